"""Figures of a classifier, zero-shot or probe: accuracies, recall of each class, the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..files import write_figure
from .retrieval import TIE

UNSEEN = -1  # the target of an image whose class is none of the classes
_WRITTEN_OUT = 20  # up to so many classes the cells of a confusion matrix show their counts
_NAMED = 100  # up to so many classes each has its name at the axes


def _ranks(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The place of the right class of each image, (N,) from 1; a tie and a NaN count against it, UNSEEN is last."""
    right = scores.gather(1, targets.clamp(min=0)[:, None])  # (N, 1)
    place = (~(scores < right - TIE)).sum(1) + right[:, 0].isnan()
    return torch.where(targets == UNSEEN, scores.shape[1] + 1, place)


def classification_metrics(
    scores: torch.Tensor, targets: torch.Tensor | Sequence[int], labels: Sequence[str]
) -> dict[str, object]:
    """How well scores (N, K) of images tell their classes `targets` (N,), as fractions.

    `acc@1`, `acc@5` (from 5 classes on), `per_class_recall` (by label, of the classes that have images) and its
    mean `mean_per_class_recall`, `n_images`, `n_classes`. A tie with the right class counts against the model, and
    so does a NaN; an image whose target is UNSEEN is wrong, and in no class. As clip_benchmark's
    zeroshot_classification.
    """
    scores, targets = scores.double().cpu(), torch.as_tensor(targets, dtype=torch.long).cpu()
    place = _ranks(scores, targets)
    metrics: dict[str, object] = {f"acc@{k}": (place <= k).double().mean().item() for k in (1, 5) if k <= len(labels)}
    hit = (place <= 1).double()
    recalls = {labels[c]: hit[targets == c].mean().item() for c in targets[targets != UNSEEN].unique().tolist()}
    return metrics | {
        "mean_per_class_recall": sum(recalls.values()) / max(1, len(recalls)),
        "per_class_recall": recalls,
        "n_images": len(targets),
        "n_classes": len(labels),
    }


def confusion_matrix(scores: torch.Tensor, targets: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """(K, K) counts: images of the class of the row that were taken for the class of the column.

    Its diagonal holds the images that count as right in acc@1: one that ties with another class goes to that.
    Images whose target is UNSEEN are left out.
    """
    scores, targets = scores.double().cpu(), torch.as_tensor(targets, dtype=torch.long).cpu()
    seen = targets != UNSEEN
    scores, targets = scores[seen], targets[seen]
    others = scores.nan_to_num(nan=torch.inf).scatter(1, targets[:, None], -torch.inf)
    guesses = torch.where(_ranks(scores, targets) <= 1, targets, others.argmax(1))
    k = scores.shape[1]
    return torch.bincount(targets * k + guesses, minlength=k * k).view(k, k)


def format_classification(metrics: dict[str, object], matrix: torch.Tensor, labels: Sequence[str], title: str) -> str:
    """The figures in percent, and the recall of every class, the worst first, with the images it has in `matrix`."""
    images = dict(zip(labels, matrix.sum(1).tolist(), strict=True))
    figures = [f"acc@1 {100 * metrics['acc@1']:.1f}"]
    if "acc@5" in metrics:
        figures.append(f"acc@5 {100 * metrics['acc@5']:.1f}")
    figures.append(f"mean per-class recall {100 * metrics['mean_per_class_recall']:.1f}")
    recalls = sorted(metrics["per_class_recall"].items(), key=lambda item: item[1])
    cells = [f"{100 * recall:5.1f}  {label} ({images[label]:,})" for label, recall in recalls]
    width = max(map(len, cells), default=0)
    columns = max(1, min(4, 118 // (width + 3)))
    height = -(-len(cells) // columns)  # read downwards, then to the right
    lines = ["   ".join(cell.ljust(width) for cell in cells[row::height]).rstrip() for row in range(height)]
    return "\n".join([title, "   ".join(figures), "recall of each class, worst first (images):", *lines])


def draw_confusion(matrix: torch.Tensor, labels: Sequence[str], path: str | Path) -> Path:
    """Write a (K, K) confusion matrix as a picture, each row coloured by its shares.

    Raises UserError where the file cannot be written.
    """
    from matplotlib.figure import Figure

    k = len(labels)
    longest = min(40, max(map(len, labels)))
    side = min(24.0, max(3.0, 0.24 * k + (0.3 * k if k <= _WRITTEN_OUT else 0)))
    room = 1.2 + 0.075 * longest
    figure = Figure(figsize=(side + room + 1.0, side + room), dpi=120, layout="constrained")
    axis = figure.subplots()
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    image = axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    step = -(-k // _NAMED)
    shown = range(0, k, step)
    names = [labels[i] if len(labels[i]) <= 40 else labels[i][:37] + "..." for i in shown]
    axis.set_xticks(shown, names, rotation=90, fontsize=9, parse_math=False)
    axis.set_yticks(shown, names, fontsize=9, parse_math=False)
    if k <= _NAMED:
        axis.set_xticks(np.arange(0.5, k - 1), minor=True)
        axis.set_yticks(np.arange(0.5, k - 1), minor=True)
        axis.grid(which="minor", color="#dddddd", linewidth=0.5)
        axis.tick_params(which="minor", length=0)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if k <= _WRITTEN_OUT:
        for row in range(k):
            for column in range(k):
                if count := int(matrix[row, column]):
                    colour = "white" if shares[row, column] > 0.6 else "black"
                    axis.text(column, row, f"{count:,}", ha="center", va="center", fontsize=9, color=colour)
    bar = figure.colorbar(image, ax=axis, shrink=min(1.0, 4 / side + 0.3), pad=0.02)
    bar.set_label("share of the images of a class")
    return write_figure(figure, path)
