"""Where a loader's uint8 squares come from: decoded at every step, or once into a memory-mapped cache on disk.

A cache is a folder images-<hash> of four files: `pixels` (N, M, M, 3) uint8, `ratios` (N,) float32, `done` (N,) one
byte a row, all raw, and files.json with the names and stamps of the images. The hash is that of the files and of
whatever decides the pixels, so that no cache is ever out of date. A row counts as done when its bytes are on the
disk: what builds a cache may be killed at any instant, and the next goes on. The pages of the map are shared by all
processes that read it, and stay in memory as long as there is room.
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

from ..files import cache_folder
from .images import image_prefix, load_image, prefix_side, reading

if TYPE_CHECKING:
    from ..config import CFG

_FORMAT = 1  # of the folder; also to be raised when the same settings come to give other pixels
_WORTH_SAYING = 5e8  # bytes: a cache as large as this is announced
_CHUNK = 256  # rows that are decoded, written and recorded together


class ImageFiles:
    """N images that are decoded anew whenever they are asked for: `.side` M, `.read(numbers)`."""

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
        """One image's square (M, M, 3), and width / height of the image. Raises UserError for one that is corrupt."""
        if not hasattr(self._local, "prefix"):  # a pipeline keeps the state of a call: each thread needs its own
            self._local.prefix = self._prefix()
        with reading(self.paths[number]):
            image = load_image(self.paths[number])
            return self._local.prefix(image=image)["image"], image.shape[1] / image.shape[0]

    def read(self, numbers: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
        """The squares (M, M, 3) of B images, and their ratios (B,) of width to height."""
        squares, ratios = zip(*map(self.decode, numbers), strict=True)
        return list(squares), np.array(ratios, np.float32)


class ImageCache:
    """The same from a finished cache: `.pixels` (N, M, M, 3) is the memory map, `.ratios` (N,)."""

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
    """The images `names` below `folder` as squares: from the cache, which is built first where it is not there.

    ImageFiles where cfg.image_cache is off, and where the disk has no room or cannot be written, which one printed
    line says. Raises UserError for a missing or corrupt image.
    """
    files = ImageFiles(names, folder, cfg, train)
    if not cfg.image_cache:
        return files
    record = _record(names, files.paths, folder, files.side)
    cache = cache_folder(cfg) / f"images-{_key(record, cfg, train)}"
    try:
        if not _finished(cache, files):
            _build_alone(cache, files, record)
        return ImageCache(cache, len(files), files.side)
    except (OSError, NotImplementedError) as error:  # NotImplementedError: of a disk that knows no locks
        print(f"no image cache in {cache.parent} ({error}): images are decoded at every step. Set --cache-path to "
              "a folder with room.", file=sys.stderr)  # fmt: skip
        return files


def decoded_before(folder: Path, cfg: CFG) -> set[str]:
    """The images below `folder` that a cache has decoded, and whose files have not been touched since."""
    known: set[str] = set()
    for file in cache_folder(cfg).glob("images-*/files.json"):
        try:
            record = json.loads(file.read_text())
            done = np.fromfile(file.with_name("done"), bool)
        except (OSError, ValueError):  # just being made or removed
            continue
        if record["folder"] == os.path.abspath(folder) and len(done) == len(record["names"]):
            rows = zip(record["names"], record["stamps"], done, strict=True)
            known.update(name for name, stamp, ok in rows if ok and _stamp(os.path.join(folder, name)) == stamp)
    return known


# ---- which cache


def _stamp(path: str) -> list[int] | None:
    """Size in bytes and time of the last change in ns; None where there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _record(names: Sequence[str], paths: Sequence[str], folder: Path, side: int) -> dict:
    """What files.json holds."""
    stamps = [_stamp(path) for path in paths]
    return {"folder": os.path.abspath(folder), "side": side, "names": list(names), "stamps": stamps}


def _key(record: dict, cfg: CFG, train: bool) -> str:
    """A hash of all that decides the pixels: the files, the settings and the libraries that resize."""
    crops = train and cfg.crop_scale < 1
    geometry = (cfg.interpolation, *(() if crops else (cfg.size, cfg.resize)))
    versions = PIL.__version__, *map(_version, ("albumentations", "opencv-python", "opencv-python-headless"))
    decides = json.dumps([_FORMAT, record, crops, geometry, versions])
    return hashlib.sha256(decides.encode()).hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


# ---- building


def _finished(cache: Path, files: ImageFiles) -> bool:
    return (cache / "done").is_file() and _rows_done(cache, files).all()


def _rows_done(cache: Path, files: ImageFiles) -> np.ndarray:
    """Which rows (N,) are on the disk; none of a folder whose files have not the size that they were made with."""
    n = len(files)
    sizes = {"pixels": 3 * n * files.side**2, "ratios": 4 * n, "done": n}
    if all((cache / name).is_file() and (cache / name).stat().st_size == size for name, size in sizes.items()):
        return np.fromfile(cache / "done", bool)
    return np.zeros(n, bool)


def _build_alone(cache: Path, files: ImageFiles, record: dict) -> None:
    """Build, or go on with, a cache while no other process does. Raises OSError where it cannot be written."""
    from filelock import FileLock, Timeout

    cache.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that builds {cache}", file=sys.stderr)
        lock.acquire()
    try:
        if not _finished(cache, files):
            _build(cache, files, record)
    finally:
        lock.release()


def _build(cache: Path, files: ImageFiles, record: dict) -> None:
    from tqdm import tqdm

    n, size = len(files), 3 * files.side**2  # bytes of a row
    done = _rows_done(cache, files)
    missing, free = int((~done).sum()) * size, shutil.disk_usage(cache).free
    if missing > free / 2:  # the other half is for runs, and for whoever else uses the disk
        raise OSError(f"it needs {missing / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    if missing > _WORTH_SAYING:
        print(f"caching {n:,} images, {n * size / 1e9:.1f} GB, in {cache} (--no-image-cache does without)")
    if not done.any():
        _lay_out(cache, n, size, record)
    rows = np.flatnonzero(~done)
    with (
        open(cache / "pixels", "r+b") as pixels,
        open(cache / "ratios", "r+b") as ratios,
        open(cache / "done", "r+b") as finished,
        tqdm(total=n, initial=n - len(rows), desc="Caching images", unit=" images", leave=False) as bar,
    ):
        for chunk in _decoded(files, rows):
            for row, (square, ratio) in chunk:
                _write_row(pixels, row, square)
                _write_row(ratios, row, np.float32(ratio))
            for file in (pixels, ratios):
                _to_disk(file)
            for row, _ in chunk:  # only now: what is recorded as done is done, whenever the power fails
                _write_row(finished, row, np.True_)
            _to_disk(finished)
            bar.update(len(chunk))


def _lay_out(cache: Path, n: int, size: int, record: dict) -> None:
    """Empty files of their final sizes."""
    (cache / "files.json").write_text(json.dumps(record))
    for name, length in (("pixels", n * size), ("ratios", 4 * n), ("done", n)):
        with open(cache / name, "wb") as file:
            file.truncate(length)


def _decoded(files: ImageFiles, rows: np.ndarray) -> Iterator[list[tuple[int, tuple[np.ndarray, float]]]]:
    """The rows in chunks, the next of which is being decoded while one is written."""
    chunks = np.split(rows, range(_CHUNK, len(rows), _CHUNK))
    pool = ThreadPoolExecutor(os.cpu_count() or 1)  # decoders release Python's lock
    try:
        begun: list[list[tuple[int, Future]]] = []
        for chunk in chunks:
            begun.append([(int(row), pool.submit(files.decode, row)) for row in chunk])
            if len(begun) > 1:
                yield [(row, future.result()) for row, future in begun.pop(0)]
        yield [(row, future.result()) for row, future in begun.pop(0)]
    finally:
        pool.shutdown(cancel_futures=True)  # at a corrupt image, or Ctrl-C


def _write_row(file, row: int, value: np.ndarray | np.generic) -> None:
    file.seek(row * value.nbytes)
    file.write(value.tobytes())


def _to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())
