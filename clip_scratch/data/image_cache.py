"""Where a loader's uint8 squares come from: decoded in every step, or once into a memory-mapped cache on disk.

A cache is a folder images-<hash> with four files: `pixels` (N, M, M, 3) uint8, `ratios` (N,) float32, `done` (N,) one
byte per row, all raw, and files.json with the names, sizes and times of the images. The hash covers these and all
settings that change the pixels, so a cache is never stale. A row is recorded as done once its bytes are on the disk:
a build may be killed at any instant, and the next one resumes it. All processes share the pages of the map, which stay
in memory as long as there is room.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL

from ..files import cache_folder, check_room, sole_writer
from .images import image_prefix, load_image, prefix_side, reading

if TYPE_CHECKING:
    from ..config import CFG

_FORMAT = 2  # of the folder; raised also when the same settings give other pixels than before
_CHUNK = 256  # rows that are decoded, written and recorded together


class ImageFiles:
    """N images that are decoded at every access: `.side` M, `.read(numbers)`."""

    def __init__(self, names: Sequence[str], folder: Path, cfg: CFG, train: bool):
        self.paths = [os.path.join(folder, name) for name in names]
        self.side = prefix_side(cfg, train, self.paths)
        self._prefix = functools.partial(image_prefix, cfg, train, self.side)
        self._local = threading.local()

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_local"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _local=threading.local())

    def __len__(self) -> int:
        return len(self.paths)

    def decode(self, number: int) -> tuple[np.ndarray, float]:
        """An image's square (M, M, 3), and the image's width / height. Raises UserError for a corrupt image."""
        if not hasattr(self._local, "prefix"):  # a pipeline has state: each thread needs its own
            self._local.prefix = self._prefix()
        with reading(self.paths[number]):
            image = load_image(self.paths[number])
            return self._local.prefix(image=image)["image"], image.shape[1] / image.shape[0]

    def read(self, numbers: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
        """The squares (M, M, 3) of B images, and their ratios (B,) of width to height."""
        squares, ratios = zip(*map(self.decode, numbers), strict=True)
        return list(squares), np.array(ratios, np.float32)


class ImageCache:
    """The same from a complete cache: `.pixels` (N, M, M, 3) is the memory map, `.ratios` (N,)."""

    def __init__(self, folder: Path, n: int, side: int):
        self.pixels = np.asarray(np.memmap(folder / "pixels", np.uint8, "r", shape=(n, side, side, 3)))
        self.ratios = np.fromfile(folder / "ratios", np.float32)
        self.side = side

    def __len__(self) -> int:
        return len(self.ratios)

    def read(self, numbers: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
        """The squares (M, M, 3) of B images, not copied, and their ratios (B,) of width to height."""
        return [self.pixels[number] for number in numbers], self.ratios[numbers]


def open_images(names: Sequence[str], folder: Path, cfg: CFG, train: bool) -> ImageCache | ImageFiles:
    """The images `names` below `folder` as squares: from the cache, which is built if it is missing.

    ImageFiles where cfg.image_cache is off, and, with one printed line, where the cache cannot be written or the disk
    has no room; an unfinished cache is then removed. Raises UserError for a missing or corrupt image.
    """
    files = ImageFiles(names, folder, cfg, train)
    if not cfg.image_cache:
        return files
    record = _record(names, files.paths, folder, files.side)
    try:
        cache = cache_folder(cfg) / f"images-{_key(record, cfg, train)}"
        if not rows_done(cache, len(files), files.side).all():
            with sole_writer(cache):
                _build(cache, files, record)
        return ImageCache(cache, len(files), files.side)
    except OSError as error:
        print(f"no image cache ({error}): images are decoded in every step. Set --cache-path to a folder with room.",
              file=sys.stderr)  # fmt: skip
        return files


def decoded_before(folder: Path, cfg: CFG) -> set[str]:
    """The images below `folder` that are in a cache and whose files have not changed since."""
    known: set[str] = set()
    try:
        records = list(cache_folder(cfg).glob("images-*/files.json"))
    except OSError:  # no home folder, or one that cannot be read
        return known
    for file in records:
        try:
            record = json.loads(file.read_text())
            done = rows_done(file.parent, len(record["names"]), record["side"])
        except (OSError, ValueError):  # just being written or removed
            continue
        if record["folder"] == os.path.abspath(folder):
            rows = zip(record["names"], record["stamps"], done, strict=True)
            known.update(name for name, stamp, ok in rows if ok and _stamp(os.path.join(folder, name)) == stamp)
    return known


def rows_done(cache: Path, n: int, side: int) -> np.ndarray:
    """Which of a cache's `n` rows are on the disk, (N,) bool; none where a file is missing or has another size."""
    sizes = {"pixels": 3 * n * side**2, "ratios": 4 * n, "done": n}
    if all(os.path.isfile(cache / name) and os.path.getsize(cache / name) == size for name, size in sizes.items()):
        return np.fromfile(cache / "done", bool)
    return np.zeros(n, bool)


# ---- which cache


def _stamp(path: str) -> list[int] | None:
    """Size in bytes and modification time in ns; None where there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _record(names: Sequence[str], paths: Sequence[str], folder: Path, side: int) -> dict:
    """The content of files.json."""
    stamps = [_stamp(path) for path in paths]
    return {"folder": os.path.abspath(folder), "side": side, "names": list(names), "stamps": stamps}


def _key(record: dict, cfg: CFG, train: bool) -> str:
    """A hash of all that determines the pixels: the files, the settings and the libraries that resize."""
    crops = train and cfg.crop_scale < 1
    geometry = (cfg.interpolation, *(() if crops else (cfg.size, cfg.resize)))
    versions = PIL.__version__, *map(_version, ("albumentations", "opencv-python", "opencv-python-headless"))
    content = json.dumps([_FORMAT, record, crops, geometry, versions])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


# ---- building


def _build(cache: Path, files: ImageFiles, record: dict) -> None:
    """Build a cache, or complete it. Raises OSError where there is no room, and removes the unfinished cache."""
    n, row_size = len(files), 3 * files.side**2
    rows = np.flatnonzero(~rows_done(cache, n, files.side))
    try:
        check_room(cache.parent, len(rows) * row_size, f"{n:,} images", "--no-image-cache")
        if len(rows) == n:
            cache.mkdir(exist_ok=True)
            (cache / "files.json").write_text(json.dumps(record))
            for name, size in (("pixels", n * row_size), ("ratios", 4 * n), ("done", n)):
                with open(cache / name, "wb") as file:
                    file.truncate(size)
        if len(rows):  # else another process has completed it meanwhile
            _write_rows(cache, files, rows)
    except OSError:
        shutil.rmtree(cache, ignore_errors=True)
        raise


def _write_rows(cache: Path, files: ImageFiles, rows: np.ndarray) -> None:
    from tqdm import tqdm

    with (
        open(cache / "pixels", "rb+") as pixels,
        open(cache / "ratios", "rb+") as ratios,
        open(cache / "done", "rb+") as done,
        tqdm(total=len(rows), desc="Caching images", unit=" images", leave=False) as bar,
    ):
        for chunk in _decoded(files, rows):
            for row, (square, ratio) in chunk:
                _write_row(pixels, row, square)
                _write_row(ratios, row, np.float32(ratio))
            _sync(pixels)
            _sync(ratios)
            for row, _ in chunk:  # only now: a row that is recorded as done is on the disk, even after a power failure
                _write_row(done, row, np.True_)
            _sync(done)
            bar.update(len(chunk))


def _decoded(files: ImageFiles, rows: np.ndarray) -> Iterator[list[tuple[int, tuple[np.ndarray, float]]]]:
    """The rows in chunks; while one is written the next one is decoded."""
    pool = ThreadPoolExecutor(os.cpu_count() or 1)  # decoders release the GIL
    try:
        started: list[list[tuple[int, Future]]] = []
        for chunk in np.split(rows, range(_CHUNK, len(rows), _CHUNK)):
            started.append([(int(row), pool.submit(files.decode, row)) for row in chunk])
            if len(started) > 1:
                yield [(row, future.result()) for row, future in started.pop(0)]
        yield [(row, future.result()) for row, future in started.pop(0)]
    finally:
        pool.shutdown(cancel_futures=True)  # after a corrupt image, or Ctrl-C


def _write_row(file, row: int, value: np.ndarray | np.generic) -> None:
    file.seek(row * value.nbytes)
    file.write(value.tobytes())


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())
