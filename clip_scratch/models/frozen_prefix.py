"""Frozen prefixes: what a tower computes below its first module that trains, cut off there and gone on from.

With a frozen input such a prefix gives the same activations in every epoch, so they can be kept. They are cut off
by a hook that leaves the forward with the input of that module, the `unit`, and put back by one that gives the unit
that input again. A unit is known by its name, and no hook stays between two calls, so that a deep copy of a model
(the averaged one) goes on from the same activations.

Shapes: B images, C captions, L tokens, S pixels a side, D features, P projected dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from .freezing import blocks

if TYPE_CHECKING:
    from .clip import DualEncoder

_TOLERANCE = 2e-5  # between two ways to a normalised embedding in fp32; a wrong way is off by far more


class _Reached(Exception):
    """The unit was reached, and this is its input."""

    def __init__(self, activations: torch.Tensor):
        self.activations = activations


def unit_that_trains(model: DualEncoder, part: str, batch: dict) -> str | None:
    """The name of the module of a tower ("image" or "text") up to which nothing trains; None where that is nothing.

    It is the tower's head where the whole tower is frozen, otherwise a block, stage or layer. A tower that trains
    below something frozen has none: with full and lora, or an unfrozen stem. `batch` is a small one of a loader,
    to see in which order the modules are called.
    """
    tower, head = model.towers[part], model.heads[part]
    of_head = {id(p) for p in head.parameters()}  # SigLIP's heads are parts of its towers
    number, _ = blocks(tower)
    trains = [(number[name], p.requires_grad) for name, p in tower.named_parameters() if id(p) not in of_head]
    lowest = min((block for block, trained in trains if trained), default=None)
    if lowest is None:
        return next(name for name, module in model.named_modules() if module is head)
    if lowest == 0 or any(block >= lowest and not trained for block, trained in trains):
        return None
    called = _calls(model, part, batch)
    first = next((name for name in called if _trains(model, name, any, recurse=False)), "")
    path = first.split(".")
    around = [".".join(path[:depth]) for depth in range(1, len(path) + 1)]  # from the outermost module inwards
    unit = next((name for name in around if name in called and _trains(model, name, all)), None)
    return unit if unit and (part == "image" or _layers_below(model, unit)) else None


def _trains(model: nn.Module, name: str, which: Callable[[Iterable[bool]], bool], recurse: bool = True) -> bool:
    """Whether any, or all, of a module's parameters train."""
    return which(p.requires_grad for p in _module(model, name).parameters(recurse))


def _module(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


@torch.no_grad()
def _calls(model: DualEncoder, part: str, batch: dict) -> list[str]:
    """The names of the modules in the order in which they are called."""
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: called.append(name))
        for name, module in model.named_modules()
    ]
    try:
        _embed(model, part, batch)
    finally:
        for handle in handles:
            handle.remove()
    return called


def _embed(model: DualEncoder, part: str, batch: dict) -> torch.Tensor:
    return model.embed_images(batch) if part == "image" else model.embed_texts(batch)


def _layers_below(model: DualEncoder, unit: str) -> tuple[nn.ModuleList, int] | None:
    """The list of layers that holds `unit`, and how many stand below it; None where none does."""
    parent, _, index = unit.rpartition(".")
    layers = _module(model, parent)
    return (layers, int(index)) if isinstance(layers, nn.ModuleList) and int(index) else None


def activations(model: DualEncoder, part: str, unit: str, batch: dict) -> torch.Tensor:
    """What enters `unit` when the model embeds the images or the texts of a batch: (B, ...) or (C, ...).

    Text of which a CPU makes more than one chunk is cut off in the first: give no more than one.
    """

    def leave(module: nn.Module, args: tuple, named: dict) -> None:
        raise _Reached(_first(args, named))

    handle = _module(model, unit).register_forward_pre_hook(leave, with_kwargs=True)
    try:
        _embed(model, part, batch)
    except _Reached as reached:
        return reached.activations
    finally:
        handle.remove()
    raise AssertionError(f"{unit} was not called")


def _first(args: tuple, named: dict) -> torch.Tensor:
    return args[0] if args else next(iter(named.values()))


def image_features_from(model: DualEncoder, unit: str, kept: torch.Tensor) -> torch.Tensor:
    """`model.image_features` from the activations (B, ...) that enter `unit` on: (B, P).

    The frozen part runs on a single black image, whose activations are then replaced: this costs little and, other
    than a network taken apart, works for every tower whose data flow through the unit alone.
    """
    module = _module(model, unit)
    if module is model.heads["image"]:
        return module(kept)
    size = model.cfg.size
    with _given(module, iter([kept])):
        return model.image_features(torch.zeros(1, 3, size, size, device=kept.device))


def text_features_from(
    model: DualEncoder,
    unit: str,
    kept: Sequence[torch.Tensor],
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """`model.text_features` from the activations that enter `unit` on: (C, P).

    `kept` is one tensor a chunk of captions, in the order in which the model calls its tower with them. The ids and
    the mask, (C, L), are for what a tower does beside its layers; where it is frozen as a whole they are not used.
    """
    module = _module(model, unit)
    if module is model.heads["text"]:
        (features,) = kept
        return module(features)
    with _without(*_layers_below(model, unit)), _given(module, iter(kept)):
        return model.text_features(input_ids, attention_mask)


@contextmanager
def _given(module: nn.Module, kept: Iterator[torch.Tensor]) -> Iterator[None]:
    """Each call of `module` takes the next of `kept` in place of its first input."""

    def put(module: nn.Module, args: tuple, named: dict) -> tuple[tuple, dict]:
        if args:
            return (next(kept), *args[1:]), named
        return args, named | {next(iter(named)): next(kept)}

    handle = module.register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _without(layers: nn.ModuleList, n: int) -> Iterator[None]:
    """The list without its first `n` layers."""
    whole = layers._modules
    layers._modules = {str(i): layer for i, layer in enumerate(list(layers)[n:])}
    try:
        yield
    finally:
        layers._modules = whole


@torch.no_grad()
def goes_on_exactly(model: DualEncoder, part: str, unit: str, batch: dict) -> bool:
    """Whether a batch's embeddings come out the same from the activations at `unit` on. The model is in eval mode.

    They do not where data reach the layers above the unit past it, as in a DenseNet, or from layers that are taken
    out, as T5's position bias.
    """
    with torch.autocast(model.device.type, enabled=False):
        expected = _embed(model, part, batch)
        kept = activations(model, part, unit, batch)
        try:
            found = _embed(model, part, batch | {f"{part}_activations": kept, f"{part}_unit": unit})
        except Exception:  # a tower that is called in a way that was not meant may fail with anything
            return False
    return found.shape == expected.shape and bool((found - expected).abs().max() <= _TOLERANCE)
