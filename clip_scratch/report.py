"""What a training run says: the bar, a line an epoch, the pictures, and the table at the end."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .config import CFG
from .data.captions import image_folder
from .evaluation.retrieval import format_table
from .models.freezing import count_parameters, policies
from .retrieval.embed import encode_image
from .retrieval.matches import draw, find_matches, save_grid
from .training.checkpoint import load
from .training.log import warnings_for
from .training.optimizer import learning_rates

if TYPE_CHECKING:
    from .train import Progress

_QUERIES = 3


def describe_parameters(model, cfg: CFG) -> str:
    """How many parameters train, per tower, and why."""
    why = {part: f" ({policy})" for part, policy in policies(cfg).items()}
    lines = [
        f"{name + ':':<13}{trained:>12,} of {total:>12,} parameters train{why.get(part, '')}"
        for (part, (trained, total)), name in zip(
            count_parameters(model).items(), ("image tower", "text tower", "heads"), strict=True
        )
    ]
    return "\n".join(lines)


def start_line(metrics: dict[str, float], is_pretrained: bool) -> str:
    """What the model can do before the first step: of a pretrained one, its zero-shot recall."""
    if not is_pretrained:
        return f"rsum before training: {metrics['rsum']:.1f}"
    return (
        f"epoch   0  zero-shot   image to text R@1 {100 * metrics['text_retrieval_recall@1']:.1f}  "
        f"text to image R@1 {100 * metrics['image_retrieval_recall@1']:.1f}  rsum {metrics['rsum']:.1f}"
    )


def progress_bar(progress: Progress, cfg: CFG, batches: int):
    """The bar of the present epoch, a batch a tick."""
    from tqdm import tqdm

    name = f"epoch {progress.epoch + 1}/{cfg.epochs}"
    return tqdm(total=batches, initial=progress.batch, desc=name, unit="batch", dynamic_ncols=True, leave=False)


def show_step(bar, progress: Progress, step, model) -> None:
    """Move the bar: mean loss of the epoch, pairs (captions seen with their image) per second, temperature."""
    rate = progress.captions / max(progress.seconds, 1e-9)
    temperature = 1 / model.logit_scale.item()
    bar.set_postfix_str(
        f"loss {progress.loss_sum / step.number:.3f}, {rate:.0f} pairs/s, temperature {temperature:.4f}", refresh=False
    )
    bar.update(step.batches)


def epoch_line(progress: Progress, metrics: dict[str, float], model, optimizer) -> dict[str, object]:
    """The line of metrics.jsonl for the epoch that has just been measured; epoch 0 is the untouched model."""
    seconds = max(progress.seconds, 1e-9)
    return {
        "epoch": progress.epoch + 1 if progress.batch else 0,
        "step": progress.step,
        "train_loss": progress.loss_sum / progress.batch if progress.batch else None,
        "pairs_per_second": progress.captions / seconds,
        "images_per_second": progress.images / seconds,
        "seconds": progress.seconds,
        "wall_seconds": progress.wall_seconds,
        "trained_parameters": sum(trained for trained, _ in count_parameters(model).values()),
        "logit_scale": model.logit_scale.item(),
        **learning_rates(optimizer),
        **metrics,
    }


def report_epoch(line: dict, progress: Progress, cfg: CFG, chance: float) -> None:
    """One line an epoch, and what is wrong with it, if anything."""
    best = "  best so far" if progress.best_epoch == progress.epoch else ""
    print(
        f"epoch {line['epoch']:>3}  loss {line['train_loss']:.3f}  "
        f"image to text R@1 {100 * line['text_retrieval_recall@1']:.1f}  "
        f"text to image R@1 {100 * line['image_retrieval_recall@1']:.1f}  rsum {line['rsum']:.1f}  "
        f"{line['pairs_per_second']:.0f} pairs/s  {line['seconds']:.0f} s{best}"
    )
    for warning in warnings_for(
        loss=cfg.loss, train_loss=line["train_loss"], chance=chance, spread=progress.spread,
        logit_scale=line["logit_scale"], start_logit_scale=progress.start_logit_scale,
        rsum=line["rsum"], start_rsum=progress.start_rsum,
    ):  # fmt: skip
        print(f"warning: {warning}", file=sys.stderr)


def _sample_matches(model, valid_df, image_embeddings, n: int = 5) -> list:
    """The matches of three validation captions, spread over the split, for the retrieval picture.

    `image_embeddings` are those of the distinct images, in the order of `valid_df`.
    """
    names = valid_df["image"].drop_duplicates().tolist()
    queries = valid_df["caption"].iloc[[(2 * i + 1) * len(valid_df) // (2 * _QUERIES) for i in range(_QUERIES)]]
    folder = image_folder(model.cfg, valid_df)
    return find_matches(model, image_embeddings, queries.tolist(), names, n=n, image_path=folder)


def draw_epoch(log, model, valid_df, image_embeddings, step: int) -> None:
    """The retrieval picture of this epoch, for TensorBoard."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(draw(_sample_matches(model, valid_df, image_embeddings), columns=5))
    canvas.draw()
    log.board.add_image("retrieval", np.asarray(canvas.buffer_rgba())[..., :3], step, dataformats="HWC")


def report_run(folder: Path, progress: Progress, valid_df, device, is_pretrained: bool) -> None:
    """The recall table of the best epoch, the picture of three queries, and what to type next."""
    if not progress.best_epoch and not is_pretrained:
        print("no epoch was finished: nothing was measured")
        return
    metrics = json.loads((folder / "best" / "metrics.json").read_text())
    alpha = metrics.get("wise_ft_alpha", 1)
    mixed = f", {alpha:g} of it mixed with zero-shot" if alpha < 1 else ""
    print(f"\nbest epoch: {metrics['epoch']}{mixed}")
    if not metrics["epoch"]:
        print("best/ is the untouched, zero-shot model" + (
            f": {progress.epoch} epochs of fine-tuning did not improve on it. Try lower learning rates"
            if progress.epoch else ""
        ))  # fmt: skip
    print(format_table(metrics, "valid", valid_df["image_id"].nunique(), len(valid_df)))
    model = load(folder, str(device))
    images = image_folder(model.cfg, valid_df)
    names = valid_df["image"].drop_duplicates()
    image_embeddings = encode_image(model, [images / name for name in names], progress=True)
    results = _sample_matches(model, valid_df, image_embeddings)
    picture = save_grid(results, folder / "retrieval.png", columns=5)
    print(f"""
three queries and the images found: {picture}
search with the model:              python -m clip_scratch.search {folder} {shlex.quote(results[0].query)}
measure it again:                   python -m clip_scratch.evaluate {folder}
{_next_step(folder, is_pretrained)}""")


def _next_step(folder: Path, is_pretrained: bool) -> str:
    if is_pretrained:
        return f"compare it with zero-shot:          python -m clip_scratch.evaluate --compare {folder}"
    flickr8k = "python -m clip_scratch.prepare flickr8k && python -m clip_scratch.train flickr8k"
    return f"train on Flickr8k:                  {flickr8k}"
