"""The built-in data set: small drawn scenes of coloured shapes, five captions each. No download, no licence.

A scene is one to three things, each of a shape, a colour, a size and a fill, in one relation on one background.
Most scenes come with twins that say the same words of another picture (a red circle left of a blue square; a blue
circle left of a red square), so a model must learn which attribute belongs to which thing.

`sample_scenes`, `draw` and `describe` are pure; `write_scenes` and `ensure_scenes` make files.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2

from ...errors import UserError
from .describe import describe
from .draw import COLOURS, PLACES, RADIUS, SHAPES, TONES, draw

FILLS = ("solid", "striped", "dotted", "outlined")
PATTERNS = ("plain", "lined", "gridded", "speckled")
SPLIT_LISTS = {"train": "trainImages.txt", "valid": "devImages.txt", "test": "testImages.txt"}
# Two and three things, in the order of Scene.things. Its mirror image ("right of") is the same scene, so has no name.
PAIRS = ("left", "above", "inside", "front")
TRIPLES = ("row", "column", "under", "over")  # left to right; top to bottom; third under, over the first two
UNSEEN = {"dark": ("black", "brown", "purple")}  # colours that vanish on a tone
HOLDERS = ("circle", "square", "hexagon", "diamond", "flower")  # shapes with room for a thing inside


@dataclass(frozen=True)
class Thing:
    """One coloured shape."""

    shape: str
    colour: str
    size: str
    fill: str


@dataclass(frozen=True)
class Scene:
    """The canonical description of a picture: two scenes are equal where a full caption of each would be."""

    relation: str  # a place for one thing; one of PAIRS or TRIPLES for more
    things: tuple[Thing, ...]
    tone: str
    pattern: str


# --- Which scenes there are -------------------------------------------------------------------------------------


def sample_scenes(n: int, seed: int) -> Iterator[tuple[str, Scene]]:
    """`n` different scenes, each with its split, in a fixed order: validation, test, training.

    About 80/10/10, at most 500 for validation and for test: from 5,000 scenes on, these two are the same whatever
    `n`, so that training on more scenes is measured on the same pictures. Twins share a split.
    """
    rng = random.Random(f"scenes {seed}")
    seen: set[Scene] = set()
    held_out = min(n // 10, 500)
    for split, wanted in (("valid", held_out), ("test", held_out), ("train", n - 2 * held_out)):
        while wanted:
            for scene in _family(rng)[:wanted]:
                if scene not in seen:
                    seen.add(scene)
                    wanted -= 1
                    yield split, scene


def _family(rng: random.Random) -> list[Scene]:
    """A random scene and, most of the time, one to three of its twins."""
    relation = rng.choice(rng.choices((tuple(PLACES), PAIRS, TRIPLES), weights=(20, 50, 30))[0])
    count = 3 if relation in TRIPLES else 2 if relation in PAIRS else 1
    sizes = ("small", "big") if relation == "inside" else ()
    scene = None
    while scene is None or not _drawable(scene):
        things = [
            Thing(rng.choice(tuple(SHAPES)), rng.choice(tuple(COLOURS)), rng.choice(tuple(RADIUS)), rng.choice(FILLS))
            for _ in range(count)
        ]
        things[: len(sizes)] = [replace(thing, size=size) for thing, size in zip(things, sizes, strict=False)]
        scene = Scene(relation, tuple(things), rng.choice(tuple(TONES)), rng.choice(PATTERNS))
    twins = [twin for twin in _twins(scene) if _drawable(twin) and twin != scene]
    return [scene, *rng.sample(twins, min(len(twins), rng.randint(0, 3)))]


def _twins(scene: Scene) -> Iterator[Scene]:
    """Scenes that differ from this one only in what belongs to what, or in the relation."""
    for i, j in itertools.combinations(range(len(scene.things)), 2):
        for names in (("colour",), ("shape",), ("size", "fill"), ("shape", "colour", "size", "fill")):
            things = list(scene.things)
            things[i] = replace(things[i], **{name: getattr(scene.things[j], name) for name in names})
            things[j] = replace(things[j], **{name: getattr(scene.things[i], name) for name in names})
            yield replace(scene, things=tuple(things))
    for relations in (PLACES, PAIRS, TRIPLES):
        if scene.relation in relations:
            yield from (replace(scene, relation=relation) for relation in relations)


def _drawable(scene: Scene) -> bool:
    """Whether every thing can be seen, told from the others, and fits into the picture."""
    relation, things = scene.relation, scene.things
    r = [RADIUS[thing.size] for thing in things]
    if len(set(things)) < len(things) or any(thing.colour in UNSEEN.get(scene.tone, ()) for thing in things):
        return False
    if relation == "inside":
        roomy = things[1].shape in HOLDERS and things[1].fill in ("solid", "outlined")
        return roomy and (things[0].size, things[1].size) == ("small", "big") and things[0].colour != things[1].colour
    if relation == "front":  # what is in front hides some of what is behind, and leaves enough of it
        hides = things[0].shape != "crescent" and r[0] < r[1]
        compact = things[1].shape in (*HOLDERS, "triangle", "heart") and things[0].colour != things[1].colour
        return hides and compact and "outlined" not in (things[0].fill, things[1].fill)
    if relation in ("row", "column"):
        return sum(r) <= 0.44
    if relation in ("under", "over"):
        return max(r[:2]) + r[2] <= 0.42 and r[0] + r[1] <= 0.42
    return True


# --- Files ------------------------------------------------------------------------------------------------------


def write_scenes(folder: str | Path, n: int, seed: int, workers: int | None = None, progress: bool = True) -> float:
    """Write `n` scenes as an ordinary data set into `folder`, and return the image-caption pairs per second.

    The folder then holds Images/000000.png ..., captions.txt (image,caption; five rows an image) and the split lists
    trainImages.txt, devImages.txt and testImages.txt. It depends on `n` and `seed` alone, not on `workers` (by default
    one process a core). The folder appears whole or not at all.

    Raises UserError if it is there already, if n < 30, or where it cannot be written.
    """
    folder = Path(folder)
    with _sole_writer(folder):
        if folder.exists():
            raise UserError(f"{folder} exists already: remove it, or name another folder")
        return _write(folder, n, seed, workers, progress)


def ensure_scenes(cfg) -> tuple[Path, Path]:
    """(captions file, image folder) of the built-in set of cfg.n_scenes scenes and cfg.seed, drawn where absent.

    It lies in data/scenes-N-SEED of the current directory. Raises UserError where that cannot be written.
    """
    folder = Path("data") / f"scenes-{cfg.n_scenes}-{cfg.seed}"
    with _sole_writer(folder):
        if not _is_complete(folder, cfg.n_scenes):
            shutil.rmtree(folder, ignore_errors=True)
            _write(folder, cfg.n_scenes, cfg.seed, workers=None, progress=True)
    return folder / "captions.txt", folder / "Images"


@contextlib.contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """Let one process at a time write `folder`; the others wait. What the disk refuses becomes a UserError."""
    import filelock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.parent / f".{folder.name}.lock"):
            yield
    except OSError as error:
        where = folder.absolute()
        raise UserError(
            f"cannot write the drawn scenes to {where}: {error.strerror}. Go to a folder of yours"
        ) from error


def _is_complete(folder: Path, n: int) -> bool:
    lists = [folder / name for name in SPLIT_LISTS.values()]
    if not all(path.is_file() for path in (*lists, folder / "captions.txt")):
        return False
    listed = set(itertools.chain.from_iterable(path.read_text().split() for path in lists))
    return len(listed) == n and listed <= {entry.name for entry in os.scandir(folder / "Images")}


def _write(folder: Path, n: int, seed: int, workers: int | None, progress: bool) -> float:
    from tqdm import tqdm

    if n < 30:
        raise UserError(f"a drawn data set takes at least 30 scenes, not {n}")
    start = time.perf_counter()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        (partial / "Images").mkdir(parents=True)
        names: dict[str, list[str]] = {split: [] for split in SPLIT_LISTS}
        with open(partial / "captions.txt", "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(("image", "caption"))
            with tqdm(total=n, desc=f"drawing {folder}", unit="img", disable=not progress) as bar:
                for split, name, captions in _drawn(partial / "Images", n, seed, workers):
                    names[split].append(name)
                    rows.writerows((name, caption) for caption in captions)
                    bar.update()
            _sync(file)
        for split, list_name in SPLIT_LISTS.items():
            with open(partial / list_name, "w", encoding="utf-8") as file:
                file.writelines(f"{name}\n" for name in names[split])
                _sync(file)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return 5 * n / (time.perf_counter() - start)


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _drawn(folder: Path, n: int, seed: int, workers: int | None) -> Iterator[tuple[str, str, list[str]]]:
    """(split, image name, captions) of every scene, in order, its image written into `folder`."""
    if workers is None:  # a small set is drawn sooner than processes start
        workers = 1 if n < 500 else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    numbered = enumerate(sample_scenes(n, seed))
    chunks = iter(lambda: list(itertools.islice(numbered, 64)), [])
    draw_chunk = functools.partial(_draw_chunk, folder, seed)
    if workers == 1:
        yield from itertools.chain.from_iterable(map(draw_chunk, chunks))
        return
    # fork where it is safe: spawn would run an unguarded script of the caller's once more in every worker.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with context.Pool(workers, initializer=_start_worker) as pool:
        yield from itertools.chain.from_iterable(pool.imap(draw_chunk, chunks))


def _start_worker() -> None:
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _draw_chunk(
    folder: Path, seed: int, chunk: list[tuple[int, tuple[str, Scene]]]
) -> list[tuple[str, str, list[str]]]:
    done = []
    for i, (split, scene) in chunk:
        name = f"{i:06d}.png"
        _, png = cv2.imencode(".png", draw(scene)[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 4])
        (folder / name).write_bytes(png)
        done.append((split, name, describe(scene, random.Random(f"captions {seed} {i}"))))
    return done
