"""Which device computes, what it computes fast, and how to get the most out of its memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .config import CFG
from .errors import UserError, first_line, is_out_of_memory

if TYPE_CHECKING:
    import torch


def pick_device(cfg: CFG) -> torch.device:
    """The torch device of `cfg.device`. Raises UserError where it is not available."""
    import torch

    name = cfg.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each of its processes here
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not available: {first_line(error)}") from error
    if cfg.precision == "fp16" and device.type != "cuda":
        raise UserError("precision fp16 needs a CUDA GPU; on a CPU use bf16 or fp32")
    return device


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the processor has bf16 arithmetic; one without it emulates bf16, many times slower than fp32.

    The environment variable CLIP_SCRATCH_BF16 (0 or 1) overrides what is detected, to reproduce on one machine what
    another computes.
    """
    import torch

    override = os.environ.get("CLIP_SCRATCH_BF16")
    if override in ("0", "1"):
        return override == "1"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it and faulting it in again at every step.

    The activations of a step on a CPU are hundreds of large blocks; without this, up to half of the time of a
    convolutional tower is spent zeroing fresh pages in the kernel. Does nothing on other systems.
    """
    if sys.platform == "linux":
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of mallopt(3)
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(mmap_threshold, 1 << 30)
            mallopt(trim_threshold, 2**31 - 1)


def release_memory(device: torch.device) -> None:
    """Give freed memory back, which is kept in pieces: after a failure a smaller step may not fit into any of them."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None:
        trim(0)


@contextlib.contextmanager
def training_on(cfg: CFG, less_memory: str) -> Iterator[torch.device]:
    """The device of a run, with `cfg.deterministic` in force. Raises UserError with this advice if memory runs out.

    Where an operation has no deterministic algorithm torch warns and names it.
    """
    import torch

    device, before = pick_device(cfg), torch.are_deterministic_algorithms_enabled()
    keep_freed_memory()
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read before the first product
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield device
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory: {less_memory}") from error
    finally:
        torch.use_deterministic_algorithms(before)
