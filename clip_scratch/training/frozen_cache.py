"""What frozen layers make of a data set, computed once, kept in a memory map, and put into a loader's batches.

The files lie in the cache folder under a key of all that they depend on: the frozen weights, the images and how they
are augmented, the captions, the precision. So a later run that shares them, and one that is resumed, finds them.

Shapes: N images of the data set, B images and C captions of a batch, L tokens, D features.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..config import CFG
from ..data.image_cache import cache_folder
from ..data.loaders import Batch, CaptionedImages, EpochBatches, Loader
from ..models.clip import DualEncoder
from ..models.frozen_prefix import activations, goes_on_exactly, unit_that_trains
from .device import computes_in_bf16
from .engine import autocast, to_device

_FORMAT = 1  # of the files: a new number leaves the old ones unused
_CAPTIONS = 64  # computed at a time; models.clip puts no fewer together
# Settings that decide what the frozen layers see and how they compute; the seed is the data set's
_SETTINGS = {
    "image": (
        "size", "resize", "crop_from", "interpolation", "crop_scale", "horizontal_flip", "color_jitter", "hue_jitter",
        "crop_margin", "precision", "channels_last",
    ),
    "text": ("text_pooling", "precision"),
}  # fmt: skip


class KeptImages(NamedTuple):
    """What enters `unit` for every view of every image, (views, N, ...)."""

    unit: str
    values: torch.Tensor
    channels_last: bool  # feature maps, kept as (views, N, height, width, D)

    def batch(self, epoch: int, numbers: Sequence[int]) -> Batch:
        """Those images' activations in the view of `epoch`: (B, ...)."""
        rows = self.values[epoch % len(self.values)].index_select(0, torch.tensor(numbers))
        return {"image_activations": rows.permute(0, 3, 1, 2) if self.channels_last else rows, "image_unit": self.unit}


class KeptTexts(NamedTuple):
    """What enters `unit` for every caption: (captions, D), or for each token of all captions (all tokens, D)."""

    unit: str
    values: torch.Tensor
    starts: torch.Tensor | None  # of tokens: caption i has the rows starts[i] to starts[i + 1]

    def batch(self, captions: np.ndarray) -> Batch:
        """Those captions' activations: (C, D), or of tokens (C, L, D); where it pads are those of other captions."""
        rows = torch.from_numpy(captions)
        if self.starts is not None:
            rows = _token_rows(self.starts, rows)[0].clamp(max=len(self.values) - 1)  # (C, L)
        values = self.values.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        return {"text_activations": values, "text_unit": self.unit}


def _token_rows(starts: torch.Tensor, captions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the tokens of captions (C,) are kept, and which of them there are: both (C, L)."""
    lengths = starts[captions + 1] - starts[captions]
    column = torch.arange(int(lengths.max()))
    return starts[captions, None] + column, column < lengths[:, None]


class FrozenLoader:
    """A Loader whose batches have activations in the place of pixels, of captions, or of both.

    Its interface is the Loader's: iteration, len, `batches`, `dataset` and `start`.
    """

    def __init__(self, loader: Loader, images: KeptImages | None, texts: KeptTexts | None):
        self.loader, self.images, self.texts = loader, images, texts

    @property
    def dataset(self) -> CaptionedImages:
        return self.loader.dataset

    @property
    def batches(self) -> EpochBatches:
        return self.loader.batches

    def __len__(self) -> int:
        return len(self.loader)

    def start(self, epoch: int, skip: int = 0, stop: int | None = None) -> FrozenLoader:
        """The batches `skip` up to `stop` of `epoch`."""
        self.loader.start(epoch, skip, stop)
        return self

    def __iter__(self) -> Iterator[Batch]:
        with_pixels = iter(self.loader) if self.images is None else None
        for keys in self.batches:
            epoch, numbers = keys[0][0], [number for _, number in keys]
            captions, counts = self.dataset.captions_of(epoch, numbers)
            if self.images is None:
                batch = next(with_pixels)
            else:
                batch = self._without_pixels(numbers, captions, counts) | self.images.batch(epoch, numbers)
            yield batch if self.texts is None else batch | self.texts.batch(captions)

    def _without_pixels(self, numbers: Sequence[int], captions: np.ndarray, counts: np.ndarray) -> Batch:
        """The ids of a batch, and of its tokens where a part of the text tower has still to see them."""
        batch = self.dataset.ids(numbers, captions, counts)
        if self.texts is None or self.texts.starts is not None:
            batch["input_ids"], batch["attention_mask"] = self.dataset.tokens.batch(captions)  # both (C, L)
        return batch


def freeze_features(model: DualEncoder, loader: Loader, cfg: CFG) -> Loader | FrozenLoader:
    """The loader with what frozen layers give computed once, now, for `cfg.frozen_views` views of each image.

    An evaluation loader's images have one view. The loader itself where nothing is frozen or `frozen_views` is 0; a
    tower that cannot be cut in two, or has no room on the disk, is computed in every epoch, and a line says so. The
    model has its weights, and on its device: what is frozen may not change any more.
    """
    if not cfg.frozen_views:
        return loader
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(cfg, model.device):
            images, texts = _keep_images(model, loader.dataset, cfg), _keep_texts(model, loader.dataset, cfg)
    finally:
        model.train(was_training)
    return FrozenLoader(loader, images, texts) if images or texts else loader


def _keep_images(model: DualEncoder, data: CaptionedImages, cfg: CFG) -> KeptImages | None:
    few = data.pixels(0, list(range(min(4, len(data)))))  # (4, 3, S, S)
    found = _cut(model, "image", {"pixels": few.to(model.device)})
    if found is None:
        return None
    unit, example = found
    channels_last = _is_channels_last(example)
    example = example.permute(0, 2, 3, 1) if channels_last else example
    views = cfg.frozen_views if data.seed is not None else 1
    shape = (views, len(data), *example.shape[1:])

    def fill(values: torch.Tensor) -> None:
        with tqdm(desc="Frozen image layers", total=views * len(data), unit=" images", leave=False) as bar:
            for view in range(views):
                for start in range(0, len(data), cfg.batch_size):
                    numbers = list(range(start, min(start + cfg.batch_size, len(data))))
                    pixels = data.pixels(view, numbers).to(model.device)
                    batch = activations(model, "image", unit, {"pixels": pixels})
                    values[view, start : start + len(numbers)] = batch.permute(0, 2, 3, 1) if channels_last else batch
                    bar.update(len(numbers))

    files = [(name, os.stat(data.folder / name)) for name in data.names]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    key = _key(model, "image", cfg, unit, shape, example.dtype, data.seed, files, few.cpu().numpy())
    values = _computed_once(key, shape, example.dtype, fill, "image", cfg)
    return None if values is None else KeptImages(unit, values, channels_last)


def _is_channels_last(x: torch.Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _keep_texts(model: DualEncoder, data: CaptionedImages, cfg: CFG) -> KeptTexts | None:
    tokens = data.tokens
    by_length = np.argsort(tokens.lengths(), kind="stable")

    def batch_of(rows: np.ndarray) -> Batch:
        input_ids, attention_mask = tokens.batch(rows)
        return to_device({"input_ids": input_ids, "attention_mask": attention_mask}, model.device)

    found = _cut(model, "text", batch_of(by_length[[0, -1]]))
    if found is None:
        return None
    unit, example = found
    starts = None
    if example.ndim == 3:
        padded = model.padded_length  # then no mask hides the padding, which is kept with the words
        starts = torch.arange(len(tokens) + 1) * padded if padded else torch.from_numpy(tokens.starts)
    shape = (len(tokens) if starts is None else int(starts[-1]), example.shape[-1])

    def fill(values: torch.Tensor) -> None:
        with tqdm(desc="Frozen text layers", total=len(tokens), unit=" captions", leave=False) as bar:
            for first in range(0, len(tokens), _CAPTIONS):
                rows = by_length[first : first + _CAPTIONS]
                batch = activations(model, "text", unit, batch_of(rows)).to(values.device)  # (C, D) or (C, L, D)
                place = torch.from_numpy(rows)
                if starts is not None:
                    place, there = _token_rows(starts, place)
                    place, batch = place[there], batch[there]
                values[place] = batch
                bar.update(len(rows))

    key = _key(model, "text", cfg, unit, shape, example.dtype, tokens.ids, tokens.starts)
    values = _computed_once(key, shape, example.dtype, fill, "text", cfg)
    return None if values is None else KeptTexts(unit, values, starts)


def _cut(model: DualEncoder, part: str, batch: Batch) -> tuple[str, torch.Tensor] | None:
    """Where a tower's frozen part ends, and what comes out of it for a small batch; None where it has to be run."""
    unit = unit_that_trains(model, part, batch)
    if unit is None:
        return None
    if not goes_on_exactly(model, part, unit, batch):
        _say(part, f"what enters {unit} is not all that the layers above it need")
        return None
    return unit, activations(model, part, unit, batch)


def _say(part: str, reason: str) -> None:
    print(f"the frozen layers of the {part} tower are computed in every epoch: {reason}", file=sys.stderr)


def _key(model: DualEncoder, part: str, cfg: CFG, *facts: object) -> str:
    """A hash of everything that the activations of a data set depend on."""
    tower = model.towers[part]
    settings = {name: getattr(cfg, name) for name in _SETTINGS[part]}
    known = [_FORMAT, part, settings, model.device.type, computes_in_bf16(model.device), repr(tower)]
    digest = hashlib.sha256(repr(known).encode())
    for fact in facts:
        digest.update(fact.tobytes() if isinstance(fact, np.ndarray) else repr(fact).encode())
    for tensor in [*_frozen_tensors(tower), model.mean, model.std]:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _frozen_tensors(tower: torch.nn.Module) -> Iterator[torch.Tensor]:
    for module in tower.modules():
        parameters = list(module.parameters(recurse=False))
        if not any(p.requires_grad for p in parameters):  # else its buffers, as a batch norm's, change with it
            yield from parameters
            yield from module.buffers(recurse=False)


def _computed_once(
    key: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    fill: Callable[[torch.Tensor], None],
    part: str,
    cfg: CFG,
) -> torch.Tensor | None:
    """The tensor in the cache under `key`, which `fill` fills where there is none; None where there is no room.

    The file gets its name when it is whole, so that what was left of a killed run is never taken for it.
    """
    folder = cache_folder(cfg)
    path = folder / f"frozen-{key}.bin"
    count, size = math.prod(shape), math.prod(shape) * dtype.itemsize
    if path.is_file() and path.stat().st_size == size:
        return torch.from_file(str(path), shared=False, size=count, dtype=dtype).view(shape)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{path.stem}.*.tmp"):
            left.unlink(missing_ok=True)
        if (free := shutil.disk_usage(folder).free) < size:
            raise OSError(f"it needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        with open(unfinished, "wb") as file:
            if hasattr(os, "posix_fallocate"):  # a map of a file whose disk runs full would kill the process
                os.posix_fallocate(file.fileno(), 0, size)
        values = torch.from_file(str(unfinished), shared=True, size=count, dtype=dtype).view(shape)
    except OSError as error:
        _remove(unfinished)
        _say(part, f"{folder} cannot keep what they give ({error}). Set --cache-path to a folder with room.")
        return None
    try:
        fill(values)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        _remove(unfinished)
    return values


def _remove(path: Path) -> None:
    if path.exists():
        path.unlink()
