"""train_epoch and valid_epoch: the loop itself. No file is written here and no command line is read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import nn

from ..config import CFG
from ..data.loaders import Batch, on_device
from ..errors import UserError, is_out_of_memory
from ..evaluation.retrieval import recall_at_k
from ..retrieval.embed import embed_batches
from .distributed import Replica, summed, world_size
from .large_batch import backward_in_parts, largest_that_fits
from .losses import LOSSES
from .sharded import by_kind, full

# (image_embeddings (B, P), text_embeddings (C, P), logit_scale, image_ids (B,), caption_image_ids (C,),
# caption_ids (C,)) -> a scalar
Loss = Callable[..., torch.Tensor]

# Optimizer steps between two reads of the losses, by device; on a GPU a read waits for it
_READ_EVERY, _READ_EVERY_ON_GPU = {"cpu": 1}, 16


@dataclass
class EpochStats:
    """What an epoch did, or a few of its steps; losses and times are sums."""

    steps: int = 0  # optimizer steps
    batches: int = 0
    images: int = 0
    captions: int = 0
    loss_sum: float = 0.0  # over batches
    seconds: float = 0.0  # data and computation
    spread: float = 0.0  # mean cosine of two different images in the last batch: near 1, the embeddings have collapsed

    @property
    def loss(self) -> float:
        """The mean loss of a batch; NaN without a batch."""
        return self.loss_sum / self.batches if self.batches else math.nan

    @property
    def pairs_per_second(self) -> float:
        """Captions seen with their image, per second."""
        return self.captions / max(self.seconds, 1e-9)

    def count(self, other: EpochStats) -> None:
        """Count the steps of `other` too."""
        for name in ("steps", "batches", "images", "captions", "loss_sum", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.spread = other.spread


def train_epoch(
    model: nn.Module, loader: Iterable[Batch], optimizer: torch.optim.Optimizer, cfg: CFG, *, loss: Loss | None = None,
    step_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None, scaler: torch.amp.GradScaler | None = None,
    average: nn.Module | None = None, on_step: Callable[[EpochStats], object] = lambda steps: None,
) -> EpochStats:  # fmt: skip
    """One pass over any loader of batches: forward, loss, backward, and every `accumulation` batches a step.

    `loss` takes the arguments of `contrastive_loss`; the default is the one of `cfg.loss`. The gradients of the
    batches of a step are averaged and clipped together; the negatives of a caption are those of its own batch.
    `average` is a WeightAverage to update. `on_step` receives the statistics of the steps since its last call (one
    step on a CPU, up to 16 on a GPU) and may raise to stop between two steps. Raises UserError at a loss or gradient
    that is not finite, on a CPU before it reaches the weights, on a GPU within 16 steps; and where memory runs out.
    """
    model.train()
    loss = loss or loss_function(model, cfg)
    params = [p for p in model.parameters() if p.requires_grad]
    read_every = _READ_EVERY.get(model.device.type, _READ_EVERY_ON_GPU)
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    replica, total, unread, began = Replica(model), EpochStats(), _Unread(), time.perf_counter()
    ahead = on_device(loader, model.device)
    while batches := list(islice(ahead, cfg.accumulation)):  # of a step; the last one of an epoch may have fewer
        optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            replica.is_last = batch is batches[-1]
            unread.add(batch, *_backward(model, batch, loss, scaler, 1 / len(batches), cfg.micro_batch_size, replica))
        replica.finish()
        norm = _clip_gradients(params, optimizer, scaler, cfg.grad_clip)
        unread.add_step(None if scaler.is_enabled() else norm)  # a scaler skips the step
        is_read = unread.steps == read_every
        if is_read:
            unread.check(total.batches)
        _step(optimizer, scaler, step_scheduler)
        if average is not None:
            average.update_parameters(model)
        if is_read:
            unread, began = _Unread(), _report(unread, total, on_step, began)
    if unread.steps:
        unread.check(total.batches)
        _report(unread, total, on_step, began)
    return total


def loss_function(model: nn.Module, cfg: CFG) -> Loss:
    """The loss of `cfg.loss`."""
    loss = LOSSES[cfg.loss]
    return partial(loss, logit_bias=model.logit_bias) if cfg.loss == "sigmoid" else loss


def compute_loss(model: nn.Module, batch: Batch, loss: Loss) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch, in fp32, and its image embeddings (B, P)."""
    image_embeddings, text_embeddings = model(batch)  # (B, P), (C, P)
    ids = batch["image_ids"], batch["caption_image_ids"], batch.get("caption_ids")
    return loss(image_embeddings, text_embeddings, model.logit_scale, *ids), image_embeddings


def backward(
    model: nn.Module, batch: Batch, loss: Loss, scaler: torch.amp.GradScaler | None, share: float,
    micro_batch_size: int = 0, replica: Replica | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Add `share` of the gradients of a batch's loss to those of the model; the loss and the spread of its images.

    With a `micro_batch_size` in parts of so many images: the same gradients in less memory (see large_batch.py).
    `replica` is the model's of this process, where there are several.
    """
    n = len(batch["image_ids"])
    if 0 < micro_batch_size < n or world_size() > 1:
        value, image_embeddings = backward_in_parts(model, batch, loss, scaler, share, micro_batch_size or n, replica)
        return value, spread(image_embeddings)
    value, image_embeddings = compute_loss(model, batch, loss)
    scaled = value if share == 1 else value * share
    (scaled if scaler is None else scaler.scale(scaled)).backward()
    return value.detach(), spread(image_embeddings.detach())


def _backward(model: nn.Module, batch: Batch, *args) -> tuple[torch.Tensor, torch.Tensor]:
    """`backward`, or where memory runs out a UserError with a micro-batch size that was found to fit."""
    try:
        return backward(model, batch, *args)
    except (RuntimeError, MemoryError) as error:
        if "Expected to have finished reduction" in str(error):  # by DistributedDataParallel
            raise UserError(
                "trained parameters take no part in the loss, and the processes would wait for their gradients: "
                "freeze them (TORCH_DISTRIBUTED_DEBUG=INFO names them)"
            ) from error
        if not is_out_of_memory(error):
            raise
    # Only outside of the handler are the activations of the failed step gone
    size = largest_that_fits(model, batch)
    remedy = f"--micro-batch-size {size} fits, and gives the same gradients" if size else "use smaller images or towers"
    raise UserError(f"out of memory with {len(batch['image_ids'])} images at once: {remedy}")


def spread(embeddings: torch.Tensor) -> torch.Tensor:
    """Mean cosine of two different rows of (B, P) normalised embeddings, those of all processes; a scalar."""
    n = len(embeddings) * world_size()
    cosines = summed(embeddings.sum(0)).square().sum()  # the sum of all, the n of a row with itself included
    return (cosines - n) / max(1, n * (n - 1))


def _clip_gradients(params, optimizer, scaler, largest: float) -> torch.Tensor:
    """Scale the gradients down to the norm `largest`, unless it is 0, and return their norm before, a scalar."""
    scaler.unscale_(optimizer)

    kinds = by_kind((p,) for p in params if p.grad is not None)
    norms = [full(nn.utils.get_total_norm([p.grad for p in params])) for (params,) in kinds]
    norm = torch.stack(norms).norm() if len(norms) > 1 else norms[0]
    # Otherwise a pass over all gradients would multiply them by one; a GPU would have to be asked, and waited for
    if largest and (norm.device.type != "cpu" or norm > largest):
        for (params,) in kinds:
            nn.utils.clip_grads_with_norm_(params, largest, norm)
    return norm


def _step(optimizer, scaler, step_scheduler) -> None:
    scaler.step(optimizer)
    scaler.update()
    if step_scheduler is not None:
        step_scheduler.step()


def _report(steps: EpochStats, total: EpochStats, on_step: Callable[[EpochStats], object], began: float) -> float:
    """Take the time of the steps, count them, show them to `on_step`, and return the time now."""
    steps.seconds = time.perf_counter() - began
    total.count(steps)
    on_step(steps)
    return time.perf_counter()


class _Unread(EpochStats):
    """The statistics of some steps, whose losses and gradient norms are still on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []
        self.names: list[str] = []  # of the images of the last batch

    def add(self, batch: Batch, loss: torch.Tensor, spread: torch.Tensor) -> None:
        self.losses.append(loss)
        self.batches += 1
        self.images += len(batch["image_ids"]) * world_size()
        self.captions += len(batch["caption_image_ids"]) * world_size()  # about: processes may differ
        self.names, self.spread = batch.get("names", []), spread

    def add_step(self, norm: torch.Tensor | None) -> None:
        self.steps += 1
        self.norms += [] if norm is None else [norm]

    def check(self, batches_before: int) -> None:
        """Read all numbers from the device. Raises UserError where one is not finite."""
        values = torch.stack([*self.losses, *self.norms, self.spread]).tolist()
        self.loss_sum, self.spread = sum(values[: self.batches]), values[-1]
        for what, numbers in (("loss", values[: self.batches]), ("gradient norm", values[self.batches : -1])):
            if bad := [value for value in numbers if not math.isfinite(value)]:
                shown = ", ".join(self.names[:8]) + (", ..." if len(self.names) > 8 else "")
                place = f"within {self.batches} batches up to" if self.batches > 1 else "at"
                number = batches_before + self.batches
                raise UserError(f"the {what} is {bad[0]} {place} batch {number} of this pass; its images: {shown}")


def valid_epoch(model: nn.Module, loader: Iterable[Batch], cfg: CFG | None = None) -> dict[str, float]:
    """The recalls of `model` on a validation loader, as `recall_at_k` returns them; `cfg` as in the tutorial's call."""
    return recall_at_k(*embed_batches(model, loader))
