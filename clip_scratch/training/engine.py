"""train_epoch and valid_epoch: the loop itself. No file is written here and no command line is read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from ..config import CFG
from ..data.loaders import Batch, Loader
from ..errors import UserError
from ..evaluation.retrieval import recall_at_k
from .device import computes_in_bf16
from .losses import LOSSES

Item = TypeVar("Item")


@dataclass
class Step:
    """What one optimiser step did, for whoever watches: the progress bar, the log, the checkpoint."""

    number: int  # batches of this epoch done, this step's included
    loss: float  # mean of its batches
    batches: int
    images: int
    captions: int
    seconds: float  # data and computation of this step
    spread: float  # mean cosine of two different images of the batch: near 1, the embeddings have collapsed


def autocast(cfg: CFG, device: torch.device):
    """The autocast context of `precision`; a context that does nothing for fp32.

    A model that was trained in bf16 may come to a processor without it, which would emulate it, many times slower
    than fp32.
    """
    if cfg.precision == "fp16":
        return torch.autocast(device.type, torch.float16)
    if cfg.precision == "fp32" or not computes_in_bf16(device):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches with their tensors on `device`; for a GPU the next is made while it computes on the present."""
    if device.type == "cpu":  # there the two would only take each other's cores
        return iter(batches)
    return prefetched(to_device(batch, device) for batch in batches)


def prefetched(items: Iterator[Item]) -> Iterator[Item]:
    """The items in their order, each made one ahead by a thread."""
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(next, items, None)
        while (item := ahead.result()) is not None:
            ahead = thread.submit(next, items, None)
            yield item


def loss_of(model: nn.Module, batch: Batch, cfg: CFG) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch, and its image embeddings (B, P). The towers run in `precision`, the loss in fp32."""
    with autocast(cfg, model.device):
        image_embeddings, text_embeddings = model(batch)  # (B, P), (C, P)
    loss = LOSSES[cfg.loss]
    if cfg.loss == "sigmoid":
        loss = partial(loss, logit_bias=model.logit_bias)
    ids = batch["image_ids"], batch["caption_image_ids"], batch["caption_ids"]
    return loss(image_embeddings, text_embeddings, model.logit_scale, *ids), image_embeddings


def train_epoch(
    model: nn.Module,
    loader: Loader,
    optimizer: torch.optim.Optimizer,
    cfg: CFG,
    *,
    step_scheduler: torch.optim.lr_scheduler.LambdaLR | None = None,
    scaler: torch.amp.GradScaler | None = None,
    average: nn.Module | None = None,
    on_step: Callable[[Step], object] = lambda step: None,
) -> None:
    """One pass over `loader`'s batches: forward, loss, backward, and every `accumulation` batches a step.

    The gradients of those batches are averaged, and clipped together; the negatives of a caption are still those
    of its own batch. `average` is an exponential moving average of the model to update, if any. `on_step` sees
    every step and may raise to stop between two steps. Raises UserError at a non-finite loss or gradient, before
    it reaches the weights.
    """
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    last = len(loader.batches)
    began, done = time.perf_counter(), []
    for number, batch in enumerate(on_device(loader, model.device), start=loader.batches.skip + 1):
        loss, image_embeddings = loss_of(model, batch, cfg)
        value = loss.item()
        if not math.isfinite(value):
            raise _not_finite("loss", value, number, batch)
        if not done:
            optimizer.zero_grad(set_to_none=True)
            together = min(cfg.accumulation, last - number + 1)  # fewer at the end of an epoch
        loss = loss / together
        (loss if scaler is None else scaler.scale(loss)).backward()
        done.append((value, len(batch["image_ids"]), len(batch["caption_ids"])))
        if len(done) < together:
            continue
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if cfg.grad_clip and norm > cfg.grad_clip:  # else a pass over all gradients would multiply them by one
            nn.utils.clip_grads_with_norm_(trained, cfg.grad_clip, norm)
        if scaler is None:
            if not math.isfinite(norm.item()):  # a finite loss may have such a gradient; a scaler skips the step
                raise _not_finite("gradient's norm", norm.item(), number, batch)
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if step_scheduler is not None:
            step_scheduler.step()
        if average is not None:
            average.update_parameters(model)
        now = time.perf_counter()
        losses, images, captions = map(sum, zip(*done, strict=True))
        on_step(Step(number, losses / together, together, images, captions, now - began, _spread(image_embeddings)))
        began, done = time.perf_counter(), []


def _not_finite(what: str, value: float, number: int, batch: Batch) -> UserError:
    names = ", ".join(batch["names"][:8]) + (", ..." if len(batch["names"]) > 8 else "")
    return UserError(f"the {what} is {value} at step {number} of this epoch; the batch's images: {names}")


def _spread(embeddings: torch.Tensor) -> float:
    """Mean cosine of two different rows of (B, P) normalised embeddings."""
    n = len(embeddings)
    total = embeddings.detach().sum(0).square().sum().item()  # sum of all cosines, the n of a row with itself included
    return (total - n) / max(1, n * (n - 1))


@torch.inference_mode()
def embed(model: nn.Module, loader: Iterable[Batch], cfg: CFG) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings of all images (N, P) and captions (C, P) of a loader, and the image row of each caption (C,)."""
    model.eval()
    images, texts, ids, caption_ids = [], [], [], []
    for batch in on_device(loader, model.device):
        with autocast(cfg, model.device):
            image_embeddings, text_embeddings = model(batch)
        images.append(image_embeddings.float().cpu())
        texts.append(text_embeddings.float().cpu())
        ids.append(batch["image_ids"].cpu())
        caption_ids.append(batch["caption_image_ids"].cpu())
    order, rows = torch.cat(ids).sort()
    own = rows[torch.searchsorted(order, torch.cat(caption_ids))]
    return torch.cat(images), torch.cat(texts), own


def valid_epoch(model: nn.Module, loader: Iterable[Batch], cfg: CFG) -> dict[str, float]:
    """The recalls of `model` on a validation loader, as `recall_at_k` gives them."""
    return recall_at_k(*embed(model, loader, cfg))
