"""What all tests share: no network, no cache outside the test's own folders, and a tiny data set."""

import csv
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

# Before any of the libraries is imported: they read these once. Subprocesses inherit them.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="clip-scratch-hf-")
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # refuses at once, as a machine without a network does
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FLICKR8K = ROOT.parent / "shared" / "flickr8k"

settings.register_profile("clip_scratch", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("clip_scratch")

COLOURS = {"red": (220, 30, 30), "green": (30, 170, 60), "blue": (40, 60, 220), "yellow": (235, 210, 40)}
CAPTIONS = (
    "A {c} square on grey ground",
    "one {c} square , number {i}",
    "{c}",
    "There is a {c} square in the {w} half of this picture",
    "a picture of a {c} box",
)


def pytest_collection_modifyitems(items):
    if not FLICKR8K.is_dir():
        for item in items:
            if "real_data" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"there is no {FLICKR8K}"))


@pytest.fixture(scope="session", autouse=True)
def _two_threads():
    import torch

    torch.set_num_threads(min(2, int(os.environ["OMP_NUM_THREADS"])))


@pytest.fixture
def flickr8k():
    """The folder of the real data; for tests marked real_data."""
    return FLICKR8K


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """26 drawn images with one to five captions each: `.captions_path`, `.image_path`, `.table` (20 train, 6 valid).

    Some captions repeat under several images, some differ in case only.
    """
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "Images").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(26):
        colour = list(COLOURS)[i % len(COLOURS)]
        pixels = rng.integers(90, 160, (40 + i % 3 * 8, 48, 3), dtype=np.uint8)
        left = 4 if i % 2 else 28
        pixels[10:26, left : left + 16] = COLOURS[colour]
        Image.fromarray(pixels).save(folder / "Images" / f"{i:02d}.png")
        for text in CAPTIONS[: 1 + i % 5]:
            caption = text.format(c=colour, i=i, w="left" if i % 2 else "right")
            rows.append((f"{i:02d}.png", caption, i, "train" if i < 20 else "valid"))
    with open(folder / "captions.txt", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *(row[:2] for row in rows)])
    table = pd.DataFrame(rows, columns=["image", "caption", "image_id", "split"])
    return SimpleNamespace(
        folder=folder, captions_path=folder / "captions.txt", image_path=folder / "Images", table=table
    )


@pytest.fixture
def tiny_cfg(tiny_data):
    """Settings of a model that trains in seconds on `tiny_data`, from random weights."""
    from clip_scratch.config import CFG

    return CFG(
        captions_path=tiny_data.captions_path,
        image_path=tiny_data.image_path,
        model_name="test_resnet",
        text_encoder_model="bert-tiny",
        text_tokenizer="train",
        pretrained=False,
        size=32,
        max_length=24,
        projection_dim=32,
        batch_size=8,
        epochs=2,
        valid_fraction=0.2,
        device="cpu",
    )


@pytest.fixture(scope="session")
def _trained_tokenizer(tiny_data):
    from clip_scratch.data.tokenizer import train_tokenizer

    return train_tokenizer(tiny_data.table["caption"].tolist())


@pytest.fixture
def tiny_tokenizer(_trained_tokenizer):
    """The WordPiece tokenizer of `tiny_data`; a copy, since a model sets its tokenizer's length."""
    import copy

    return copy.deepcopy(_trained_tokenizer)


@pytest.fixture(scope="session")
def scene_run(tmp_path_factory):
    """A finished run on 240 built-in scenes: `.folder` of the run, and `.cwd`, where its data lie."""
    from clip_scratch.config import PRESETS
    from clip_scratch.train import main

    cwd = tmp_path_factory.mktemp("scenes")
    settings = {"size": 32, "model_name": "test_resnet", "text_encoder_model": "bert-tiny", "n_scenes": 240}
    settings |= {"batch_size": 16, "epochs": 5, "warmup_steps": 4, "max_length": 32, "device": "cpu"}
    settings |= {"image_encoder_lr": 2e-3, "text_encoder_lr": 1e-3}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        folder = main(PRESETS["scenes"](**settings, run_dir="runs/scenes"))
    return SimpleNamespace(folder=cwd / folder, cwd=cwd)
