"""What a model finds on a caption table: the rank of each right answer, and the record of the zero-shot model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..config import CFG
from ..data.captions import fingerprint_of
from ..data.loaders import build_loaders
from ..errors import UserError
from ..files import write_json
from ..models.clip import DualEncoder
from ..retrieval.embed import embed_batches
from .retrieval import ranks, recalls_of

if TYPE_CHECKING:
    import pandas as pd

ZERO_SHOT = "zero_shot.json"  # in the folder of a run that began with a pretrained CLIP


@dataclass
class Measured:
    """The ranks that a model reached on a split: of every caption's image and of every image's best caption."""

    images: list[str]  # (N,) names
    image_of_caption: torch.Tensor  # (C,) rows of `images`
    image_rank: torch.Tensor  # (C,) from 1
    text_rank: torch.Tensor  # (N,) from 1
    fingerprint: str = ""  # `fingerprint_of` the captions; empty where it is not known

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The figures of `recall_at_k`."""
        return recalls_of(self.image_rank, self.text_rank)

    def captions_per_image(self) -> dict[str, int]:
        counts = torch.bincount(self.image_of_caption, minlength=len(self.images))
        return dict(zip(self.images, counts.tolist(), strict=True))

    def hits(self) -> tuple[np.ndarray, np.ndarray]:
        """R@1 image to text and text to image as counts of an image: its queries that hit, and all its queries.

        Both (N, 2), the images in the order of their names, so that those of two models line up.
        """
        n, own = len(self.images), self.image_of_caption
        found = torch.bincount(own, (self.image_rank <= 1).double(), minlength=n)
        hits = torch.stack([(self.text_rank <= 1).double(), found], 1)
        sizes = torch.stack([torch.ones(n).double(), torch.bincount(own, minlength=n).double()], 1)
        order = sorted(range(n), key=self.images.__getitem__)
        return hits[order].numpy(), sizes[order].numpy()


def measure(model: DualEncoder, cfg: CFG, table: pd.DataFrame) -> Measured:
    """Rank all images and captions of a caption table, in the protocol of `recall_at_k`."""
    cfg = dataclasses.replace(cfg, image_cache=False)  # each image is looked at once
    loader = build_loaders(table, model.tokenizer, "valid", cfg)
    images, texts, own = embed_batches(model, loader)
    return Measured(loader.dataset.names, own, *ranks(images, texts, own), fingerprint_of(table))


def save_zero_shot(
    path: str | Path,
    model_name: str,
    names: Sequence[str],
    image_of_caption: torch.Tensor | Sequence[int],
    image_rank: torch.Tensor | Sequence[int],
    text_rank: torch.Tensor | Sequence[int],
    fingerprint: str = "",
) -> None:
    """Keep what the untouched model found on a run's validation split, for `read_zero_shot`.

    Names of the N images, the image row of each caption (C,), the two results of `ranks`, and `fingerprint_of` the
    split's captions.
    """
    lists = {"image_of_caption": image_of_caption, "image_rank": image_rank, "text_rank": text_rank}
    lists = {name: torch.as_tensor(values).tolist() for name, values in lists.items()}
    head = {"model_name": model_name, "split": "valid", "fingerprint": fingerprint, "images": list(names)}
    write_json(Path(path), head | lists)


def read_zero_shot(path: str | Path) -> tuple[str, Measured]:
    """The model's name and ranks that `save_zero_shot` wrote. Raises UserError where the file is damaged."""
    try:
        saved = json.loads(Path(path).read_text())
        own, image_rank, text_rank = (
            torch.tensor(saved[name], dtype=torch.long) for name in ("image_of_caption", "image_rank", "text_rank")
        )
        images = list(saved["images"])
        every_image = list(range(len(images)))
        if not images or len(text_rank) != len(images) or len(image_rank) != len(own):
            raise ValueError("its lists do not fit together")
        if sorted(set(own.tolist())) != every_image:
            raise ValueError("its captions are not those of its images")
        fingerprint = str(saved.get("fingerprint", ""))  # files of older runs have none
        return saved["model_name"], Measured(images, own, image_rank, text_rank, fingerprint)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({error}): train the run again, or delete the file") from error
