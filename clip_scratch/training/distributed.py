"""Data-parallel training in the processes that torchrun starts, with the gradients of one process.

Each process embeds its share of a batch, and computes its share of the loss of the whole batch (shared_losses.py) and
from it the gradients of its own embeddings, which it continues into its towers. Summed over the processes, these are
the gradients of the whole batch.

Without torchrun there is one process, and every function here does nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # before the group is made: its default arguments would keep the group, and its threads
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..config import CFG
from ..environment import versions
from ..errors import USER_ERROR, UserError

_TIMEOUT = datetime.timedelta(minutes=30)  # rank 0 may decode a data set meanwhile


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


@contextlib.contextmanager
def process_group(cfg: CFG | None = None) -> Iterator[CFG | None]:
    """Join the processes of torchrun, where it started this one; the settings of a training run that they share.

    Processes but the first print nothing. After a restart by torchrun (`--max-restarts`) the run resumes from its last
    checkpoint. Raises UserError for settings that several processes cannot have, or that differ between them.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield cfg
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store, number, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {restarts}", store)  # it outlives a restart, and so do its addresses
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=_TIMEOUT)
    try:
        if cfg is not None:
            _check(cfg)
            if restarts != "0" and cfg.run_dir and Path(cfg.run_dir, "config.json").is_file():
                cfg = dataclasses.replace(cfg, resume=cfg.run_dir)
        with contextlib.ExitStack() as stack:
            if not is_main():
                silence = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(silence))
                stack.enter_context(contextlib.redirect_stderr(silence))
                os.environ["TQDM_DISABLE"] = "1"
            yield cfg
    except UserError as error:
        if store.add("user errors", 1) > 1:  # another process says so already
            sys.exit(USER_ERROR)
        raise UserError(f"process {number} of {size}: {error}" if number else str(error)) from error
    dist.destroy_process_group()  # not after an error: the others may wait for this process


def _check(cfg: CFG) -> None:
    """Raise UserError for settings or versions that differ between the processes, or that several cannot have."""
    settings = dataclasses.asdict(cfg) | versions()
    theirs = from_main(settings)
    different = [name for name in settings | theirs if settings.get(name) != theirs.get(name)]
    if any_process(bool(different)):
        names = ", ".join(different) or "another process's"
        same = "start all with the same command, and with the same packages"
        raise UserError(f"the processes have different settings or versions ({names}): {same}")
    if cfg.batch_size % world_size():
        raise UserError(f"batch_size ({cfg.batch_size}) is not a multiple of the {world_size()} processes: change it")
    if cfg.fully_shard and not torch.cuda.is_available():
        raise UserError("fully_shard needs GPUs: leave it out")
    if cfg.wise_ft:
        raise UserError("wise_ft is for one process: leave it out, and average afterwards in a run of one")


def share(items: list, work: Callable[[list], Iterator]) -> Iterator:
    """What `work` yields for the first process's items, of which each process does a part; in the first process."""
    if world_size() == 1:
        yield from work(items)
        return
    own = work(from_main(items)[rank() :: world_size()])
    while True:
        found = [None] * world_size() if is_main() else None
        item = next(own, None)
        dist.gather_object(item, found)
        if not any_process(item is not None):
            return
        yield from (other for other in found or () if other is not None)


def from_main(value):
    """The first process's `value`, in every process."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def any_process(asked: bool) -> bool:
    """Whether any process says yes."""
    if world_size() == 1:
        return asked
    flag = torch.tensor(int(asked))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def gather(rows: torch.Tensor) -> list[torch.Tensor]:
    """The rows (N, ...) of every process, in their order, without gradient; N may differ between processes."""
    if world_size() == 1:
        return [rows]
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    counts = [int(count) for count in counts]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded.contiguous())
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def gather_with_gradient(rows: torch.Tensor) -> torch.Tensor:
    """The rows (N, P) of every process as one tensor, whose gradients are summed over the processes."""
    return _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        parts = gather(rows)
        ctx.counts = [len(part) for part in parts]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.split(ctx.counts)[rank()]


def gather_embeddings(
    embedded: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`embed_batches` of every process as one: images (N, P), captions (C, P), and the image row of each caption."""
    if world_size() == 1:
        return embedded
    images, texts, rows = (gather(part) for part in embedded)
    firsts = [sum(len(part) for part in images[:i]) for i in range(len(images))]
    return torch.cat(images), torch.cat(texts), torch.cat([r + first for r, first in zip(rows, firsts, strict=True)])


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the processes' tensors of one shape, without gradient."""
    if world_size() > 1:
        dist.all_reduce(tensor := tensor.clone())
    return tensor


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor, of which each process has a shard (sharded.py); the class is slow to import."""
    return hasattr(tensor, "full_tensor")


def sharded_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose weights are sharded (sharded.py)."""
    return [module for module in model.modules() if hasattr(module, "unshard")]


class Replica:
    """The forward pass of a model of which every process has a copy, and whose gradients are summed over them.

    DistributedDataParallel, or FSDP2 for sharded towers, reduces the gradients of the towers during the backward pass.
    Temperature and bias get theirs before it, from the loss: `finish` reduces them.
    """

    def __init__(self, model: nn.Module):
        self.forward = model
        self.is_last = True  # whether the next batch is the last one of a step
        self._sharded = sharded_modules(model)
        rest = model.parameters() if self._sharded else (model.log_scale, model.logit_bias)
        self._rest = [p for p in rest if p is not None and p.requires_grad and not is_sharded(p)]
        if world_size() > 1 and not self._sharded:
            module = nn.Sequential(model)  # parameters of the outermost module itself cannot be left out
            ignored = [name for name, p in module.named_parameters() if any(p is other for other in self._rest)]
            ignored += [name for name, _ in module.named_buffers()]  # batch norm's statistics are each process's own
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
            self.forward = DistributedDataParallel(module, gradient_as_bucket_view=True)
            self.forward.register_comm_hook(None, _sum_bucket)

    def pass_over(self, is_last: bool) -> contextlib.AbstractContextManager:
        """For a forward and a backward pass over a part of a batch: the last ones of a step sum the gradients."""
        sums = world_size() == 1 or (self.is_last and is_last)
        for module in self._sharded:
            module.set_requires_gradient_sync(sums, recurse=False)
        return contextlib.nullcontext() if sums or self._sharded else self.forward.no_sync()

    def finish(self) -> None:
        """After the last backward pass of a step."""
        for p in self._rest:
            if p.grad is not None:  # a loss may do without a temperature
                p.grad = summed(p.grad)


def _sum_bucket(_, bucket):
    """DistributedDataParallel's hook for a sum in place of its mean. It takes no annotation that is a string."""
    done = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return done.then(lambda future: future.value()[0])


def same_weights(model: nn.Module) -> None:
    """Give every process the first one's weights and buffers, such as batch norm's statistics of its own share."""
    if world_size() > 1:
        for tensor in [*model.parameters(), *model.buffers()]:
            if not is_sharded(tensor):
                dist.broadcast(tensor.detach(), src=0)


def sync_batch_norm(model: nn.Module) -> None:
    """Let the batch norms of a model take their statistics from all processes. Raises UserError without a GPU."""
    from timm.layers import convert_sync_batchnorm  # which keeps the activations in timm's own batch norms

    if model.device.type != "cuda":
        raise UserError("sync_batch_norm needs GPUs: leave it out, or fix the statistics with --freeze-batch-norm")
    convert_sync_batchnorm(model)


def own_randomness(seed: int, step: int) -> None:
    """From here on each process draws its own dropout masks."""
    if world_size() > 1:
        torch.manual_seed(hash((seed, step, rank())) % 2**63)
