"""Parameter groups with three learning rates, the two schedules, and the average of the weights."""

import copy
import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from ..config import CFG
from ..errors import UserError
from ..models.clip import DualEncoder
from ..models.freezing import places
from .sharded import by_kind


def build_optimizer(model: DualEncoder, cfg: CFG) -> torch.optim.AdamW:
    """AdamW with learning rates for the image tower, the text tower, the heads and the LoRA updates.

    With `layer_decay` each block's rate is lower than that of the block above it (Clark et al. 2020, arXiv:2003.10555).
    Norms, biases and the temperature are not decayed. Raises UserError where no parameter trains.
    """
    rates = {"image": cfg.image_encoder_lr, "text": cfg.text_encoder_lr, "head": cfg.head_lr}
    groups: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
    for place, parameter in places(model):
        if parameter.requires_grad:
            rate = (cfg.lora_lr if place.is_lora else rates[place.part]) * cfg.layer_decay**place.below_top
            groups.setdefault((place.part, rate, parameter.ndim >= 2), []).append(parameter)
    if not groups:
        raise UserError("nothing to train: every parameter is frozen")
    groups = [
        {"params": parameters, "lr": rate, "weight_decay": cfg.weight_decay if decay else 0.0, "part": part}
        for (part, rate, decay), parameters in groups.items()
    ]
    return torch.optim.AdamW(groups, fused=True)


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The current image_encoder_lr, text_encoder_lr and head_lr: of the last block, and 0 for a frozen tower."""
    names = {"image": "image_encoder_lr", "text": "text_encoder_lr", "head": "head_lr"}
    rates = {part: [group["lr"] for group in optimizer.param_groups if group["part"] == part] for part in names}
    return {name: max(rates[part], default=0.0) for part, name in names.items()}


def build_scheduler(optimizer: torch.optim.Optimizer, cfg: CFG, total_steps: int) -> LambdaLR | ReduceLROnPlateau:
    """The scheduler of `cfg.scheduler`.

    "plateau" lowers the rates when the validation rsum stalls, and steps once an epoch; "cosine" warms up linearly, for
    a fifth of the run at most, then falls to zero, and steps with the optimizer.
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


class WeightAverage(nn.Module):
    """Exponential moving average of the trained weights of a model: `module` is the averaged model.

    The decay grows from 0.1 to `decay` over the first steps, so that random heads are forgotten at once. Frozen weights
    are shared with the model; buffers (batch-norm statistics) are averages already and are copied.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__()
        self.module, self.decay, self.n_updates = copy.deepcopy(model), decay, 0
        for averaged, parameter in zip(self.module.parameters(), model.parameters(), strict=True):
            if not parameter.requires_grad:
                averaged.data = parameter.data

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the weights of `model`; the first update copies them."""
        pairs = zip(self.module.parameters(), model.parameters(), strict=True)
        decay = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates)) if self.n_updates else 0.0
        for averages, weights in by_kind(pair for pair in pairs if pair[1].requires_grad):
            torch._foreach_lerp_(averages, weights, 1 - decay)
        for averaged, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            averaged.copy_(buffer)
        self.n_updates += 1

    def get_extra_state(self) -> int:
        """The number of updates, as a part of the state dict."""
        return self.n_updates

    def set_extra_state(self, state: int) -> None:
        self.n_updates = state
