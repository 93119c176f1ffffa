"""What a run is measured on: a split of its own captions or of others, and the labels of its images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import pandas as pd

from ..config import CFG
from ..data.captions import check_images, image_folder, plain_words, read_captions, split_of
from ..errors import UserError

WHOLE = "all"  # the split of a captions file that has none


def captions_for(cfg: CFG, captions_path: str = "", image_path: str = "") -> tuple[CFG, pd.DataFrame]:
    """The caption table of the run with settings `cfg`, or of another file, and the settings that read it.

    Of another file that has no splits all rows are in the split "all". Raises UserError as `read_captions` does.
    """
    if captions_path:
        cfg = dataclasses.replace(
            cfg, captions_path=captions_path, image_path=image_path, captions_format="auto", image_column="",
            caption_column="", label_column="", valid_captions_path="", test_captions_path="",
            valid_fraction=0.0, test_fraction=0.0,
        )  # fmt: skip
    elif image_path:
        cfg = dataclasses.replace(cfg, image_path=image_path)
    table = read_captions(cfg)
    if captions_path and set(table["split"]) == {"train"}:
        table = table.assign(split=WHOLE)
    return cfg, table


def part_of(cfg: CFG, table: pd.DataFrame, split: str) -> tuple[pd.DataFrame, str]:
    """The rows of a split, their images checked, and its name: "all" where the table has no splits.

    Raises UserError for a split without images and for images that are missing or damaged.
    """
    if set(table["split"]) == {WHOLE}:
        split = WHOLE
    rows = split_of(table, split, cfg.captions_path)
    return check_images(rows, image_folder(cfg, rows), cfg.on_bad_image), split


def count_ambiguous(table: pd.DataFrame) -> int:
    """How many captions also stand, in the same words, case and spacing aside, under another image of the table."""
    return int((table.groupby(plain_words(table["caption"]))["image_id"].transform("nunique") > 1).sum())


def image_labels(cfg: CFG, table: pd.DataFrame) -> pd.Series:
    """The label of each distinct image, as a string, by image name in the order of the table.

    Raises UserError for a table without labels, an image without one, and an image with two different ones.
    """
    source = cfg.captions_path or "the built-in data set"
    if "label" not in table:
        raise UserError(f"{source} has no column of labels: give it one that is named label")
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


@dataclass
class Images:
    """Images to classify, with their true labels."""

    source: str  # the split, or the folder
    folder: Path
    names: list[str]  # (N,) paths below the folder
    labels: list[str]  # (N,), or [] where they are not known

    @property
    def paths(self) -> list[Path]:
        return [self.folder / name for name in self.names]


def images_of_split(cfg: CFG, table: pd.DataFrame, split: str) -> Images:
    """The distinct images of a split with their labels. Raises UserError as `part_of` and `image_labels` do."""
    rows, split = part_of(cfg, table, split)
    labels = image_labels(cfg, rows)
    return Images(split, image_folder(cfg, rows), labels.index.tolist(), labels.tolist())


def images_of_folder(folder: Path, names: Sequence[str]) -> Images:
    """The images `names` below a folder; the sub-folder that one lies in is its label, if they lie in any.

    Raises UserError where some lie in one and some do not.
    """
    labels = [PurePath(name).parts[0] if len(PurePath(name).parts) > 1 else "" for name in names]
    if any(labels) and not all(labels):
        raise UserError(
            f"{folder / names[labels.index('')]} lies beside the folders whose names are the labels: move it into one"
        )
    return Images(str(folder), folder, list(names), labels if any(labels) else [])
