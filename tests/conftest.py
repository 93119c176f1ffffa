"""What all tests share: no network, no cache outside the test's own folders, and a tiny data set."""

import csv
import gc
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

# Before any of the libraries is imported: they read these once. Subprocesses inherit them.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="clip-scratch-hf-")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="clip-scratch-cache-")
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # refuses at once, as a machine without a network does
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings
from PIL import Image

os.fsync = lambda descriptor: None  # no test cuts the power, and thousands of calls would wait for the disk
gc.disable()  # until all tests are collected: libraries make a million objects, none of which is garbage

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """What `-n auto` stands for: the cores that this process may use, 8 at most (a worker takes about 1 GB)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores, 8)


def pytest_collection_modifyitems(config, items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        items[:] = _longest_first(items, config.workerinput["workercount"])
    if not FLICKR8K.is_dir():
        for item in items:
            if "real_data" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"there is no {FLICKR8K}"))


def pytest_collection_finish():
    gc.freeze()  # what was imported stays: no collection looks at it again
    gc.enable()


def pytest_sessionfinish():
    gc.unfreeze()  # else Triton says that it leaks


def _longest_first(items, workers):
    """Each worker's share of the tests, as `--dist worksteal` deals them, begins with slow ones, by whole files.

    A slow test that began last would run alone.
    """
    slow = [item for item in items if item.get_closest_marker("slow")]
    others = [item for item in items if not item.get_closest_marker("slow")]
    files, order = list(dict.fromkeys(item.path for item in slow)), []
    for worker in range(workers):
        mine = [item for item in slow if item.path in files[worker::workers]]
        room = (len(items) - len(order)) // (workers - worker) - len(mine)
        order += mine + others[: max(0, room)]
        del others[: max(0, room)]
    return order + others


@pytest.fixture(scope="session", autouse=True)
def _threads():
    import torch

    torch.set_num_threads(min(2, int(os.environ["OMP_NUM_THREADS"])))


@pytest.fixture
def flickr8k():
    """The folder of the real data; for tests marked real_data."""
    return FLICKR8K


@pytest.fixture(params=[True, False], ids=["bf16", "no_bf16"])
def bf16(request, monkeypatch):
    """Whether the processor counts as one with bf16 arithmetic: the test runs with both answers on every machine."""
    monkeypatch.setenv("CLIP_SCRATCH_BF16", str(int(request.param)))
    return request.param


@pytest.fixture
def plain(monkeypatch):
    """No pictures: they take most of the time of so small a run."""
    import clip_scratch.training.report as report

    monkeypatch.setattr(report.Report, "picture", lambda *_, **__: None)
    monkeypatch.setattr(report.Report, "end", lambda *_, **__: None)


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
    """A finished run on 240 built-in scenes: `.folder` of the run, and `.cwd`, where its data lie. Workers share it."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "scenes"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _train_on_scenes(folder)
    return SimpleNamespace(folder=folder / "runs/scenes", cwd=folder)


def _train_on_scenes(cwd):
    from clip_scratch.presets import PRESETS
    from clip_scratch.train import main

    cwd.mkdir()
    settings = {"size": 32, "model_name": "test_resnet", "text_encoder_model": "bert-tiny", "n_scenes": 240}
    settings |= {"batch_size": 16, "epochs": 5, "warmup_steps": 4, "max_length": 32, "device": "cpu"}
    settings |= {"image_encoder_lr": 2e-3, "text_encoder_lr": 1e-3}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        main(PRESETS["scenes"](**settings, run_dir="runs/scenes"))


# ---- pretrained CLIPs of transformers, small enough to make

_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
_VISION = _TOWER | {"image_size": 32, "patch_size": 8}


def clip_bpe_tokenizer(captions):
    """A tokenizer of CLIP's own kind (byte-level BPE, <|startoftext|> and <|endoftext|>), learned from captions."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    empty = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"], show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(captions, trainer)
    model = json.loads(bpe.to_str())["model"]
    return CLIPTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


def _make_hf_clip(kind, folder, tokenizer, bert_tokenizer):
    """Save a random model of `kind` (see `hf_clip`) with its image processor and tokenizer in `folder`."""
    import torch
    import transformers as hf

    torch.manual_seed(7)
    square, crop = {"height": 32, "width": 32}, {"size": {"shortest_edge": 32}, "crop_size": 32}
    bert = {**_TOWER, "vocab_size": len(bert_tokenizer), "max_position_embeddings": 40}
    bert |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    if kind == "clip":
        text = {**_TOWER, "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        config = hf.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=24)
        processor = hf.CLIPImageProcessor(**crop)
    elif kind == "siglip":
        config = hf.SiglipConfig(text_config={**bert, "max_position_embeddings": 64}, vision_config=_VISION)
        processor = hf.SiglipImageProcessor(size=square, resample=2)
    elif kind == "siglip2":
        vision = {**_TOWER, "patch_size": 8, "num_patches": 16}
        config = hf.Siglip2Config(text_config={**bert, "max_position_embeddings": 64}, vision_config=vision)
        processor = hf.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    elif kind == "chinese":
        config = hf.ChineseCLIPConfig(text_config=bert, vision_config=_VISION, projection_dim=24)
        processor = hf.ChineseCLIPImageProcessor(**crop)
    else:
        if kind == "dual_timm":
            vision = hf.TimmWrapperConfig(architecture="test_resnet", hidden_size=96, num_labels=0)
        else:
            vision = hf.ViTConfig(**_VISION)
        config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(
            vision, hf.BertConfig(**bert), projection_dim=24
        )
        processor = hf.ViTImageProcessor(size=square, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25])
    model = hf.AutoModel.from_config(config)
    with torch.no_grad():  # random towers hardly tell inputs apart; trained ones do
        for p in model.parameters():
            if p.ndim >= 2:
                p.mul_(3)
        if "siglip" in kind:
            model.logit_scale.fill_(4.765)  # 117, beyond CLIP's clamp, as of the published models
            model.logit_bias.fill_(-12.9)
        elif kind == "clip":
            model.logit_scale.fill_(4.6052)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (tokenizer if kind == "clip" else bert_tokenizer).save_pretrained(folder)


@pytest.fixture(scope="session")
def hf_clip(tmp_path_factory, tiny_data, _trained_tokenizer):
    """Make the folder of a tiny transformers model, as `save_pretrained` leaves it, and return its path.

    clip, siglip, siglip2 (NaFlex), chinese, dual (ViT + BERT) and dual_timm (a timm ResNet + BERT). Copy a folder
    before you change it.
    """
    import copy

    root, made = tmp_path_factory.mktemp("hf"), {}

    def make(kind="clip"):
        if kind not in made:
            scenes = ["a red circle left of a blue square", "two green stars on grey", "small yellow triangle above"]
            tokenizer = clip_bpe_tokenizer([*tiny_data.table["caption"], *scenes * 2])
            _make_hf_clip(kind, root / kind, tokenizer, copy.deepcopy(_trained_tokenizer))
            made[kind] = root / kind
        return made[kind]

    return make


@pytest.fixture
def hf_cfg(tiny_data, hf_clip):
    """Settings that fine-tune one of the tiny CLIPs on `tiny_data` in a second or two: 5 batches an epoch."""
    from clip_scratch.presets import HFClip

    def make(kind="clip", **settings):
        rates = {"head_lr": 1e-3, "image_encoder_lr": 1e-3, "text_encoder_lr": 1e-3}
        defaults = {"captions_path": tiny_data.captions_path, "valid_fraction": 0.2, "device": "cpu", "batch_size": 4}
        defaults |= {"epochs": 2, "warmup_steps": 2, "early_stopping": 0}
        return HFClip(model_name=hf_clip(kind), **defaults | rates | settings)

    return make
