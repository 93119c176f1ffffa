"""A run written as ONNX files: the folder's own script gives torch's embeddings, and mistakes leave nothing."""

import copy
import dataclasses
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip_scratch.exporting.onnx as home
from clip_scratch.config import CFG
from clip_scratch.data.images import image_transform, load_image, wanted_side
from clip_scratch.errors import UserError
from clip_scratch.export import Arguments, _check_drop, export, main
from clip_scratch.exporting.onnx import quantize_onnx_folder, write_onnx_folder
from clip_scratch.models.clip import CLIPModel
from clip_scratch.models.hf_clip import HFCLIPModel
from clip_scratch.models.saved import prepare_best, save_best
from clip_scratch.presets import HFClip
from clip_scratch.retrieval.embed import encode_image, encode_text

pytest.importorskip("onnxruntime")
TEXT = ("text.onnx", "tokenizer.json")
CAPTIONS = ["red", "one blue square , number 7", "There is a green square in the left half of this picture " * 3]


@pytest.fixture(scope="session")
def written(tmp_path_factory, tiny_data, _trained_tokenizer, hf_clip):
    """A function: "resnet", "vit" or a name of `hf_clip` -> (model, folder); each takes the exporter seconds, once.

    Of transformers' layers, which are all alike, one. "vit" has the text tower of "resnet".
    """
    root, made = tmp_path_factory.mktemp("onnx"), {}
    where = {"captions_path": tiny_data.captions_path, "image_path": tiny_data.image_path, "device": "cpu"}
    tiny = {"text_encoder_model": "bert-tiny", "pretrained": False, "projection_dim": 32, "max_length": 24, "size": 32}
    kinds = {
        "resnet": CFG(model_name="test_resnet+test_convnext", head="mlp", interpolation="area", **where, **tiny),
        "vit": CFG(model_name="test_vit", loss="sigmoid", resize="crop:40", interpolation="bicubic", **where, **tiny),
    }

    def make(kind):
        if kind not in made:
            torch.manual_seed(0)
            if kind in kinds:
                model = CLIPModel(kinds[kind], copy.deepcopy(_trained_tokenizer)).eval()
                bert = model.text_encoder.model
                bert.encoder.layer, bert.config.num_hidden_layers = bert.encoder.layer[:1], 1
            else:
                model = HFCLIPModel(HFClip(model_name=hf_clip(kind), **where)).eval()
                for tower in (model.hf.text_model, model.hf.vision_model):
                    tower.encoder.layers = tower.encoder.layers[:1]
            (root / kind).mkdir()
            with pytest.MonkeyPatch.context() as patch:
                if kind == "vit":
                    resnet, folder = make("resnet")
                    model.text_encoder, model.text_projection = resnet.text_encoder, resnet.text_projection
                    patch.setattr(home, "write_text_tower", lambda _, to: [shutil.copy(folder / f, to) for f in TEXT])
                write_onnx_folder(model, root / kind)
            made[kind] = model, root / kind
        return made[kind]

    return make


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("vit", "siglip")]


@pytest.mark.parametrize("kind", ["resnet", "clip", *SLOW])
def test_the_script_of_the_folder_gives_torch_s_embeddings(written, tiny_data, kind):
    model, folder = written(kind)
    paths = [tiny_data.image_path / f"{i:02d}.png" for i in range(5)]
    model.cfg = dataclasses.replace(model.cfg, precision="fp32")
    script = runpy.run_path(str(folder / "run.py"))
    for own, theirs in (
        (encode_image(model, paths), script["embed_images"](paths, batch_size=3)),
        (encode_text(model, CAPTIONS), script["embed_texts"](CAPTIONS, batch_size=2)),
    ):
        assert theirs.dtype == np.float32 and np.abs(theirs - own.numpy()).max() < 1e-4
        assert torch.pdist(own).min() > 1e-3  # a network that ignores its input would not do
    config = json.loads((folder / "config.json").read_text())
    assert config["logit_scale"] == pytest.approx(model.logit_scale.item())
    assert (config["logit_bias"] is None) == (model.logit_bias is None)
    assert str(folder.parent.parent) not in json.dumps(config)  # no path of this machine


@pytest.fixture(scope="session")
def script(tmp_path_factory, _trained_tokenizer):
    """The script's functions, without networks."""
    folder = tmp_path_factory.mktemp("script")
    shutil.copy(Path(home.__file__).with_name("onnx_run.py"), folder / "run.py")
    (folder / "config.json").write_text("{}")
    _trained_tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnxruntime.InferenceSession", lambda *_, **__: None)
        return runpy.run_path(str(folder / "run.py"))


@pytest.mark.parametrize("interpolation", ["area", "bilinear", "bicubic"])
@pytest.mark.parametrize("resize", ["stretch", "crop", "crop:37"])
@pytest.mark.parametrize("shape", [(75, 100), (64, 64), (33, 32), (120, 41), (20, 24)])
def test_squares_are_those_of_the_model(script, tmp_path, interpolation, resize, shape):
    cfg = CFG(size=32, interpolation=interpolation, resize=resize)
    rule = {
        "size": 32,
        "interpolation": interpolation,
        "shorter_side": {"stretch": 0, "crop": 32, "crop:37": 37}[resize],
    }
    script["CONFIG"].update(rule)
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    own = image_transform(cfg, train=False)(image=pixels)["image"].numpy().astype(int)
    assert np.abs(script["square"](tmp_path / "x.png") - own).max() <= 1  # of 255: a tie that is rounded the other way


@pytest.mark.parametrize("resize", ["stretch", "crop"])
def test_large_photos_are_decoded_as_the_model_does(script, tmp_path, resize):
    cfg, path = CFG(size=32, resize=resize), tmp_path / "x.jpg"
    script["CONFIG"].update(size=32, shorter_side=32 * (resize == "crop"), interpolation=cfg.interpolation)
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((600, 400)).save(path)
    small = load_image(path, wanted_side(cfg))
    assert small.shape == (100, 150, 3)
    own = image_transform(cfg, train=False)(image=small)["image"].numpy().astype(int)
    assert np.abs(script["square"](path) - own).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "CMYK", "LA"])
def test_every_kind_of_image_file_is_read_as_the_model_reads_it(script, tmp_path, mode):
    script["CONFIG"].update(size=40, shorter_side=0, interpolation="bilinear")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 4), dtype=np.uint8), "RGBA")
    path = tmp_path / f"x.{'jpg' if mode == 'CMYK' else 'png'}"
    image.convert("RGB" if mode in ("CMYK", "P") else "RGBA").convert(mode).save(path)
    assert np.array_equal(script["square"](path), load_image(path).transpose(2, 0, 1))


def test_a_photo_is_turned_as_its_exif_says(script, tmp_path):
    script["CONFIG"].update(size=8, shorter_side=0, interpolation="bilinear")
    image, exif = Image.new("RGB", (8, 8), "white"), Image.Exif()
    image.putpixel((0, 0), (0, 0, 0))
    exif[0x112] = 3  # upside down
    image.save(tmp_path / "x.png", exif=exif)
    assert script["square"](tmp_path / "x.png")[0, 7, 7] == 0


def test_the_script_needs_neither_this_package_nor_torch(written, tiny_data, tmp_path):
    _, folder = written("resnet")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "image.onnx", "run.py", "text.onnx", "tokenizer.json",
    ]  # fmt: skip
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'clip_scratch', 'transformers', 'cv2')))"
    (tmp_path / "sitecustomize.py").write_text(blocked)
    command = [sys.executable, str(folder / "run.py"), str(tiny_data.image_path / "00.png"), "red", "a blue box"]
    out = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    lines = [line.split("  ") for line in out.stdout.splitlines()]
    assert [name for _, name in lines] == ["red", "a blue box"] and all(-1 <= float(cosine) <= 1 for cosine, _ in lines)


@pytest.fixture
def prepared(written, monkeypatch, tmp_path):
    """The run of the tiny ResNet; exporting it copies the networks that `written` made, which takes no seconds."""
    model, folder = written("resnet")
    prepare_best(tmp_path / "run" / "best", model, model.cfg)
    save_best(tmp_path / "run" / "best", model, 1, {})
    monkeypatch.setattr(
        home, "write_onnx_folder", lambda _, target: shutil.copytree(folder, target, dirs_exist_ok=True)
    )
    return tmp_path / "run"


def test_the_command_measures_what_it_wrote(prepared, tmp_path, capsys):
    folder = tmp_path / "folder"
    main(Arguments(str(prepared), str(folder), device="cpu", format="onnx", int8=True, max_drop=100))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["run", "folder"]
    fp32 = prepared.parent / "fp32"
    result = export(prepared, fp32, format="onnx")
    assert result["image_cosines"].min() > 1 - 1e-4 and result["text_cosines"].min() > 1 - 1e-5
    sizes = [sum(path.stat().st_size for path in f.glob("*.onnx")) for f in (folder, fp32)]
    assert sizes[0] < 0.6 * sizes[1]
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in fp32.iterdir())


def test_int8_embeddings_are_near(written, tiny_data, tmp_path):
    """Of a ViT too; the recall of random towers says nothing. Without VNNI, sums of 8-bit products saturate."""
    model, folder = written("clip")
    shutil.copytree(folder, tmp_path / "int8")
    paths = [tiny_data.image_path / f"{i:02d}.png" for i in range(12)]
    pixels = [model.image_transform()(image=load_image(path))["image"] for path in paths]
    quantize_onnx_folder(tmp_path / "int8", [{"pixel_values": torch.stack(pixels[i : i + 4])} for i in (0, 4, 8)])
    before, after = (runpy.run_path(str(Path(f, "run.py"))) for f in (folder, tmp_path / "int8"))
    for embed, inputs in (("embed_images", paths), ("embed_texts", CAPTIONS)):
        cosines = (before[embed](inputs) * after[embed](inputs)).sum(1)
        assert 0.95 < cosines.min() < 1 - 1e-6


def test_a_loss_of_recall_is_refused():
    recalls = {"run": {"text_retrieval_recall@1": 0.433, "image_retrieval_recall@1": 0.352}}
    recalls["folder"] = {"text_retrieval_recall@1": 0.423, "image_retrieval_recall@1": 0.4}
    _check_drop(recalls, 1.0)
    recalls["run"]["image_retrieval_recall@1"] = 0.4125
    with pytest.raises(UserError, match="R@1 of image retrieval from 41.2 to 40.0: .* --max-drop 2"):
        _check_drop(recalls, 1.0)
    _check_drop(recalls, 2)


def test_what_is_refused_leaves_nothing(prepared, tmp_path, monkeypatch):
    def refused(message, name="folder", **settings):
        with pytest.raises(UserError, match=message) as caught:
            export(prepared, tmp_path / name, **{"format": "onnx", **settings})
        assert "\n" not in str(caught.value) and not (tmp_path / "folder").exists()
        assert not list(tmp_path.glob(".*.tmp"))

    refused("int8 is for --format onnx", format="transformers", int8=True)
    refused("run exists already. Name a new or empty folder", "run")
    refused("int8 lowers .* --max-drop", int8=True, max_drop=-101)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused(r"pip install 'clip_scratch\[onnx\]'")
    monkeypatch.undo()
    monkeypatch.setattr(CLIPModel, "forward_image", lambda self, x: x if x.sum() > 0 else 2 * x)
    monkeypatch.setattr("clip_scratch.retrieval.embed.embed_batches", lambda *_: (None, None, None))
    refused("image tower cannot be exported to ONNX: Could not guard on data-dependent expression")
