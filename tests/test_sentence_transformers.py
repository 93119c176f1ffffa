"""A run as a sentence-transformers folder, which loads without our code, and one of theirs that we fine-tune."""

import dataclasses
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from clip_scratch.errors import UserError
from clip_scratch.export import export
from clip_scratch.models.build import build_model
from clip_scratch.models.clip import CLIPModel
from clip_scratch.models.hf_clip import HFCLIPModel
from clip_scratch.models.saved import load, prepare_best, save_best
from clip_scratch.retrieval.embed import encode_image, encode_text

sentence_transformers = pytest.importorskip("sentence_transformers")

CAPTIONS = ["red", "one blue square , number 7", "There is a green square in the left half of this picture"]
ENCODE = """
import sys, numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
folder, out, image, *captions = sys.argv[1:]
model = SentenceTransformer(folder, device="cpu", local_files_only=True)
assert "clip_scratch" not in sys.modules
np.savez(out, images=model.encode([Image.open(image)] * 2), texts=model.encode(captions))
"""


def written(folder, model):
    prepare_best(folder / "best", model, model.cfg)
    save_best(folder / "best", model, 1, {})
    return folder


def check(run, folder, tmp_path):
    """Someone without clip_scratch gets the model's embeddings, from image files of its size on."""
    own = load(run)
    own.cfg.precision = "fp32"
    image = tmp_path / "image.png"
    noise = np.random.default_rng(0).integers(0, 256, (own.cfg.size, own.cfg.size, 3), np.uint8)
    Image.fromarray(noise).save(image)
    done = subprocess.run(
        [sys.executable, "-c", ENCODE, str(folder), str(tmp_path / "out.npz"), str(image), *CAPTIONS],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = np.load(tmp_path / "out.npz")
    assert out["images"] == pytest.approx(encode_image(own, [image] * 2).numpy(), abs=1e-5)
    assert out["texts"] == pytest.approx(encode_text(own, CAPTIONS).numpy(), abs=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_from_scratch(tiny_cfg, tiny_tokenizer, tmp_path, pooling):
    torch.manual_seed(0)
    cfg = dataclasses.replace(tiny_cfg, head="linear", text_pooling=pooling, interpolation="bilinear")
    run = written(tmp_path / "run", CLIPModel(cfg, tiny_tokenizer))
    measured = export(run, tmp_path / "st", format="sentence-transformers")
    assert measured["folder"] == pytest.approx(measured["run"])
    assert min(measured["image_cosines"].min(), measured["text_cosines"].min()) > 1 - 1e-6
    check(run, tmp_path / "st", tmp_path)


def test_a_fine_tuned_clip(hf_cfg, tmp_path):
    run = written(tmp_path / "run", HFCLIPModel(hf_cfg()))
    export(run, tmp_path / "st", format="sentence-transformers")
    check(run, tmp_path / "st", tmp_path)
    again = HFCLIPModel(dataclasses.replace(hf_cfg(), model_name=str(tmp_path / "st")))
    before = load(run).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("inside", ["", "0_CLIPModel"])
def test_a_clip_of_theirs_is_fine_tuned(hf_clip, hf_cfg, tmp_path, inside):
    """As their releases before and after 5.4 save it."""
    module = sentence_transformers.sentence_transformer.modules.CLIPModel(str(hf_clip()))
    sentence_transformers.SentenceTransformer(modules=[module], device="cpu").save(str(tmp_path / "new"))
    folder = tmp_path / "theirs"
    (folder / inside).parent.mkdir(exist_ok=True)
    shutil.move(tmp_path / "new", folder / inside)
    model = build_model(dataclasses.replace(hf_cfg(), model_name=str(folder)))
    own, expected = model.hf.state_dict(), HFCLIPModel(hf_cfg()).hf.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in expected.items())


def test_what_has_no_module_is_refused(tiny_cfg, tiny_tokenizer, tmp_path, monkeypatch):
    run = written(tmp_path / "run", CLIPModel(tiny_cfg, tiny_tokenizer))
    with pytest.raises(UserError, match="head 'mlp' has no module in sentence-transformers. Train with --head linear"):
        export(run, tmp_path / "st", format="sentence-transformers")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match="pip install 'clip_scratch\\[sentence-transformers\\]'"):
        export(run, tmp_path / "st", format="sentence-transformers")
    assert not (tmp_path / "st").exists()
