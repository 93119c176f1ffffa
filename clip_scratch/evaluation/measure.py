"""A model's ranks on a caption table, and the record of a pretrained CLIP's ranks before fine-tuning."""

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..config import CFG
from ..data.captions import check_images, fingerprint_of, image_folder, plain_words, read_captions
from ..data.loaders import build_loaders
from ..data.source import DataSource
from ..environment import RECORD
from ..errors import UserError
from ..files import write_json
from ..models.clip import DualEncoder
from ..models.saved import best_folder
from ..retrieval.embed import embed_batches
from .retrieval import ranks, recalls_of

ZERO_SHOT = "zero_shot.json"  # in the folder of a run that fine-tuned a pretrained CLIP
WHOLE = "all"  # the split of a captions file that has none
_RANKS = ("image_of_caption", "image_rank", "text_rank")


def open_captions(cfg: CFG, captions_path: str = "", image_path: str = "") -> DataSource:
    """The captions of a run, or of another file (in the split "all" if it has none); images are not checked yet."""
    if captions_path:
        cfg = dataclasses.replace(
            cfg, captions_path=captions_path, image_path=image_path, captions_format="auto", image_column="",
            caption_column="", label_column="", valid_captions_path="", test_captions_path="",
            valid_fraction=0.0, test_fraction=0.0,
        )  # fmt: skip
    elif image_path:
        cfg = dataclasses.replace(cfg, image_path=image_path)
    table = read_captions(cfg)
    if captions_path and set(table["split"]) == {"train"}:
        table = table.assign(split=WHOLE)
    folder = image_folder(cfg, table)
    return DataSource(dataclasses.replace(cfg, image_path=str(folder)), table, folder)


def checked_split(source: DataSource, split: str) -> tuple[DataSource, str]:
    """The rows of a split, their images checked, and its name: "all" where the table has no splits.

    Raises UserError for a split without images and for images that are missing or damaged.
    """
    split = WHOLE if set(source.table["split"]) == {WHOLE} else split
    rows = check_images(source.split(split), source.image_folder, source.cfg.on_bad_image)
    return dataclasses.replace(source, table=rows), split


def data_changed(run: str | Path, split: str, table: pd.DataFrame) -> bool:
    """Whether a split of the captions that a run was trained with has other rows now; False where no record tells."""
    try:
        known = json.loads((best_folder(run).parent / RECORD).read_text())["data"][split]
    except (OSError, ValueError, KeyError, TypeError):  # of an older run, only best/, or damaged
        return False
    return known != fingerprint_of(table)


def count_ambiguous(table: pd.DataFrame) -> int:
    """How many captions also belong, up to case and spacing, to another image of the table."""
    return int((table.groupby(plain_words(table["caption"]))["image_id"].transform("nunique") > 1).sum())


@dataclass
class Measured:
    """A model's ranks on a split: of every caption's image, and of every image's best caption."""

    images: list[str]  # (N,) names
    image_of_caption: torch.Tensor  # (C,) rows of `images`
    image_rank: torch.Tensor  # (C,) from 1
    text_rank: torch.Tensor  # (N,) from 1
    fingerprint: str  # `fingerprint_of` the captions

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The recalls, median ranks and rsum of `recall_at_k`."""
        return recalls_of(self.image_rank, self.text_rank)

    def hits(self) -> tuple[np.ndarray, np.ndarray]:
        """R@1 image to text and text to image as counts per image: its queries that hit, and all its queries, (N, 2).

        Sorted by image name, so that the counts of two models line up.
        """
        order, own = np.argsort(self.images), self.image_of_caption.numpy()
        hits = self.text_rank.numpy() <= 1, np.bincount(own, self.image_rank.numpy() <= 1)
        sizes = np.ones(len(order)), np.bincount(own)
        return np.stack(hits, 1)[order], np.stack(sizes, 1)[order]


def measure(model: DualEncoder, source: DataSource) -> Measured:
    """Rank all images and captions of an opened split, in the protocol of `recall_at_k`."""
    cfg = dataclasses.replace(source.cfg, image_cache=False)  # each image is read once
    loader = build_loaders(source.table, model.tokenizer, "valid", cfg)
    images, texts, own = embed_batches(model, loader)
    return Measured(loader.dataset.names, own, *ranks(images, texts, own), fingerprint_of(source.table))


def save_zero_shot(path: Path, model_name: str, measured: Measured) -> None:
    """Record the ranks of the untouched model on a run's validation split, for `read_zero_shot`."""
    head = {"model_name": model_name, "split": "valid", "fingerprint": measured.fingerprint, "images": measured.images}
    write_json(path, head | {name: getattr(measured, name).tolist() for name in _RANKS})


def read_zero_shot(path: Path) -> Measured:
    """The ranks that `save_zero_shot` wrote. Raises UserError where the file is damaged."""
    try:
        saved = json.loads(path.read_text())
        return Measured(list(saved["images"]), *(torch.tensor(saved[name]) for name in _RANKS), saved["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): train the run again, or delete the file") from error
