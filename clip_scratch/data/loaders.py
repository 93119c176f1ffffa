"""Image-centred batches: B images, captions of each, and the ids that show which belong together.

The images of a batch, their captions and their augmentation depend on (seed, epoch, image) alone: a run that stops in
an epoch resumes exactly.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..config import CFG
from .augment import augment, augment_on_device, augments, changes, random_numbers
from .captions import image_folder, plain_words
from .image_cache import ImageCache, open_images
from .image_files import split_member
from .images import load_image, of_split, reading
from .shards import shard_order
from .tokenizer import TokenTable, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, torch.Tensor | list[str]]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches with their tensors on `device`; for a GPU a thread makes and copies the next one meanwhile."""
    if device.type == "cpu":  # there the two would only compete for cores
        yield from batches
        return
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    remaining = iter(batches)

    def copied() -> Batch | None:
        batch = next(remaining, None)
        if batch is None or stream is None:
            return batch and to_device(batch, device)
        on_cpu = {k for k, v in batch.items() if isinstance(v, torch.Tensor) and v.device.type == "cpu"}
        with torch.cuda.stream(stream):  # so that the copy does not wait for the training step
            return to_device({k: v.pin_memory() if k in on_cpu else v for k, v in batch.items()}, device)

    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(copied)
        while (batch := ahead.result()) is not None:
            if stream is not None:
                current = torch.cuda.current_stream(device)
                current.wait_stream(stream)
                for value in batch.values():
                    if isinstance(value, torch.Tensor):
                        value.record_stream(current)  # else its memory could be reused while the step reads it
            ahead = thread.submit(copied)
            yield batch


class CaptionedImages(Dataset):
    """The distinct images of a caption table, each with the rows of its captions.

    An item is a batch; its key is [(epoch, image number), ...], all of one epoch. With a `transform` images are decoded
    and transformed one by one; without, they come as squares from the cache and are augmented together.
    """

    def __init__(
        self, table: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, train: bool, cfg: CFG,
        transform: Callable | None = None, device: torch.device | str = "cpu",
    ):  # fmt: skip
        cfg = of_split(cfg, train)
        if train and cfg.max_captions:
            table = table[table.groupby("image_id").cumcount() < cfg.max_captions]
        first = table.drop_duplicates("image_id")
        self.names = first["image"].tolist()
        self.image_ids = first["image_id"].to_numpy()
        self.folder: Path = image_folder(cfg, table)
        shards = [split_member(name) for name in self.names]
        self.shard_of = pd.factorize(pd.Series([shard for shard, _ in shards]))[0] if all(shards) else None
        groups = table.reset_index(drop=True).groupby("image_id", sort=False).indices
        rows = [groups[i] for i in self.image_ids]
        self.rows = np.concatenate(rows)  # of the captions, image after image
        self.counts = np.array([len(own) for own in rows])  # captions of each image, (N,)
        self.tokens: TokenTable = tokenize(table["caption"].tolist(), tokenizer, cfg.max_length, cfg)
        # captions that are equal, case and spacing aside, share an id: they are positives of each other's images
        self.caption_ids = pd.factorize(plain_words(table["caption"]))[0]
        self.per_image = cfg.captions_per_image if train else 0  # 0: all of them
        self.seed = cfg.seed if train else None
        self.cfg, self.transform = cfg, transform
        self.augmented = train and (transform is not None or augments(cfg))
        self.images = open_images(self.names, self.folder, cfg, train) if transform is None else None
        on_cuda = isinstance(self.images, ImageCache) and torch.device(device).type == "cuda"
        self.device, self.held = torch.device(device if on_cuda else "cpu"), None  # where images are augmented
        if on_cuda and self.images.pixels.nbytes < 0.1 * torch.cuda.mem_get_info(self.device)[0]:
            self.held = torch.tensor(self.images.pixels, device=self.device)  # leaves room for the training step
        # Cached features of a frozen backbone, which replace pixels and token ids in a batch
        self.image_features: torch.Tensor | None = None  # (views, N, D)
        self.text_features: torch.Tensor | None = None  # (captions, D)
        self._epoch, self._uniform = None, None  # the last epoch, and its random numbers (N, K)

    @property
    def decodes(self) -> bool:
        """Whether images are decoded in every step; worker processes can do that."""
        return self.image_features is None and not isinstance(self.images, ImageCache)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, keys: Sequence[tuple[int, int]]) -> Batch:
        epoch, numbers = keys[0][0], [number for _, number in keys]
        captions, counts = self.captions_of(epoch, numbers)
        image_ids = self.image_ids[numbers]
        batch: Batch = {
            "image_ids": torch.from_numpy(image_ids),  # (B,)
            "caption_image_ids": torch.from_numpy(image_ids.repeat(counts)),  # (C,)
            "caption_ids": torch.from_numpy(self.caption_ids[captions]),  # (C,)
            "names": [self.names[n] for n in numbers],
        }
        if self.image_features is None:
            batch["pixel_values"] = self.pixels(epoch, numbers)
        else:
            view = self.image_features[epoch % len(self.image_features)]
            batch["image_features"] = view.index_select(0, torch.tensor(numbers))  # (B, D)
        if self.text_features is None:
            batch["input_ids"], batch["attention_mask"] = self.tokens.batch(captions)  # (C, L)
        else:
            batch["text_features"] = self.text_features.index_select(0, torch.from_numpy(captions))  # (C, D)
        return batch

    def pixels(self, epoch: int, numbers: Sequence[int]) -> torch.Tensor:
        """The images in `epoch`: uint8 (B, 3, S, S), channels last."""
        if self.transform is not None:
            return torch.stack([self._transformed(epoch, number) for number in numbers])
        return self._from_squares(epoch, numbers, self.device.type != "cpu").permute(0, 3, 1, 2)

    def _from_squares(self, epoch: int, numbers: Sequence[int], on_device: bool) -> torch.Tensor:
        """Squares, augmented in training, by the CPU or on `.device`: uint8 (B, S, S, 3)."""
        squares, ratios = self.images.read(numbers)
        if self.augmented:
            if epoch != self._epoch:
                self._epoch, self._uniform = epoch, random_numbers(self.seed, epoch, len(self))
            todo = changes(self.cfg, self._uniform[numbers], ratios)
            size, bicubic = self.cfg.size, self.cfg.interpolation == "bicubic"
            if not on_device:
                return torch.from_numpy(augment(squares, todo, size, bicubic))
        if self.held is not None:
            squares = self.held[torch.tensor(numbers, device=self.device)]
        else:
            squares = torch.from_numpy(np.stack(squares)).to(self.device)
        return augment_on_device(squares, todo, size, bicubic) if self.augmented else squares

    def captions_of(self, epoch: int, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The caption rows (C,) of B images in `epoch`, and how many each image has (B,).

        An image's captions take turns over the epochs. Images start at different ones, as the fifth captions of a data
        set often differ in kind from the first.
        """
        numbers = np.asarray(numbers)
        own = self.counts[numbers]
        counts = np.minimum(own, self.per_image) if self.per_image else own
        turn = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)  # 0, 1, ... within each image
        turn += np.repeat(np.where(counts < own, epoch * self.per_image + numbers, 0), counts)
        first = self.counts.cumsum()[numbers] - own
        return self.rows[np.repeat(first, counts) + turn % np.repeat(own, counts)], counts

    def _transformed(self, epoch: int, number: int) -> torch.Tensor:
        """One image through the caller's pipeline: uint8 (3, S, S)."""
        if self.seed is not None:
            self.transform.set_random_seed(int(np.random.SeedSequence((self.seed, epoch, number)).generate_state(1)[0]))
        with reading(path := self.folder / self.names[number]):
            image = load_image(path)
        return self.transform(image=image)["image"]


class EpochBatches(Sampler):
    """Batches of (epoch, image number): shuffled by (seed, epoch) for training, in order for evaluation.

    Of several processes, number `rank` of `world_size` takes its share: in training of every batch, so that together
    they have the batches of one process; in evaluation of the images. `shard_of` (N,) is the shard of each image, where
    they are in shards: then few shards are read at a time.
    """

    def __init__(
        self, n: int, batch_size: int, seed: int | None, rank: int = 0, world_size: int = 1,
        shard_of: np.ndarray | None = None,
    ):  # fmt: skip
        self.n, self.batch_size, self.seed, self.shard_of = n, min(batch_size, n), seed, shard_of
        self.own = np.arange(n)
        if seed is None:
            self.own = np.array_split(self.own, world_size)[rank]
            self.batch_size = max(1, min(batch_size, len(self.own)))
        self.share = slice(rank * self.batch_size // world_size, (rank + 1) * self.batch_size // world_size)
        self.start()

    def start(self, epoch: int = 0, skip: int = 0, stop: int | None = None) -> None:
        """Set the next pass to the batches `skip` up to `stop` of `epoch`; the passes after it are whole epochs."""
        self.epoch, self.skip, self.stop = epoch, skip, stop

    def __len__(self) -> int:
        # A short last batch has fewer negatives: training leaves it out, evaluation does not
        return self.n // self.batch_size if self.seed is not None else -(-len(self.own) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, share = self.own, slice(None)
        if self.seed is not None:
            rng, share = np.random.default_rng((self.seed, self.epoch)), self.share
            in_shards = self.shard_of is not None
            order = shard_order(self.shard_of, self.batch_size, rng) if in_shards else rng.permutation(order)
        for k in range(self.skip, len(self) if self.stop is None else min(len(self), self.stop)):
            yield [(self.epoch, int(i)) for i in order[k * self.batch_size : (k + 1) * self.batch_size][share]]
        self.start(self.epoch + 1)


class Loader(DataLoader):
    """A DataLoader over image-centred batches that can start anywhere: `loader.start(epoch, skip)`.

    Batches from the cache are made in this process, as copying them is faster than sending them between processes;
    `num_workers` processes make them where images are decoded in every step.
    """

    def __init__(self, data: CaptionedImages, batch_size: int, num_workers: int, rank: int = 0, world_size: int = 1):
        self.processes = rank, world_size
        self.batches = EpochBatches(len(data), batch_size, data.seed, rank, world_size, data.shard_of)
        super().__init__(
            data,
            sampler=self.batches,
            batch_size=None,  # an item of the data is a batch
            num_workers=num_workers if data.decodes else 0,
            worker_init_fn=_ignore_ctrl_c,
            generator=torch.Generator(),  # each start would draw from the global one, and a resumed run would differ
        )

    def start(self, epoch: int, skip: int = 0, stop: int | None = None) -> Loader:
        """`EpochBatches.start`; returns the loader."""
        self.batches.start(epoch, skip, stop)
        return self


def _ignore_ctrl_c(_: int) -> None:
    """The training process handles Ctrl-C; a worker that is killed by it would raise an error there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def build_loaders(
    table: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, mode: Literal["train", "valid"], cfg: CFG,
    transform: Callable | None = None, device: torch.device | str = "cpu", rank: int = 0, world_size: int = 1,
) -> Loader:  # fmt: skip
    """A loader over the images of a caption table (tutorial name), or of the share of process `rank`.

    "train": shuffled, augmented, `captions_per_image` captions each, no short last batch.
    "valid": in order, not augmented, every caption.

    A `transform`, any albumentations pipeline from an RGB array (H, W, 3) to a uint8 tensor (3, S, S), replaces the
    cache and the batched augmentation; it is slower. On a CUDA `device` cached images are augmented there.
    """
    cfg = cfg() if isinstance(cfg, type) else cfg
    data = CaptionedImages(table, tokenizer, mode == "train", cfg, transform, device)
    return Loader(data, cfg.batch_size, cfg.num_workers, rank, world_size)
