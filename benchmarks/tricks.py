"""Contenders that measure one trick each: the same work with and without it, in one process.

Shapes: B images, C captions, L tokens, S pixels a side.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch

from clip_scratch.data.loaders import build_loaders
from clip_scratch.data.tokenizer import tokenize
from clip_scratch.device import keep_freed_memory
from clip_scratch.models.build import build_model
from clip_scratch.models.convolutions import fold_batch_norms, freeze_depthwise, train_depthwise_in_fp32
from clip_scratch.models.dropout import Dropout
from clip_scratch.models.encoders import ImageEncoder
from clip_scratch.training.engine import train_epoch
from clip_scratch.training.optimizer import build_optimizer

from .contenders import Setup, train_table
from .rounds import Figures


def _time(work: Callable[[], object], least: float = 0.5) -> tuple[float, float]:
    """Repeat `work` for at least `least` seconds: (repetitions, seconds)."""
    began, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - began < least:
        work()
        count += 1
    return count, time.perf_counter() - began


class _Variants:
    """Named variants of some work: each runs once as a warm-up and is then timed in every round."""

    variants: dict[str, Callable[[], object]]

    def _warm_up(self) -> None:
        for work in self.variants.values():
            work()

    def round(self) -> Figures:
        return {name: _time(work) for name, work in self.variants.items()}

    def facts(self) -> dict[str, object]:
        return {}


def _forward_and_backward(tower: torch.nn.Module, inputs: tuple[torch.Tensor, ...], precision: str) -> None:
    context = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    with context:
        features = tower(*inputs)
    features.float().square().mean().backward()
    tower.zero_grad(set_to_none=True)


class ImageTower(_Variants):
    """Forward and backward of the image tower on B images; a form is e.g. "bf16 channels_last"."""

    def __init__(self, setup: Setup, forms: tuple[str, ...], keep_memory: bool = True, compiled: bool = False):
        if keep_memory:
            keep_freed_memory()
        towers = {}
        pixels = torch.randn(setup.batch_size, 3, setup.size, setup.size)
        self.variants = {}
        for form in forms:
            precision, layout = form.split(" ")
            memory = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}[layout]
            if layout not in towers:
                encoder = ImageEncoder(setup.model_name, pretrained=False, size=setup.size)
                towers[layout] = encoder.to(memory_format=memory).train()
            inputs = (pixels.contiguous(memory_format=memory),)
            self.variants[form] = lambda t=towers[layout], i=inputs, p=precision: _forward_and_backward(t, i, p)
            if compiled:
                compiled_tower = torch.compile(towers[layout])
                self.variants[f"{form} compiled"] = lambda t=compiled_tower, i=inputs, p=precision: (
                    _forward_and_backward(t, i, p)
                )
        began = time.perf_counter()
        self._warm_up()
        self.warm_up_seconds = time.perf_counter() - began

    def facts(self) -> dict[str, object]:
        return {"warm_up_seconds": self.warm_up_seconds}


class EfficientNet(_Variants):
    """EfficientNet-lite0: training with its depthwise convolutions in bf16 and in fp32; with fixed batch norms that are
    folded or not, and frozen depthwise convolutions; and the frozen tower's forward pass, folded or not."""

    def __init__(self, setup: Setup):
        keep_freed_memory()
        encoder = ImageEncoder("tf_efficientnet_lite0", pretrained=False, size=setup.size)
        plain = encoder.to(memory_format=torch.channels_last).train()
        mixed = copy.deepcopy(plain)
        train_depthwise_in_fp32(mixed)
        fixed, folded = copy.deepcopy(mixed).eval(), copy.deepcopy(plain).eval()
        fold_batch_norms(folded, setup.size)
        train_depthwise_in_fp32(folded)
        pointwise = copy.deepcopy(folded)
        freeze_depthwise(pointwise)
        pixels = torch.randn(min(16, setup.batch_size), 3, setup.size, setup.size)
        inputs = (pixels.contiguous(memory_format=torch.channels_last),)
        self.variants = {p: partial(_forward_and_backward, plain, inputs, p) for p in setup.precisions}
        towers = {"fixed": fixed, "folded": folded, "folded, depthwise frozen": pointwise}
        for name, tower in towers.items():
            self.variants[name] = partial(_forward_and_backward, tower, inputs, setup.precision)
        self.variants["frozen"] = partial(self._forward, fixed, inputs, setup.precision)
        self.variants["frozen, folded"] = partial(self._forward, folded, inputs, setup.precision)
        if "bf16" in setup.precisions:
            self.variants["bf16, depthwise in fp32"] = partial(_forward_and_backward, mixed, inputs, "bf16")
        self._warm_up()

    @staticmethod
    @torch.no_grad()
    def _forward(tower: torch.nn.Module, inputs: tuple[torch.Tensor, ...], precision: str) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            tower(*inputs)


class TextTower(_Variants):
    """Forward and backward of the text tower: captions padded to the data set's longest, to the batch's, the same with
    torch's dropout, and in chunks."""

    def __init__(self, setup: Setup):
        keep_freed_memory()
        cfg = setup.cfg(model_name="test_resnet")  # the image tower is not used
        captions = train_table(cfg)["caption"].tolist()
        model = build_model(cfg, captions).train()
        tokens = tokenize(captions, model.tokenizer, cfg.max_length)
        rows = np.random.default_rng(0).permutation(len(tokens))
        longest = int(tokens.lengths().argmax())

        def work(ids: torch.Tensor, mask: torch.Tensor, tower: torch.nn.Module = model.text_encoder):
            return lambda: _forward_and_backward(tower, (ids, mask), setup.precision)

        some, many = rows[: setup.batch_size], rows[: 5 * setup.batch_size]
        padded = [part[:-1] for part in tokens.batch([*some, longest])]  # as wide as the longest caption
        self.variants = {"padded": work(*padded), "trimmed": work(*tokens.batch(some))}
        plain = copy.deepcopy(model.text_encoder)
        for module in plain.modules():
            if isinstance(module, Dropout):
                module.__class__ = torch.nn.Dropout
        self.variants["torch's dropout"] = work(*tokens.batch(some), tower=plain)
        self.variants["many"] = work(*tokens.batch(many))
        self.variants["many in chunks"] = work(*tokens.batch(many), tower=_InChunks(model))
        self._warm_up()


class _InChunks(torch.nn.Module):
    """The model's text tower, which encodes captions of similar length together."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model.forward_text(input_ids, attention_mask)  # (C, L) -> (C, P)


class Peak(_Variants):
    """Square matrix products in each of the processor's precisions, the reference of MFU. Counts are FLOPs."""

    def __init__(self, setup: Setup):
        n = setup.matmul
        self.flops = 2 * n**3
        self.variants = {}
        for precision in setup.precisions:
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
            a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
            self.variants[precision] = lambda a=a, b=b: a @ b
        self._warm_up()

    def round(self) -> Figures:
        return {name: (count * self.flops, seconds) for name, (count, seconds) in super().round().items()}


class HeadOnly:
    """Training the heads on frozen towers: recomputed in every step, or from cached features.

    Recomputing is timed for `steps` steps, training from the cache for whole epochs.
    """

    def __init__(self, setup: Setup, images: int | None = None, steps: int = 2):
        from clip_scratch.training.cached_features import cache_features

        keep_freed_memory()
        cfg = setup.cfg(image_freeze="backbone", text_freeze="backbone", cached_views=1, batch_size=200)
        table = train_table(cfg, images)
        torch.manual_seed(cfg.seed)
        self.model = build_model(cfg, table["caption"].tolist())
        self.cfg, self.steps = self.model.cfg, steps
        self.loader = build_loaders(table, self.model.tokenizer, "train", self.cfg)
        self.optimizer = build_optimizer(self.model, self.cfg)
        began = time.perf_counter()
        self.cached = cache_features(self.model, self.loader, self.cfg)
        self.building = time.perf_counter() - began
        self.epochs = itertools.count()
        self._train(self.loader, 1)
        seconds = self._train(self.cached, None)[1]
        self.repeats = max(1, math.ceil(1 / seconds))

    def _train(self, loader, steps: int | None) -> tuple[float, float]:
        done = []
        began = time.perf_counter()
        loader.start(next(self.epochs), 0, steps)
        train_epoch(self.model, loader, self.optimizer, self.cfg, on_step=done.append)
        return sum(step.images for step in done), time.perf_counter() - began

    def round(self) -> Figures:
        epochs = [self._train(self.cached, None) for _ in range(self.repeats)]
        return {
            "recomputed": self._train(self.loader, self.steps),
            "cached": (sum(images for images, _ in epochs), sum(seconds for _, seconds in epochs)),
        }

    def facts(self) -> dict[str, object]:
        return {"cache_built_in_seconds": self.building, "images": len(self.loader.dataset)}
