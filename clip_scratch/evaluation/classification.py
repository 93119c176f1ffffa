"""Results of a classifier, zero-shot or linear probe: accuracies, recall of each class, the confusion matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files import write_figure
from .retrieval import TIE

UNSEEN = -1  # the target of an image whose class is not among the classes


@dataclass
class Classified:
    """How well N images were classified into K classes."""

    metrics: dict[str, object]  # of `measure_classes`, and what the classifier adds
    matrix: torch.Tensor  # (K, K) counts of images: true classes by predicted ones, without images of UNSEEN classes
    labels: list[str]  # the K classes
    title: str = ""

    def text(self) -> str:
        """The metrics in percent, and the recall of every class, worst first, with the number of its images."""
        images = dict(zip(self.labels, self.matrix.sum(1).tolist(), strict=True))
        keys = ("acc@1", "acc@5", "mean_per_class_recall")
        accuracies = "   ".join(f"{key} {100 * self.metrics[key]:.1f}" for key in keys if key in self.metrics)
        recalls = sorted(self.metrics["per_class_recall"].items(), key=lambda item: item[1])
        cells = [f"{100 * recall:5.1f}  {label} ({images[label]:,})" for label, recall in recalls]
        width = max(map(len, cells), default=0)
        height = -(-len(cells) // max(1, min(4, 118 // (width + 3))))  # read downwards, then to the right
        lines = ["   ".join(cell.ljust(width) for cell in cells[row::height]).rstrip() for row in range(height)]
        return "\n".join([self.title, accuracies, "recall of each class, worst first (images):", *lines])

    def draw(self, path: str | Path) -> Path:
        """Write the confusion matrix as a picture: each row in percent of its class's images.

        Raises UserError where the file cannot be written.
        """
        from matplotlib.figure import Figure
        from sklearn.metrics import ConfusionMatrixDisplay

        k, names = len(self.labels), [label.replace("$", r"\$")[:40] for label in self.labels]
        side = min(24.0, 2.0 + k * (0.5 if k <= 20 else 0.22))  # inches, and as many as the class names need
        figure = Figure(figsize=[side + 1.5 + 0.08 * max(map(len, names))] * 2, dpi=120, layout="constrained")
        percent = 100 * self.matrix / self.matrix.sum(1, keepdim=True).clamp(min=1)
        display = ConfusionMatrixDisplay(percent.numpy(), display_labels=names).plot(
            include_values=k <= 20, values_format=".0f", cmap="Blues", xticks_rotation="vertical",
            ax=figure.subplots(), colorbar=False, im_kw={"vmin": 0},
        )  # fmt: skip
        display.ax_.tick_params(labelsize=min(9.0, 50 * side / k))  # points
        figure.colorbar(display.im_, shrink=0.8, label="percent of the images of a class")
        return write_figure(figure, path)


def measure_classes(scores: torch.Tensor, targets: torch.Tensor | Sequence[int], labels: Sequence[str]) -> Classified:
    """How well scores (N, K) of images predict their classes `targets` (N,), as fractions.

    `acc@1`, `acc@5` (from 5 classes on), `per_class_recall` (by label, of the classes that have images) and its
    mean `mean_per_class_recall`, `n_images`, `n_classes`. A tie with the true class counts against the model, and
    so does a NaN; an image whose target is UNSEEN is wrong, and in no class. As clip_benchmark's
    zeroshot_classification.
    """
    scores, targets = scores.double().cpu(), torch.as_tensor(targets, dtype=torch.long).cpu()
    k, seen, own = len(labels), targets != UNSEEN, targets.clamp(min=0)[:, None]  # (N, 1)
    right = scores.gather(1, own)
    place = (~(scores < right - TIE)).sum(1) + right[:, 0].isnan() + k * ~seen  # rank of the true class, from 1
    # An image whose true class ties with another one is predicted as that
    others = scores.nan_to_num(nan=torch.inf).scatter(1, own, -torch.inf).argmax(1)
    predicted = torch.where(place <= 1, targets, others)
    matrix = torch.bincount((targets * k + predicted)[seen], minlength=k * k).view(k, k)
    counts = matrix.sum(1)
    recalls = {labels[c]: (matrix[c, c] / counts[c]).item() for c in counts.nonzero()[:, 0].tolist()}
    metrics = {f"acc@{n}": (place <= n).double().mean().item() for n in (1, 5) if n <= k}
    metrics |= {"mean_per_class_recall": sum(recalls.values()) / max(1, len(recalls)), "per_class_recall": recalls}
    return Classified(metrics | {"n_images": len(targets), "n_classes": k}, matrix, list(labels))
