"""A captions file or data set -> the caption table: one row per (image, caption), each image in one split."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pandas as pd

from ..errors import UserError, suggest
from .readers import Columns, read_file, read_text

if TYPE_CHECKING:
    from ..config import CFG

SPLITS = ("train", "valid", "test")
SPLIT_OF_NAME = {
    "train": "train", "training": "train", "restval": "train",
    "valid": "valid", "val": "valid", "validation": "valid", "dev": "valid",
    "test": "test", "testing": "test",
}  # fmt: skip
SPLIT_LISTS = {
    "train": ("*trainImages.txt",),
    "valid": ("*devImages.txt", "*valImages.txt"),
    "test": ("*testImages.txt",),
}
# The captions file of a published data set, by its name; the first that a folder holds is taken.
PUBLISHED = (
    "dataset_*.json", "Flickr8k.token.txt", "results_20130124.token", "captions.txt", "captions.csv", "results.csv",
)  # fmt: skip
CAPTIONS_SUFFIXES = {".csv", ".tsv", ".json", ".jsonl", ".ndjson"}
# Where the images of a published data set lie when its texts have a folder of their own.
IMAGE_FOLDERS = ("Images", "images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images", "flickr30k-images")


def read_captions(cfg: CFG) -> pd.DataFrame:
    """The caption table of cfg.captions_path, or of the built-in scenes.

    Columns: image (path below `image_folder(cfg)`), caption, image_id (one integer per distinct image, counted
    from 0 in the order of the file), split (train, valid or test), file and row (where the caption stands), and
    label where the file has one. The split is the one of the files, of a split column, of published lists beside
    the file, or seeded, in this order. Raises UserError for whatever the user can mend.
    """
    cfg = cfg() if isinstance(cfg, type) else cfg
    files, form, columns, _ = _locate(cfg)
    parts = {split: read_file(file, form, columns) for split, file in files.items()}
    parts = [part.assign(split=split) if split else part for split, part in parts.items()]
    table = _split(_clean(pd.concat(parts, ignore_index=True)), next(iter(files.values())), cfg)
    table["image_id"] = pd.factorize(table["image"])[0]
    first = ["image", "caption", "image_id", "split"]
    return table[first + [name for name in table.columns if name not in first]].reset_index(drop=True)


def make_train_valid_dfs(cfg: CFG) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The training and the validation part of the caption table."""
    cfg = cfg() if isinstance(cfg, type) else cfg
    table = read_captions(cfg)
    return split_of(table, "train", cfg.captions_path), split_of(table, "valid", cfg.captions_path)


def split_of(table: pd.DataFrame, split: str, source: str) -> pd.DataFrame:
    """The rows of a split. Raises UserError where `source`, the data set's name in the message, has none."""
    rows = table[table["split"] == split]
    if rows.empty:
        counts = table.groupby("split")["image"].nunique()
        there = " and ".join(f"{name} ({counts[name]:,} images)" for name in SPLITS if name in counts)
        fix = {
            "train": "Set --captions-path to a file with training images.",
            "valid": "Set --valid-fraction above 0, or --valid-captions-path.",
            "test": "Set --test-fraction above 0, or --test-captions-path.",
        }.get(split, f"A split is one of {', '.join(SPLITS)}.")
        name = source or "the built-in data set"
        raise UserError(f"{name} has no images in the split {split!r}; it has {there or 'none'}. {fix}")
    return rows.reset_index(drop=True)


def fingerprint_of(table: pd.DataFrame) -> str:
    """The SHA-256 of a caption table's (image, caption) pairs, whatever their order."""
    pairs = sorted(zip(table["image"], table["caption"], strict=True))
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def plain_words(captions: pd.Series) -> pd.Series:
    """The captions in lower case with single spaces: two that are equal then say the same."""
    return captions.str.lower().str.split().str.join(" ")


def image_folder(cfg: CFG, table: pd.DataFrame | None = None) -> Path:
    """The folder that the `image` column is relative to.

    It is cfg.image_path, or else the captions file's folder or one beside the file, whichever holds the images.
    With the caption `table` at hand the captions file is not read a second time.
    """
    cfg = cfg() if isinstance(cfg, type) else cfg
    files, form, columns, images = _locate(cfg)
    path = next(iter(files.values()))
    if images:
        return images
    if cfg.image_path:
        folder = Path(cfg.image_path).expanduser()
        if not folder.is_dir():
            raise UserError(f"no image folder {folder}.{_near(folder)} Set --image-path to the folder of the images.")
        return folder
    names = (read_file(path, form, columns) if table is None else table)["image"].drop_duplicates()
    sample = names.iloc[:: max(1, len(names) // 20)]
    beside = sorted(entry for entry in path.parent.iterdir() if entry.is_dir())
    above = [path.parent.parent / name for name in IMAGE_FOLDERS]
    # The first of equals wins, so the captions file's own folder is the answer where no image is found at all.
    return max([path.parent, *beside, *above], key=lambda folder: sum((folder / name).is_file() for name in sample))


def check_images(
    table: pd.DataFrame, folder: Path, on_bad_image: str, progress: bool = True, known: Collection[str] = ()
) -> pd.DataFrame:
    """Decode every distinct image of the table; the table without those that are missing or undecodable.

    The images in `known` (`image_cache.decoded_before`) have been decoded already and are not decoded again.
    With on_bad_image "error" any bad image raises UserError, which counts them and names the first ten with
    file and row; with "skip" the same is printed and their rows are left out. That no image is there at all is
    an error either way: the folder is wrong.
    """
    from tqdm import tqdm

    firsts = table.drop_duplicates("image")
    missing = ~firsts["image"].map(lambda name: (folder / name).is_file())
    if missing.all():
        example = firsts.iloc[0]
        raise UserError(
            f"none of the {len(firsts):,} images of {example['file']} is there: searched {folder.absolute()}, for "
            f"example for {example['image']} (row {example['row']}). Set --image-path to the folder of the images."
        )
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders release Python's lock
        new = firsts[~firsts["image"].isin(known)]
        faults = pool.map(_fault, [folder / name for name in new["image"]])
        faults = list(tqdm(faults, "Checking images", len(new), disable=not progress, unit=" images", leave=False))
    bad = new.assign(fault=faults).dropna(subset="fault")
    if bad.empty:
        return table
    shown = [f"  {row.image} ({row.file}, row {row.row}): {row.fault}" for row in bad.head(10).itertuples()]
    shown += [f"  and {len(bad) - 10:,} more"] if len(bad) > 10 else []
    count = f"{len(bad):,} of {len(firsts):,} images in {folder}"
    report = "\n".join([f"{count} are missing or cannot be decoded:", *shown])
    if on_bad_image == "error" or len(bad) == len(firsts):
        raise UserError(f"{report}\nMend them, or leave them out with --on-bad-image skip.")
    _note(f"{report}\nThey are left out.")
    return table[~table["image"].isin(bad["image"])].reset_index(drop=True)


def _fault(path: Path) -> str | None:
    """Why an image cannot be used; None where it can."""
    from .images import fault_of, load_image

    try:
        load_image(path)
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError and classes of their own
        return fault_of(path, error)
    return None


# ---- where the captions are


def _locate(cfg: CFG) -> tuple[dict[str, Path], str, Columns, Path | None]:
    """The captions files by split, their format and columns, and the image folder where the data set fixes one.

    A single file, whose splits are inside it or beside it or nowhere, has the key "".
    """
    if not cfg.captions_path:
        from .scenes.write import ensure_scenes

        captions, images = ensure_scenes(cfg)
        return {"": Path(captions)}, "table", Columns(), Path(images)
    path = Path(cfg.captions_path).expanduser()
    try:
        path.exists()
    except OSError as error:  # a folder above it is closed, or the name is too long
        raise UserError(f"cannot read {path}: {error.strerror}. Set --captions-path.") from error
    if cfg.captions_format == "huggingface" or (cfg.captions_format == "auto" and _is_huggingface(path)):
        from .huggingface import export

        captions = export(path if path.exists() else cfg.captions_path, cfg)
        return {"": captions}, "json", Columns(), captions.parent
    columns = Columns(cfg.image_column, cfg.caption_column, cfg.label_column)
    files = _captions_files(path)
    others = {"valid": cfg.valid_captions_path, "test": cfg.test_captions_path}
    others = {split: _captions_file(Path(other).expanduser()) for split, other in others.items() if other}
    if others and "" in files:
        files = {"train": files[""]}
    return files | others, cfg.captions_format, columns, None


def _is_huggingface(path: Path) -> bool:
    """Whether a path is a Hugging Face data set: a folder or file of that kind, or else a name on the hub."""
    if path.is_dir():
        signs = ["dataset_dict.json", "state.json", "*.parquet", "data/*.parquet"]
        signs += ["metadata.csv", "metadata.jsonl", "*/metadata.csv", "*/metadata.jsonl"]  # an imagefolder
        return any(next(path.glob(sign), None) for sign in signs)
    if path.exists() or path.suffix == ".parquet":
        return path.suffix == ".parquet"
    # `owner/name`, unless that is meant to be a file in a folder that exists
    on_hub = re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) and path.suffix not in {*CAPTIONS_SUFFIXES, ".txt", ".token"}
    return bool(on_hub) and not path.parent.exists()


def _captions_files(path: Path) -> dict[str, Path]:
    """`_captions_file`, with the key ""; of a folder with a file for each split, as train.csv and val.csv, those."""
    if path.is_dir():
        found = _captions_files_in(path)
        splits = {_split_in_name(file): file for file in found}
        if len(found) > 1 and len(splits) == len(found) and None not in splits:
            return {split: splits[split] for split in SPLITS if split in splits}
    return {"": _captions_file(path)}


def _split_in_name(file: Path) -> str | None:
    """The one split that a word of the file's name means, as in val_data.json; None for none or two."""
    words = re.split(r"[\W_]+", file.stem.lower())
    splits = {SPLIT_OF_NAME[word] for word in words if word in SPLIT_OF_NAME}
    return splits.pop() if len(splits) == 1 else None


def _captions_files_in(folder: Path) -> list[Path]:
    """What may be the captions file of a folder: what has a published name, or else a usual ending."""
    for pattern in PUBLISHED:
        if found := sorted(folder.glob(pattern)) or sorted(folder.glob(f"*/{pattern}")):
            return found
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in CAPTIONS_SUFFIXES)


def _captions_file(path: Path) -> Path:
    """`path` itself, or the captions file in it where it is a folder. Raises UserError where there is none."""
    if not path.exists():
        raise UserError(f"no captions file {path}.{_near(path)} Set --captions-path.")
    if path.is_file():
        return path
    found = _captions_files_in(path)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(str(file.relative_to(path)) for file in found[:5])
        raise UserError(
            f"{path} holds several captions files ({names}). Set --captions-path to one of them, "
            "or leave one for each split, named as train.csv and val.csv are."
        )
    raise UserError(f"{path} holds no captions file (looked for {', '.join(PUBLISHED)}). Set --captions-path to it.")


def _near(path: Path) -> str:
    """A sentence on what there is instead of a path that does not exist."""
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} either."
    return suggest(path.name, (entry.name for entry in path.parent.iterdir()))


# ---- cleaning and splits


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _clean(table: pd.DataFrame) -> pd.DataFrame:
    """The table without empty captions, which are counted aloud, and with each caption of an image once."""
    empty = (table["caption"] == "") | (table["image"] == "")
    if empty.any():
        first = table[empty].iloc[0]
        where = f"{first['file']}, row {first['row']}"
        if empty.all():
            raise UserError(f"{where} and all other rows have no image or no caption.")
        _note(f"Left out {empty.sum():,} rows with no image or no caption (the first: {where}).")
    # The same caption in two splits stays twice, so that _split sees and refuses it.
    return table[~empty].drop_duplicates([name for name in ("image", "caption", "split") if name in table])


def _split(table: pd.DataFrame, path: Path, cfg: CFG) -> pd.DataFrame:
    """The table with a `split` for every row; rows that a published list leaves out are dropped."""
    if "split" in table:
        table = table.assign(split=_column_splits(table))
    else:
        listed = _listed(table["image"], _published_lists(path.parent))
        if listed.isna().all():  # no lists, or lists of another data set: nothing is published
            return _seeded(table, cfg.valid_fraction, cfg.test_fraction, cfg.seed)
        if listed.isna().any():
            left_out = table["image"][listed.isna()].nunique()
            _note(f"Left out {left_out:,} images of {path.name} that are in none of its published splits.")
        table = table.assign(split=listed)[listed.notna()]

    there = set(table["split"])
    if "train" in there and "valid" not in there and cfg.valid_fraction:
        rest, train = table[table["split"] != "train"], table[table["split"] == "train"]
        train = _seeded(train, cfg.valid_fraction, 0 if "test" in there else cfg.test_fraction, cfg.seed)
        _note(f"{path.name} has no validation split: {cfg.valid_fraction:.0%} of its training images are set aside.")
        table = pd.concat([train, rest]).sort_index()
    return table


def _column_splits(table: pd.DataFrame) -> pd.Series:
    """The split column in our names. Raises UserError for an unknown name, or an image in two splits."""
    given = table["split"].fillna("").astype(str).str.strip()
    splits = given.map(lambda name: SPLIT_OF_NAME.get(name.lower()))
    if splits.isna().any():
        bad = table[splits.isna()].iloc[0]
        name = given[splits.isna()].iloc[0]
        raise UserError(f"{bad['file']}, row {bad['row']}: the split {name!r} is none of {', '.join(SPLIT_OF_NAME)}.")
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
    """image -> split from lists such as Flickr_8k.trainImages.txt in a folder: an image name per line."""
    splits: dict[str, str] = {}
    for split, patterns in SPLIT_LISTS.items():
        for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
            for name in read_text(file).split("\n"):
                name = name.strip()
                if name and splits.setdefault(name, split) != split:
                    raise UserError(f"{file} lists {name}, which is in the {splits[name]} list too.")
    return splits


def _listed(images: pd.Series, lists: dict[str, str]) -> pd.Series:
    """The split of each image that is listed, as it stands or without its folders; NaN for the others."""
    return images.map(lambda name: lists.get(name, lists.get(PurePosixPath(name).name)))


def _seeded(table: pd.DataFrame, valid_fraction: float, test_fraction: float, seed: int) -> pd.DataFrame:
    """The table with its images split at random: at least one in each part that is asked for.

    Images are ordered by a hash of seed and name, so that neither the order of the rows matters nor, but for the
    few at the edges, which other images there are.
    """

    def draw(name: str) -> bytes:
        return hashlib.sha256(f"{seed} {name}".encode()).digest()

    images = sorted(table["image"].unique(), key=draw)
    n_valid, n_test = (max(1, round(len(images) * part)) if part else 0 for part in (valid_fraction, test_fraction))
    if len(images) <= n_valid + n_test:
        raise UserError(
            f"{len(images)} images are too few for a split with {valid_fraction:.0%} validation and "
            f"{test_fraction:.0%} test images. Lower --valid-fraction or --test-fraction."
        )
    splits = dict.fromkeys(images, "train") | dict.fromkeys(images[:n_valid], "valid")
    splits |= dict.fromkeys(images[n_valid : n_valid + n_test], "test")
    return table.assign(split=table["image"].map(splits))
