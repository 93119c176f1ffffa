"""A run as a sentence-transformers folder, and a sentence-transformers folder as the CLIP that a run starts from."""

import dataclasses
import json
import os
import re
import sys

import pytest
import torch
from PIL import Image

from clip_scratch.errors import UserError
from clip_scratch.export import export
from clip_scratch.models.clip import CLIPModel
from clip_scratch.models.hf_clip import HFCLIPModel
from clip_scratch.models.saved import load, prepare_best, save_best
from clip_scratch.retrieval.embed import encode_image, encode_text

CAPTIONS = ["red", "one blue square , number 7", "There is a green square in the left half of this picture " * 9]


def write_run(folder, model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "log" not in name:
                parameter += (0.3 if parameter.ndim < 2 else 0.02) * torch.randn(parameter.shape)
    prepare_best(folder / "best", model, model.cfg)
    save_best(folder / "best", model, 1, {})
    return folder


def own_embeddings(run, paths):
    model = load(run)
    model.cfg = dataclasses.replace(model.cfg, precision="fp32")
    return encode_image(model, paths), encode_text(model, CAPTIONS)


def encoded(folder, paths):
    from sentence_transformers import SentenceTransformer  # not above: every worker collects this file

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    images = [Image.open(path) for path in paths]
    return torch.from_numpy(model.encode(images)), torch.from_numpy(model.encode(CAPTIONS))


@pytest.fixture
def paths(tiny_data, tmp_path):
    grey, clear = tmp_path / "grey.png", tmp_path / "palette.png"
    image = Image.open(tiny_data.image_path / "00.png")
    image.convert("L").save(grey)
    image.convert("P").save(clear)
    return [*(tiny_data.image_path / f"{i:02d}.png" for i in range(26)), grey, clear]


@pytest.mark.parametrize(
    "settings",
    [
        {"head": "mlp", "text_pooling": "mean"},
        {"head": "linear", "text_pooling": "cls", "interpolation": "bicubic"},
        {"head": "mlp", "model_name": "test_vit", "resize": "crop:40"},
        {"head": "mlp", "text_encoder_model": "distilbert-base-uncased", "text_pooling": "mean"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_sentence_transformers_gives_the_same_embeddings(
    tiny_cfg, tiny_tokenizer, tmp_path, settings, paths, monkeypatch
):
    from transformers import DistilBertConfig

    small = DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=32)
    if "text_encoder_model" in settings:
        monkeypatch.setattr("clip_scratch.models.encoders.text_config", lambda name: small)
    torch.manual_seed(0)
    cfg = dataclasses.replace(tiny_cfg, **{"interpolation": "bilinear", **settings})
    run = write_run(tmp_path / "run", CLIPModel(cfg, tiny_tokenizer))
    result = export(run, tmp_path / "folder", format="sentence-transformers")
    for written, own in zip(encoded(tmp_path / "folder", paths), own_embeddings(run, paths), strict=True):
        assert own.std(0).max() > 1e-3  # they tell inputs apart
        torch.testing.assert_close(written, own, atol=1e-5, rtol=0)
    assert min(result["image_cosines"].min(), result["text_cosines"].min()) > 1 - 1e-5
    assert result["folder"] == pytest.approx(result["run"])


def test_the_area_filter_is_nearly_the_same_and_the_result_says_so(tiny_cfg, tiny_tokenizer, tmp_path, paths):
    cfg = dataclasses.replace(tiny_cfg, interpolation="area")
    run = write_run(tmp_path / "run", CLIPModel(cfg, tiny_tokenizer))
    result = export(run, tmp_path / "folder", format="sentence-transformers")
    assert 0.99 < result["image_cosines"].min() < 1 - 1e-6
    (images, _), (own, _) = (
        get(where, paths) for get, where in ((encoded, tmp_path / "folder"), (own_embeddings, run))
    )
    assert (images * own).sum(1).min() > 0.99
    sized = [tmp_path / f"{i}.png" for i in range(5)]
    for path, source in zip(sized, paths, strict=False):
        Image.open(source).resize((32, 32)).save(path)
    torch.testing.assert_close(encoded(tmp_path / "folder", sized)[0], own_embeddings(run, sized)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["clip", "siglip", "chinese", "dual_timm"])
def test_a_pretrained_clip_goes_there_and_comes_back(kind, hf_cfg, tmp_path, paths):
    run = write_run(tmp_path / "run", HFCLIPModel(hf_cfg(kind, image_path="")))
    export(run, tmp_path / "folder", format="sentence-transformers")
    own = own_embeddings(run, paths)
    for written, expected in zip(encoded(tmp_path / "folder", paths), own, strict=True):
        torch.testing.assert_close(written, expected, atol=1e-5, rtol=0)
    cfg = dataclasses.replace(load(run).cfg, model_name=str(tmp_path / "folder"), size=0, projection_dim=256)
    cfg.precision = "fp32"
    again = HFCLIPModel(cfg).eval()
    torch.testing.assert_close(encode_image(again, paths), own[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(encode_text(again, CAPTIONS), own[1], atol=1e-5, rtol=0)


def test_a_clip_folder_of_sentence_transformers_is_fine_tuned(hf_clip, hf_cfg, tmp_path):
    """As sentence-transformers wrote them until 5.4: modules.json, and the model itself in 0_CLIPModel."""
    (tmp_path / "st").mkdir()
    os.symlink(hf_clip("clip"), tmp_path / "st/0_CLIPModel")
    module = {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}
    (tmp_path / "st/modules.json").write_text(json.dumps([module]))
    own, theirs = HFCLIPModel(hf_cfg("clip")), HFCLIPModel(dataclasses.replace(hf_cfg(), model_name=tmp_path / "st"))
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), theirs.parameters(), strict=True))
    assert own.cfg.size == theirs.cfg.size and torch.equal(own.mean, theirs.mean)
    assert own.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    (tmp_path / "st/modules.json").write_text("[]")
    with pytest.raises(UserError, match="model_name: transformers cannot load .*/st"):
        HFCLIPModel(dataclasses.replace(hf_cfg(), model_name=tmp_path / "st"))


def test_what_it_has_no_module_for_is_refused(tiny_cfg, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "st_flat.py").write_text(
        "from torch import nn\nclass Flat(nn.Flatten):\n    out_dim = 3072\nflat = lambda cfg: Flat()\n"
    )
    for number, name in enumerate(("st_flat:flat", "test_resnet+test_convnext")):
        cfg = dataclasses.replace(tiny_cfg, model_name=name)
        run = write_run(tmp_path / str(number), CLIPModel(cfg, tiny_tokenizer))
        with pytest.raises(UserError, match=f"{re.escape(name)}': .* no class for it. Train with one timm model"):
            export(run, tmp_path / "folder", format="sentence-transformers")
    run = write_run(tmp_path / "other", CLIPModel(tiny_cfg, tiny_tokenizer))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"pip install 'clip_scratch\[sentence-transformers\]'"):
        export(run, tmp_path / "folder", format="sentence-transformers")
    assert not (tmp_path / "folder").exists()
