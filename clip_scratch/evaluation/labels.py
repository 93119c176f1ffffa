"""The classes of images: true labels from a captions file or folder names, label files, and prompt templates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import pandas as pd
import torch

from ..data.source import DataSource
from ..errors import UserError, suggest


@dataclass
class LabelledImages:
    """Images to classify, with their true labels."""

    source: str  # the split, or the folder
    folder: Path
    names: list[str]  # (N,) paths below the folder
    labels: list[str]  # (N,), or [] where they are not known

    @property
    def paths(self) -> list[Path]:
        return [self.folder / name for name in self.names]


def labelled_split(source: DataSource, split: str) -> LabelledImages:
    """The distinct images of an opened split with their labels. Raises UserError as `image_labels` does."""
    labels = image_labels(source.table, source.name)
    return LabelledImages(split, source.image_folder, labels.index.tolist(), labels.tolist())


def labelled_folder(folder: Path, names: Sequence[str]) -> LabelledImages:
    """The images `names` below a folder; the sub-folder that an image is in is its label, if any are in one.

    Raises UserError where only some are.
    """
    parts = [PurePath(name).parts for name in names]
    labels = [part[0] if len(part) > 1 else "" for part in parts]
    if any(labels) and not all(labels):
        raise UserError(
            f"{folder / names[labels.index('')]} is beside the folders whose names are the labels: move it into one"
        )
    return LabelledImages(str(folder), folder, list(names), labels if any(labels) else [])


def image_labels(table: pd.DataFrame, source: str) -> pd.Series:
    """The label of each distinct image, as a string, by image name in the order of the table.

    Raises UserError for a table without labels, an image without one, and an image with two different ones.
    """
    if "label" not in table:
        raise UserError(f"{source} has no column of labels: add one that is named label")
    given = table["label"].map(lambda label: "" if pd.isna(label) else str(label).strip())
    rows = table.assign(label=given).drop_duplicates(["image", "label"])
    if (rows["label"] == "").any():
        row = rows[rows["label"] == ""].iloc[0]
        raise UserError(f"{row['file']}, row {row['row']}: {row['image']} has no label")
    twice = rows[rows.duplicated("image", keep=False)]
    if not twice.empty:
        one, other = twice[twice["image"] == twice.iloc[0]["image"]].head(2).itertuples()
        raise UserError(
            f"{one.image} has two labels: {one.label!r} ({one.file}, row {one.row}) and {other.label!r} ({other.file}, "
            f"row {other.row}). Give each image one."
        )
    return rows.set_index("image")["label"]


def read_labels(path: str | Path) -> list[str]:
    """The labels of a text file, one a line; blank lines are ignored.

    Raises UserError where it cannot be read, is empty, or repeats a label up to case, spacing and underscores: most
    tokenizers could not tell the two prompts apart.
    """
    lines = _lines(path, "labels")
    labels = [label for _, label in lines]
    if pair := _alike(labels):
        (row, label), (other_row, other) = (lines[place] for place in pair)
        raise UserError(f"{path}, row {other_row}: the label {other!r} repeats {label!r} of row {row}")
    return labels


def distinct_labels(given: Iterable[str], source: str) -> list[str]:
    """The distinct labels of the images of `source`, sorted. Raises UserError for repetitions, as `read_labels`."""
    labels = sorted(set(given))
    if pair := _alike(labels):
        one, other = (labels[place] for place in pair)
        raise UserError(
            f"{source} has the labels {one!r} and {other!r}, which prompts cannot tell apart: spell them alike if they "
            "are one class, and in different words if they are two"
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
    lines = _lines(path, "templates")
    for row, template in lines:
        if "{}" not in template:
            raise UserError(f"{path}, row {row}: a template has {{}} where the label goes, unlike {template!r}")
    return [template for _, template in lines]


def _lines(path: str | Path, what: str) -> list[tuple[int, str]]:
    """(row, text) of each line that is not blank. Raises UserError where the file cannot be read or has none."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the {what} file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the {what} file {path} is not UTF-8 text") from error
    lines = [(row, line.strip()) for row, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path} contains no {what}")
    return lines


def targets_of(images: LabelledImages, labels: Sequence[str]) -> torch.Tensor:
    """The number of each image's true label among `labels`, (N,). Raises UserError for one that is not among them."""
    number = {label: i for i, label in enumerate(labels)}
    for name, label in zip(images.names, images.labels, strict=True):
        if label not in number:
            others = len(set(images.labels) - number.keys()) - 1
            more = f" {others:,} other true labels are missing too." if others else ""
            near = suggest(label, labels)
            raise UserError(f"the label {label!r} of {name} is not among the {len(labels):,} labels.{near}{more}")
    return torch.tensor([number[label] for label in images.labels], dtype=torch.long)
