"""Towers whose weights, gradients and optimizer state are sharded over the processes: PyTorch's FSDP2 (ZeRO-3).

A block has its full weights only while it computes. Heads and temperature are small: every process has them in full.
The model is unsharded while it is measured and drawn, and checkpoints hold full tensors.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..models.clip import DualEncoder
from ..models.freezing import blocks, merged_state
from .distributed import is_main, is_sharded, sharded_modules, world_size


def shard(model: DualEncoder) -> None:
    """Shard each block of the towers, and what is left of each tower, over the processes, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The heads, which come after a tower, change nothing in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(model.device.type, (world_size(),))
    in_heads = {p for head in model.heads.values() for p in head.parameters()}  # SigLIP's heads are parts of its towers
    for tower in model.towers.values():
        for module in [*_blocks(tower), tower]:
            fully_shard(module, mesh=mesh, ignored_params=in_heads)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)  # a sum, not a mean


def _blocks(tower: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules of a tower with parameters of one block alone."""
    number, depth = blocks(tower)
    found: list[str] = []
    for name, module in tower.named_modules():
        within = {number[f"{name}.{own}"] for own, _ in module.named_parameters()} if name else set()
        is_block = len(within) == 1 and 1 <= max(within) <= depth and not isinstance(module, nn.ModuleList)
        if is_block and not name.startswith(tuple(f"{other}." for other in found)):
            found.append(name)
            yield module


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Within it every process has the full weights, and may call the model as often as it likes."""
    modules = sharded_modules(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in modules:
        module.reshard()
        module.set_reshard_after_forward(True, recurse=False)


def by_kind(rows: Iterable[tuple[torch.Tensor, ...]]) -> list[tuple[list[torch.Tensor], ...]]:
    """Rows of tensors as columns, apart for sharded and for ordinary tensors: no operation takes both at once."""
    kinds: dict[bool, list] = {}
    for row in rows:
        kinds.setdefault(is_sharded(row[0]), []).append(row)
    return [tuple(map(list, zip(*kind, strict=True))) for kind in kinds.values()]


def full_state_dict(model: DualEncoder) -> dict[str, torch.Tensor]:
    """`merged_state` with full tensors, in the first process; a collective call where the model is sharded."""
    return {name: full_on_main(tensor) for name, tensor in merged_state(model).items()}


def full_on_main(value: object) -> object:
    """A sharded tensor in full, on the CPU of the first process; a collective call. Other objects as they are."""
    if not is_sharded(value):
        return value
    tensor = value.full_tensor()
    return tensor.cpu() if is_main() else tensor.new_empty(0)  # no other needs the memory


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor in full, in every process; a collective call. Other tensors as they are."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(value: object, like: object) -> object:
    """This process's shard of a full tensor, sharded as `like` is; as it is where `like` is not."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements)
