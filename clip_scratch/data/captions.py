"""A captions file or data set -> the caption table: one row per (image, caption), each image in one split."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pandas as pd

from ..errors import UserError
from .image_files import stamp
from .locate import SPLIT_OF_NAME, SPLITS, Located, existing_folder, find_images, fix_for, locate
from .readers import read_file, read_text
from .shards import read_shards

if TYPE_CHECKING:
    from ..config import CFG

# Lists of the images of a split, beside the captions file: an image name per line
SPLIT_LISTS = {
    "*trainImages.txt": "train", "*devImages.txt": "valid", "*valImages.txt": "valid", "*testImages.txt": "test",
}  # fmt: skip


def read_captions(cfg: CFG) -> pd.DataFrame:
    """The caption table of cfg.captions_path, or of the built-in scenes.

    Columns: image (path below `image_folder(cfg)`), caption, image_id (one integer per distinct image, counted from 0
    in the order of the file), split (train, valid or test), file and row (where the caption is), and label where the
    file has one. The split comes from the files, a split column, published lists beside the file, or a seed, in this
    order. Raises UserError for a bad file or setting.
    """
    cfg = cfg() if isinstance(cfg, type) else cfg
    return read_table(locate(cfg), cfg)


def read_table(located: Located, cfg: CFG) -> pd.DataFrame:
    """`read_captions` of a data set that has been located."""
    table = assign_splits(_clean(pd.concat(read_rows(located, cfg), ignore_index=True)), Path(located.first), cfg)
    table["image_id"] = pd.factorize(table["image"])[0]
    first = ["image", "caption", "image_id", "split"]
    return table[first + [name for name in table.columns if name not in first]].reset_index(drop=True)


def read_rows(located: Located, cfg: CFG, lenient: bool = False) -> list[pd.DataFrame]:
    """The rows of each captions file as they are (see `read_file`), with a split where there is a file for each."""
    parts = {}
    for split, file in located.files.items():
        if isinstance(file, str):
            parts[split] = read_shards(file, located.images, cfg.on_bad_image)
        else:
            parts[split] = read_file(file, located.form, located.columns, lenient)
    return [part.assign(split=split) if split else part for split, part in parts.items()]


def make_train_valid_dfs(cfg: CFG) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The training and the validation part of the caption table."""
    table = read_captions(cfg)
    return split_of(table, "train", cfg.captions_path), split_of(table, "valid", cfg.captions_path)


def split_of(table: pd.DataFrame, split: str, source: str) -> pd.DataFrame:
    """The rows of a split. Raises UserError where there are none; `source` is the data set's name in the message."""
    rows = table[table["split"] == split]
    if rows.empty:
        counts = table.groupby("split")["image"].nunique()
        there = " and ".join(f"{name} ({counts[name]:,} images)" for name in SPLITS if name in counts)
        fix = f"Set --{split}-fraction above 0, or --{split}-captions-path."
        fix = "Set --captions-path to a file with training images." if split == "train" else fix
        name = source or "the built-in data set"
        raise UserError(f"{name} has no images in the split {split!r}; it has {there or 'none'}. {fix}")
    return rows.reset_index(drop=True)


def fingerprint_of(table: pd.DataFrame) -> str:
    """The SHA-256 of a caption table's (image, caption) pairs, whatever their order."""
    pairs = sorted(zip(table["image"], table["caption"], strict=True))
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def plain_words(captions: pd.Series) -> pd.Series:
    """The captions in lower case with single spaces, to compare them."""
    return captions.str.lower().str.split().str.join(" ")


def image_folder(cfg: CFG, table: pd.DataFrame | None = None) -> Path:
    """The folder of the `image` column: cfg.image_path, or the one that `open_data` would find for this table."""
    cfg = cfg() if isinstance(cfg, type) else cfg
    if cfg.image_path:
        return existing_folder(cfg.image_path)
    located = locate(cfg)
    return located.images or find_images(located, read_table(located, cfg) if table is None else table)


def check_images(
    table: pd.DataFrame, folder: Path, on_bad_image: str, progress: bool = True, known: Collection[str] = ()
) -> pd.DataFrame:
    """Decode every distinct image; returns the table without images that are missing or cannot be decoded.

    The images in `known` are not decoded again. With on_bad_image "error" bad images raise UserError with their number
    and the first ten with file and row; with "skip" this is printed. If all are missing, the folder is wrong: an error.
    """
    from tqdm import tqdm

    firsts = table.drop_duplicates("image")
    if not any(stamp(folder / name) for name in firsts["image"]):
        example = firsts.iloc[0]
        raise UserError(
            f"none of the {len(firsts):,} images of {example['file']} is in {folder.absolute()}, for example "
            f"{example['image']} (row {example['row']}). {fix_for(folder, 'Set --image-path to their folder.')}"
        )
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders release the GIL
        new = firsts[~firsts["image"].isin(known)]
        faults = pool.map(_fault, [folder / name for name in new["image"]])
        faults = list(tqdm(faults, "Checking images", len(new), disable=not progress, unit=" images", leave=False))
    bad = new.assign(fault=faults).dropna(subset="fault")
    if bad.empty:
        return table
    shown = [f"  {row.image} ({row.file}, row {row.row}): {row.fault}" for row in bad.head(10).itertuples()]
    shown += [f"  and {len(bad) - 10:,} more"] if len(bad) > 10 else []
    count = f"{len(bad):,} of {len(firsts):,} images in {folder} are missing or cannot be decoded:"
    report = "\n".join([count, *shown])
    if on_bad_image == "error" or len(bad) == len(firsts):
        raise UserError(f"{report}\nRepair them, or leave them out with --on-bad-image skip.")
    print(f"{report}\nThey are left out.", file=sys.stderr)
    return table[~table["image"].isin(bad["image"])].reset_index(drop=True)


def _fault(path: Path) -> str | None:
    """Why an image cannot be used, or None."""
    from .images import fault_of, load_image

    try:
        load_image(path, side=1)  # all of it is read, and the pixels are not wanted
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError and classes of their own
        return fault_of(path, error)
    return None


# ---- cleaning and splits


def _clean(table: pd.DataFrame) -> pd.DataFrame:
    """The table without rows that have no caption or image, which are counted, and without repeated rows."""
    empty = (table["caption"] == "") | (table["image"] == "")
    if empty.any():
        first = table[empty].iloc[0]
        where = f"{first['file']}, row {first['row']}"
        if empty.all():
            raise UserError(f"{where} and all other rows have no image or no caption.")
        print(f"Left out {empty.sum():,} rows with no image or no caption (the first: {where}).", file=sys.stderr)
    # The same caption in two splits stays twice, so that assign_splits refuses it
    return table[~empty].drop_duplicates([name for name in ("image", "caption", "split") if name in table])


def assign_splits(table: pd.DataFrame, path: Path, cfg: CFG) -> pd.DataFrame:
    """The table with a `split` for every row; images that are in none of the published lists are left out."""
    if "split" in table:
        table = table.assign(split=_column_splits(table))
    else:
        lists = _published_lists(path.parent)
        listed = table["image"].map(lambda name: lists.get(name, lists.get(PurePosixPath(name).name)))
        if listed.isna().all():  # no lists, or those of another data set
            return _seeded(table, cfg.valid_fraction, cfg.test_fraction, cfg.seed)
        if listed.isna().any():
            out = table["image"][listed.isna()].nunique()
            print(f"Left out {out:,} images of {path.name} that are in none of its published splits.", file=sys.stderr)
        table = table.assign(split=listed)[listed.notna()]

    there = set(table["split"])
    if "train" in there and "valid" not in there and cfg.valid_fraction:
        rest, train = table[table["split"] != "train"], table[table["split"] == "train"]
        train = _seeded(train, cfg.valid_fraction, 0 if "test" in there else cfg.test_fraction, cfg.seed)
        table = pd.concat([train, rest]).sort_index()
        share = f"{cfg.valid_fraction:.0%} of its training images are set aside"
        print(f"{path.name} has no validation split: {share}.", file=sys.stderr)
    return table


def _column_splits(table: pd.DataFrame) -> pd.Series:
    """The split column as train, valid and test. Raises UserError for an unknown name, or an image in two splits."""
    given = table["split"].fillna("").astype(str).str.strip()
    splits = given.map(lambda name: SPLIT_OF_NAME.get(name.lower()))
    if splits.isna().any():
        bad, known = table.assign(split=given)[splits.isna()].iloc[0], ", ".join(SPLIT_OF_NAME)
        raise UserError(f"{bad['file']}, row {bad['row']}: unknown split {bad['split']!r}. A split is one of {known}.")
    firsts = table.assign(split=splits).drop_duplicates(["image", "split"])
    twice = firsts[firsts.duplicated("image", keep=False)]
    if not twice.empty:
        one, other = twice[twice["image"] == twice.iloc[0]["image"]].head(2).itertuples()
        raise UserError(
            f"{one.image} is both in {one.split} ({one.file}, row {one.row}) and in {other.split} ({other.file}, "
            f"row {other.row}), as are {twice['image'].nunique() - 1:,} other images. Keep each image in one split."
        )
    return splits


def _published_lists(folder: Path) -> dict[str, str]:
    """image -> split from lists such as Flickr_8k.trainImages.txt in a folder."""
    splits: dict[str, str] = {}
    for pattern, split in SPLIT_LISTS.items():
        for file in sorted(folder.glob(pattern)):
            for name in filter(None, map(str.strip, read_text(file).split("\n"))):
                if splits.setdefault(name, split) != split:
                    raise UserError(f"{file} lists {name}, which is in the {splits[name]} list too.")
    return splits


def _seeded(table: pd.DataFrame, valid_fraction: float, test_fraction: float, seed: int) -> pd.DataFrame:
    """The table with its images split at random, at least one in each split with a fraction above 0.

    Images are ordered by a hash of seed and name: the order of the rows does not matter, and images that are added or
    removed move few of the others.
    """
    images = sorted(table["image"].unique(), key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    n_valid, n_test = (max(1, round(len(images) * part)) if part else 0 for part in (valid_fraction, test_fraction))
    if len(images) <= n_valid + n_test:
        raise UserError(
            f"{len(images)} images are too few for a split with {valid_fraction:.0%} validation and "
            f"{test_fraction:.0%} test images. Lower --valid-fraction or --test-fraction."
        )
    splits = dict.fromkeys(images, "train") | dict.fromkeys(images[:n_valid], "valid")
    splits |= dict.fromkeys(images[n_valid : n_valid + n_test], "test")
    return table.assign(split=table["image"].map(splits))
