"""A run as ONNX files: torch's embeddings, a run.py without torch, int8 that is measured, and what is refused."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from clip_scratch.data.tokenizer import tokenize
from clip_scratch.errors import UserError
from clip_scratch.export import export
from clip_scratch.exporting.onnx import OnnxTowers
from clip_scratch.models.clip import CLIPModel
from clip_scratch.models.hf_clip import HFCLIPModel
from clip_scratch.models.saved import load, prepare_best, save_best
from clip_scratch.retrieval.embed import encode_image, encode_text

CAPTIONS = ["red", "one blue square , number 7", "There is a green square in the left half of this picture"]


def written(folder, model):
    prepare_best(folder / "best", model, model.cfg)
    save_best(folder / "best", model, 1, {})
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function: name, model -> its run, the folder exported from it, and what was measured; each once."""
    made = {}

    def export_once(name, model, **options):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            run = written(root / "run", model)
            made[name] = run, root / "onnx", export(run, root / "onnx", format="onnx", **options)
        return made[name]

    return export_once


@pytest.fixture
def model(tiny_cfg, tiny_tokenizer):
    torch.manual_seed(0)
    return CLIPModel(dataclasses.replace(tiny_cfg, interpolation="bilinear"), tiny_tokenizer)


def largest_difference(run, folder):
    """Between torch's and onnxruntime's embeddings of 3 images and 3 captions of several lengths."""
    own = load(run)
    own.cfg.precision = "fp32"
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, own.cfg.size, own.cfg.size), np.uint8))
    ids, mask = tokenize(CAPTIONS, own.tokenizer, own.cfg.max_length).batch([0, 1, 2])
    images, texts = OnnxTowers(folder, own.tokenizer)(
        {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
    )
    with torch.no_grad():
        return max((images - own.encode_image(pixels)).abs().max(), (texts - own.encode_text(ids, mask)).abs().max())


def test_convolutional_towers(exported, model):
    run, folder, measured = exported("convolutional", model)
    assert largest_difference(run, folder) < 1e-4
    assert measured["folder"]["rsum"] == pytest.approx(measured["run"]["rsum"])


@pytest.mark.slow
def test_a_fine_tuned_clip_with_a_vit(exported, hf_cfg):
    run, folder, _ = exported("vit", HFCLIPModel(hf_cfg()))
    assert largest_difference(run, folder) < 1e-4


def test_run_py_needs_no_torch(exported, model, tiny_data):
    """And gives the embeddings of the model from the image file on."""
    run, folder, _ = exported("convolutional", model)
    image = tiny_data.image_path / "03.png"
    done = subprocess.run([sys.executable, folder / "run.py", image, *CAPTIONS], capture_output=True, text=True)
    own = load(run)
    own.cfg.precision = "fp32"
    expected = (encode_text(own, CAPTIONS) @ encode_image(own, [image])[0]).tolist()
    lines = [line.split("  ") for line in done.stdout.splitlines()]
    assert {text: float(c) for c, text in lines} == pytest.approx(dict(zip(CAPTIONS, expected, strict=True)), abs=1e-3)
    assert [float(c) for c, _ in lines] == sorted((float(c) for c, _ in lines), reverse=True)
    code = "import sys, run; assert not {'torch', 'clip_scratch'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0


def test_int8_is_smaller_near_and_measured(exported, model):
    _, fp32, _ = exported("convolutional", model)
    _, folder, measured = exported("int8", model, int8=True, max_loss=100)
    assert json.loads((folder / "config.json").read_text())["int8"]
    for tower in ("image", "text"):
        assert (folder / f"{tower}.onnx").stat().st_size < 0.6 * (fp32 / f"{tower}.onnx").stat().st_size
    assert 0.9 < measured["image_cosines"].min() < 0.99999 and measured["text_cosines"].mean() > 0.98
    assert sorted(os.listdir(folder)) == ["config.json", "image.onnx", "run.py", "text.onnx", "tokenizer.json"]


def test_a_loss_that_is_too_large_leaves_nothing(model, tmp_path, monkeypatch):
    from clip_scratch.exporting import onnx

    def worse(own, folder, batches, int8):
        folder.joinpath("image.onnx").touch()

    class Wrong(CLIPModel):
        def __init__(self, folder, tokenizer):
            super().__init__(model.cfg, tokenizer)

        def encode_text(self, *tokens):
            return -super().encode_text(*tokens)

    monkeypatch.setattr(onnx, "write_onnx_folder", worse)
    monkeypatch.setattr(onnx, "OnnxTowers", Wrong)
    monkeypatch.setattr("clip_scratch.evaluation.retrieval.recall_at_k", lambda *embeddings: recalls.pop())
    names = ("image_retrieval_recall@1", "text_retrieval_recall@1")
    recalls = [dict.fromkeys(names, 0.45), dict.fromkeys(names, 0.4701)]
    run = written(tmp_path / "run", model)
    with pytest.raises(UserError, match="text retrieval from 47.0 to 45.0: .* --max-loss 3$"):
        export(run, tmp_path / "out", format="onnx", int8=True)
    assert sorted(os.listdir(tmp_path)) == ["run"]


def test_what_cannot_be_written(model, tmp_path, monkeypatch):
    run = written(tmp_path / "run", model)
    with pytest.raises(UserError, match="int8 is for --format onnx"):
        export(run, tmp_path / "out", int8=True)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"pip install 'clip_scratch\[onnx\]'"):
        export(run, tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()
