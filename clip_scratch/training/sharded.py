"""Towers whose weights, gradients and optimizer state are divided among the processes: PyTorch's FSDP2 (ZeRO-3).

A block has its whole weights only while it computes. The heads and the temperature are small, and every process has
them whole. What is measured, drawn and saved is whole.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..models.clip import DualEncoder
from ..models.freezing import blocks, merged_state
from .distributed import divided_modules, is_divided, is_main, world_size


def shard(model: DualEncoder) -> None:
    """Divide each block of the towers, and what is left of each tower, among the processes, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The heads, which come after a tower, change nothing in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(model.device.type, (world_size(),))
    whole = {p for head in model.heads.values() for p in head.parameters()}  # SigLIP's heads are parts of its towers
    for tower in model.towers.values():
        for module in [*_blocks(tower), tower]:
            fully_shard(module, mesh=mesh, ignored_params=whole)
    for module in divided_modules(model):
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
def whole_towers(model: nn.Module) -> Iterator[None]:
    """Give every process the whole weights meanwhile; each may then use the model as often as it likes."""
    modules = divided_modules(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in modules:
        module.reshard()
        module.set_reshard_after_forward(True, recurse=False)


def alike(rows: Iterable[tuple[torch.Tensor, ...]]) -> list[tuple[list[torch.Tensor], ...]]:
    """Rows of tensors as columns: those of divided tensors, and those of others. No operation takes both at once."""
    kinds: dict[bool, list] = {}
    for row in rows:
        kinds.setdefault(is_divided(row[0]), []).append(row)
    return [tuple(map(list, zip(*kind, strict=True))) for kind in kinds.values()]


def whole_state(model: DualEncoder) -> dict[str, torch.Tensor]:
    """`merged_state` in the first process, whatever is divided; all processes must ask."""
    return {name: to_main(tensor) for name, tensor in merged_state(model).items()}


def to_main(value: object) -> object:
    """A divided tensor as a whole, on the CPU of the first process; all must ask. Other objects as they are."""
    if not is_divided(value):
        return value
    tensor = value.full_tensor()
    return tensor.cpu() if is_main() else tensor.new_empty(0)  # no other needs the memory


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A divided tensor as a whole, in every process; all must ask."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def part_of(value: object, like: object) -> object:
    """This process's part of a whole tensor, divided as `like` is. Other objects as they are."""
    if not is_divided(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements)
