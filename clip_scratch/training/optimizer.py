"""Parameter groups with three learning rates, and the two schedules."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from ..config import CFG
from ..errors import UserError
from ..models.clip import DualEncoder
from ..models.freezing import places


def build_optimizer(model: DualEncoder, cfg: CFG) -> torch.optim.AdamW:
    """AdamW with a learning rate each for the image tower, the text tower and the heads.

    LoRA's updates have a rate of their own, and with `layer_decay` each block's is lower than that of the block
    above it (Clark et al. 2020, arXiv:2003.10555). Norms, biases and the temperature are not decayed. Raises
    UserError where no parameter trains.
    """
    rates = {"image": cfg.image_encoder_lr, "text": cfg.text_encoder_lr, "head": cfg.head_lr}
    groups: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
    for place, parameter in places(model):
        if parameter.requires_grad:
            rate = (cfg.lora_lr if place.is_lora else rates[place.part]) * cfg.layer_decay**place.below_top
            groups.setdefault((place.part, rate, parameter.ndim >= 2), []).append(parameter)
    if not groups:
        raise UserError("nothing to train: every parameter is frozen")
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate, "weight_decay": cfg.weight_decay if decay else 0.0, "part": part}
            for (part, rate, decay), parameters in groups.items()
        ],
        fused=True,
    )


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The present rate of each part: image_encoder_lr, text_encoder_lr, head_lr. A frozen tower's is 0.

    With `layer_decay` a tower's rate is that of its last block.
    """
    rates = {"image_encoder_lr": 0.0, "text_encoder_lr": 0.0, "head_lr": 0.0}
    names = {"image": "image_encoder_lr", "text": "text_encoder_lr", "head": "head_lr"}
    for group in optimizer.param_groups:
        name = names[group["part"]]
        rates[name] = max(rates[name], group["lr"])
    return rates


def build_scheduler(optimizer: torch.optim.Optimizer, cfg: CFG, total_steps: int) -> LambdaLR | ReduceLROnPlateau:
    """ "plateau": lower the rates when the validation rsum stalls. "cosine": warm up linearly, then fall to zero.

    A plateau scheduler steps once an epoch with the rsum; a cosine one once an optimiser step. The warm-up takes
    a fifth of a short run at most.
    """
    if cfg.scheduler == "plateau":
        return ReduceLROnPlateau(optimizer, mode="max", patience=cfg.patience, factor=cfg.factor)

    warmup = min(cfg.warmup_steps, total_steps // 5)

    def multiplier(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, total_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return LambdaLR(optimizer, multiplier)


def build_average(model: nn.Module, cfg: CFG) -> AveragedModel | None:
    """The exponential moving average of the weights at decay `ema`; None for 0.

    The decay grows from 0.1 to `ema` over the first steps, so that random heads are forgotten at once.
    """
    if not cfg.ema:
        return None

    def blend(averages: list[torch.Tensor], weights: list[torch.Tensor], n: torch.Tensor | int) -> None:
        decay = min(cfg.ema, (1 + int(n)) / (10 + int(n)))
        torch._foreach_lerp_(averages, weights, 1 - decay)

    # Only parameters are averaged; buffers (batch-norm statistics) are averages already and are copied.
    return AveragedModel(model, multi_avg_fn=blend)
