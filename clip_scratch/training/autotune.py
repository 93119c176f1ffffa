"""precision="auto": each tower's fastest precision and memory format, measured when a run starts.

No rule of thumb holds everywhere: bf16 halves or thirds the time of dense layers where the processor has it, yet
slows the backward pass of depthwise convolutions on a CPU; channels_last helps most convolutions, not all.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from ..config import CFG
from ..data.loaders import Batch
from ..models.clip import DualEncoder
from .device import computes_in_bf16
from .engine import autocast

WORTH_MEASURING = 200  # optimiser steps: a shorter run would not win back the seconds that measuring takes
_CPU_IMAGES, _GPU_IMAGES = 16, 64  # a part of a batch tells as much, sooner
_STEPS = 3
_HOPELESS = 1.5  # a first step this many times the best time decides
_CLEARLY = 0.9  # of the best time: noise alone should not change a run's arithmetic


def tune(model: DualEncoder, batch: Batch, cfg: CFG) -> tuple[CFG, str]:
    """`cfg` with precision, image_precision, text_precision and channels_last as they are fastest, and why.

    Each tower runs forward and backward on a few images and their captions of `batch`, on a copy of the model; the
    model itself and the random state are left as they are. fp32 is tried against bf16 where the processor has
    bf16, for the image tower in both memory formats; a precision that `cfg` sets to fp32 stays. Results in bf16
    agree with fp32 to about two decimals of a cosine (tests/test_autotune.py).
    """
    has_bf16 = computes_in_bf16(model.device)
    n = _CPU_IMAGES if model.device.type == "cpu" else _GPU_IMAGES
    ids = batch["image_ids"][:n]
    captions = torch.isin(batch["caption_image_ids"], ids)
    few = {"pixels": batch["pixels"][:n]} | {k: batch[k][captions] for k in ("input_ids", "attention_mask")}
    few = {k: v.to(model.device) for k, v in few.items()}

    def precisions(part: str, asked: str) -> list[str]:
        trains = any(p.requires_grad for p in model.towers[part].parameters())  # fp32 is for the part that trains
        return ["same", "fp32"] if has_bf16 and trains and asked == "same" else [asked]

    trial = copy.deepcopy(model).train()
    cfg = dataclasses.replace(cfg, precision="bf16" if has_bf16 else "fp32")
    lines = []
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        layouts = [(p, layout) for p in precisions("image", cfg.image_precision) for layout in (True, False)]
        choices = {
            f"{_name(p, has_bf16)} {'channels_last' if layout else 'contiguous'}":
                dataclasses.replace(cfg, image_precision=p, channels_last=layout)
            for p, layout in layouts
        }  # fmt: skip
        cfg, line = _fastest(choices, lambda choice: _step(trial, "image", few, choice))
        lines.append(f"image tower, {len(few['pixels'])} images: {line}")
        choices = {
            _name(p, has_bf16): dataclasses.replace(cfg, text_precision=p)
            for p in precisions("text", cfg.text_precision)
        }
        cfg, line = _fastest(choices, lambda choice: _step(trial, "text", few, choice))
        lines.append(f"text tower, {len(few['input_ids'])} captions: {line}")
    return cfg, "\n".join(f"precision of the {line}" for line in lines)


def _name(precision: str, has_bf16: bool) -> str:
    return "bf16" if precision == "same" and has_bf16 else "fp32"


def _step(model: DualEncoder, part: str, batch: Batch, cfg: CFG) -> Callable[[], None]:
    """One forward and backward pass of a tower and its head, by `cfg`."""
    model.cfg = cfg
    model.apply_precision()

    def step() -> None:
        with autocast(cfg, model.device):
            if part == "image":
                embeddings = model.encode_image(batch["pixels"])
            else:
                embeddings = model.encode_text(batch["input_ids"], batch["attention_mask"])
        if embeddings.requires_grad:  # not of a tower that is frozen with its head
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
    """The median time of a few steps after a first that warms up, or of one that is hopeless already."""
    step()  # libraries build and keep their kernels for new shapes
    seconds = []
    for _ in range(_STEPS):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
        if seconds[0] > hopeless:
            break
    return statistics.median(seconds)
