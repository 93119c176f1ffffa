"""Where a loader's uint8 squares come from: decoded in every step, or once into a memory-mapped cache on disk.

A cache is a folder images-<hash> with four files: `pixels` (N, M, M, 3) uint8, `ratios` (N,) float32, `done` (N,) one
byte per row, all raw, and files.json with the names, sizes and times of the images. The hash covers these and all
settings that change the pixels, so a cache is never stale. A row is recorded as done once its bytes are on the disk:
a build may be killed at any instant, and the next one resumes it.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL

from ..config import CFG
from ..files import allocate, cache_folder, check_room, sole_writer
from .image_files import stamp
from .images import image_prefix, load_image, reading, wanted_side

_FORMAT = 3  # of the folder; raised also when the same settings give other pixels than before
_CHUNK = 256  # rows that are decoded, written and recorded together


class ImageFiles:
    """N images that are decoded at every access: `.side` M, `.read(numbers)`."""

    def __init__(self, names: Sequence[str], folder: Path, cfg: CFG, train: bool):
        self.paths = [os.path.join(folder, name) for name in names]
        self.side, self._prefix = image_prefix(cfg, train, self.paths)
        self._wanted = max(self.side, wanted_side(cfg))

    def __len__(self) -> int:
        return len(self.paths)

    def decode(self, number: int) -> tuple[np.ndarray, float]:
        """An image's square (M, M, 3), and the image's width / height. Raises UserError for a corrupt image."""
        with reading(self.paths[number]):
            image = load_image(self.paths[number], self._wanted)
            return self._prefix(image), image.shape[1] / image.shape[0]

    def read(self, numbers: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
        """The squares (M, M, 3) of B images, and their ratios (B,) of width to height."""
        squares, ratios = zip(*map(self.decode, numbers), strict=True)
        return list(squares), np.array(ratios, np.float32)


class ImageCache:
    """The same from a complete cache: `.pixels` (N, M, M, 3) is the memory map, `.ratios` (N,), `.is_new`."""

    def __init__(self, folder: Path, n: int, side: int, is_new: bool = False):
        self.pixels = np.asarray(np.memmap(folder / "pixels", np.uint8, "r", shape=(n, side, side, 3)))
        self.ratios = np.fromfile(folder / "ratios", np.float32)
        self.side, self.is_new = side, is_new  # is_new: it was built, or completed, just now

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
    stamps = [stamp(path) for path in files.paths]
    record = {"folder": os.path.abspath(folder), "side": files.side, "names": list(names), "stamps": stamps}
    try:
        cache = cache_folder(cfg) / f"images-{_key(record, cfg, train)}"
        if is_new := not rows_done(cache, len(files), files.side).all():
            with sole_writer(cache):
                _build(cache, files, record)
        return ImageCache(cache, len(files), files.side, is_new)
    except OSError as error:
        fix = "images are decoded in every step. Set --cache-path to a folder with room."
        print(f"no image cache ({error}): {fix}", file=sys.stderr)
        return files


def decoded_before(folder: Path, cfg: CFG) -> set[str]:
    """The images below `folder` that are in a cache and whose files have not changed since."""
    known: set[str] = set()
    with contextlib.suppress(OSError):  # no home folder, or one that cannot be read
        for file in cache_folder(cfg).glob("images-*/files.json"):
            with contextlib.suppress(OSError, ValueError):  # just being written or removed
                record = json.loads(file.read_text())
                if record["folder"] == os.path.abspath(folder):
                    done = rows_done(file.parent, len(record["names"]), record["side"])
                    rows = zip(record["names"], record["stamps"], done, strict=True)
                    known.update(name for name, before, ok in rows if ok and stamp(folder / name) == before)
    return known


def rows_done(cache: Path, n: int, side: int) -> np.ndarray:
    """Which of a cache's `n` rows are on the disk, (N,) bool; none where a file is missing or has another size."""
    files = [(cache / name, size) for name, size in _sizes(n, side).items()]
    if all(os.path.isfile(file) and os.path.getsize(file) == size for file, size in files):
        return np.fromfile(cache / "done", bool)
    return np.zeros(n, bool)


def _sizes(n: int, side: int) -> dict[str, int]:
    return {"pixels": 3 * n * side**2, "ratios": 4 * n, "done": n}


def _key(record: dict, cfg: CFG, train: bool) -> str:
    """A hash of all that determines the pixels: the files, the settings and the libraries that resize."""
    import cv2

    crops = train and cfg.crop_scale < 1
    geometry = (cfg.interpolation, *(() if crops else (cfg.size, cfg.resize)))
    content = json.dumps([_FORMAT, record, crops, geometry, PIL.__version__, cv2.__version__])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _build(cache: Path, files: ImageFiles, record: dict) -> None:
    """Build a cache, or complete it. Raises OSError where there is no room, and removes the unfinished cache."""
    sizes = _sizes(len(files), files.side)
    rows = np.flatnonzero(~rows_done(cache, len(files), files.side))
    try:
        if len(rows) == len(files):
            check_room(cache.parent, sizes["pixels"], f"{len(files):,} images", "--no-image-cache")
            cache.mkdir(exist_ok=True)
            (cache / "files.json").write_text(json.dumps(record))
            for name, size in sizes.items():
                allocate(cache / name, size)
        if len(rows):  # else another process has completed it meanwhile
            _write_rows(cache, files, rows)
    except OSError:
        shutil.rmtree(cache, ignore_errors=True)
        raise


def _write_rows(cache: Path, files: ImageFiles, rows: np.ndarray) -> None:
    """Decode these rows; while a chunk of them is written the next one is decoded."""
    from tqdm import tqdm

    pixels = np.memmap(cache / "pixels", np.uint8, "r+", shape=(len(files), files.side, files.side, 3))
    ratios, done = np.memmap(cache / "ratios", np.float32, "r+"), np.memmap(cache / "done", bool, "r+")
    pool = ThreadPoolExecutor(os.cpu_count() or 1)  # decoders release the GIL
    chunks = np.split(rows, range(_CHUNK, len(rows), _CHUNK))
    try:
        with tqdm(total=len(rows), desc="Caching images", unit=" images", leave=False) as bar:
            ahead = pool.map(files.decode, chunks[0])
            for k, chunk in enumerate(chunks):
                decoded, ahead = ahead, pool.map(files.decode, chunks[k + 1] if k + 1 < len(chunks) else ())
                for row, (square, ratio) in zip(chunk, decoded, strict=True):
                    pixels[row], ratios[row] = square, ratio
                    bar.update()
                pixels.flush()
                ratios.flush()
                done[chunk] = True  # only now: what is recorded as done is on the disk, even after a power failure
                done.flush()
    finally:
        pool.shutdown(cancel_futures=True)  # after a corrupt image, or Ctrl-C
