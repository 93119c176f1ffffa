"""Results of a classifier, zero-shot or linear probe: accuracies, recall of each class, the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files import write_figure
from .retrieval import TIE

UNSEEN = -1  # the target of an image whose class is not among the classes
_CELLS = 20  # most classes whose cells show their percentages
_TICKS = 100  # most class names along an axis


@dataclass
class Classified:
    """Scores of N images for K classes, and how many of them are right."""

    metrics: dict[str, object]  # of `classification_metrics`, and what the classifier adds
    scores: torch.Tensor  # (N, K) cosines or decision values
    targets: torch.Tensor  # (N,) numbers of the true classes, or UNSEEN
    labels: list[str]  # the K classes
    title: str = ""


def _ranks(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The rank of each image's true class, (N,) from 1; ties and NaN count against the model, UNSEEN is last."""
    right = scores.gather(1, targets.clamp(min=0)[:, None])  # (N, 1)
    place = (~(scores < right - TIE)).sum(1) + right[:, 0].isnan()
    return torch.where(targets == UNSEEN, scores.shape[1] + 1, place)


def classification_metrics(
    scores: torch.Tensor, targets: torch.Tensor | Sequence[int], labels: Sequence[str]
) -> dict[str, object]:
    """How well scores (N, K) of images predict their classes `targets` (N,), as fractions.

    `acc@1`, `acc@5` (from 5 classes on), `per_class_recall` (by label, of the classes that have images) and its
    mean `mean_per_class_recall`, `n_images`, `n_classes`. A tie with the true class counts against the model, and
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
    """(K, K) counts: images of the class of the row that were predicted as the class of the column.

    Its diagonal counts the images that are right in acc@1: one that ties with another class is predicted as that.
    Images whose target is UNSEEN are left out.
    """
    scores, targets = scores.double().cpu(), torch.as_tensor(targets, dtype=torch.long).cpu()
    seen = targets != UNSEEN
    scores, targets = scores[seen], targets[seen]
    others = scores.nan_to_num(nan=torch.inf).scatter(1, targets[:, None], -torch.inf)
    predicted = torch.where(_ranks(scores, targets) <= 1, targets, others.argmax(1))
    k = scores.shape[1]
    return torch.bincount(targets * k + predicted, minlength=k * k).view(k, k)


def format_classification(metrics: dict[str, object], matrix: torch.Tensor, labels: Sequence[str], title: str) -> str:
    """The metrics in percent, and the recall of every class, worst first, with the images it has in `matrix`."""
    images = dict(zip(labels, matrix.sum(1).tolist(), strict=True))
    named = {"acc@1": "acc@1", "acc@5": "acc@5", "mean_per_class_recall": "mean per-class recall"}
    accuracies = "   ".join(f"{name} {100 * metrics[key]:.1f}" for key, name in named.items() if key in metrics)
    recalls = sorted(metrics["per_class_recall"].items(), key=lambda item: item[1])
    cells = [f"{100 * recall:5.1f}  {label} ({images[label]:,})" for label, recall in recalls]
    width = max(map(len, cells), default=0)
    columns = max(1, min(4, 118 // (width + 3)))
    height = -(-len(cells) // columns)  # read downwards, then to the right
    lines = ["   ".join(cell.ljust(width) for cell in cells[row::height]).rstrip() for row in range(height)]
    return "\n".join([title, accuracies, "recall of each class, worst first (images):", *lines])


def draw_confusion(matrix: torch.Tensor, labels: Sequence[str], path: str | Path) -> Path:
    """Write a (K, K) confusion matrix as a picture: each row in percent of its class's images.

    Raises UserError where the file cannot be written.
    """
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    k = len(labels)
    names = [name if len(name) <= 40 else f"{name[:37]}..." for name in (label.replace("$", r"\$") for label in labels)]
    side = min(24.0, 2.0 + k * (0.5 if k <= _CELLS else 0.22))
    margin = 1.0 + 0.08 * max(map(len, names))  # inches for the class names
    figure = Figure(figsize=(side + margin + 1, side + margin), dpi=120, layout="constrained")
    axis = figure.subplots()
    percent = 100 * matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    display = ConfusionMatrixDisplay(percent.numpy(), display_labels=names)
    display.plot(
        include_values=k <= _CELLS, values_format=".0f", cmap="Blues", xticks_rotation="vertical", ax=axis,
        colorbar=False, im_kw={"vmin": 0},
    )  # fmt: skip
    if k > _TICKS:
        shown = range(0, k, -(-k // _TICKS))
        axis.set(
            xticks=shown, yticks=shown, xticklabels=[names[i] for i in shown], yticklabels=[names[i] for i in shown]
        )
    axis.tick_params(labelsize=9)
    if k > _CELLS:  # thin lines lead from a cell to its class names
        axis.grid(color="#dddddd", linewidth=0.3)
    bar = figure.colorbar(display.im_, ax=axis, shrink=0.8)
    bar.set_label("percent of the images of a class")
    return write_figure(figure, path)
