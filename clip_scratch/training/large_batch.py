"""The exact gradient of a batch in the memory of a part of it: GradCache (Gao et al. 2021, arXiv:2101.06983).

The embeddings of all parts are computed without a graph; the loss of the whole batch gives their gradients; each part
is computed again, with its graph and the same random numbers, and its gradients are continued into the towers. Exact
for whatever treats each image and each caption alone. Batch norm does not: it takes its statistics from a part, as it
does from each process in data-parallel training, unless `freeze_batch_norm` fixes them.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from ..data.loaders import Batch
from ..device import release_memory
from ..errors import is_out_of_memory
from .distributed import Replica, summed
from .shared_losses import loss_share

_INPUTS = ("pixel_values", "image_features", "input_ids", "attention_mask", "text_features")


def backward_in_parts(
    model: nn.Module, batch: Batch, loss: Callable[..., torch.Tensor], scaler: torch.amp.GradScaler | None,
    share: float, size: int, replica: Replica | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`engine.backward` of a batch by parts of `size` images: the loss, and the image embeddings (B, P).

    With several processes (distributed.py) the loss is that of the batch that theirs make together.
    """
    replica, parts = replica or Replica(model), split(batch, size)
    states, embedded = [], []
    is_one = len(parts) == 1  # its graph is kept, and it is computed once
    if is_one:
        with replica.pass_over(is_last=True):
            embedded.append(replica.forward(parts[0]))
    else:
        with torch.no_grad(), _fixed_statistics(model):
            for part in parts:
                states.append(_random_state(model.device))
                embedded.append(model(part))
    leaves = [torch.cat(embeddings).detach().requires_grad_() for embeddings in zip(*embedded, strict=True)]
    ids = (batch.get(name) for name in ("image_ids", "caption_image_ids", "caption_ids"))
    value = loss_share(loss, *leaves, model.logit_scale, *ids)
    scaled = value if share == 1 else value * share
    (scaled if scaler is None else scaler.scale(scaled)).backward()  # temperature and bias get their gradients here
    gradients = [leaf.grad.tensor_split(len(parts)) for leaf in leaves]
    after = _random_state(model.device)
    for i, part in enumerate(parts):
        with replica.pass_over(is_last=i == len(parts) - 1):
            if is_one:
                embeddings = embedded[0]
            else:
                _set_random_state(states[i], model.device)
                embeddings = replica.forward(part)
            outputs = zip(embeddings, (of_parts[i] for of_parts in gradients), strict=True)
            if trained := [(e, g) for e, g in outputs if e.requires_grad]:  # a tower may be frozen as a whole
                torch.autograd.backward(*zip(*trained, strict=True))
    _set_random_state(after, model.device)
    return summed(value.detach()), leaves[0].detach()


def split(batch: Batch, size: int) -> list[Batch]:
    """A batch in parts of at most `size` images, each with an equal share of the captions, of whatever images."""
    n = -(-len(batch["image_ids"]) // size)
    rows = {name: batch[name].tensor_split(n) for name in _INPUTS if name in batch}
    return [{name: parts[i] for name, parts in rows.items()} for i in range(n)]


def largest_that_fits(model: nn.Module, batch: Batch) -> int:
    """The largest halving of a batch's images that the device has memory for, forward and backward; 0 where none."""

    def attempt(size):
        for part in split(batch, size)[:2]:  # the second has the gradients of the first beside it
            torch.autograd.backward([e.sum() for e in model(part) if e.requires_grad])

    size = len(batch["image_ids"])
    while size := size // 2:
        release_memory(model.device)
        try:
            # In a thread of its own: one in which oneDNN once had no memory for its code never gets any again
            with ThreadPoolExecutor(1) as thread:
                thread.submit(attempt, size).result()
            return size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        finally:
            model.zero_grad(set_to_none=True)
    return 0


@contextlib.contextmanager
def _fixed_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms in training mode normalise as ever but leave their running statistics to the second pass."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    changed = [m for m in norms if m.training and m.track_running_stats]
    try:
        for module in changed:
            module.track_running_stats = False
        yield
    finally:
        for module in changed:
            module.track_running_stats = True


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
