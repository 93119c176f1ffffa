"""The built-in data set as files: drawn scenes of coloured shapes, five captions each. No download, no licence."""

import csv
import random
from collections.abc import Iterator
from pathlib import Path

import cv2

from ...config import CFG
from ...errors import UserError
from ...files import new_folder, sole_writer
from .describe import describe_scene
from .draw import draw_scene
from .scene import Scene, sample_scenes

SPLIT_LISTS = {"train": "trainImages.txt", "valid": "devImages.txt", "test": "testImages.txt"}


def write_scenes(folder: str | Path, n: int, seed: int, progress: bool = True, exist_ok: bool = False) -> None:
    """Write `n` scenes as an ordinary data set into `folder`.

    The folder then holds Images/000000.png ..., captions.txt (image,caption; five rows per image) and the split lists
    trainImages.txt, devImages.txt and testImages.txt. The folder appears whole or not at all.

    Raises UserError if n < 30, if the folder exists and `exist_ok` is False, or where it cannot be written.
    """
    folder = Path(folder)
    if n < 30:
        raise UserError(f"the built-in data set needs at least 30 scenes, not {n}")
    try:
        with sole_writer(folder):
            if not folder.exists():
                _write(folder, n, seed, progress)
            elif not exist_ok:
                raise UserError(f"{folder} exists already: remove it, or choose another folder")
    except OSError as error:
        raise UserError(f"cannot write the scenes to {folder.absolute()}: {error}. Use another folder.") from error


def ensure_scenes(cfg: CFG) -> tuple[Path, Path]:
    """(captions file, image folder) of the built-in set of cfg.n_scenes scenes and cfg.seed, drawn if missing.

    It is in data/scenes-N-SEED of the current directory. Raises UserError where that cannot be written.
    """
    folder = Path("data") / f"scenes-{cfg.n_scenes}-{cfg.seed}"
    if not folder.exists():
        write_scenes(folder, cfg.n_scenes, cfg.seed, exist_ok=True)  # another process may draw it meanwhile
    return folder / "captions.txt", folder / "Images"


def training_captions(n: int, seed: int) -> list[str]:
    """The captions of the training scenes among `n`, without drawing any."""
    return [caption for split, _, captions in _described(n, seed) if split == "train" for caption in captions]


def _described(n: int, seed: int) -> Iterator[tuple[str, Scene, list[str]]]:
    for i, (split, scene) in enumerate(sample_scenes(n, seed)):
        yield split, scene, describe_scene(scene, random.Random(f"captions {seed} {i}"))


def _write(folder: Path, n: int, seed: int, progress: bool) -> None:
    from tqdm import tqdm

    rows, names = [("image", "caption")], {split: [] for split in SPLIT_LISTS}
    with new_folder(folder) as unfinished:
        (unfinished / "Images").mkdir()
        scenes = tqdm(_described(n, seed), f"drawing {folder}", n, unit="img", disable=not progress)
        for i, (split, scene, captions) in enumerate(scenes):
            name = f"{i:06d}.png"
            _, png = cv2.imencode(".png", draw_scene(scene)[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 4])
            (unfinished / "Images" / name).write_bytes(png)
            rows += [(name, caption) for caption in captions]
            names[split].append(name)
        with open(unfinished / "captions.txt", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        for split, file_name in SPLIT_LISTS.items():
            (unfinished / file_name).write_text("".join(f"{name}\n" for name in names[split]), "utf-8")
