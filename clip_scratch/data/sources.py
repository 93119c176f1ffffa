"""The published data sets: where their archives are, how these are laid out, and what they become."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..files import sole_writer, write_atomically, write_json
from .download import Remote, download
from .unpack import unpack

RECORD = ".unpacked"  # in a data set's folder: its archives that are done
_KARPATHY = Remote("https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip")
_FLICKR8K = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
_COCO = "http://images.cocodataset.org/zips"


@dataclass(frozen=True)
class Source:
    """A data set: `rules` say where the files of any of its archives go (see `unpack`)."""

    captions: str  # the captions file or one of them, below the data set's folder
    images: str  # the image folder
    rules: dict[str, str]
    files: tuple[Remote, ...] = ()  # what is downloaded
    by_hand: str = ""  # what cannot be: from whom to get it, and how
    finish: Callable[[Path], None] = lambda folder: None


def _food_captions(folder: Path) -> None:
    """captions.csv of Food-101: a caption from the name of each image's class, which is its label too."""
    import pandas as pd

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
        "Flickr8k.token.txt", "Images",
        {
            r"(?:.*/)?(Flickr8k\.token\.txt|Flickr_8k\.\w+Images\.txt)": r"\1",
            r"(?:.*/)?captions\.txt": "Flickr8k.token.txt",  # Kaggle's, which is read by its content
            r"(?:.*/)?([^/]+\.jpg)": r"Images/\1",
        },
        (Remote(f"{_FLICKR8K}/Flickr8k_text.zip"), Remote(f"{_FLICKR8K}/Flickr8k_Dataset.zip")),
    ),
    "flickr30k": Source(
        "dataset_flickr30k.json", "flickr30k_images",
        {r"(?:.*/)?(dataset_flickr30k\.json)": r"\1", r"(?:.*/)?([^/]+\.jpg)": r"flickr30k_images/\1"},
        (_KARPATHY,),
        "Flickr30k is free for research, but may not be redistributed: request the images (flickr30k-images.tar.gz) at "
        "https://shannon.cs.illinois.edu/DenotationGraph/ or get the zip of https://www.kaggle.com/datasets/hsankesara/"
        "flickr-image-dataset, which needs an account",
    ),
    "coco": Source(
        "dataset_coco.json", "images",
        {r"(?:.*/)?(dataset_coco\.json)": r"\1", r"(?:.*/)?((?:train|val)2014/[^/]+\.jpg)": r"images/\1"},
        (_KARPATHY, Remote(f"{_COCO}/val2014.zip"), Remote(f"{_COCO}/train2014.zip")),
    ),
    "food": Source(
        "captions.csv", "images",
        {r"(?:.*/)?meta/(train|test)\.txt": r"meta/\1.txt", r"(?:.*/)?images/([^/]+/[^/]+\.jpg)": r"images/\1"},
        (Remote("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", digest="md5:85eeb15f3717b99a5da872d97d918f87"),),
        finish=_food_captions,
    ),
    "indo_fashion": Source(
        "train_data.json", "images",
        {
            r"(?:.*/)?((?:train|val|test)_data\.json)": r"\1",
            r"(?:.*/)?images/((?:train|val|test)/[^/]+\.jpe?g)": r"images/\1",
        },
        by_hand="Indo Fashion is for research: get the zip of https://www.kaggle.com/datasets/validmodel/"
        "indo-fashion-dataset, which needs an account",
    ),
}  # fmt: skip


def fetch(name: str, folder: Path, archives: tuple[Path, ...] = (), url: str = "") -> None:
    """Make `folder` the data set `name`: download what can be, or take `archives`, and unpack it.

    What is there already is not done again. `url` is a mirror, in whose folder the files have their published names.
    Raises UserError for what only the user can get, or what the archives lack.
    """
    source = SOURCES[name]
    captions, images, record = folder / source.captions, folder / source.images, folder / RECORD
    folder.mkdir(parents=True, exist_ok=True)
    with sole_writer(record):
        if not record.is_file() and captions.is_file() and images.is_dir():
            return  # put there by hand
        done = json.loads(record.read_text()) if record.is_file() else []
        files = () if archives else source.files
        for file in [*archives, *files]:
            if file.name in done:
                continue
            if isinstance(file, Remote):
                file = download(Remote(f"{url}/{file.name}", file.size, file.digest) if url else file, folder)
            if not file.is_file():
                raise UserError(f"there is no archive {file}")
            if not unpack(file, folder, source.rules):
                raise UserError(f"{file} has nothing of {name}: its layout is not one of those known here")
            done.append(file.name)
            write_json(record, done)
        if images.is_dir() and not captions.is_file():
            source.finish(folder)
    missing = [str(path) for path in (captions, images) if not path.exists()]
    if missing and source.by_hand:
        again = f"python -m clip_scratch.prepare {name} --archive FILE"
        raise UserError(f"{' and '.join(missing)} not found. {source.by_hand}. Then: {again}")
    if missing:
        raise UserError(f"{' and '.join(missing)} not found in {', '.join(done)}: add the other --archive")
