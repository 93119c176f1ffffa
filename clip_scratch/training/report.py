"""Everything that a training run prints and draws: the bar, a line per epoch, warnings, pictures, the final table."""

import math
import shlex
import sys

import torch

from ..data.source import DataSource
from ..evaluation.retrieval import format_table
from ..files import write_figure
from ..models.clip import DualEncoder
from ..models.freezing import count_parameters, frozen_parts
from ..models.saved import best_metrics
from ..retrieval.matches import find_matches
from ..retrieval.results import draw_matches
from .engine import EpochStats
from .optimizer import learning_rates
from .run import Run
from .state import TrainState

_QUERIES, _IMAGES = 3, 5  # of the retrieval picture
_LABELS = {"image": "image tower", "text": "text tower", "head": "heads"}


class Report:
    """The output of one run."""

    def __init__(self, run: Run, source: DataSource):
        self.run, self.cfg, self.source = run, run.cfg, source
        self.valid_df = source.split("valid")
        self.is_pretrained = run.cfg.backend == "hf_clip"
        self.bar = None
        splits = ((name, source.split(name)) for name in ("train", "valid"))
        print("; ".join(f"{name}: {df['image_id'].nunique():,} images, {len(df):,} captions" for name, df in splits))

    def parameters(self, model: DualEncoder, truncated: int) -> None:
        """How many parameters train, and how many captions are cut off."""
        frozen, limit = frozen_parts(self.cfg), model.tokenizer.model_max_length
        for part, (trained, total) in count_parameters(model).items():
            also = ", depthwise" if part == "image" and self.cfg.freeze_depthwise else ""
            why = f" (freeze: {frozen[part]}{also})" if part in frozen else ""
            print(f"{_LABELS[part] + ':':<13}{trained:>12,} of {total:>12,} parameters train{why}")
        if truncated:
            print(f"{truncated:,} captions are longer than {limit} tokens and are cut off there")

    def begin(self, state: TrainState) -> None:
        """Where the run is, and what the model can do before its first step."""
        progress = state.progress
        if self.run.is_resumed:
            print(f"resuming {self.run.folder} at epoch {progress.epoch + 1}, step {progress.step}")
        print(f"run folder: {self.run.folder}")
        if self.is_pretrained:
            print(f"epoch   0  zero-shot   {_recalls(progress.start)}")
        else:
            print(f"rsum before training: {progress.start['rsum']:.1f}")

    def progress_bar(self, state: TrainState, batches: int):
        """The progress bar of the current epoch, a batch a tick; a context manager."""
        from tqdm import tqdm

        name, done = f"epoch {state.progress.epoch + 1}/{self.cfg.epochs}", state.progress.batch
        self.bar = tqdm(total=batches, initial=done, desc=name, unit="batch", dynamic_ncols=True, leave=False)
        return self.bar

    def step(self, state: TrainState, steps: EpochStats) -> None:
        """Move the bar: mean loss of the epoch, pairs (captions seen with their image) per second, temperature."""
        stats, temperature = state.progress.stats, 1 / max(state.model.logit_scale.item(), 1e-9)
        self.bar.set_postfix_str(
            f"loss {stats.loss:.3f}, {stats.pairs_per_second:.0f} pairs/s, temperature {temperature:.4f}", refresh=False
        )
        self.bar.update(steps.batches)

    def epoch(self, line: dict, state: TrainState, stats: EpochStats) -> None:
        """One line per epoch, and warnings in plain words."""
        progress = state.progress
        best = "  best so far" if progress.best_epoch == progress.epoch else ""
        print(
            f"epoch {line['epoch']:>3}  loss {stats.loss:.3f}  {_recalls(line)}  "
            f"{line['pairs_per_second']:.0f} pairs/s  {line['seconds']:.0f} s{best}"
        )
        for warning in epoch_warnings(line, state, stats, self.cfg.loss):
            print(f"warning: {warning}", file=sys.stderr)
        if progress.reached:
            print(f"text to image R@10 has reached {self.cfg.stop_at:g}: stopped after {line['wall_seconds']:.1f} s")
        elif state.is_stale:
            print(f"no better rsum in {progress.stale} epochs: stopped early")

    def picture(self, model: DualEncoder, image_embeddings: torch.Tensor, step: int, is_best: bool) -> None:
        """Draw what three validation captions find: for TensorBoard, and of the best epoch as retrieval.png.

        `image_embeddings` (N, P) are those of the distinct validation images in the order of the table.
        """
        names, folder = self.valid_df["image"].drop_duplicates().tolist(), self.source.image_folder
        matches = find_matches(model, image_embeddings, self._queries(), names, n=_IMAGES, image_path=folder)
        figure = draw_matches(matches, columns=_IMAGES)
        if is_best:
            write_figure(figure, self.run.folder / "retrieval.png")
        if self.run.board:
            self.run.board.add_figure("retrieval", figure, step)

    def _queries(self) -> list[str]:
        n = len(self.valid_df)
        return self.valid_df["caption"].iloc[[(2 * i + 1) * n // (2 * _QUERIES) for i in range(_QUERIES)]].tolist()

    def end(self, state: TrainState) -> None:
        """The recall table of the best epoch, where the picture is, and what to type next."""
        progress, folder = state.progress, self.run.folder
        if not progress.best_epoch and not self.is_pretrained:
            print("no epoch was finished: nothing was measured")
            return
        metrics = best_metrics(self.run.best)
        alpha = metrics.get("wise_ft_alpha", 1)
        mixed = f", averaged with zero-shot: {alpha:g} of it" if alpha < 1 else ""
        print(f"\nbest epoch: {metrics['epoch']}{mixed}")
        if not metrics["epoch"]:
            tried = f": {progress.epoch} epochs of fine-tuning did not improve on it. Try lower learning rates"
            print("best/ is the untouched, zero-shot model" + (tried if progress.epoch else ""))
        print(format_table(metrics, "valid", self.valid_df["image_id"].nunique(), len(self.valid_df)))
        images, query = self.source.image_folder, shlex.quote(self._queries()[0])
        commands = {
            "three queries and their images": folder / "retrieval.png",
            "index a folder of pictures": f"python -m clip_scratch.search index {folder} {images}",
            "search it": f"python -m clip_scratch.search find indexes/{images.name} {query}",
            "measure it again": f"python -m clip_scratch.evaluate {folder}",
        }
        if self.is_pretrained:
            commands["compare it with zero-shot"] = f"python -m clip_scratch.compare {folder}"
        elif not self.cfg.captions_path:  # the built-in scenes
            prepare = "python -m clip_scratch.prepare flickr8k"
            commands["train on Flickr8k"] = f"{prepare} && python -m clip_scratch.train flickr8k"
        print("", *(f"{what + ':':<32}{command}" for what, command in commands.items()), sep="\n")


def _recalls(metrics: dict[str, float]) -> str:
    return (
        f"image to text R@1 {100 * metrics['text_retrieval_recall@1']:.1f}  "
        f"text to image R@1 {100 * metrics['image_retrieval_recall@1']:.1f}  rsum {metrics['rsum']:.1f}"
    )


def epoch_line(state: TrainState, stats: EpochStats, metrics: dict[str, float]) -> dict[str, object]:
    """The line of metrics.jsonl for the epoch that has just ended; epoch 0 is the untouched model."""
    seconds = max(stats.seconds, 1e-9)
    return {
        "epoch": state.progress.epoch,
        "step": state.progress.step,
        "train_loss": stats.loss if stats.batches else None,
        "pairs_per_second": stats.pairs_per_second,
        "images_per_second": stats.images / seconds,
        "seconds": stats.seconds,
        "wall_seconds": state.wall_seconds,
        "trained_parameters": sum(trained for trained, _ in count_parameters(state.model).values()),
        "logit_scale": state.model.logit_scale.item(),
        **learning_rates(state.optimizer),
        **metrics,
    }


def chance_loss(n_images: float, n_captions: float) -> float:
    """The InfoNCE loss of a model that cannot tell B images and C captions apart: the mean of ln B and ln C."""
    return (math.log(n_images) + math.log(n_captions)) / 2


def epoch_warnings(line: dict, state: TrainState, stats: EpochStats, loss: str) -> list[str]:
    """What an experienced eye would notice in this epoch; [] where nothing is wrong.

    A pretrained CLIP may start above chance, and at the clamp of its temperature.
    """
    rsum, start_rsum = line["rsum"], state.progress.start["rsum"]
    chance = chance_loss(stats.images / stats.batches, stats.captions / stats.batches)
    at_chance = loss == "infonce" and stats.loss > 0.98 * chance and rsum < 1.1 * start_rsum
    at_clamp = line["logit_scale"] > 99.5 > state.progress.start_logit_scale
    warnings = {
        f"the loss ({stats.loss:.3f}) is still at chance ({chance:.3f}, ln of the batch size): the model does not "
        "learn. Try a higher learning rate or a warm-up, and check that captions and images belong together": at_chance,
        f"the image embeddings have collapsed (mean cosine of different images {stats.spread:.2f}). Lower the learning "
        "rates or use a larger batch": stats.spread > 0.95,
        "the learned temperature has reached its clamp (logit scale 100), often a sign of overfitting: watch "
        "the validation recall, use more regularization or fewer epochs": at_clamp,
        f"the validation rsum ({rsum:.1f}) is below where training started ({start_rsum:.1f}). Lower the learning "
        "rates of the towers": rsum < start_rsum,
    }
    return [warning for warning, applies in warnings.items() if applies]
