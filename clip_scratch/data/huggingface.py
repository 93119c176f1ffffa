"""A Hugging Face data set -> ordinary image files and a captions file."""

import contextlib
import hashlib
import io
import json
import os
from pathlib import Path

from huggingface_hub import constants

from ..config import CFG
from ..errors import UserError, first_line
from ..files import new_folder, sole_writer, write_json
from ..hub import hub_access
from .readers import Columns, find_columns

CAPTIONS, SOURCE = "huggingface-captions.jsonl", "huggingface-source.json"


def export(source: Path | str, cfg: CFG) -> Path:
    """The captions file (JSON Lines) of a data set whose images are written beside it, once.

    `source` is an existing folder or file (save_to_disk, imagefolder, parquet) or a name on the hub. The images go to
    cfg.image_path, or to data/NAME-images (data/OWNER--NAME for the hub) in the current directory. Raises UserError
    where that holds anything else, without the `datasets` library, without a network for a data set that only the hub
    has, and for one without an image or a text column.
    """
    local = isinstance(source, Path)
    name = f"{source.absolute().stem}-images" if local else source.replace("/", "--")
    folder = Path(os.path.expanduser(cfg.image_path)) if cfg.image_path else Path("data") / name
    made_from = {
        "source": str(source.absolute()) if local else source,
        "modified": max(file.stat().st_mtime for file in [source, *source.rglob("*")]) if local else 0,
        "columns": [cfg.image_column, cfg.caption_column, cfg.label_column],
    }
    if not _is_made_from(folder, made_from):
        splits = _load(source)  # before anything is written: a data set that is not available leaves no folder
        try:
            with sole_writer(folder):  # the processes of a distributed run come here together
                if not _is_made_from(folder, made_from):
                    _write(splits, str(source), cfg, folder, made_from)
        except OSError as error:
            raise UserError(f"cannot write the images of {source} to {folder}: {error}. Set --image-path.") from error
    return folder / CAPTIONS


def _is_made_from(folder: Path, made_from: dict) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / SOURCE).read_text(encoding="utf-8")) == made_from
    return False


def _load(source: Path | str) -> dict:
    """split name -> datasets.Dataset."""
    try:
        import datasets
    except ImportError as error:
        what = f"{source} is a Hugging Face data set, which needs another library"
        raise UserError(f"{what}: pip install clip_scratch[datasets]") from error
    try:
        if not isinstance(source, Path):
            remedy = "Download it where there is a network, save it with save_to_disk, and set --captions-path to it"
            with hub_access(f"the data set {source}", remedy):
                datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE  # its own copy
                loaded = datasets.load_dataset(source)
        elif (source / "dataset_dict.json").exists() or (source / "state.json").exists():
            loaded = datasets.load_from_disk(str(source))
        elif source.is_file():
            loaded = datasets.load_dataset("parquet", data_files=str(source))
        else:
            loaded = datasets.load_dataset(str(source))
    except UserError:
        raise
    except Exception as error:  # each loader of the library has its own errors
        raise UserError(f"cannot load the Hugging Face data set {source}: {first_line(error)}") from error
    return dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}


def _write(splits: dict, source: str, cfg: CFG, folder: Path, made_from: dict) -> None:
    """Write the folder: each distinct image once, and a line of the captions file for each record."""
    import datasets
    from tqdm import tqdm

    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} has other files in it. Remove it, or set --image-path to a new folder for {source}.")
    with new_folder(folder) as unfinished, open(unfinished / CAPTIONS, "w", encoding="utf-8") as out:
        files = _ImageFiles(unfinished)
        for split, dataset in splits.items():
            of_type = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
            columns = Columns(cfg.image_column or next(iter(of_type), ""), cfg.caption_column, cfg.label_column)
            image, captions, own_split, label = find_columns(source, dataset.column_names, columns)
            labels = dataset.features[label] if label else None
            wanted = [name for name in (image, *captions, label, own_split) if name]
            # The encoded files: images.py decodes
            dataset = dataset.select_columns(wanted).cast_column(image, datasets.Image(decode=False))
            for index, record in enumerate(tqdm(dataset, f"Writing {split} images", unit=" images", leave=False)):
                texts = [record[name] for name in captions]
                line = {
                    "image": files.add(record[image] or {}, f"{split}-{index:06d}"),
                    "caption": [text for value in texts for text in (value if isinstance(value, list) else [value])],
                }
                if label:
                    named = isinstance(labels, datasets.ClassLabel) and record[label] is not None
                    line["label"] = labels.int2str(record[label]) if named else record[label]
                if own_split or len(splits) > 1:  # a data set with a single part is not split yet
                    line["split"] = record[own_split] if own_split else split
                out.write(json.dumps(line) + "\n")
        out.flush()
        os.fsync(out.fileno())
        write_json(unfinished / SOURCE, made_from)


class _ImageFiles:
    """The images written to a folder so far. Data sets repeat an image for each caption; a file has it once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name_of: dict[bytes, str] = {}  # digest of the bytes -> file name
        self.names: set[str] = set()  # in lower case: Windows and macOS do not distinguish case

    def add(self, image: dict, fallback: str) -> str:
        """The file name of an image `{"bytes": ..., "path": ...}`, which is written if it is new."""
        from PIL import Image

        path = Path(image.get("path") or "")
        raw = image.get("bytes") or (path.read_bytes() if path.is_file() else b"")
        if not raw:
            return path.name  # a missing file is reported with the bad images, '' with the rows without an image
        digest = hashlib.sha1(raw).digest()
        if digest not in self.name_of:
            name = path.name
            if not name or name.lower() in self.names:
                suffix = "image"
                with contextlib.suppress(OSError):
                    suffix = Image.open(io.BytesIO(raw)).format.lower().replace("jpeg", "jpg")
                name = f"{fallback}.{suffix}"
            (self.folder / name).write_bytes(raw)
            self.name_of[digest] = name
            self.names.add(name.lower())
        return self.name_of[digest]
