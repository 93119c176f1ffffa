"""The classes of images: true labels from a captions file or folder names, and files of labels and templates."""

from collections.abc import Sequence
from pathlib import Path, PurePath

import pandas as pd
import torch

from ..data.images import images_below
from ..errors import UserError, suggest


def folder_labels(folder: Path) -> pd.Series:
    """The sub-folder that each image below a folder is in, by its path in there; "" for all where there is none."""
    parts = {name: PurePath(name).parts for name in images_below(folder)}
    labels = pd.Series({name: part[0] if len(part) > 1 else "" for name, part in parts.items()})
    if labels.any() and not labels.all():
        name = labels.index[labels == ""][0]
        raise UserError(f"{folder / name} is beside the folders whose names are the labels: move it into one")
    return labels


def image_labels(table: pd.DataFrame, source: str) -> pd.Series:
    """The label of each distinct image, as a string, by image name in the order of the table.

    Raises UserError for a table without labels, an image without one, and an image with two different ones.
    """
    if "label" not in table:
        raise UserError(f"{source} has no column of labels: add one that is named label")
    given = table["label"].map(lambda label: "" if pd.isna(label) else str(label).strip())
    rows = table.assign(label=given).drop_duplicates(["image", "label"])
    wrong = rows[rows.duplicated("image") | (rows["label"] == "")]
    if not wrong.empty:
        row = wrong.iloc[0]
        fault = f"has a second label, {row['label']!r}" if row["label"] else "has no label"
        raise UserError(f"{row['file']}, row {row['row']}: {row['image']} {fault}. Give each image one.")
    return rows.set_index("image")["label"]


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file that are not blank. Raises UserError where it cannot be read."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}, a file of UTF-8 text with an entry a line: {error}") from error
    return [line.strip() for line in text.split("\n") if line.strip()]


def targets_of(true: pd.Series, labels: Sequence[str]) -> torch.Tensor:
    """The number of each image's true label among `labels`, (N,). Raises UserError for one that is not among them."""
    numbers = pd.Index(labels).get_indexer(true)
    if (numbers < 0).any():
        name, label = next(true[numbers < 0].items())
        near = suggest(label, labels)
        raise UserError(f"the label {label!r} of {name} is not among the {len(labels):,} labels.{near}")
    return torch.from_numpy(numbers)
