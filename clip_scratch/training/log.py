"""What a run tells: metrics.jsonl, TensorBoard, and plain-language warnings when training goes wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

from .checkpoint import write_atomically


class RunLog:
    """A line of JSON per epoch and TensorBoard events, both cut back to `epochs_done` on a resume."""

    def __init__(self, folder: Path, epochs_done: int = 0, steps_done: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        self.lines = [line for line in lines if json.loads(line)["epoch"] <= epochs_done]
        self.board = SummaryWriter(str(folder), purge_step=steps_done + 1)

    def epoch(self, line: dict[str, object], step: int) -> None:
        """Append a line to metrics.jsonl, atomically, and its numbers to TensorBoard at optimiser step `step`."""
        self.lines.append(json.dumps(line))
        write_atomically(self.path, lambda temporary: temporary.write_text("\n".join(self.lines) + "\n"))
        for name, value in line.items():
            if isinstance(value, int | float):
                self.board.add_scalar(f"epoch/{name}", value, step)
        self.board.flush()

    def close(self) -> None:
        self.board.close()


def chance_loss(n_images: int, n_captions: int) -> float:
    """The InfoNCE of a model that cannot tell B images and C captions apart: the mean of ln B and ln C."""
    return (math.log(n_images) + math.log(n_captions)) / 2


def warnings_for(
    *,
    loss: str,
    train_loss: float,
    chance: float,
    spread: float,
    logit_scale: float,
    start_logit_scale: float,
    rsum: float,
    start_rsum: float,
) -> list[str]:
    """What an experienced eye would say of this epoch; [] where nothing is wrong.

    `chance` is `chance_loss` of a batch; `spread` the mean cosine of different images in a batch. A pretrained
    CLIP may start at the clamp of its temperature, which then says nothing.
    """
    said = []
    # A pretrained model may begin above chance, and learn
    if loss == "infonce" and train_loss > 0.98 * chance and rsum < 1.1 * start_rsum:
        said.append(
            f"the loss ({train_loss:.3f}) sits at chance ({chance:.3f}, ln of the batch size): nothing is learned. "
            "Try a higher learning rate, a warm-up, or look whether captions and images belong together"
        )
    if spread > 0.95:
        said.append(
            f"the image embeddings have collapsed (mean cosine of different images {spread:.2f}). "
            "Lower the learning rates or use a larger batch"
        )
    if logit_scale > 99.5 > start_logit_scale:
        said.append(
            "the learned temperature has hit its clamp (logit scale 100). Often the model memorises: "
            "look at the validation recall, use more regularisation or fewer epochs"
        )
    if rsum < start_rsum:
        said.append(
            f"the validation rsum ({rsum:.1f}) is below where training started ({start_rsum:.1f}). "
            "Lower the learning rates of the towers"
        )
    return said
