"""A run written as a transformers folder: plain transformers gives the same embeddings, and mistakes leave nothing."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, VisionTextDualEncoderModel

from clip_scratch.config import CFG
from clip_scratch.data.images import load_image
from clip_scratch.errors import UserError
from clip_scratch.export import Arguments, export, main
from clip_scratch.exporting.dual_encoder import to_dual_encoder
from clip_scratch.models.clip import CLIPModel
from clip_scratch.models.saved import load, prepare_best, save_best
from clip_scratch.retrieval.embed import encode_image, encode_text
from clip_scratch.train import main as train

CAPTIONS = ["red", "one blue square , number 7", "There is a green square in the left half of this picture"]


def write_run(folder, model):
    prepare_best(folder / "best", model, model.cfg)
    save_best(folder / "best", model, 1, {})
    return folder


@pytest.fixture
def linear_run(tiny_cfg, tiny_tokenizer, tmp_path):
    """A function: settings -> a run whose every weight, LayerNorms' too, is off its starting value."""

    def make(**settings):
        for name, value in {"head": "linear", "interpolation": "bilinear", **settings}.items():
            setattr(tiny_cfg, name, value)
        torch.manual_seed(0)
        model = CLIPModel(tiny_cfg, tiny_tokenizer)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                is_norm = "LayerNorm" in name or parameter.ndim < 2
                parameter += (0.3 if is_norm else 0.02) * torch.randn(parameter.shape)
        return write_run(tmp_path / "run", model)

    return make


def normalised(output):
    return F.normalize(output.pooler_output, dim=-1)


@torch.inference_mode()
def embeddings(folder, images, captions):
    """What someone without clip_scratch computes."""
    model = AutoModel.from_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(folder)(captions, padding=True, truncation=True, return_tensors="pt")
    return normalised(model.get_image_features(**pixels)), normalised(model.get_text_features(**tokens))


def cosines(a, b):
    return (a * b).sum(1)


def apart(embedded):
    """1 - cosine of two embeddings of different things, the median: those of random towers are all much alike."""
    return (1 - embedded @ embedded.T)[~torch.eye(len(embedded), dtype=torch.bool)].median()


@pytest.mark.parametrize(
    "settings",
    [
        {"text_pooling": "mean"},
        {"text_pooling": "cls"},
        {"text_pooling": "cls", "projection_dim": 200},  # more than the 128 of the text tower
        {"text_pooling": "mean", "projection_dim": 200},  # one direction of the 128 is lost
        {"text_pooling": "mean", "model_name": "test_vit", "resize": "crop", "interpolation": "bicubic"},
    ],
)
def test_plain_transformers_gives_the_same_embeddings(linear_run, tiny_data, tmp_path, settings):
    run, folder = linear_run(**settings), tmp_path / "folder"
    result = export(run, folder)
    paths = [tiny_data.image_path / f"{i:02d}.png" for i in range(26)]
    images, texts = embeddings(folder, [load_image(path) for path in paths], CAPTIONS)
    model = load(run)
    model.cfg = dataclasses.replace(model.cfg, precision="fp32")
    own_images, own_texts = encode_image(model, paths), encode_text(model, CAPTIONS)
    for what, written, own in (("image", images, own_images), ("text", texts, own_texts)):
        furthest = min(1e-4, 0.02 * apart(own))  # at most a fiftieth of what lies between two of them
        assert 1 - cosines(written, own).min() < furthest
        assert 1 - result[f"{what}_cosines"].min() < furthest
    assert result["n_images"] == 5 and len(result["text_cosines"]) == result["n_captions"]


def test_a_text_tower_that_lacks_weights_is_no_success(linear_run, monkeypatch):
    """Only what the export adds may be missing where its weights are loaded not strictly."""
    model = load(linear_run(text_pooling="mean"))
    features = torch.rand(10, model.image_encoder.out_dim)
    assert to_dual_encoder(model, features) is not None
    tower = model.text_encoder.model
    state = {name: tensor for name, tensor in tower.state_dict().items() if "layer.1.output.dense" not in name}
    monkeypatch.setattr(tower, "state_dict", lambda: state)
    with pytest.raises(AssertionError, match="layer.1.output.dense"):
        to_dual_encoder(model, features)


def test_devices(linear_run, tmp_path):
    run = linear_run()
    assert export(run, tmp_path / "folder", device="auto")["n_images"] == 5
    with pytest.raises(UserError, match="device 'nonsense' is not available"):
        export(run, tmp_path / "other", device="nonsense")
    assert not (tmp_path / "other").exists()


def test_the_folder_is_an_ordinary_one(linear_run, tmp_path):
    run, folder = linear_run(text_pooling="mean"), tmp_path / "deep" / "folder"
    export(run, folder)
    written, own = VisionTextDualEncoderModel.from_pretrained(folder), load(run)
    assert written.logit_scale.exp().item() == pytest.approx(own.logit_scale.item(), rel=1e-6)
    for name, tensor in own.image_encoder.model.state_dict().items():
        assert torch.equal(written.vision_model.timm_model.state_dict()[name], tensor), name
    for name, tensor in own.text_encoder.model.state_dict().items():
        assert torch.equal(written.text_model.state_dict()[name], tensor), name
    assert AutoTokenizer.from_pretrained(folder).model_max_length == own.cfg.max_length
    config = (folder / "config.json").read_text()
    assert json.loads(config)["text_config"]["num_hidden_layers"] == 3
    assert str(tmp_path) not in config and sys.prefix not in config
    assert not folder.with_name(".folder.tmp").exists()
    export(run, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


FRESH = """
import sys
import transformers
from PIL import Image

for kind in ("AutoModel", "AutoImageProcessor", "AutoTokenizer"):
    getattr(transformers, kind).from_pretrained("transformers")
print("clip_scratch" in sys.modules, "sentence_transformers" in sys.modules)

from sentence_transformers import SentenceTransformer

model = SentenceTransformer("sentence-transformers", device="cpu")
print(model.encode(["a red square", "blue"]).shape, model.encode([Image.open(sys.argv[1])]).shape)
print("clip_scratch" in sys.modules)
"""


def test_the_folders_need_neither_clip_scratch_nor_trusted_code(linear_run, tiny_data, tmp_path):
    """Of both formats, in a fresh interpreter."""
    run = linear_run(text_pooling="mean")
    for kind in ("transformers", "sentence-transformers"):
        export(run, tmp_path / kind, format=kind)
        assert str(tmp_path).encode() not in b"".join(path.read_bytes() for path in (tmp_path / kind).rglob("*.json"))
    command = [sys.executable, "-c", FRESH, str(tiny_data.image_path / "00.png")]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    out = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert out.stdout.splitlines() == ["False False", "(2, 32) (1, 32)", "False"], out.stderr


def test_what_the_exported_model_learns_reaches_both_pooling_and_tower(linear_run, tmp_path):
    """The layer that takes the mean is no dead end: gradients pass it."""
    export(linear_run(text_pooling="mean"), tmp_path / "folder")
    model = AutoModel.from_pretrained(tmp_path / "folder")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "folder")(CAPTIONS, padding=True, return_tensors="pt")
    embedded = normalised(model.get_text_features(**tokens))
    (embedded[0] @ embedded[1]).backward()
    layers = model.text_model.encoder.layer
    for weight in (layers[0].output.dense.weight, layers[-1].output.dense.weight, model.text_projection.weight):
        assert weight.grad.abs().max() > 1e-6


def test_a_fine_tuned_clip_is_written_as_it_is(linear_run, tiny_data, tmp_path):
    from clip_scratch.models.hf_clip import HFCLIPModel

    first, second = tmp_path / "first", tmp_path / "second"
    export(linear_run(text_pooling="mean", size=64), first)
    settings = {"captions_path": tiny_data.captions_path, "image_path": tiny_data.image_path, "device": "cpu"}
    tuned = HFCLIPModel(CFG(backend="hf_clip", model_name=str(first), size=0, valid_fraction=0.2, **settings))
    with torch.no_grad():
        tuned.hf.text_projection.weight += 0.02 * torch.randn(tuned.hf.text_projection.weight.shape)
    result = export(write_run(tmp_path / "tuned", tuned), second)
    assert result["folder"] == pytest.approx(result["run"])
    assert min(result["image_cosines"].min(), result["text_cosines"].min()) > 1 - 1e-5
    written, before = (AutoModel.from_pretrained(folder).state_dict() for folder in (second, first))
    assert all(torch.equal(written[name], tensor) for name, tensor in tuned.hf.state_dict().items())
    assert not torch.equal(written["text_projection.weight"], before["text_projection.weight"])
    processors = [json.loads((folder / "preprocessor_config.json").read_text()) for folder in (first, second)]
    assert processors[0] == processors[1] and processors[0]["size"] == {"height": 64, "width": 64}


def test_the_command_prints_how_true_the_folder_is(linear_run, tiny_data, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()  # an empty one will do
    (tmp_path / ".folder.tmp").mkdir()  # of an export that was killed
    run = linear_run(captions_path="moved/captions.txt", image_path="moved/Images")
    with pytest.raises(UserError, match="no captions file moved/captions.txt.* Set --captions-path"):
        main(Arguments(str(run), str(folder), device="cpu"))
    assert not any(folder.iterdir())
    main(Arguments(str(run), str(folder), str(tiny_data.captions_path), str(tiny_data.image_path), "cpu"))
    assert not (tmp_path / ".folder.tmp").exists()
    out = capsys.readouterr().out
    assert out.startswith("valid: 5 images, ") and "cosine of each text between the two: mean 1.0000" in out
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["run", "folder"]
    assert out.endswith(f"written: {folder}\n")


# ---- the data set, where it has moved


@pytest.fixture
def two_files(tiny_data, tmp_path):
    """A folder with a captions file of training images and one of validation images, whose split none of us draws."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "valid"):
        rows = tiny_data.table[tiny_data.table["split"] == split]
        rows[["image", "caption"]].to_csv(folder / f"{split}.csv", index=False)
    return folder


def test_the_run_s_own_validation_file_is_measured(linear_run, tiny_data, two_files, tmp_path):
    names = {"captions_path": str(two_files / "train.csv"), "valid_captions_path": str(two_files / "valid.csv")}
    run = linear_run(**names)
    moved = tmp_path / "moved"
    moved.mkdir()
    (two_files / "train.csv").rename(moved / "train.csv")
    where = {"captions_path": moved / "train.csv", "image_path": tiny_data.image_path}
    assert export(run, tmp_path / "a", **where)["n_images"] == 6  # the validation file is where it was
    (two_files / "valid.csv").unlink()
    with pytest.raises(UserError, match="no captions file .*data/valid.csv"):
        export(run, tmp_path / "b", **where)
    assert not (tmp_path / "b").exists()


def test_images_that_were_trained_on_are_not_measured(tiny_cfg, tiny_data, tmp_path, plain):
    """Two more images move the seeded split: images that were trained on are then in the validation split."""
    run = train(dataclasses.replace(tiny_cfg, head="linear", epochs=1, run_dir=str(tmp_path / "run")))
    assert export(run, tmp_path / "a", tiny_data.captions_path, tiny_data.image_path)["n_images"] == 5
    lines = tiny_data.captions_path.read_text().splitlines()
    (tmp_path / "fewer.txt").write_text("\n".join(lines[:1] + lines[4:]))
    with pytest.raises(UserError, match="fewer.txt is not what .*run/best was trained on.* Set --captions-path"):
        export(run / "best", tmp_path / "b", tmp_path / "fewer.txt", tiny_data.image_path)
    assert not (tmp_path / "b").exists()


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "mlp"}, "head 'mlp' cannot be exported"),
        ({"model_name": "my_flat:flat"}, "model_name 'my_flat:flat': transformers has no class"),
        ({"model_name": "test_resnet+test_convnext"}, r"model_name 'test_resnet\+.*': transformers has no class"),
        ({"text_encoder_model": "distilbert-base-uncased"}, "a distilbert text tower cannot be exported"),
    ],
)
def test_what_cannot_be_expressed_is_refused(linear_run, tmp_path, monkeypatch, settings, message):
    from transformers import DistilBertConfig

    small = DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=32)
    monkeypatch.setattr("clip_scratch.models.encoders.text_config", lambda name: small)
    (tmp_path / "my_flat.py").write_text(
        "from torch import nn\nclass Flat(nn.Flatten):\n    out_dim = 3072\nflat = lambda cfg: Flat()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    refused(message, linear_run(**settings), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_folder_in_use_is_left_alone(linear_run, tmp_path):
    run = linear_run()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("x")
    refused("used exists already. Name a new or empty folder", run, tmp_path / "used")
    refused("mine.txt exists already", run, tmp_path / "used" / "mine.txt")
    refused("cannot write to", run, tmp_path / "used" / "mine.txt" / "folder")
    assert [file.name for file in tmp_path.rglob("used/*")] == ["mine.txt"]
    refused("is not a run folder", tmp_path / "used", tmp_path / "folder")


def refused(message, run, folder):
    with pytest.raises(UserError, match=message) as caught:
        export(run, folder)
    assert "\n" not in str(caught.value)
