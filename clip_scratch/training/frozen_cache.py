"""What frozen layers make of a data set, computed once, kept in a memory map, and put into a loader's batches.

The files lie in the cache folder under a key of all that they depend on: the frozen weights, the images and how they
are augmented, the captions, the precision. So a later run that shares them, and one that is resumed, finds them. One
process fills a file, under a lock, and another that wants it waits.

Shapes: N images of the data set, B images and C captions of a batch, L tokens, D features.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
from .engine import autocast, to_device

_FORMAT = 1  # of the files: a new number leaves the old ones unused
_CAPTIONS = 64  # computed at a time; models.clip puts no fewer together
_WORTH_SAYING = 5e8  # bytes: a file as large as this is announced
# Settings that decide what the frozen layers see and how they compute, beside the precision and the data set's seed
_SETTINGS = {
    "image": (
        "size", "resize", "crop_from", "interpolation", "crop_scale", "horizontal_flip", "color_jitter", "hue_jitter",
        "crop_margin", "image_precision", "channels_last",
    ),
    "text": ("text_pooling", "text_precision"),
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

    Images that are not augmented, as those of an evaluation loader, have one view. The loader itself where nothing is
    frozen or `frozen_views` is 0; a tower that cannot be cut in two, or has no room on the disk, is computed in every
    epoch, and a line says so. The model has its weights, and on its device: what is frozen may not change any more.
    """
    if not cfg.frozen_views:
        return loader
    data = loader.dataset
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(cfg, model.device):
            few = to_device(data[[(0, number) for number in range(min(4, len(data)))]], model.device)
            image_unit, text_unit = (unit_that_trains(model, part, few) for part in ("image", "text"))
            if image_unit is None and text_unit is None and data.seed is not None:
                print("frozen_views has no effect: no tower has frozen layers below the trained ones", file=sys.stderr)
            images = _keep_images(model, image_unit, few["pixels"], data, cfg) if image_unit else None
            texts = _keep_texts(model, text_unit, data, cfg) if text_unit else None
    finally:
        model.train(was_training)
    return FrozenLoader(loader, images, texts) if images or texts else loader


def _keep_images(
    model: DualEncoder, unit: str, few: torch.Tensor, data: CaptionedImages, cfg: CFG
) -> KeptImages | None:
    """`few` are the pixels of the first images in the first view: (4, 3, S, S)."""
    example = _entering(model, "image", unit, {"pixels": few})
    if example is None:
        return None
    channels_last = _is_channels_last(example)
    example = example.permute(0, 2, 3, 1) if channels_last else example
    views, seed = (cfg.frozen_views, data.seed) if data.augmented else (1, None)
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
    key = _key(model, "image", cfg, unit, shape, example.dtype, seed, files, few.cpu().numpy())
    values = _computed_once(key, shape, example.dtype, fill, "image", cfg)
    return None if values is None else KeptImages(unit, values, channels_last)


def _is_channels_last(x: torch.Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _keep_texts(model: DualEncoder, unit: str, data: CaptionedImages, cfg: CFG) -> KeptTexts | None:
    tokens = data.tokens
    by_length = np.argsort(tokens.lengths(), kind="stable")

    def batch_of(rows: np.ndarray) -> Batch:
        input_ids, attention_mask = tokens.batch(rows)
        return to_device({"input_ids": input_ids, "attention_mask": attention_mask}, model.device)

    example = _entering(model, "text", unit, batch_of(by_length[[0, -1]]))
    if example is None:
        return None
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


def _entering(model: DualEncoder, part: str, unit: str, batch: Batch) -> torch.Tensor | None:
    """What enters `unit` for a small batch; None where the tower cannot go on from that alone."""
    if not goes_on_exactly(model, part, unit, batch):
        _say(part, f"what enters {unit} is not all that the layers above it need")
        return None
    return activations(model, part, unit, batch)


def _say(part: str, reason: str) -> None:
    print(f"the frozen layers of the {part} tower are computed in every epoch: {reason}", file=sys.stderr)


def _key(model: DualEncoder, part: str, cfg: CFG, *facts: object) -> str:
    """A hash of everything that the activations of a data set depend on, to be made under the autocast they get."""
    tower, device = model.towers[part], model.device.type
    settings = {name: getattr(cfg, name) for name in _SETTINGS[part]}
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    known = [_FORMAT, part, settings, device, precision, repr(tower)]
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
    """The tensor in the cache under `key`, which `fill` fills where there is none; None where there is no room."""
    folder = cache_folder(cfg)
    path, size = folder / f"frozen-{key}.bin", math.prod(shape) * dtype.itemsize
    try:
        if not _finished(path, size):
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(path):
                if not _finished(path, size):
                    _build(path, shape, dtype, fill, part)
        return _opened(path, shape, dtype)
    except (OSError, NotImplementedError) as error:  # NotImplementedError: of a disk that knows no locks
        _say(part, f"{folder} cannot keep what they give ({error}). Set --cache-path to a folder with room.")
        return None


def _finished(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While no other process builds `path`."""
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that builds {path}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(
    path: Path, shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[[torch.Tensor], None], part: str
) -> None:
    """Fill a file, which gets its name when it is whole: what a killed run leaves is never taken for it."""
    count, size = math.prod(shape), math.prod(shape) * dtype.itemsize
    unfinished = path.with_suffix(".tmp")
    unfinished.unlink(missing_ok=True)  # a killed run's, which takes room
    free = shutil.disk_usage(path.parent).free
    if size > free / 2:  # the other half is for runs, and for whoever else uses the disk
        raise OSError(f"it needs {size / 1e9:.1f} GB, and takes at most half of the {free / 1e9:.1f} GB that are free")
    if size > _WORTH_SAYING:
        print(f"keeping what the frozen layers of the {part} tower give, {size / 1e9:.1f} GB, in {path.parent} "
              "(--frozen-views 0 does without)")  # fmt: skip
    try:
        with open(unfinished, "wb") as file:
            if hasattr(os, "posix_fallocate"):  # a map of a file whose disk runs full would kill the process
                os.posix_fallocate(file.fileno(), 0, size)
        # No name holds the map: Windows renames no file that is still mapped
        fill(torch.from_file(str(unfinished), shared=True, size=count, dtype=dtype).view(shape))
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:  # Ctrl-C among them
        with suppress(OSError):  # of Windows, where the traceback still holds the map: the next build overwrites it
            unfinished.unlink()
        raise


def _opened(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor in a file, which nothing may write to.

    The map is NumPy's: torch's own reserves memory for all of the file, and there may be less.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that a write would be undefined
        return torch.from_numpy(np.memmap(path, np.uint8, "r")).view(dtype).view(shape)
