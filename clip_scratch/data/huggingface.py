"""A Hugging Face data set -> ordinary image files and a captions file, so that nothing downstream knows."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .readers import IMAGE_NAMES, LABEL_NAMES, caption_columns, find_column, missing_column

if TYPE_CHECKING:
    from ..config import CFG

CAPTIONS, SOURCE = "huggingface-captions.jsonl", "huggingface-source.json"
OURS = ".written-by-clip_scratch"  # the mark of a folder that may be written anew
IMAGE_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}


def export(source: Path | str, cfg: CFG) -> Path:
    """The captions file (JSON Lines) of a data set whose images were written beside it, once.

    `source` is a folder or file that exists (save_to_disk, imagefolder, parquet) or a name on the hub. The images
    go to cfg.image_path, or to data/NAME-images (data/OWNER--NAME for the hub) in the current directory. Raises
    UserError without the `datasets` library, without a network for a data set that only the hub has, and for a
    data set without an image or a text column.
    """
    import filelock

    local = isinstance(source, Path)
    name = f"{source.absolute().stem}-images" if local else source.replace("/", "--")
    folder = Path(cfg.image_path).expanduser() if cfg.image_path else Path("data") / name
    made_from = {
        "source": str(source.absolute()) if local else source,
        "modified": max(file.stat().st_mtime for file in [source, *source.rglob("*")]) if local else 0,
        "columns": [cfg.image_column, cfg.caption_column, cfg.label_column],
    }
    if _is_made_from(folder, made_from):
        return folder / CAPTIONS
    if folder.is_dir() and any(folder.iterdir()) and not (folder / OURS).exists():
        raise UserError(f"{folder} holds other files, which the images of {source} could overwrite. Set --image-path.")
    # Before anything is written, so that a data set that cannot be had leaves no folder
    splits = _load(source)
    columns = {split: _columns(dataset, str(source), cfg) for split, dataset in splits.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OURS).touch()
        with filelock.FileLock(folder / f"{OURS}.lock"):  # the processes of a distributed run come here together
            if not _is_made_from(folder, made_from):
                (folder / SOURCE).unlink(missing_ok=True)
                _write(splits, columns, folder)
                (folder / SOURCE).write_text(json.dumps(made_from), encoding="utf-8")  # last: all else is complete
    except OSError as error:
        raise UserError(f"cannot write the images of {source} to {folder}: {error}. Set --image-path.") from error
    return folder / CAPTIONS


def _is_made_from(folder: Path, made_from: dict) -> bool:
    try:
        return json.loads((folder / SOURCE).read_text(encoding="utf-8")) == made_from
    except (OSError, ValueError):
        return False


def _load(source: Path | str) -> dict:
    """split name -> datasets.Dataset."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{source} is a Hugging Face data set, which needs another library: pip install clip_scratch[datasets]"
        ) from error

    try:
        if not isinstance(source, Path):
            with _offline_unless_reachable() as online:
                loaded = datasets.load_dataset(source)
        elif (source / "dataset_dict.json").exists() or (source / "state.json").exists():
            loaded = datasets.load_from_disk(str(source))
        elif source.is_file():
            loaded = datasets.load_dataset("parquet", data_files=str(source))
        else:
            loaded = datasets.load_dataset(str(source))
    except Exception as error:  # whatever is wrong with the data set: each of its loaders has its own errors
        if not isinstance(source, Path) and not online:
            raise UserError(
                f"the Hugging Face hub cannot be reached and {source} is not in its local cache. Download it where "
                "there is a network, save it with save_to_disk, and set --captions-path to that folder."
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot load the Hugging Face data set {source}: {reason}") from error
    return dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}


@contextlib.contextmanager
def _offline_unless_reachable() -> Iterator[bool]:
    """Let the Hugging Face libraries use their cache alone where the hub does not answer within five seconds.

    Left to themselves they try again for half a minute.
    """
    import datasets
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
        online = True
    except Exception:  # of whichever HTTP client that version uses
        online = False
    owners = [huggingface_hub.constants, datasets.config]
    before = [owner.HF_HUB_OFFLINE for owner in owners]
    for owner in owners:
        owner.HF_HUB_OFFLINE = owner.HF_HUB_OFFLINE or not online
    try:
        yield online
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.HF_HUB_OFFLINE = value


def _write(splits: dict, columns: dict, folder: Path) -> None:
    """Write each distinct image once, and a line of the captions file for each record."""
    import datasets
    from tqdm import tqdm

    files = _ImageFiles(folder)
    temporary = folder / f"{CAPTIONS}.{os.getpid()}"
    with temporary.open("w", encoding="utf-8") as out:
        for split, dataset in splits.items():
            image, captions, label = columns[split]
            own_split = find_column(dataset.column_names, "", ("split",))
            wanted = [name for name in (image, *captions, label, own_split) if name]
            labels = dataset.features[label] if label else None
            # The files as they are: decoding is the business of images.py
            dataset = dataset.select_columns(wanted).cast_column(image, datasets.Image(decode=False))
            for index, record in enumerate(tqdm(dataset, f"Writing {split} images", unit=" images", leave=False)):
                line = {
                    "image": files.add(record[image], f"{split}-{index:06d}"),
                    "caption": [text for name in captions for text in _as_list(record[name])],
                }
                if label:
                    value = record[label]
                    named = isinstance(labels, datasets.ClassLabel) and value is not None
                    line["label"] = labels.int2str(value) if named else value
                if own_split or len(splits) > 1:  # a data set with a single part is not split yet
                    line["split"] = record[own_split] if own_split else split
                out.write(json.dumps(line) + "\n")
    temporary.replace(folder / CAPTIONS)


def _columns(dataset, source: str, cfg: CFG) -> tuple[str, list[str], str | None]:
    """The image column (the first of that kind, or by its name), the caption columns and the label column."""
    import datasets

    names = dataset.column_names
    of_kind = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    image = find_column(names, cfg.image_column or next(iter(of_kind), ""), IMAGE_NAMES)
    captions = caption_columns(names, cfg.caption_column)
    label = find_column(names, cfg.label_column, LABEL_NAMES)
    if not image:
        raise missing_column(source, names, cfg.image_column, "image")
    if not captions:
        raise missing_column(source, names, cfg.caption_column, "caption")
    if cfg.label_column and not label:
        raise missing_column(source, names, cfg.label_column, "label")
    return image, captions, label


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [value]


class _ImageFiles:
    """The images written to a folder so far. Data sets repeat an image for each caption; a file has it once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name_of: dict[bytes, str] = {}  # digest of the bytes -> file name
        self.names: set[str] = set()

    def add(self, image: dict | None, fallback: str) -> str:
        """The name of the file that holds an image `{"bytes": ..., "path": ...}`, written where it is a new one."""
        image = image or {}
        path = Path(image.get("path") or "")
        raw = image.get("bytes") or (path.read_bytes() if path.is_file() else b"")
        if not raw:
            return path.name  # no such file: reported with the bad images; '': with the rows that have no image
        digest = hashlib.sha1(raw).digest()
        if digest not in self.name_of:
            name = path.name if path.name and path.name not in self.names else fallback + _suffix(raw)
            (self.folder / name).write_bytes(raw)
            self.name_of[digest] = name
            self.names.add(name)
        return self.name_of[digest]


def _suffix(raw: bytes) -> str:
    from PIL import Image

    try:
        return IMAGE_SUFFIXES.get(Image.open(io.BytesIO(raw)).format, ".image")
    except OSError:
        return ".image"
