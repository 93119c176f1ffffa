"""TrainState: everything that training changes, and where it stands; its state dict is what a resume needs."""

import dataclasses
import random
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils._pytree import tree_map

from ..models.clip import DualEncoder
from .distributed import world_size
from .engine import EpochStats
from .optimizer import WeightAverage, build_optimizer, build_scheduler
from .sharded import full_on_main, shard, shard_like


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    epoch: int = 0  # finished epochs
    batch: int = 0  # finished batches of the current epoch
    step: int = 0  # optimizer steps
    stats: EpochStats = field(default_factory=EpochStats)  # of the current epoch
    start: dict[str, float] = field(default_factory=dict)  # metrics of the model before the first step
    start_logit_scale: float = 0.0
    best_rsum: float = -1.0
    best_epoch: int = 0
    stale: int = 0  # epochs since the best
    reached: bool = False  # the recall that `stop_at` asks for

    def add(self, steps: EpochStats) -> None:
        """Count optimizer steps."""
        self.stats.count(steps)
        self.batch += steps.batches
        self.step += steps.steps

    def end_epoch(self, metrics: dict[str, float], stop_at: float) -> bool:
        """Close the epoch; whether it was the best one."""
        self.epoch, self.batch, self.stats = self.epoch + 1, 0, EpochStats()
        self.reached = bool(stop_at) and 100 * metrics["image_retrieval_recall@10"] >= stop_at
        is_best = metrics["rsum"] > self.best_rsum
        self.stale = 0 if is_best else self.stale + 1
        if is_best:
            self.best_rsum, self.best_epoch = metrics["rsum"], self.epoch
        return is_best


class TrainState:
    """Model, optimizer, scheduler, gradient scaler, weight average and progress of a run."""

    def __init__(self, model: DualEncoder, total_steps: int, began: float | None = None):
        cfg = model.cfg
        self.model, self.total_steps, self.progress = model, total_steps, Progress()
        self._began = time.perf_counter() if began is None else began  # less the seconds of earlier processes
        self.average = WeightAverage(model, cfg.ema) if cfg.ema else None
        if cfg.fully_shard and world_size() > 1:
            shard(model)
            if self.average:
                shard(self.average.module)
        self.optimizer = build_optimizer(model, cfg)
        self.scheduler = build_scheduler(self.optimizer, cfg, total_steps)
        self.scaler = torch.amp.GradScaler(model.device.type) if cfg.precision == "fp16" else None

    @property
    def wall_seconds(self) -> float:
        """Seconds of the whole run, with validation and all processes that it was interrupted in."""
        return time.perf_counter() - self._began

    @property
    def measured(self) -> DualEncoder:
        """The model that is validated and saved: the average, where there is one."""
        return self.average.module if self.average else self.model

    @property
    def step_scheduler(self):
        """The scheduler, if it steps with the optimizer."""
        return None if isinstance(self.scheduler, ReduceLROnPlateau) else self.scheduler

    @property
    def is_done(self) -> bool:
        """Whether no epoch is left; an epoch that stopped after its last step has still to be measured."""
        cfg, progress = self.model.cfg, self.progress
        steps_left = progress.step < self.total_steps or progress.batch
        return progress.epoch >= cfg.epochs or not steps_left or progress.reached or self.is_stale

    @property
    def is_stale(self) -> bool:
        """Whether `early_stopping` epochs have passed without a better one."""
        return 0 < self.model.cfg.early_stopping <= self.progress.stale

    def end_epoch(self, metrics: dict[str, float]) -> bool:
        """Close the epoch, and step a plateau scheduler; whether it was the best epoch."""
        if self.step_scheduler is None:
            self.scheduler.step(metrics["rsum"])
        return self.progress.end_epoch(metrics, self.model.cfg.stop_at)

    def state_dict(self) -> dict[str, object]:
        """Tensors, numbers, strings, lists and dicts of them: all that an exact resume needs.

        A collective call with `fully_shard`: the first process gets the full tensors.
        """
        random, progress = random_states(self.model.device), dataclasses.asdict(self.progress)
        own = {"progress": progress, "wall_seconds": self.wall_seconds, "random": random}
        return tree_map(full_on_main, {name: part.state_dict() for name, part in self._parts().items()}) | own

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned. Raises an error of several kinds where it does not fit."""
        for name, part in self._parts().items():
            saved = state[name]
            if isinstance(part, nn.Module):
                own = part.state_dict()
                saved = {key: shard_like(value, own.get(key)) for key, value in saved.items()}
            part.load_state_dict(saved)
        for parameter, moments in self.optimizer.state.items():
            for key, value in moments.items():  # saved contiguous; the fused AdamW wants the parameter's own strides
                if value.shape == parameter.shape:
                    moments[key] = torch.empty_like(parameter).copy_(shard_like(value, parameter))
        self.progress = Progress(**state["progress"] | {"stats": EpochStats(**state["progress"]["stats"])})
        self._began -= state["wall_seconds"]
        restore_random_states(state["random"], self.model.device)

    def _parts(self) -> dict:
        names = ("model", "optimizer", "scheduler", "scaler", "average")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def seed_everything(seed: int) -> None:
    """Seed every random generator that training draws from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_states(device: torch.device) -> dict[str, object]:
    """The state of every random generator that training on `device` draws from."""
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    states = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_random_states(states: dict, device: torch.device) -> None:
    """Restore what `random_states` returned; on a device of another type its own generator stays as it is."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    if "mps" in states and device.type == "mps":
        torch.mps.set_rng_state(states["mps"])
