"""Build the model in the package, `load("scenes-tiny")`: python -m benchmarks.scenes_tiny

Trains small towers on the built-in scenes from random weights, and writes the best model in fp16 to
clip_scratch/released/scenes-tiny. About 15 minutes on 2 cores.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from clip_scratch.device import keep_freed_memory
from clip_scratch.evaluate import evaluate
from clip_scratch.models.saved import RELEASED, WEIGHTS, load, prepare_best, write_tensors
from clip_scratch.presets import Scenes
from clip_scratch.train import main as train


class ScenesTiny(Scenes):
    """Towers of 1.0 and 0.5 million weights."""

    model_name = "mobilenetv4_conv_small_050"
    size = 96
    head = "linear"
    epochs = 24
    minutes = 0.0


def release(run: Path, folder: Path) -> None:
    """Write the best model of a run in fp16, without the paths of this machine."""
    model = load(run)
    shutil.rmtree(folder, ignore_errors=True)
    model.cfg.run_dir = model.cfg.image_path = model.cfg.cache_path = ""
    prepare_best(folder, model, model.cfg)
    weights = load_file(run / "best" / WEIGHTS)
    halves = {name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in weights.items()}
    write_tensors(folder / WEIGHTS, halves, {"format": "pt"})


def main() -> None:
    """Train, release, and print the recalls of both on the validation and the test split."""
    keep_freed_memory()
    run = train(ScenesTiny())
    release(run, RELEASED / "scenes-tiny")
    for split in ("valid", "test"):
        for name in (run, "scenes-tiny"):
            measured = evaluate(name, split)
            recalls = [100 * measured[f"{way}_retrieval_recall@1"] for way in ("text", "image")]
            print(f"{split} {name}: R@1 {recalls[0]:.1f} {recalls[1]:.1f}, rsum {measured['rsum']:.1f}")
    size = sum(file.stat().st_size for file in (RELEASED / "scenes-tiny").iterdir())
    print(f"{size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
