"""Which parameters of a tower stay fixed: one vocabulary for every tower, ours or a pretrained CLIP's.

none            nothing: the whole tower and its head train
first:N         the stem and the first N blocks
all-but-last:N  everything below the last N blocks
backbone        the tower; its head trains
all             the tower and its head
lora            the tower, but for low-rank updates of its blocks (Hu et al. 2021, arXiv:2106.09685); its head trains

A block is a transformer layer, or a stage of a convolutional network.
"""

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn

from ..config import CFG
from ..errors import UserError
from .convolutions import freeze_depthwise
from .encoders import Concatenated

_ADAPTER = "default"  # the name that PEFT gives a set of LoRA matrices by default; there is only one here


class Place(NamedTuple):
    part: str  # image, text or head
    below_top: int  # blocks between it and the top of its tower; 0 in the last block and in a head
    is_lora: bool


def frozen_parts(cfg: CFG) -> dict[str, str]:
    """What stays fixed in the "image" and the "text" tower; the tutorial's `trainable=False` means the backbone."""
    asked = {"image": cfg.image_freeze, "text": cfg.text_freeze}
    return {tower: value if value == "all" or cfg.trainable else "backbone" for tower, value in asked.items()}


def freeze(model: nn.Module, cfg: CFG) -> None:
    """Freeze the towers and heads of a dual encoder by `image_freeze` and `text_freeze`.

    Raises UserError where a tower has too few blocks, nothing would train, or PEFT is missing for lora.
    """
    asked = frozen_parts(cfg)
    if set(asked.values()) == {"all"}:
        raise UserError("nothing to train: image_freeze and text_freeze are both all")
    for tower, value in asked.items():
        _freeze_tower(model.towers[tower], value, f"{tower}_freeze", cfg.lora_rank)
        if tower == "image" and cfg.freeze_depthwise:
            freeze_depthwise(model.towers[tower])
        model.heads[tower].requires_grad_(value != "all")  # after the tower: SigLIP's heads are parts of its towers


def _freeze_tower(tower: nn.Module, value: str, setting: str, rank: int) -> None:
    word, _, count = value.partition(":")
    if word == "lora":
        return _add_lora(tower, rank, setting)
    number, depth = blocks(tower)
    n = int(count or 0)
    if n > depth or (word == "first" and n == depth):
        raise UserError(f"{setting} {value}: the tower has {depth} blocks. Set it to backbone, or a smaller number")
    lowest = {"none": 0, "first": n + 1, "all-but-last": depth - n + 1}.get(word, depth + 2)  # of those that train
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(number[name] >= lowest)


def blocks(tower: nn.Module) -> tuple[dict[str, int], int]:
    """The block of each parameter by name, counted from 1, and how many blocks there are.

    The stem (embeddings, first convolution) is 0; what comes after the last block is one more than the depth.
    """
    if isinstance(tower, Concatenated):  # blocks are counted from the top of each network, the stem is 0 in all
        each = [blocks(network) for network in tower.children()]
        depth = max(own for _, own in each)
        return {
            f"{i}.{name}": n + (depth - own if n else 0)
            for i, (number, own) in enumerate(each)
            for name, n in number.items()
        }, depth
    network, prefix = (tower.timm_model, "timm_model.") if hasattr(tower, "timm_model") else (tower, "")
    if hasattr(network, "group_matcher"):  # timm knows the blocks of its families
        from timm.models import group_parameters

        # The last group holds what belongs to no block; the name "" does in every family
        named = SimpleNamespace(named_parameters=lambda: [*network.named_parameters(), ("", None)])
        number = group_parameters(named, network.group_matcher(coarse=True), reverse=True)
        depth = number.pop("") - 1
        return {prefix + name: n for name, n in number.items()}, depth
    names = [name for name, _ in tower.named_parameters()]
    lists = [(name, module) for name, module in tower.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return dict.fromkeys(names, 1), 1
    # The list that holds most of the weights; the outermost of equals
    path, layers = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    number, outside = {}, 0  # outside the list: 0 before its first layer, above the depth after it
    for name in names:
        number[name] = outside
        if name.startswith(f"{path}."):
            number[name] = int(name[len(path) + 1 :].partition(".")[0]) + 1
            outside = len(layers) + 1
    return number, len(layers)


def places(model: nn.Module) -> Iterator[tuple[Place, nn.Parameter]]:
    """Every parameter of a dual encoder with its place; what is outside the towers belongs to the heads."""
    heads = {id(p) for head in model.heads.values() for p in head.parameters()}
    place_of: dict[int, Place] = {}
    for part, tower in model.towers.items():
        number, depth = blocks(tower)
        for name, parameter in tower.named_parameters():
            if id(parameter) not in heads:
                place_of[id(parameter)] = Place(part, max(0, depth - number[name]), ".lora_" in name)
    for parameter in model.parameters():
        yield place_of.get(id(parameter), Place("head", 0, False)), parameter


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """How many parameters of the image tower, the text tower and the heads train, and how many there are."""
    counts = dict.fromkeys(("image", "text", "head"), (0, 0))
    for place, parameter in places(model):
        trained, total = counts[place.part]
        counts[place.part] = (trained + parameter.numel() * parameter.requires_grad, total + parameter.numel())
    return counts


def keep_frozen_in_eval(tower: nn.Module, freeze_batch_norm: bool = False) -> None:
    """Put frozen modules back into eval mode after `train()`: no dropout, fixed batch-norm statistics.

    With `freeze_batch_norm` the statistics of every batch norm stay fixed, whether its weights train or not.
    """
    for module in tower.modules():
        parameters = list(module.parameters())
        frozen = parameters and not any(p.requires_grad for p in parameters)
        if frozen or (freeze_batch_norm and isinstance(module, nn.modules.batchnorm._BatchNorm)):
            module.eval()


def _add_lora(tower: nn.Module, rank: int, setting: str) -> None:
    """Add LoRA to the linear layers and dense convolutions of a tower's blocks, in place; only its updates train."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(f"{setting} lora needs another library: pip install 'clip_scratch[lora]'") from error

    number, depth = blocks(tower)
    # Not subclasses of Linear: torch's attention uses the weights of its own without calling it
    pattern = "|".join(
        re.escape(name)
        for name, module in tower.named_modules()
        if (type(module) is nn.Linear or (isinstance(module, nn.Conv2d) and module.groups == 1))
        and 1 <= number.get(f"{name}.weight", 0) <= depth
    )
    if not pattern:
        raise UserError(f"{setting} lora: the tower's blocks have no linear layers. Set it to none or first:N")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern), tower, _ADAPTER)


def merged_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the same model without LoRA: its updates are added to the weights."""
    state = model.state_dict()
    if not any(".lora_" in name for name in state):
        return state
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            weight = f"{name}.base_layer.weight"
            with torch.no_grad():
                state[weight] = state[weight] + module.get_delta_weight(_ADAPTER).view_as(state[weight])
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
