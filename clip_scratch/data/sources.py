"""The published data sets: where their archives are, how these are laid out, and what they become."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..config import CFG
from ..errors import UserError
from ..files import sole_writer, write_atomically
from .download import Remote, download
from .unpack import unpack

_KARPATHY = Remote("https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip")
_FLICKR8K = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
_FOOD = Remote("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", digest="md5:85eeb15f3717b99a5da872d97d918f87")
_COCO = "http://images.cocodataset.org/zips"


@dataclass(frozen=True)
class Source:
    """A data set: `rules` say where the files of any of its archives go (see `unpack`)."""

    texts: tuple[str, ...]  # the captions file, then others that the published split needs
    images: str  # the image folder
    rules: dict[str, str]
    # What is downloaded: None for texts, or how the names of the images in it begin
    files: tuple[tuple[Remote, str | None], ...] = ()
    by_hand: str = ""  # what cannot be: from whom to get it, and how
    others: tuple[str, ...] = ()  # captions files without the published split
    finish: Callable[[Path], None] | None = None  # writes the captions file


def _food_captions(folder: Path) -> None:
    """captions.csv of Food-101: a caption from the name of each image's class, which is its label too."""
    import pandas as pd

    if not all((folder / f"meta/{split}.txt").is_file() for split in ("train", "test")):
        return
    parts = []
    for split in ("train", "test"):
        names = pd.Series((folder / f"meta/{split}.txt").read_text().split())
        labels = names.str.partition("/")[0].str.replace("_", " ")
        captions = "a photo of " + labels + ", a type of food"
        parts.append(pd.DataFrame({"image": names + ".jpg", "caption": captions, "label": labels, "split": split}))
    table = pd.concat(parts)
    write_atomically(folder / "captions.csv", lambda temporary: table.to_csv(temporary, index=False))


SOURCES = {
    "flickr8k": Source(
        ("Flickr8k.token.txt", *(f"Flickr_8k.{split}Images.txt" for split in ("train", "dev", "test"))), "Images",
        {
            r"(?:.*/)?(Flickr8k\.token\.txt|Flickr_8k\.\w+Images\.txt)": r"\1",
            r"(?:.*/)?captions\.txt": "Flickr8k.token.txt",  # Kaggle's, which is read by its content
            r"(?:.*/)?([^/]+\.jpg)": r"Images/\1",
        },
        (
            (Remote(f"{_FLICKR8K}/Flickr8k_text.zip", digest="md5:bf6c1abcb8e4a833b7f922104de18627"), None),
            (Remote(f"{_FLICKR8K}/Flickr8k_Dataset.zip", digest="md5:f18a1e2920de5bd84dae7cf08ec78978"), ""),
        ),
        others=("captions.txt",),
    ),
    "flickr30k": Source(
        ("dataset_flickr30k.json",), "flickr30k_images",
        {
            r"(?:.*/)?(dataset_flickr30k\.json|results\.csv|results_20130124\.token)": r"\1",
            r"(?:.*/)?([^/]+\.jpg)": r"flickr30k_images/\1",
        },
        ((_KARPATHY, None),),
        "Flickr30k is free for research, but may not be redistributed: request the images (flickr30k-images.tar.gz) at "
        "https://shannon.cs.illinois.edu/DenotationGraph/ or get the zip of https://www.kaggle.com/datasets/hsankesara/"
        "flickr-image-dataset, which needs an account",
        others=("results.csv", "results_20130124.token"),
    ),
    "coco": Source(
        ("dataset_coco.json",), "images",
        {r"(?:.*/)?(dataset_coco\.json)": r"\1", r"(?:.*/)?((?:train|val)2014/[^/]+\.jpg)": r"images/\1"},
        (
            (_KARPATHY, None),
            (Remote(f"{_COCO}/val2014.zip", digest="md5:a3d79f5ed8d289b7a7554ce06a5782b3"), "val2014/"),
            (Remote(f"{_COCO}/train2014.zip", digest="md5:0da8c0bd3d6becc4dcb32757491aca88"), "train2014/"),
        ),
    ),
    "food": Source(
        ("captions.csv",), "images",
        {r"(?:.*/)?meta/(train|test)\.txt": r"meta/\1.txt", r"(?:.*/)?images/([^/]+/[^/]+\.jpg)": r"images/\1"},
        ((_FOOD, None), (_FOOD, "")),
        finish=_food_captions,
    ),
    "indo_fashion": Source(
        ("train_data.json", "val_data.json", "test_data.json"), "images",
        {
            r"(?:.*/)?((?:train|val|test)_data\.json)": r"\1",
            r"(?:.*/)?images/((?:train|val|test)/[^/]+\.jpe?g)": r"images/\1",
        },
        by_hand="Indo Fashion is for research: get the zip of https://www.kaggle.com/datasets/validmodel/"
        "indo-fashion-dataset, which needs an account",
    ),
}  # fmt: skip


def fetch(name: str, folder: Path, archives: tuple[Path, ...] = (), url: str = "") -> None:
    """Make `folder` the data set `name`: from `archives` and those in the folder, then from what can be downloaded.

    Only what is missing is done. `url` is a mirror, in whose folder the files have their published names. Raises
    UserError for what only the user can get. Without its published split a data set is usable: that is printed.
    """
    source = SOURCES[name]
    folder.mkdir(parents=True, exist_ok=True)

    def take(archive: Path) -> None:
        if not archive.is_file():
            raise UserError(f"there is no archive {archive}")
        if not unpack(archive, folder, source.rules) and archive in archives:
            raise UserError(f"{archive} has nothing of {name}: its layout is not one of those known here")
        if source.finish and not (folder / source.texts[0]).is_file():
            source.finish(folder)

    with sole_writer(folder):
        for unfinished in folder.glob("*unpacked-*"):  # of a run that was killed
            shutil.rmtree(unfinished)
        for archive in [*archives, *archives_in(folder)]:
            if any(_missing(source, folder)):
                take(archive)
        if source.by_hand and not any(path.suffix in (".jpg", ".jpeg") for path in folder.rglob("*")):
            again = f"python -m clip_scratch.prepare {name} --archive FILE"
            raise UserError(f"{folder / source.images} not found. {source.by_hand}. Then: {again}")
        for file, prefix in source.files:
            texts, images = _missing(source, folder)
            if not (texts if prefix is None else any(image.startswith(prefix) for image in images)):
                continue
            try:
                take(download(Remote(f"{url}/{file.name}", file.size, file.digest) if url else file, folder))
            except UserError as error:
                if prefix is not None or not _captions(source, folder):
                    raise
                print(f"not the published split, but a random one: {error}", file=sys.stderr)
    if not _captions(source, folder):
        raise UserError(f"{folder / source.texts[0]} not found. {source.by_hand or 'Add the other --archive'}")


def archives_in(folder: Path) -> list[Path]:
    """The archives that lie in a data set's folder."""
    return sorted(path for pattern in ("*.zip", "*.tar", "*.tar.gz") for path in folder.glob(pattern))


def _captions(source: Source, folder: Path) -> bool:
    """Whether there are captions, be it without the published split."""
    return any((folder / name).is_file() for name in (source.texts[0], *source.others))


def _missing(source: Source, folder: Path) -> tuple[bool, list[str]]:
    """Whether a text file is missing, and the images that are missing of those that the captions name."""
    from .captions import read_table
    from .locate import find_images, locate

    texts = not all((folder / name).is_file() for name in source.texts)
    if not _captions(source, folder):
        return texts, []
    with contextlib.redirect_stderr(io.StringIO()):  # the check at the end prints it
        located = locate(cfg := CFG(captions_path=str(folder)))
        table = read_table(located, cfg)
        images = find_images(located, table)
    return texts, [name for name in table["image"].unique() if not (images / name).is_file()]
