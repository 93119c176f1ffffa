"""Build and update an index: walk a folder, decode in threads while the tower computes, commit as it goes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from ..data.captions import read_captions, split_of
from ..data.image_files import stamp
from ..data.images import draft, fault_of, load_image, open_image, wanted_side
from ..data.readers import IMAGE_NAMES
from ..data.scenes.write import training_captions
from ..data.shards import images_in
from ..device import keep_freed_memory
from ..errors import UserError
from ..files import new_folder, write_atomically, write_json
from ..models.clip import DualEncoder
from ..models.saved import load, model_fingerprint, prepare_best, save_best
from .embed import encode_text
from .index import FORMAT, INFO, log_mean_exp, open_store, read_captions_of, read_info
from .query import MODEL
from .store import OWN_COLUMNS

_BATCH = 64
_COMMIT_SECONDS = 5.0
_CAPTIONS = 5000  # of the training data that an index carries
_DATE_TAKEN, _DATE_CHANGED, _EXIF, _ORIENTATION = 36867, 306, 0x8769, 274  # EXIF 2.3 tags


@dataclasses.dataclass
class IndexUpdate:
    """What an update of an index did."""

    images: int = 0  # in the index now
    added: int = 0  # embedded, new or changed
    removed: int = 0
    seconds: float = 0.0  # of decoding and embedding
    faults: dict[str, str] = dataclasses.field(default_factory=dict)  # why images were left out, by path
    unmatched: int = 0  # rows of the captions table that name no image
    recall: float | None = None  # of the approximate index against exact search, where there is one


def update_index(
    run: str | Path,
    images: str | Path,
    folder: str | Path,
    table: str = "",
    ann: bool = False,
    store: str = "",
    device: str = "auto",
    prepare: Callable[[DualEncoder, Path], object] = lambda model, folder: None,
    share: Callable[[list[str], Callable], Iterator] = lambda names, embed: embed(names),
) -> IndexUpdate:
    """Make `folder` an index of all images below the folder `images`, or in shards, by the model of `run`.

    Of an index that exists, only what is new or changed is embedded, and what is gone is forgotten. It is committed as
    it goes: after a kill the next update resumes. `table` is a CSV file with an image column, whose other columns
    become columns of the index; `ann` builds an approximate index however few the images; `store` names a Milvus
    collection that holds the embeddings instead of the folder; `prepare` may add files to a new index; `share` lets
    other processes embed some of the images (`embed_share`). Raises UserError for a folder that is an index of
    something else or is being written by another process.
    """
    folder = Path(folder)
    if ann and store:
        raise UserError("--ann is of no use with --store: Milvus has indexes of its own")
    columns = read_columns(Path(table)) if table else {}
    images, names = images_in(images)
    model = load(run, device)
    keep_freed_memory()
    info = _begin(folder, images, model, run, store, prepare)
    with _sole_writer(folder), open_store(folder, info, writing=True) as opened:
        known = opened.known()
        on_disk = {name: tuple(found) for name in names if (found := stamp(images / name))}
        names = list(on_disk)  # without those that vanished meanwhile
        gone = known.keys() - on_disk.keys()
        opened.remove(gone)
        report = IndexUpdate(removed=len(gone))
        opened.add_columns({name: kind for name, (kind, _) in columns.items()})
        of_image = _by_image(columns, names, report)
        todo = [name for name in names if known.get(name) != on_disk[name]]
        if columns:
            opened.update({"path": name, **of_image[name]} for name in names if name in of_image and name not in todo)
        embedded = share(todo, partial(_embedded, model, images))
        _commit(embedded, len(todo), on_disk, of_image, opened, _captions(folder, info), report)
        report.recall = opened.finish(ann)
        report.images = len(opened)
    return report


def embed_share(run: str | Path, images: str | Path, device: str, share: Callable) -> None:
    """In another process than that of `update_index`: embed what it shares out."""
    for _ in share([], partial(_embedded, load(run, device), images_in(images)[0])):
        pass


def _begin(folder: Path, images: Path, model: DualEncoder, run: str | Path, store: str, prepare: Callable) -> dict:
    """index.json of `folder`, which is made where it is missing."""
    info = {
        "format": FORMAT, "folder": str(images), "run": str(run), "store": store,
        "dim": model.cfg.projection_dim, "logit_scale": model.logit_scale.item(),
        "fingerprint": model_fingerprint(model),
    }  # fmt: skip
    try:
        if not folder.exists() or not any(folder.iterdir()):
            with new_folder(folder) as temporary:
                prepare_best(temporary / MODEL, model, model.cfg)
                save_best(temporary / MODEL, model, 0, {})
                _write_captions(temporary, model)
                prepare(model, temporary)
                write_json(temporary / INFO, info)
            return info
        found = read_info(folder)
        if found["fingerprint"] != info["fingerprint"]:
            raise UserError(f"{folder} was built with another model ({found['run']}): choose another --index")
        if found["store"] != store:
            raise UserError(f"{folder} keeps its embeddings in {found['store'] or 'itself'}: choose another --index")
        if found["folder"] != info["folder"]:
            if Path(found["folder"]).is_dir():
                raise UserError(f"{folder} is an index of {found['folder']}: choose another --index")
            write_json(folder / INFO, info)  # the images have moved
        return info
    except OSError as error:
        raise UserError(f"the index {folder} cannot be written: {error}") from error


@contextlib.contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise UserError(f"another process is writing the index {folder}: wait for it") from error


def _write_captions(folder: Path, model: DualEncoder) -> None:
    """Distinct training captions and their embeddings; none where the captions file is gone."""
    cfg = model.cfg
    try:
        if cfg.captions_path:
            captions = split_of(read_captions(cfg), "train", cfg.captions_path)["caption"]
        else:
            captions = pd.Series(training_captions(cfg.n_scenes, cfg.seed))
    except (UserError, OSError) as error:
        print(f"no captions to describe images and calibrate scores with: {error}")
        return
    captions = captions.drop_duplicates()
    captions = captions.sample(min(_CAPTIONS, len(captions)), random_state=0).tolist()
    write_json(folder / "captions.json", captions)
    content = encode_text(model, captions, progress=True).numpy().astype(np.float16).tobytes()
    write_atomically(folder / "captions.f16", lambda temporary: temporary.write_bytes(content))


def _captions(folder: Path, info: dict) -> np.ndarray:
    """The captions' embeddings, scaled to logits: (C, P)."""
    return info["logit_scale"] * read_captions_of(folder, info["dim"])[1]


def _commit(
    embedded: Iterator, n: int, on_disk: dict, of_image: dict, opened, captions: np.ndarray, report: IndexUpdate
) -> None:
    """Commit the `n` images that `_embedded` gives, every few seconds and at an interrupt."""
    began = committed = time.monotonic()
    records: list[dict] = []
    embeddings: list[np.ndarray] = []

    def commit() -> None:
        if records:
            opened.add(records, np.concatenate(embeddings))
            report.added += len(records)
        records.clear()
        embeddings.clear()

    with tqdm(total=n, desc="images", unit=" images", disable=not n) as bar:
        try:
            for batch, rows, faults in embedded:
                report.faults |= faults
                backgrounds = log_mean_exp(rows @ captions.T) if len(captions) else [None] * len(rows)
                for (name, facts), background in zip(batch, backgrounds, strict=True):
                    size, mtime_ns = on_disk[name]
                    background = None if background is None else float(background)
                    facts = {"path": name, "size": size, "mtime_ns": mtime_ns, "background": background, **facts}
                    records.append({**facts, **of_image.get(name, {})})
                embeddings.append(rows)
                bar.update(len(batch) + len(faults))
                if time.monotonic() - committed > _COMMIT_SECONDS:
                    commit()
                    committed = time.monotonic()
        finally:
            commit()
    report.seconds = time.monotonic() - began


@torch.inference_mode()
def _embedded(
    model: DualEncoder, images: Path, names: Sequence[str]
) -> Iterator[tuple[list[tuple[str, dict]], np.ndarray, dict[str, str]]]:
    """Batches: (name, width, height and date) of each image, embeddings (B, P), and what is wrong with the others."""
    transform, side = model.image_transform(train=False), wanted_side(model.cfg)
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        decoded = _ahead(pool, partial(_decoded, images, transform, side), names)
        while batch := list(islice(decoded, _BATCH)):
            good = [(name, facts, pixels) for name, facts, pixels in batch if pixels is not None]
            faults = {name: facts["fault"] for name, facts, pixels in batch if pixels is None}
            rows = np.zeros((0, model.cfg.projection_dim), np.float32)
            if good:
                pixels = torch.stack([pixels for *_, pixels in good]).to(model.device)
                rows = model.encode_image(pixels).cpu().numpy()
            yield [(name, facts) for name, facts, _ in good], rows, faults


def _ahead(pool: ThreadPoolExecutor, function: Callable, items: Iterable) -> Iterator:
    """The results of `function` in order, with four batches computed ahead."""
    remaining, waiting = iter(items), deque()
    try:
        for item in remaining:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * _BATCH:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _decoded(images: Path, transform: Callable, side: int, name: str) -> tuple[str, dict, torch.Tensor | None]:
    """An image's name, what its file says of it, and its pixels: None, and the fault, where it cannot be read."""
    path = images / name
    try:
        with open_image(path) as file:
            width, height = file.size
            date, is_turned = None, False
            with contextlib.suppress(Exception):  # decoders of damaged EXIF data raise all kinds
                exif = file.getexif()
                date = _date(exif.get_ifd(_EXIF).get(_DATE_TAKEN) or exif.get(_DATE_CHANGED))
                is_turned = exif.get(_ORIENTATION, 1) >= 5
            draft(file, side)
            pixels = transform(image=load_image(file))["image"]
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError and classes of their own
        return name, {"fault": fault_of(path, error)}, None
    width, height = (height, width) if is_turned else (width, height)
    return name, {"width": width, "height": height, "date": date}, pixels


def _date(text: object) -> str | None:
    """EXIF's "2020:07:14 18:30:00" as "2020-07-14 18:30:00"; None for anything else, such as zeros."""
    found = re.match(r"([12]\d{3}):(\d\d):(\d\d)(?: (\d\d:\d\d:\d\d))?", str(text))
    return found and f"{found[1]}-{found[2]}-{found[3]} {found[4] or '00:00:00'}"


def read_columns(path: Path) -> dict[str, tuple[str, dict[str, object]]]:
    """The columns of a CSV file with an image column: SQLite type, and value by image name.

    Names become lower case with underscores, so that a `where` may use them. Raises UserError for a file that cannot be
    read, has no image column, or has a column with a name of the index's own.
    """
    import pandas as pd

    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a CSV file: {error}") from error
    names = [re.sub(r"\W+", "_", str(name).strip()).lower() for name in table.columns]
    table.columns = names
    image = next((name for name in IMAGE_NAMES if name in names), None)
    if image is None:
        raise UserError(
            f"{path} has no column with image names (such as {', '.join(IMAGE_NAMES[:4])}): {', '.join(names)}"
        )
    if taken := sorted((set(names) - {image}) & set(OWN_COLUMNS)):
        raise UserError(f"{path}: rename the column {taken[0]!r}, which an index has of its own")
    if len(set(names)) < len(names):
        raise UserError(f"{path} has two columns of one name: {', '.join(names)}")
    table = table.dropna(subset=[image]).drop_duplicates(image)
    columns = {}
    for name in (name for name in names if name != image):
        values = table[name]
        kinds = {"i": "integer", "b": "integer", "f": "real"}
        cells = [None if pd.isna(value) else value for value in values.tolist()]
        columns[name] = kinds.get(values.dtype.kind, "text"), dict(zip(table[image].astype(str), cells, strict=True))
    return columns


def _by_image(columns: dict, names: list[str], report: IndexUpdate) -> dict[str, dict[str, object]]:
    """The table's values for each image, which a row names by its path below the folder or by its file name alone."""
    if not columns:
        return {}
    by_file_name = {Path(name).name: name for name in names}
    paths, values = set(names), {}
    rows = next(iter(columns.values()))[1]
    for row in rows:
        name = row if row in paths else by_file_name.get(Path(row).name)
        if name is None:
            report.unmatched += 1
        else:
            values[name] = {column: cells[row] for column, (_, cells) in columns.items()}
    empty = dict.fromkeys(columns)
    return {name: values.get(name, empty) for name in names}
