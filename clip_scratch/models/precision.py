"""In which precision each tower computes, and the memory format of the image tower.

`cfg.precision` is one word for both towers, or one for each: "fp32/bf16" is image in fp32, text in bf16. Weights stay
in fp32. A precision that the device does not compute is replaced by fp32, so that a trained model loads anywhere.
"""

import contextlib

import torch

from ..config import CFG
from ..device import computes_in_bf16


def tower_dtype(cfg: CFG, tower: str, device: torch.device) -> torch.dtype:
    """The dtype in which the "image" or "text" tower computes on `device`."""
    image, _, text = cfg.precision.partition("/")
    precision = image if tower == "image" or not text else text
    if precision in ("auto", "bf16") and computes_in_bf16(device):
        return torch.bfloat16
    return torch.float16 if precision == "fp16" and device.type == "cuda" else torch.float32


def autocast(cfg: CFG, tower: str, device: torch.device) -> contextlib.AbstractContextManager:
    """The autocast context of a tower and its head; a context that does nothing for fp32."""
    dtype = tower_dtype(cfg, tower, device)
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def default_precision(device: torch.device) -> str:
    """What "auto" means where nothing is measured: bf16, or fp16 on a GPU without bf16, or fp32."""
    if computes_in_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


def memory_format(cfg: CFG) -> torch.memory_format:
    """The memory format of the image tower's weights and of the pixels it takes."""
    return torch.channels_last if cfg.channels_last else torch.contiguous_format
