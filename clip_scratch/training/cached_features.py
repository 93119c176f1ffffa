"""On-disk cache of frozen-tower features: what enters a head, computed once for a data set.

The files lie in the cache folder under a hash of everything that they depend on: the tower's weights, the images and
how they are augmented, the captions, the precision. A later run that shares them, and a resumed one, finds them.

Shapes: N images of the data set, D features.
"""

import copy
import hashlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..config import CFG
from ..data.image_files import stamp
from ..data.loaders import CaptionedImages, Loader
from ..files import cache_folder, check_room, sole_writer, write_atomically
from ..models.clip import DualEncoder
from ..models.precision import tower_dtype

_FORMAT = 3  # of the files: a new number leaves the old ones unused
_AT_ONCE = 64  # images or captions that a CPU computes at a time: more do not fit its caches
# The settings that decide what a frozen tower sees and how it computes
_SETTINGS = {
    "image": (
        "size", "resize", "interpolation", "crop_scale", "horizontal_flip", "color_jitter", "hue_jitter",
        "channels_last",
    ),
    "text": ("text_pooling",),
}  # fmt: skip


def cache_features(model: DualEncoder, loader: Loader, cfg: CFG) -> Loader:
    """A loader whose batches have `image_features` or `text_features` in place of a frozen tower's input.

    `cfg.cached_views` augmented views of each training image are cached; the view of an epoch is its number modulo
    the views. Returns the loader itself where `cached_views` is 0 or no tower is frozen as a whole. The model has its
    weights and is on its device: the frozen ones may not change any more.
    """
    if not cfg.cached_views:
        return loader
    frozen = [tower for tower in ("image", "text") if _is_frozen(model, tower)]
    if not frozen:
        print("cached_views has no effect: no tower is frozen as a whole", file=sys.stderr)
        return loader
    data = copy.copy(loader.dataset)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for tower in frozen:
            setattr(data, f"{tower}_features", _features(model, tower, data, cfg))
    model.train(was_training)
    return Loader(data, cfg.batch_size, cfg.num_workers, *loader.processes)


def _is_frozen(model: DualEncoder, tower: str) -> bool:
    """Whether a tower does not train, its head aside (SigLIP's heads are parts of its towers)."""
    head = {id(p) for p in model.heads[tower].parameters()}
    return not any(p.requires_grad for p in model.towers[tower].parameters() if id(p) not in head)


def head_input(model: DualEncoder, tower: str, *inputs: torch.Tensor) -> torch.Tensor:
    """What enters the head of the "image" or "text" tower for these inputs of `encode_image` or `encode_text`."""

    entered: list[torch.Tensor] = []
    encode = model.encode_image if tower == "image" else model.encode_text
    with model.heads[tower].register_forward_pre_hook(lambda head, args: entered.append(args[0])):
        encode(*inputs)
    (features,) = entered
    return features


def _features(model: DualEncoder, tower: str, data: CaptionedImages, cfg: CFG) -> torch.Tensor | None:
    """The features of all images (views, N, D) or captions (captions, D); None where the disk has no room."""
    tokens = data.tokens
    views, seed = (cfg.cached_views, data.seed) if data.augmented else (1, None)

    def batches() -> Iterator[tuple[tuple | torch.Tensor, tuple[torch.Tensor, ...]]]:
        """The place of a batch in the result, and the tower's inputs."""
        if tower == "text":  # captions of similar length together: little padding
            for rows in torch.from_numpy(np.argsort(tokens.lengths(), kind="stable")).split(_AT_ONCE):
                yield rows, tokens.batch(rows.numpy())
            return
        n = _AT_ONCE if model.device.type == "cpu" else cfg.batch_size
        for view in range(views):
            for numbers in torch.arange(len(data)).split(n):
                yield (view, numbers), (data.pixels(view, numbers.tolist()),)

    if tower == "image":
        shape, inputs = (views, len(data)), (data.pixels(0, range(min(4, len(data)))),)
        facts = seed, [(name, *stamp(data.folder / name)) for name in data.names]
    else:
        shape, inputs, facts = (len(tokens),), tokens.batch([0]), (tokens.ids, tokens.starts)

    def compute(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return head_input(model, tower, *(x.to(model.device) for x in inputs))

    def fill(features: torch.Tensor) -> None:
        progress = tqdm(batches(), desc=f"Caching {tower} features", unit=" batches", leave=False)
        for place, batch in progress:
            features[place] = compute(batch).to(features.device)

    example = compute(inputs)
    shape = (*shape, *example.shape[1:])
    key = _key(model, tower, cfg, shape, *facts, *(x.numpy() for x in inputs))
    return _computed_once(key, shape, example.dtype, fill, tower, cfg)


def _key(model: DualEncoder, tower: str, cfg: CFG, *facts: object) -> str:
    """A hash of everything that the features of a data set depend on."""
    network, device = model.towers[tower], model.device
    settings = {name: getattr(cfg, name) for name in _SETTINGS[tower]}
    known = [_FORMAT, tower, settings, device.type, tower_dtype(cfg, tower, device), repr(network)]
    digest = hashlib.sha256(repr(known).encode())
    for fact in facts:
        digest.update(fact.tobytes() if isinstance(fact, np.ndarray) else repr(fact).encode())
    for tensor in [*_frozen_tensors(network), model.mean, model.std]:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _frozen_tensors(network: torch.nn.Module) -> Iterator[torch.Tensor]:
    for module in network.modules():
        params = list(module.parameters(recurse=False))
        if not any(p.requires_grad for p in params):  # a head inside its tower trains
            yield from params
            yield from module.buffers(recurse=False)


def _computed_once(
    key: str, shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[[torch.Tensor], None], tower: str, cfg: CFG
) -> torch.Tensor | None:
    """The tensor in the cache under `key`, which `fill` computes if it is missing; None where there is no room."""
    count, size = math.prod(shape), math.prod(shape) * dtype.itemsize

    def write(temporary: Path) -> None:
        # No name holds the map: Windows does not rename a file that is mapped
        fill(torch.from_file(str(temporary), shared=True, size=count, dtype=dtype).view(shape))

    try:
        path = cache_folder(cfg) / f"features-{key}.bin"
        if not _is_complete(path, size):
            with sole_writer(path):
                if not _is_complete(path, size):
                    check_room(path.parent, size, f"the features of the frozen {tower} tower", "--cached-views 0")
                    write_atomically(path, write, size)
        return _open_tensor(path, shape, dtype)
    except OSError as error:
        fix = "and are computed in every epoch. Set --cache-path to a folder with room."
        print(f"the features of the frozen {tower} tower are not cached ({error}) {fix}", file=sys.stderr)
        return None


def _is_complete(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _open_tensor(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor in a file, read-only.

    The map is NumPy's: torch's own reserves memory for the whole file, and there may be less.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that a write would be undefined
        return torch.from_numpy(np.memmap(path, np.uint8, "r")).view(dtype).view(shape)
