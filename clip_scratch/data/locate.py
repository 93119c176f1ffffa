"""Where a data set is: its captions files and its image folder."""

import functools
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from ..config import CFG
from ..errors import UserError, suggest
from .readers import Columns
from .shards import common_folder, is_shards

SPLITS = ("train", "valid", "test")
SPLIT_OF_NAME = {
    "train": "train", "training": "train", "restval": "train",
    "valid": "valid", "val": "valid", "validation": "valid", "dev": "valid",
    "test": "test", "testing": "test",
}  # fmt: skip
# Names of captions files of published data sets; the first one found in a folder is used.
PUBLISHED = (
    "dataset_*.json", "Flickr8k.token.txt", "results_20130124.token", "captions.txt", "captions.csv", "results.csv",
)  # fmt: skip
CAPTIONS_SUFFIXES = {".csv", ".tsv", ".json", ".jsonl", ".ndjson"}
# Names of image folders, of published data sets among them; the first one is preferred.
IMAGE_FOLDERS = ("Images", "images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images", "flickr30k-images")


class Located(NamedTuple):
    """Where a data set is. The key of a single file, whose splits are inside it, beside it or nowhere, is ""."""

    files: dict[str, Path | str]  # captions files, or patterns of shards, by split
    form: str  # captions_format
    columns: Columns
    images: Path | None  # image folder, where the data set fixes it

    @property
    def first(self) -> Path | str:
        return next(iter(self.files.values()))


def locate(cfg: CFG) -> Located:
    """Find the data set of `cfg`: draws the built-in scenes, and writes a Hugging Face data set out, if necessary."""
    if not cfg.captions_path:
        from .scenes.write import ensure_scenes

        captions, images = ensure_scenes(cfg)
        return Located({"": captions}, "table", Columns(), images)
    if any(map(is_shards, (cfg.captions_path, cfg.valid_captions_path, cfg.test_captions_path))):
        return _locate_shards(cfg)
    path = Path(os.path.expanduser(cfg.captions_path))
    if cfg.captions_format == "huggingface" or (cfg.captions_format == "auto" and _is_huggingface(path)):
        from .huggingface import export

        captions = export(path if os.path.exists(path) else cfg.captions_path, cfg)
        return Located({"": captions}, "json", Columns(), captions.parent)
    files = _captions_files(path)
    for split, other in (("valid", cfg.valid_captions_path), ("test", cfg.test_captions_path)):
        if other:
            files = {name or "train": file for name, file in files.items()}
            files[split] = _captions_files(Path(os.path.expanduser(other)), single=True)[""]
    columns = Columns(cfg.image_column, cfg.caption_column, cfg.label_column)
    return Located(files, cfg.captions_format, columns, None)


def fix_for(path: Path, otherwise: str) -> str:
    """What to do where no data are at `path`: to prepare them, if it is where `prepare` puts a published data set."""
    from .sources import SOURCES

    is_prepared = path.name in SOURCES and path == Path("data", path.name)
    return f"Run: python -m clip_scratch.prepare {path.name}" if is_prepared else otherwise


def _locate_shards(cfg: CFG) -> Located:
    """Shards hold their images, so that `images` is what they have in common."""
    of_split = {"train": cfg.captions_path, "valid": cfg.valid_captions_path, "test": cfg.test_captions_path}
    files = {split: pattern for split, pattern in of_split.items() if pattern}
    if other := [pattern for pattern in files.values() if not is_shards(pattern)]:
        raise UserError(f"{other[0]} has no shards, as the other splits do. Write them with prepare shards")
    images = Path(common_folder(list(files.values())))
    return Located(files if len(files) > 1 else {"": cfg.captions_path}, "shards", Columns(), images)


def find_images(located: Located, table: pd.DataFrame) -> Path:
    """The image folder of a data set that does not fix it: the captions file's folder or one beside it; it is printed.

    The folder with the most of the images is taken; of equals the captions file's own, then those with usual names.
    Hidden folders are not searched.
    """
    names = table["image"].drop_duplicates()
    sample = names.iloc[:: max(1, len(names) // 20)]
    here = located.first.parent
    beside = {entry.name: entry for entry in _entries(here) if not entry.name.startswith(".") and entry.is_dir()}
    usual = [beside.pop(name) for name in IMAGE_FOLDERS if name in beside]
    above = [here.parent / name for name in IMAGE_FOLDERS]
    folders = [here, *usual, *beside.values(), *above]
    folder = max(folders, key=lambda folder: sum(os.path.isfile(folder / name) for name in sample))
    _announce(folder)
    return folder


@functools.cache  # once, though each loader asks
def _announce(folder: Path) -> None:
    print(f"images: {folder} (--image-path sets another folder)", file=sys.stderr)


def existing_folder(image_path: str) -> Path:
    """The folder of the setting image_path. Raises UserError where there is none."""
    folder = Path(os.path.expanduser(image_path))
    if not os.path.isdir(folder) and not re.match(r"\w\w+:(/|$)", image_path):
        raise UserError(f"no image folder {folder}.{_near(folder)} Set --image-path to the folder of the images.")
    return folder


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted. Raises UserError for one that cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}.") from error


def _is_huggingface(path: Path) -> bool:
    """Whether a path is a Hugging Face data set: a folder or file of that kind, or a name on the hub."""
    if os.path.isdir(path):
        signs = ["dataset_dict.json", "state.json", "*.parquet", "data/*.parquet"]
        signs += ["metadata.csv", "metadata.jsonl", "*/metadata.csv", "*/metadata.jsonl"]  # an imagefolder
        return any(next(path.glob(sign), None) for sign in signs)
    if path.suffix == ".parquet" or os.path.exists(path):
        return path.suffix == ".parquet"
    # `owner/name`, unless its folder exists
    on_hub = re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) and path.suffix not in {*CAPTIONS_SUFFIXES, ".txt", ".token"}
    return bool(on_hub) and not path.parent.exists() and not fix_for(path, "")


def _captions_files(path: Path, single: bool = False) -> dict[str, Path]:
    """The captions file of `path` with the key "", or those of a folder with one per split, such as val.csv.

    Raises UserError where there is none, or where it is not clear which one is meant.
    """
    if os.path.isfile(path):
        return {"": path}
    if not os.path.isdir(path):
        raise UserError(f"no captions file {path}. {fix_for(path, f'{_near(path)} Set --captions-path.'.lstrip())}")
    published = (sorted(path.glob(name)) or sorted(path.glob(f"*/{name}")) for name in PUBLISHED)
    found = next(filter(None, published), None)
    found = found or [file for file in _entries(path) if file.suffix.lower() in CAPTIONS_SUFFIXES]
    if len(found) == 1:
        return {"": found[0]}
    by_split = {_split_in_name(file): file for file in found}
    if found and not single and len(by_split) == len(found) and None not in by_split:
        return {split: by_split[split] for split in SPLITS if split in by_split}
    if found:
        names = ", ".join(str(file.relative_to(path)) for file in found[:5])
        fix = "Set --captions-path to one of them, or keep one per split, with names such as train.csv and val.csv."
        raise UserError(f"{path} has several captions files ({names}). {fix}")
    fix = fix_for(path, "Set --captions-path to it.")
    raise UserError(f"{path} has no captions file (looked for {', '.join(PUBLISHED)}). {fix}")


def _split_in_name(file: Path) -> str | None:
    """The split in the file's name, as in val_data.json; None for none or two."""
    words = re.split(r"[\W_]+", file.stem.lower())
    splits = {SPLIT_OF_NAME[word] for word in words if word in SPLIT_OF_NAME}
    return splits.pop() if len(splits) == 1 else None


def _near(path: Path) -> str:
    """A suggestion for a path that does not exist."""
    if not os.path.isdir(path.parent):
        return f" There is no folder {path.parent} either."
    return suggest(path.name, (entry.name for entry in _entries(path.parent)))
