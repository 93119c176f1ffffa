"""Recall with one, two or all captions of an image in a step, after equally many images and after equal time.

    python -m benchmarks.captions_per_image --captions-path data/flickr8k

Trains heads on cached features of the frozen towers as in the `speedrun` preset, or the towers too with `--preset
compact` (minutes per epoch). The learning rate is constant after a short warm-up and the weights are averaged, so a
run can be measured at any time. Validation time is not counted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from clip_scratch.data.captions import read_captions, split_of
from clip_scratch.data.loaders import build_loaders
from clip_scratch.device import keep_freed_memory
from clip_scratch.models.build import build_model
from clip_scratch.presets import PRESETS
from clip_scratch.training.cached_features import cache_features
from clip_scratch.training.engine import train_epoch, valid_epoch
from clip_scratch.training.optimizer import WeightAverage, build_optimizer

WARMUP = 15  # steps


@dataclass
class Arguments:
    """Compare training with 1, 2 and all captions of an image in a step."""

    captions_path: str  # the captions file or folder, as `train` takes it
    preset: str = "speedrun"  # speedrun: heads on frozen towers; compact: towers too
    seconds: float = 8  # of training steps per run
    cache_path: str = ""  # as `train` takes it


def curve(table, cfg, seconds: float) -> list[dict[str, float]]:
    """Train for `seconds` of steps: images, captions, seconds so far and recalls after each epoch."""
    torch.manual_seed(cfg.seed)
    model = build_model(cfg)
    cfg = model.cfg
    train, valid = (
        cache_features(model, build_loaders(split_of(table, mode, cfg.captions_path), model.tokenizer, mode, cfg), cfg)
        for mode in ("train", "valid")
    )
    optimizer = build_optimizer(model, cfg)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    average = WeightAverage(model, cfg.ema)
    points, done = [], []
    while not points or points[-1]["seconds"] < seconds:
        epoch = len(points)
        train_epoch(
            model, train.start(epoch), optimizer, cfg, step_scheduler=warm_up, average=average, on_step=done.append
        )
        points.append({
            "images": sum(step.images for step in done), "captions": sum(step.captions for step in done),
            "seconds": sum(step.seconds for step in done), **valid_epoch(average.module, valid, cfg),
        })  # fmt: skip
    return points


def main(arguments: Arguments) -> None:
    """Print each curve, then a comparison at equal image passes and at equal time."""
    keep_freed_memory()
    changes = {"captions_path": arguments.captions_path, "cache_path": arguments.cache_path, "device": "cpu"}
    changes |= {"size": 224, "max_captions": 0, "projection_dim": 256}
    table = read_captions(PRESETS[arguments.preset](**changes))
    curves = {}
    for per_image in (1, 2, 0):
        name = str(per_image) if per_image else "all"
        began = time.perf_counter()
        cfg = PRESETS[arguments.preset](**changes, captions_per_image=per_image)
        curves[name] = curve(table, cfg, arguments.seconds)
        for point in curves[name]:
            print(f"captions an image {name:>3}: {_line(point)}", flush=True)
        print(f"({time.perf_counter() - began:.0f} s with caches and validation)", flush=True)
    passes = min(points[-1]["images"] for points in curves.values())
    seconds = min(points[-1]["seconds"] for points in curves.values())
    for what, limit, key in (("images", passes, "images"), ("seconds", seconds, "seconds")):
        print(f"\nat {limit:,.0f} {what} (last epoch before that)")
        for name, points in curves.items():
            print(f"captions an image {name:>3}: {_line([p for p in points if p[key] <= limit][-1])}")


def _line(point: dict[str, float]) -> str:
    return (
        f"{point['images']:>7,} images {point['captions']:>7,} captions {point['seconds']:6.1f} s   "
        f"R@1 {100 * point['text_retrieval_recall@1']:.1f} / {100 * point['image_retrieval_recall@1']:.1f}   "
        f"t2i R@10 {100 * point['image_retrieval_recall@10']:.1f}   rsum {point['rsum']:.1f}"
    )


if __name__ == "__main__":
    import tyro

    from clip_scratch.errors import run_command

    run_command(lambda: main(tyro.cli(Arguments, prog="python -m benchmarks.captions_per_image")))
