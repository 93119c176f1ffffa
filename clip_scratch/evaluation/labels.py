"""The classes of images: true labels from a captions file or folder names, label files, and prompt templates."""

from __future__ import annotations

from collections.abc import Sequence
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
    """The labels of a text file, one a line. Raises UserError where it cannot be read, and as `check_distinct`."""
    labels = _lines(path, "labels")
    check_distinct(labels, str(path))
    return labels


def labels_of(table: pd.DataFrame, source: str) -> list[str]:
    """The distinct labels of a caption table, sorted. Raises UserError as `image_labels` and `check_distinct`."""
    labels = sorted(set(image_labels(table, source)))
    check_distinct(labels, source)
    return labels


def check_distinct(labels: Sequence[str], source: str) -> None:
    """Raise UserError for two labels that prompts cannot tell apart: equal up to case, spacing and underscores."""
    seen: dict[str, str] = {}
    for label in labels:
        words = " ".join(label.replace("_", " ").lower().split())
        if words in seen:
            raise UserError(
                f"{source} has the labels {seen[words]!r} and {label!r}, which prompts cannot tell apart: spell them "
                "alike if they are one class, and in different words if they are two"
            )
        seen[words] = label


def read_templates(path: str | Path) -> list[str]:
    """The templates of a text file, one a line, with {} where the label goes. Raises UserError where one has none."""
    templates = _lines(path, "templates")
    for template in templates:
        if "{}" not in template:
            raise UserError(f"{path}: a template has {{}} where the label goes, unlike {template!r}")
    return templates


def _lines(path: str | Path, what: str) -> list[str]:
    """The lines of a text file that are not blank. Raises UserError where it cannot be read or has none."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the {what} file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the {what} file {path} is not UTF-8 text") from error
    lines = [line.strip() for line in text.split("\n") if line.strip()]
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
