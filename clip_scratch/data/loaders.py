"""Image-centred batches: B images, the captions drawn for them, and the ids that say which belong together.

Which images meet in a batch, which captions they bring and how each is augmented depend on (seed, epoch,
image) alone, so a run that stops in the middle of an epoch goes on exactly as if it had not.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .captions import image_folder, plain_words
from .images import image_transform, load_image
from .tokenizer import TokenTable, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..config import CFG

Batch = dict[str, torch.Tensor | list[str]]


class CaptionedImages(Dataset):
    """The distinct images of a caption table, each with the rows of its captions.

    An item is asked for as (epoch, image number): the same pair always gives the same pixels and captions.
    """

    def __init__(self, table: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, train: bool, cfg: CFG):
        first = table.drop_duplicates("image_id")
        self.names = first["image"].tolist()
        self.image_ids = first["image_id"].to_numpy()
        self.folder: Path = image_folder(cfg, table)
        groups = table.reset_index(drop=True).groupby("image_id", sort=False).indices
        self.rows: list[np.ndarray] = [groups[i] for i in self.image_ids]  # caption rows of each image
        self.tokens: TokenTable = tokenize(table["caption"].tolist(), tokenizer, cfg.max_length)
        # captions that read the same, in whatever case and spacing, share an id: they are positives of each other
        self.caption_ids = pd.factorize(plain_words(table["caption"]))[0]
        self.per_image = cfg.captions_per_image if train else 0  # 0: all of them
        self.seed = cfg.seed if train else None
        self.transform = image_transform(cfg, train)

    def __len__(self) -> int:
        return len(self.names)

    def captions_of(self, number: int, epoch: int) -> np.ndarray:
        """The caption rows that image `number` brings to `epoch`: in turn, so that every caption is seen."""
        rows = self.rows[number]
        if not self.per_image or self.per_image >= len(rows):
            return rows
        return rows[(epoch * self.per_image + np.arange(self.per_image)) % len(rows)]

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int, np.ndarray]:
        epoch, number = key
        if self.seed is not None:
            self.transform.set_random_seed(int(np.random.SeedSequence((self.seed, epoch, number)).generate_state(1)[0]))
        pixels = self.transform(image=load_image(self.folder / self.names[number]))["image"]  # (3, S, S) uint8
        return pixels, number, self.captions_of(number, epoch)

    def collate(self, items: Sequence[tuple[torch.Tensor, int, np.ndarray]]) -> Batch:
        """Stack B images and pad their C captions to the longest of the batch."""
        pixels, numbers, rows = zip(*items, strict=True)
        image_ids = torch.from_numpy(self.image_ids[list(numbers)])
        captions = np.concatenate(rows)
        input_ids, attention_mask = self.tokens.batch(captions)
        return {
            "pixels": torch.stack(pixels),  # (B, 3, S, S) uint8
            "input_ids": input_ids,  # (C, L)
            "attention_mask": attention_mask,  # (C, L)
            "image_ids": image_ids,  # (B,)
            "caption_image_ids": image_ids.repeat_interleave(torch.tensor([len(r) for r in rows])),  # (C,)
            "caption_ids": torch.from_numpy(self.caption_ids[captions]),  # (C,)
            "names": [self.names[n] for n in numbers],
        }


class EpochBatches(Sampler):
    """Batches of (epoch, image number): shuffled by (seed, epoch) for training, in order for evaluation."""

    def __init__(self, n: int, batch_size: int, seed: int | None):
        self.n, self.batch_size, self.seed = n, min(batch_size, n), seed
        self.start()

    def start(self, epoch: int = 0, skip: int = 0, stop: int | None = None) -> None:
        """Give batches `skip` up to `stop` of `epoch`."""
        self.epoch, self.skip, self.stop = epoch, skip, stop

    def __len__(self) -> int:
        # A short last batch would be a batch of easier negatives: training leaves it out, evaluation does not.
        return self.n // self.batch_size if self.seed is not None else -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if self.seed is None:
            order = np.arange(self.n)
        else:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.n)
        for k in range(self.skip, len(self) if self.stop is None else min(len(self), self.stop)):
            yield [(self.epoch, int(i)) for i in order[k * self.batch_size : (k + 1) * self.batch_size]]


class Loader(DataLoader):
    """A DataLoader over image-centred batches that can start anywhere: `loader.start(epoch, skip)`."""

    def __init__(self, data: CaptionedImages, batch_size: int, num_workers: int):
        self.batches = EpochBatches(len(data), batch_size, data.seed)
        super().__init__(
            data,
            batch_sampler=self.batches,
            collate_fn=data.collate,
            num_workers=num_workers,
            worker_init_fn=_ignore_ctrl_c,
            generator=torch.Generator(),  # else each start draws from the global one, and a resume would differ
            pin_memory=torch.cuda.is_available(),
        )

    def start(self, epoch: int, skip: int = 0, stop: int | None = None) -> Loader:
        """The batches `skip` up to `stop` of `epoch`."""
        self.batches.start(epoch, skip, stop)
        return self


def _ignore_ctrl_c(_: int) -> None:
    """Ctrl-C is the training process's to handle; a worker that dies of it would hide the clean stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def build_loaders(
    table: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, mode: Literal["train", "valid"], cfg: CFG
) -> Loader:
    """A loader over the images of a caption table (tutorial name).

    "train": shuffled, augmented, `captions_per_image` captions each, no short last batch.
    "valid": in order, not augmented, every caption.
    """
    cfg = cfg() if isinstance(cfg, type) else cfg
    data = CaptionedImages(table, tokenizer, mode == "train", cfg)
    return Loader(data, cfg.batch_size, cfg.num_workers)
