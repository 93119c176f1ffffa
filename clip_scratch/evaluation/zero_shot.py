"""Zero-shot classification: the label whose prompts lie nearest to an image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from ..errors import UserError, suggest
from ..models.clip import DualEncoder
from ..retrieval.embed import ImageLike, encode_image, encode_text
from .sample import Images

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.")


def classify(
    model: DualEncoder,
    images: ImageLike | Sequence[ImageLike],
    labels: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
) -> list[list[tuple[str, float]]]:
    """For each image, every label, as it was given, with its probability, best first.

    Probabilities are the softmax at the model's temperature over the cosines with `label_embeddings`. Raises
    UserError for a template without {} and where there is no label or template.
    """
    per_label = label_embeddings(model, labels, templates)  # (K, P)
    return ranked_labels(model, encode_image(model, images) @ per_label.T, labels)


def ranked_labels(model: DualEncoder, cosine: torch.Tensor, labels: Sequence[str]) -> list[list[tuple[str, float]]]:
    """Every label with its probability, best first, for each row of cosines (N, K)."""
    probabilities = (model.logit_scale.detach().cpu() * cosine).softmax(-1)
    order = probabilities.argsort(dim=-1, descending=True)
    return [[(labels[i], p[i].item()) for i in row.tolist()] for p, row in zip(probabilities, order, strict=True)]


def label_embeddings(model: DualEncoder, labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> torch.Tensor:
    """One L2-normalised vector per label, (K, P): the mean of its normalised prompts, normalised again.

    Radford et al. 2021, section 3.1.4. In the prompts the underscores of a label are spaces: data sets name their
    classes like dhoti_pants. Raises UserError for a template without {} and where there is no label or template.
    """
    if not labels or not templates:
        raise UserError("classification needs at least one label and one template")
    if wrong := [t for t in templates if "{}" not in t]:
        raise UserError(f"a template holds {{}} where the label goes, not {wrong[0]!r}")
    # replace, not format: what else a template has in braces is part of the sentence
    prompts = [template.replace("{}", label.replace("_", " ")) for label in labels for template in templates]
    per_label = encode_text(model, prompts).view(len(labels), len(templates), -1).mean(1)  # (K, P)
    return F.normalize(per_label, dim=-1)


def read_labels(path: str | Path) -> list[str]:
    """The labels of a text file, one a line; blank lines do not count.

    Raises UserError where it cannot be read, holds none, or holds one twice, case, spacing and underscores aside:
    most tokenizers could not tell the two prompts apart.
    """
    lines = _lines(path, "labels")
    labels = [label for _, label in lines]
    if pair := _alike(labels):
        (row, label), (other_row, other) = (lines[place] for place in pair)
        raise UserError(f"{path}, row {other_row}: the label {other!r} stands in row {row} already, as {label!r}")
    return labels


def distinct_labels(given: Iterable[str], source: str) -> list[str]:
    """The labels that occur among those given for the images of `source`, sorted.

    Raises UserError, as `read_labels` does, for two that differ in no more than case, spacing and underscores.
    """
    labels = sorted(set(given))
    if pair := _alike(labels):
        one, other = (labels[place] for place in pair)
        raise UserError(
            f"{source} has the labels {one!r} and {other!r}, which prompts cannot tell apart: write both alike "
            "if they are one class, and in other words if they are two"
        )
    return labels


def _alike(labels: Sequence[str]) -> tuple[int, int] | None:
    """The places of two labels that differ in no more than case, spacing and underscores; None without such."""
    places: dict[str, int] = {}
    for place, label in enumerate(labels):
        words = " ".join(label.replace("_", " ").lower().split())
        if words in places:
            return places[words], place
        places[words] = place
    return None


def read_templates(path: str | Path) -> list[str]:
    """The templates of a text file, one a line, with {} where the label goes. Raises UserError where one has none."""
    for row, template in _lines(path, "templates"):
        if "{}" not in template:
            raise UserError(f"{path}, row {row}: a template holds {{}} where the label goes, not {template!r}")
    return [template for _, template in _lines(path, "templates")]


def _lines(path: str | Path, what: str) -> list[tuple[int, str]]:
    """(row, text) of each line that is not blank. Raises UserError where the file cannot be read or holds none."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the {what} file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the {what} file {path} is not UTF-8 text") from error
    lines = [(row, line.strip()) for row, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty: it holds no {what}")
    return lines


def targets_of(images: Images, labels: Sequence[str]) -> torch.Tensor:
    """The number of each image's true label among `labels`, (N,). Raises UserError for one that is not among them."""
    number = {label: i for i, label in enumerate(labels)}
    for name, label in zip(images.names, images.labels, strict=True):
        if label not in number:
            near = suggest(label, labels)
            others = len(set(images.labels) - number.keys()) - 1
            more = f" Nor are {others:,} other true labels." if others else ""
            raise UserError(f"the label {label!r} of {name} is not among the {len(labels):,} labels.{near}{more}")
    return torch.tensor([number[label] for label in images.labels], dtype=torch.long)
