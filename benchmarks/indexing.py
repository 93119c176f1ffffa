"""Images per second of indexing against the encode loops of open_clip and sentence-transformers.

    python -m benchmarks.indexing --images my_images [--model-name tf_efficientnet_lite0] [--n 1024]

All have the same timm tower with random weights, the same image files and the same linear head, in fp32 where ours is
in the precision that the processor prefers for it. open_clip: its model, its evaluation transform, a DataLoader with a
worker per core and its batches of 64. sentence-transformers: `encode` on paths, whose module opens and transforms a
batch as its CLIPModel does; both also with the allocator setting that our commands make (`keep_freed_memory`). Three
rounds in turn, each in a process of its own, medians; "tower alone" is ours on pixels that are ready.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clip_scratch import CFG
from clip_scratch.data.images import images_below
from clip_scratch.device import keep_freed_memory
from clip_scratch.models.build import build_model
from clip_scratch.retrieval.indexing import _embedded

BATCH = 64


def ours(model, folder: Path, names: list[str]) -> None:
    """What `search index` does, without the files."""
    for _ in _embedded(model, folder, names):
        pass


def tower_alone(model, n: int) -> None:
    """The image tower on pixels that are ready."""
    pixels = torch.randint(0, 256, (BATCH, 3, model.cfg.size, model.cfg.size), dtype=torch.uint8)
    with torch.inference_mode():
        for _ in range(n // BATCH):
            model.encode_image(pixels)


def open_clip_loop(model_name: str, size: int) -> Callable[[Path, list[str]], None]:
    """open_clip's model around the timm tower, its transform, and its evaluation loop."""
    import open_clip
    from torch.utils.data import DataLoader, Dataset

    config = {
        "embed_dim": 256,
        "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 2, "layers": 1},
    }
    config["vision_cfg"] = {
        "timm_model_name": model_name,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": size,
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "benchmark_tower.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder)
    model, _, transform = open_clip.create_model_and_transforms("benchmark_tower", pretrained=None)
    model.eval()

    class Files(Dataset):
        def __init__(self, paths):
            self.paths = paths

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, i):
            return transform(Image.open(self.paths[i]))

    def loop(folder: Path, names: list[str]) -> None:
        loader = DataLoader(Files([folder / name for name in names]), BATCH, num_workers=os.cpu_count())
        with torch.inference_mode():
            for images in loader:
                model.encode_image(images, normalize=True)

    return loop


def sentence_transformers_loop(model_name: str, size: int) -> Callable[[Path, list[str]], None]:
    """SentenceTransformer.encode around the timm tower."""
    import timm
    from sentence_transformers import SentenceTransformer
    from torchvision import transforms as T

    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = timm.create_model(model_name, num_classes=256)
            steps = [T.Resize(size), T.CenterCrop(size), T.ToTensor(), T.Normalize([0.5] * 3, [0.5] * 3)]
            self.transform = T.Compose(steps)

        def preprocess(self, inputs, **_):
            images = [self.transform(Image.open(path).convert("RGB")) for path in inputs]
            return {"pixel_values": torch.stack(images)}

        tokenize = preprocess

        def forward(self, features, **_):
            embeddings = torch.nn.functional.normalize(self.network(features["pixel_values"]), dim=-1)
            return {**features, "sentence_embedding": embeddings}

    model = SentenceTransformer(modules=[Tower()], device="cpu")

    def loop(folder: Path, names: list[str]) -> None:
        model.encode([str(folder / name) for name in names], batch_size=BATCH)

    return loop


def measure(name: str, options: argparse.Namespace) -> float:
    """Images per second of one contender, in this process, after a batch to warm up."""
    names = images_below(options.images)[: options.n]
    contender, _, allocator = name.partition(" + ")
    if contender.startswith("ours"):
        cfg = CFG(
            model_name=options.model_name, text_encoder_model="bert-tiny", text_tokenizer="train", pretrained=False,
            size=options.size, head="linear", precision=options.precision, device="cpu",
        )  # fmt: skip
        model = build_model(cfg, ["a dog", "two dogs"]).eval()
        alone = contender == "ours, tower alone"

        def run(names: list[str]) -> None:
            tower_alone(model, len(names)) if alone else ours(model, options.images, names)
    else:
        make = open_clip_loop if contender == "open_clip" else sentence_transformers_loop
        run = partial(make(options.model_name, options.size), options.images)
    if allocator or contender.startswith("ours"):
        keep_freed_memory()
    run(names[:BATCH])
    began = time.perf_counter()
    run(names)
    return len(names) / (time.perf_counter() - began)


CONTENDERS = (
    "open_clip", "open_clip + allocator setting", "sentence-transformers", "sentence-transformers + allocator setting",
    "ours", "ours, tower alone",
)  # fmt: skip


def main() -> None:
    """Print images/s of each contender, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--model-name", default="tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--n", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contender", choices=CONTENDERS, help="measure this one alone, in this process")
    options = parser.parse_args()
    if options.contender:
        print(measure(options.contender, options))
        return
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(options.rounds):
        for name in CONTENDERS:
            command = [sys.executable, "-m", "benchmarks.indexing", *sys.argv[1:], "--contender", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rates[name].append(float(done.stdout.split()[-1]))
    print(f"{options.n} images, {options.model_name} at {options.size}, {torch.get_num_threads()} threads")
    for name, values in rates.items():
        print(f"{name:<42}{np.median(values):7.1f} images/s  ({', '.join(f'{v:.1f}' for v in values)})")


if __name__ == "__main__":
    main()
