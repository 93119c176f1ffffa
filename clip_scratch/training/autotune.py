"""precision="auto": each tower's fastest precision and memory format, measured when a run starts.

No rule of thumb holds everywhere: bf16 makes dense layers two or three times as fast where the processor has it, and
little else; channels_last helps most convolutions, not all. The choice is remembered in the cache folder, so that two
runs on one machine agree and only the first one measures.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from ..config import CFG
from ..data.loaders import Batch, to_device
from ..device import computes_in_bf16
from ..environment import processor
from ..files import cache_folder, write_json
from ..models.clip import DualEncoder
from ..models.precision import default_precision
from .large_batch import split

_FORMAT = 3  # of the records: a new number has all measured again
MIN_STEPS = 200  # a shorter run would not win back the seconds that measuring takes
_CPU_IMAGES, _GPU_IMAGES = 16, 64  # a part of a batch is enough
_STEPS = 3
_HOPELESS = 1.5  # a first step this many times the best time decides
_CLEARLY = 0.9  # of the best time: noise alone should not change a run's arithmetic


def choose_precision(model: DualEncoder, batch: Batch, cfg: CFG) -> tuple[CFG, str]:
    """`cfg` with the fastest precision of each tower and the fastest memory format, and a message with the times.

    From the cache folder where this machine has measured these towers before.
    """
    try:
        path = cache_folder(cfg) / f"precision-{_key(model, batch)}.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        choice = dataclasses.replace(cfg, precision=record["precision"], channels_last=record["channels_last"])
        return choice, f"{record['message']} (measured before, {path.name})"
    except (OSError, ValueError, KeyError):
        choice, message = measure_precision(model, batch, cfg)
    with contextlib.suppress(OSError):  # without a cache folder the next run measures too
        path = cache_folder(cfg) / f"precision-{_key(model, batch)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"precision": choice.precision, "channels_last": choice.channels_last, "message": message})
    return choice, message


def _key(model: DualEncoder, batch: Batch) -> str:
    """A hash of what the choice depends on: the machine, the towers, which of their weights train, and the shapes."""
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    fixed = model.cfg.freeze_batch_norm  # such norms are folded into convolutions
    machine = [_FORMAT, device.type, name, computes_in_bf16(device), torch.get_num_threads(), torch.__version__]
    towers = [(repr(tower), [p.requires_grad for p in tower.parameters()]) for tower in model.towers.values()]
    shapes = [batch["pixel_values"].shape[1:], model.tokenizer.model_max_length]
    return hashlib.sha256(repr([machine, towers, shapes, fixed]).encode()).hexdigest()[:16]


def measure_precision(model: DualEncoder, batch: Batch, cfg: CFG) -> tuple[CFG, str]:
    """As `choose_precision`, always measured.

    Each tower runs forward and backward on a few images and captions of `batch`, on a copy of the model; the model
    itself and the random state are not changed. Embeddings in bf16 agree with fp32 to about two decimals of a cosine
    (tests/test_autotune.py).
    """
    n = _CPU_IMAGES if model.device.type == "cpu" else _GPU_IMAGES
    few = to_device(split(batch, n)[0], model.device)
    precisions = list(dict.fromkeys([default_precision(model.device), "fp32"]))
    trial = copy.deepcopy(model).train()
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        choices = {
            f"{p} {'channels_last' if layout else 'contiguous'}":
                dataclasses.replace(cfg, precision=p, channels_last=layout)
            for p in precisions for layout in (True, False)
        }  # fmt: skip
        image, image_line = _fastest(choices, lambda choice: _step(trial, "image", few, choice))
        choices = {p: dataclasses.replace(image, precision=p) for p in precisions}
        text, text_line = _fastest(choices, lambda choice: _step(trial, "text", few, choice))
    same = "fp16" in precisions or image.precision == text.precision  # fp16 has one gradient scaler for both towers
    precision = image.precision if same else f"{image.precision}/{text.precision}"
    message = (
        f"precision of the image tower, {len(few['pixel_values'])} images: {image_line}\n"
        f"precision of the text tower, {len(few['input_ids'])} captions: {text_line}"
    )
    return dataclasses.replace(image, precision=precision), message


def _step(model: DualEncoder, tower: str, batch: Batch, cfg: CFG) -> Callable[[], None]:
    """One forward and backward pass of a tower and its head, by `cfg`."""
    model.cfg = cfg
    model.apply_memory_format()

    def step() -> None:
        if tower == "image":
            embeddings = model.encode_image(batch["pixel_values"])
        else:
            embeddings = model.encode_text(batch["input_ids"], batch["attention_mask"])
        if embeddings.requires_grad:  # not where the tower and its head are frozen
            embeddings.sum().backward()
        nn.Module.zero_grad(model)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)

    return step


def _fastest(choices: dict[str, CFG], step_of: Callable[[CFG], Callable]) -> tuple[CFG, str]:
    """The fastest settings, earlier ones unless later ones are clearly faster, and a line with all times."""
    seconds: dict[str, float] = {}
    best = ""
    for name, choice in choices.items():
        seconds[name] = _seconds(step_of(choice), _HOPELESS * seconds[best] if best else math.inf)
        if not best or seconds[name] < _CLEARLY * seconds[best]:
            best = name
    others = ", ".join(f"{name} {1000 * s:.0f}" for name, s in seconds.items() if name != best)
    return choices[best], f"{best}, {1000 * seconds[best]:.0f} ms a step" + (f" ({others})" if others else "")


def _seconds(step: Callable[[], None], hopeless: float) -> float:
    """The median time of a few steps after a first one that warms up, or of one that is hopeless already."""
    step()  # libraries build and cache their kernels for new shapes
    seconds = []
    for _ in range(_STEPS):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
        if seconds[0] > hopeless:
            break
    return statistics.median(seconds)
