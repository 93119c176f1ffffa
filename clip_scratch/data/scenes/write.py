"""The built-in data set as files: drawn scenes of coloured shapes, five captions each. No download, no licence."""

from __future__ import annotations

import contextlib
import csv
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import cv2

from ...config import CFG
from ...errors import UserError
from ...files import new_folder, sole_writer
from .describe import describe_scene
from .draw import draw_scene
from .scene import sample_scenes

SPLIT_LISTS = {"train": "trainImages.txt", "valid": "devImages.txt", "test": "testImages.txt"}


def write_scenes(folder: str | Path, n: int, seed: int, progress: bool = True) -> float:
    """Write `n` scenes as an ordinary data set into `folder`; returns the image-caption pairs per second.

    The folder then holds Images/000000.png ..., captions.txt (image,caption; five rows per image) and the split lists
    trainImages.txt, devImages.txt and testImages.txt. The folder appears whole or not at all.

    Raises UserError if the folder exists, if n < 30, or where it cannot be written.
    """
    folder = Path(folder)
    with _writer(folder):
        if folder.exists():
            raise UserError(f"{folder} exists already: remove it, or choose another folder")
        return _write(folder, n, seed, progress)


def ensure_scenes(cfg: CFG) -> tuple[Path, Path]:
    """(captions file, image folder) of the built-in set of cfg.n_scenes scenes and cfg.seed, drawn if missing.

    It is in data/scenes-N-SEED of the current directory. Raises UserError where that cannot be written.
    """
    folder = Path("data") / f"scenes-{cfg.n_scenes}-{cfg.seed}"
    if not _is_complete(folder, cfg.n_scenes):
        with _writer(folder):
            if not _is_complete(folder, cfg.n_scenes):  # another process may have drawn it meanwhile
                shutil.rmtree(folder, ignore_errors=True)
                _write(folder, cfg.n_scenes, cfg.seed)
    return folder / "captions.txt", folder / "Images"


@contextlib.contextmanager
def _writer(folder: Path) -> Iterator[None]:
    """`sole_writer`, with the errors of the disk as UserError."""
    try:
        with sole_writer(folder):
            yield
    except OSError as error:
        raise UserError(f"cannot write the scenes to {folder.absolute()}: {error}. Use another folder.") from error


def _is_complete(folder: Path, n: int) -> bool:
    try:
        listed = {name for file in SPLIT_LISTS.values() for name in (folder / file).read_text("utf-8").split()}
        images = set(os.listdir(folder / "Images"))
    except OSError:
        return False
    return len(listed) == n and listed <= images and (folder / "captions.txt").is_file()


def _write(folder: Path, n: int, seed: int, progress: bool = True) -> float:
    from tqdm import tqdm

    if n < 30:
        raise UserError(f"the built-in data set needs at least 30 scenes, not {n}")
    start = time.perf_counter()
    names: dict[str, list[str]] = {split: [] for split in SPLIT_LISTS}
    with new_folder(folder) as unfinished:
        (unfinished / "Images").mkdir()
        with open(unfinished / "captions.txt", "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(("image", "caption"))
            scenes = tqdm(sample_scenes(n, seed), f"drawing {folder}", n, unit="img", disable=not progress)
            for i, (split, scene) in enumerate(scenes):
                name = f"{i:06d}.png"
                _, png = cv2.imencode(".png", draw_scene(scene)[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 4])
                (unfinished / "Images" / name).write_bytes(png)
                captions = describe_scene(scene, random.Random(f"captions {seed} {i}"))
                rows.writerows((name, caption) for caption in captions)
                names[split].append(name)
            file.flush()
            os.fsync(file.fileno())
        for split, list_name in SPLIT_LISTS.items():
            (unfinished / list_name).write_text("".join(f"{name}\n" for name in names[split]), "utf-8")
    return 5 * n / (time.perf_counter() - start)
