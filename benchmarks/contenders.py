"""The training loops and loaders that are compared. Each is built in its own process and then runs rounds.

`round()` returns name -> (count, seconds). `facts()` returns what is the same in every round: workers, FLOPs, lengths.
Shapes: B images, C captions, L tokens, S pixels a side.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
import torch

from clip_scratch.config import CFG
from clip_scratch.data.captions import read_captions, split_of
from clip_scratch.data.loaders import Batch, build_loaders, to_device
from clip_scratch.device import computes_in_bf16, keep_freed_memory
from clip_scratch.models.build import build_model
from clip_scratch.training import engine
from clip_scratch.training.engine import compute_loss, loss_function, train_epoch
from clip_scratch.training.optimizer import build_optimizer

from . import classical
from .rounds import Figures

# Untimed steps before a round: memory was returned to the system between rounds and has to be allocated again
SETTLING = 4


@dataclass(frozen=True)
class Setup:
    """What all contenders share: data, towers, batch size and length of a round."""

    captions_path: str
    image_path: str
    cache_path: str
    model_name: str = "resnet50"
    text_encoder_model: str = "distilbert-base-uncased"
    size: int = 224  # pixels a side
    batch_size: int = 32
    seconds: float = 6.0  # minimum length of a training round
    matmul: int = 2048  # rows and columns of the square matrices that measure the machine's peak

    @property
    def precisions(self) -> tuple[str, ...]:
        """What the processor computes in without emulation, fastest last."""
        return ("fp32", "bf16") if computes_in_bf16(torch.device("cpu")) else ("fp32",)

    @property
    def precision(self) -> str:
        return self.precisions[-1]

    def cfg(self, **changes: object) -> CFG:
        """Settings for random weights and no augmentation; the classical loop has none either."""
        settings = {
            "captions_path": self.captions_path, "image_path": self.image_path, "cache_path": self.cache_path,
            "model_name": self.model_name, "text_encoder_model": self.text_encoder_model, "text_tokenizer": "train",
            "pretrained": False, "size": self.size, "batch_size": self.batch_size, "crop_scale": 1.0,
            "horizontal_flip": 0.0, "color_jitter": 0.0, "precision": self.precision, "device": "cpu",
        }  # fmt: skip
        return CFG(**settings | changes)


def train_table(cfg: CFG, images: int | None = None) -> pd.DataFrame:
    """The training captions of all images, or of the first `images`."""
    table = split_of(read_captions(cfg), "train", cfg.captions_path)
    return table if images is None else table[table["image_id"].isin(table["image_id"].unique()[:images])]


class Classical:
    """The classical loop (benchmarks/classical.py) with `workers`, or with the faster of 0 and 2."""

    def __init__(self, setup: Setup, keep_memory: bool = False, workers: int | None = None):
        if keep_memory:
            keep_freed_memory()
        self.settling = SETTLING if keep_memory else 1  # the stock allocator allocates again at every step
        cfg = setup.cfg(precision="fp32", channels_last=False)
        table = train_table(cfg)
        torch.manual_seed(cfg.seed)
        self.model = build_model(cfg, table["caption"].tolist()).train()
        self.optimizer = classical.build_optimizer(self.model)
        self.loaders = {
            n: classical.build_loader(table, self.model, n, setup.batch_size)
            for n in ((0, 2) if workers is None else (workers,))
        }
        seconds = {n: self._train(n, 1)[1] for n in self.loaders}
        self.workers = min(seconds, key=seconds.get)
        self.steps = max(2, math.ceil(setup.seconds / seconds[self.workers]))

    def _train(self, workers: int, steps: int) -> tuple[float, float]:
        """Pairs and seconds of `steps` steps, after untimed ones in which workers start and memory is allocated."""
        batches = iter(self.loaders[workers])
        for batch in itertools.islice(batches, self.settling):
            classical.train_step(self.model, batch, self.optimizer)
        began = time.perf_counter()
        pairs = 0
        for batch in itertools.islice(batches, steps):
            classical.train_step(self.model, batch, self.optimizer)
            pairs += len(batch["pixel_values"])
        return pairs, time.perf_counter() - began

    def round(self) -> Figures:
        return {"pairs": self._train(self.workers, self.steps)}

    def facts(self) -> dict[str, object]:
        tokens = self.loaders[self.workers].dataset.input_ids.shape[1]
        return {"workers": self.workers, "steps_a_round": self.steps, "tokens_a_caption": tokens}


class Ours:
    """This package's loop, from the same parts as clip_scratch.train; `changes` are settings."""

    def __init__(self, setup: Setup, **changes: object):
        keep_freed_memory()
        cfg = setup.cfg(**changes)
        table = train_table(cfg)
        torch.manual_seed(cfg.seed)
        self.model = build_model(cfg, table["caption"].tolist()).to(cfg.device)
        self.cfg = self.model.cfg
        self.loader = build_loaders(table, self.model.tokenizer, "train", self.cfg, device=cfg.device)
        self.optimizer = build_optimizer(self.model, self.cfg)
        self.epoch = 0
        self._train(1)
        self.steps = max(2, math.ceil(setup.seconds / self._train(1)["pairs"][1]))

    def _train(self, steps: int) -> Figures:
        done = []
        self.loader.start(self.epoch, 0, steps)
        self.epoch += 1  # different images next time
        began = time.perf_counter()
        train_epoch(self.model, self.loader, self.optimizer, self.cfg, on_step=done.append)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        return {
            "pairs": (sum(step.captions for step in done), seconds),
            "images": (sum(step.images for step in done), seconds),
        }

    def round(self) -> Figures:
        self._train(SETTLING)
        return self._train(self.steps)

    def facts(self) -> dict[str, object]:
        """FLOPs of a step, forward and backward, and the shape of its batch."""
        from torch.utils.flop_counter import FlopCounterMode

        self.loader.start(0, 0, 1)
        batch = to_device(next(iter(self.loader)), self.model.device)
        with FlopCounterMode(display=False) as counter:
            compute_loss(self.model, batch, loss_function(self.model, self.cfg))[0].backward()
        shapes = {"images_a_step": len(batch["image_ids"]), "captions_a_step": len(batch["caption_ids"])}
        tokens = batch["input_ids"].shape[1]
        return {
            "steps_a_round": self.steps,
            "flops_a_step": counter.get_total_flops(),
            "tokens_a_caption": tokens,
        } | shapes


class OursOnGpu(Ours):
    """Full fine-tuning on a GPU, and the share of the time it waits for data."""

    def __init__(self, setup: Setup, batch_size: int = 512):
        super().__init__(setup, device="cuda", precision="bf16", batch_size=batch_size)

    def round(self) -> Figures:
        figures = super().round()
        waiting, on_device = _Stopwatch(), engine.on_device
        engine.on_device = lambda batches, device: waiting.watch(on_device(batches, device))
        began = time.perf_counter()
        self.loader.start(self.epoch, 0, self.steps)
        try:
            train_epoch(self.model, self.loader, self.optimizer, self.cfg)
        finally:
            engine.on_device = on_device
        torch.cuda.synchronize()
        return figures | {"stall": (waiting.seconds, time.perf_counter() - began)}

    def facts(self) -> dict[str, object]:
        memory = torch.cuda.max_memory_allocated()
        facts = {"gpu": torch.cuda.get_device_name(), "peak_gpu_memory": memory, "peak_flops_a_second": _gpu_peak()}
        return super().facts() | facts


def _gpu_peak(n: int = 8192, times: int = 20) -> float:
    """FLOP/s of a large bf16 matrix product on the GPU."""
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    for _ in range(times):  # warm-up: the clock settles
        a @ b
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        a @ b
    torch.cuda.synchronize()
    return times * 2 * n**3 / (time.perf_counter() - began)


class _Stopwatch:
    """Adds up the time that training waits for batches."""

    seconds = 0.0

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - began
            if batch is None:
                return
            yield batch


class ClassicalLoader:
    """The classical DataLoader alone, with the faster of 0 and 2 workers."""

    def __init__(self, setup: Setup, images: int = 1920):
        cfg = setup.cfg()
        table = train_table(cfg).iloc[:images]  # it decodes an image per row
        model = build_model(cfg, table["caption"].tolist())
        self.loaders = {n: classical.build_loader(table, model, n, setup.batch_size) for n in (0, 2)}
        rates = {n: count / seconds for n in self.loaders for count, seconds in [self._epoch(n)]}
        self.workers = max(rates, key=rates.get)

    def _epoch(self, workers: int) -> tuple[float, float]:
        batches = iter(self.loaders[workers])
        next(batches)  # starts the workers
        began = time.perf_counter()
        images = sum(len(batch["pixel_values"]) for batch in batches)
        return images, time.perf_counter() - began

    def round(self) -> Figures:
        return {"images": self._epoch(self.workers)}

    def facts(self) -> dict[str, object]:
        return {"workers": self.workers}


class OurLoader:
    """Our loader alone, and with normalisation, which our model does and the classical loader includes."""

    def __init__(self, setup: Setup, images: int | None = None, **changes: object):
        keep_freed_memory()
        cfg = setup.cfg(**changes)
        table = train_table(cfg, images)
        self.model = build_model(cfg, table["caption"].tolist())
        self.loader = build_loaders(table, self.model.tokenizer, "train", self.model.cfg)
        self.epoch = 0
        self.first_epoch = self._epoch(False)[1]  # fills the image cache, if there is one

    @torch.inference_mode()
    def _epoch(self, normalise: bool) -> tuple[float, float]:
        self.loader.start(self.epoch)
        self.epoch += 1
        began = time.perf_counter()
        images = 0
        for batch in self.loader:
            images += len(batch["image_ids"])
            if normalise:
                self.model.normalize_pixels(batch["pixel_values"])
        return images, time.perf_counter() - began

    def round(self) -> Figures:
        return {"images": self._epoch(False), "normalised images": self._epoch(True)}

    def facts(self) -> dict[str, object]:
        return {"first_epoch_seconds": self.first_epoch}
