"""--minutes: how many optimizer steps fit into a wall-clock budget, measured once and then fixed."""

import copy
import sys

import torch

from ..config import CFG
from ..data.loaders import Loader
from ..models.clip import DualEncoder
from .engine import train_epoch
from .optimizer import build_optimizer

_STEPS = 6  # measured, after as many that warm up
_RESERVE = 0.05  # of the time left: the pace drifts
EPOCH_OVERHEAD = 2.0  # seconds for the checkpoints, the metrics and the retrieval picture of an epoch


def steps_per_epoch(loader: Loader, cfg: CFG) -> int:
    """Optimizer steps of an epoch."""
    return -(-len(loader) // cfg.accumulation)


def planned_steps(loader: Loader, cfg: CFG) -> int:
    """Optimizer steps of the whole run, by `epochs` and `max_steps`."""
    return min(cfg.epochs * steps_per_epoch(loader, cfg), cfg.max_steps or sys.maxsize)


def measure_pace(model: DualEncoder, loader: Loader, cfg: CFG) -> float:
    """Seconds of an optimizer step.

    The first batches of `loader` train a copy of the model, whose weights are then dropped: the run itself begins with
    its number of steps known, and a resume lays the same schedule. The random state is not changed.
    """
    trial = copy.deepcopy(model)
    optimizer = build_optimizer(trial, cfg)
    scaler = torch.amp.GradScaler(model.device.type) if cfg.precision == "fp16" else None
    steps = min(_STEPS, max(1, steps_per_epoch(loader, cfg) // 2))
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        for _ in range(2):
            loader.start(0, 0, steps * cfg.accumulation)
            stats = train_epoch(trial, loader, optimizer, cfg, scaler=scaler)
    loader.start(0)
    return stats.seconds / max(1, stats.steps)


def steps_within(seconds: float, step: float, validation: float, epoch_steps: int, most: int) -> int:
    """The largest number of steps, up to `most`, that takes no more than `seconds`; at least 1.

    `step` and `validation` are the seconds of a step, and of the validation after each epoch of `epoch_steps` steps;
    the last epoch may be cut short, and is validated too.
    """
    left = seconds * (1 - _RESERVE)
    epochs = int(left // (epoch_steps * step + validation))
    left -= epochs * (epoch_steps * step + validation)
    partial = int(max(0.0, left - validation) // step)
    return max(1, min(most, epochs * epoch_steps + partial))
