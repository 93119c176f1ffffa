"""A pretrained CLIP of transformers behind our interface: the same embeddings, the same run, whatever its family."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

import clip_scratch.evaluate as evaluate_verb
from clip_scratch import CFG, Index, encode_image, encode_text, find_matches, load
from clip_scratch.cli import parse
from clip_scratch.data.captions import check_images, image_folder, read_captions, split_of
from clip_scratch.data.loaders import build_loaders
from clip_scratch.data.tokenizer import tokenize
from clip_scratch.errors import UserError
from clip_scratch.evaluate import evaluate
from clip_scratch.evaluation.measure import read_zero_shot
from clip_scratch.evaluation.retrieval import recall_at_k
from clip_scratch.models import saved as checkpoint
from clip_scratch.models.hf_clip import HFCLIPModel
from clip_scratch.presets import PRESETS, HFClip
from clip_scratch.retrieval.indexing import update_index
from clip_scratch.train import main
from clip_scratch.training.engine import compute_loss, loss_function, train_epoch
from clip_scratch.training.optimizer import build_optimizer
from clip_scratch.training.report import Report
from clip_scratch.training.run import load_tree

KINDS = ["clip", "siglip", "siglip2", "chinese", "dual", "dual_timm"]
SENTENCES = ["a red square", "There is a blue square in the left half of this picture", "green", "yellow box , 17"]
TIMINGS = {"pairs_per_second", "images_per_second", "seconds", "wall_seconds"}


@pytest.fixture
def changed(hf_clip, tmp_path):
    """A copy of a model's folder to change."""

    def make(kind="clip"):
        return Path(shutil.copytree(hf_clip(kind), tmp_path / f"changed-{kind}"))

    return make


def model_of(folder, **settings):
    return HFCLIPModel(HFClip(**{"model_name": folder, "precision": "fp32"} | settings)).eval()


def same(a, b):
    """Whether two state dicts are equal; that of an average has a number in it."""
    tensors = (torch.as_tensor(a[name]).equal(torch.as_tensor(b[name])) for name in a)
    return a.keys() == b.keys() and all(tensors)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder):
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines_of(folder)]


def last_of(folder):
    return load_tree(Path(folder) / "last/training.safetensors")


# ---- plain transformers, as its documentation says


class Plain:
    """The model, image processor and tokenizer of a folder, used as transformers' documentation shows."""

    def __init__(self, folder):
        self.hf = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoImageProcessor.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def images(self, images):
        images = [Image.open(i).convert("RGB") if isinstance(i, str | Path) else i for i in images]
        inputs = self.processor(images=images, return_tensors="pt")
        return F.normalize(self.hf.get_image_features(**inputs).pooler_output, dim=-1)

    @torch.inference_mode()
    def texts(self, texts):
        """One at a time, so that nothing is padded but SigLIP's, which its model card pads to 64."""
        siglip = "siglip" in self.hf.config.model_type
        options = {"padding": "max_length", "max_length": 64} if siglip else {"max_length": self.limit}
        rows = []
        for text in texts:
            inputs = self.tokenizer([text], truncation=True, return_tensors="pt", **options)
            if siglip:
                inputs = {"input_ids": inputs["input_ids"]}
            rows.append(self.hf.get_text_features(**inputs).pooler_output)
        return F.normalize(torch.cat(rows), dim=-1)

    @property
    def limit(self):
        return self.hf.config.text_config.max_position_embeddings


def pictures(n=5, size=32, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(n)]


def many_captions(n=150):
    """Captions of every length up to far beyond the limit, in no order."""
    words = ["red", "blue", "square", "picture", "half", "number", "box", "grey", "of", "the"]
    rng = np.random.default_rng(1)
    return [" ".join(rng.choice(words, 1 + (37 * i) % 30)) for i in range(n)]


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_those_of_plain_transformers(hf_clip, kind):
    plain, model = Plain(hf_clip(kind)), model_of(hf_clip(kind))
    torch.testing.assert_close(encode_image(model, pictures()), plain.images(pictures()), atol=1e-5, rtol=0)
    captions = [*SENTENCES, *many_captions()]
    ours = encode_text(model, captions)
    torch.testing.assert_close(ours, plain.texts(captions), atol=1e-5, rtol=0)
    assert model.cfg.projection_dim == ours.shape[1]
    assert len(ours.unique(dim=0)) > 100  # the captions are told apart
    table = tokenize(captions, model.tokenizer, model.cfg.max_length)  # all at once, in the chunks of a CPU
    with torch.inference_mode():
        together = model.encode_text(*table.batch(range(len(captions))))
    torch.testing.assert_close(together, ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["clip", "siglip", "chinese", "dual"])
def test_a_picture_of_another_size_is_resized_as_by_the_processor(hf_clip, kind):
    """To within the rounding of PIL's resize: its embeddings are far nearer than those of other pictures."""
    plain, model = Plain(hf_clip(kind)), model_of(hf_clip(kind))
    shape = (75, 48, 3)
    waves = np.linspace(0, 6, shape[0])[:, None, None] + np.linspace(0, 4, shape[1])[None, :, None]
    pictures = [
        Image.fromarray((127 + 120 * np.sin(waves * k + np.array([0, 1, 2]))).astype(np.uint8)) for k in (0.5, 1, 2)
    ]
    inputs = plain.processor(images=pictures, return_tensors="pt")["pixel_values"]
    transform = model.image_transform(train=False)
    ours = torch.stack([transform(image=np.array(p))["image"] for p in pictures])
    ours = (ours - model.mean) / model.std
    step = (1 / model.std).max().item()  # one grey level
    assert (ours - inputs).abs().max() < 2.1 * step and (ours - inputs).abs().mean() < 0.3 * step
    torch.testing.assert_close(encode_image(model, pictures), plain.images(pictures), atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", ["siglip", "dual", "chinese"])
def test_a_tokenizer_that_pads_on_the_left(changed, kind):
    folder = changed(kind)
    AutoTokenizer.from_pretrained(folder, padding_side="left").save_pretrained(folder)
    plain, model = Plain(folder), model_of(folder)
    assert plain.tokenizer.padding_side == model.tokenizer.padding_side == "left"
    captions = [*SENTENCES, *many_captions(80)]
    torch.testing.assert_close(encode_text(model, captions), plain.texts(captions), atol=1e-5, rtol=0)


def test_siglip_sees_its_padding_wherever_it_is(hf_clip, changed):
    """The test above would mean nothing if the padding made no difference."""
    folder = changed("siglip")
    AutoTokenizer.from_pretrained(folder, padding_side="left").save_pretrained(folder)
    left, right = (encode_text(model_of(f), SENTENCES) for f in (folder, hf_clip("siglip")))
    assert (left - right).abs().max() > 1e-3


def test_the_geometry_and_the_limits_are_the_model_s_own(hf_clip):
    expected = {  # size, resize, interpolation, loss, tokens
        "clip": (32, "crop", "bicubic", "infonce", 77),
        "siglip": (32, "stretch", "bilinear", "sigmoid", 64),
        "siglip2": (32, "stretch", "bilinear", "sigmoid", 64),
        "chinese": (32, "crop", "bicubic", "infonce", 40),
        "dual": (32, "stretch", "bilinear", "infonce", 40),
    }
    for kind, figures in expected.items():
        model = model_of(hf_clip(kind))
        cfg = model.cfg
        assert (cfg.size, cfg.resize, cfg.interpolation, cfg.loss, model.tokenizer.model_max_length) == figures, kind
        processor = AutoImageProcessor.from_pretrained(hf_clip(kind))
        assert model.mean.flatten().tolist() == pytest.approx([255 * v for v in processor.image_mean])
        assert model.std.flatten().tolist() == pytest.approx([255 * v for v in processor.image_std])
    assert model.mean.flatten().tolist() == pytest.approx([102, 127.5, 153])
    assert model_of(hf_clip("clip"), max_length=9).tokenizer.model_max_length == 9
    assert model_of(hf_clip("clip"), loss="soft_target").cfg.loss == "soft_target"
    assert model_of(hf_clip("siglip"), loss="infonce").logit_bias is None
    assert model_of(hf_clip("clip"), size=32).cfg.size == 32


def test_a_processor_that_crops(changed):
    folder = changed()
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False).save_pretrained(folder)
    assert model_of(folder).cfg.resize == "stretch"


@pytest.mark.parametrize("kind", ["clip", "siglip", "dual"])
def test_a_caption_over_the_limit_is_cut_and_counted(hf_clip, kind):
    plain, model = Plain(hf_clip(kind)), model_of(hf_clip(kind))
    limit = model.tokenizer.model_max_length
    long = ["a red square " * 60, "a red square"]
    table = tokenize(long, model.tokenizer, model.cfg.max_length)
    assert table.truncated == 1 and table.lengths().max() == limit
    torch.testing.assert_close(encode_text(model, long), plain.texts(long), atol=1e-5, rtol=0)


def test_a_short_limit_still_pads_siglip_to_its_length(hf_clip):
    model = model_of(hf_clip("siglip"), max_length=5)
    assert model.tokenizer.model_max_length == 5 and model.padded_length == 64
    torch.testing.assert_close(
        encode_text(model, ["a red square"]), encode_text(model_of(hf_clip("siglip")), ["a red square"])
    )


def test_a_text_tower_that_does_not_tell_its_positions(hf_clip, monkeypatch):
    """Relative positions, as T5 has: the setting is the only limit."""
    real = transformers.AutoModel.from_pretrained

    def without(*args, **options):
        model, loading = real(*args, **options)
        object.__setattr__(model.config.text_config, "max_position_embeddings", None)
        return model, loading

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", without)
    model = model_of(hf_clip("dual"), max_length=20)
    assert model.tokenizer.model_max_length == 20
    assert torch.equal(encode_text(model, SENTENCES), encode_text(model_of(hf_clip("dual"), max_length=20), SENTENCES))


def test_weights_in_half_precision_come_in_fp32(changed):
    folder = changed()
    AutoModel.from_pretrained(folder).to(torch.float16).save_pretrained(folder)
    assert load_file(folder / "model.safetensors")["visual_projection.weight"].dtype == torch.float16
    model = model_of(folder)
    assert {p.dtype for p in model.state_dict().values() if p.is_floating_point()} == {torch.float32}
    assert {p.dtype for p in model_of(folder, pretrained=False).parameters()} == {torch.float32}
    torch.testing.assert_close(encode_text(model, SENTENCES), Plain(folder).texts(SENTENCES), atol=1e-5, rtol=0)


# ---- the logit scale and the losses


def test_a_scale_beyond_clip_s_clamp_is_kept(hf_clip, hf_cfg, plain, tmp_path):
    start = Plain(hf_clip("siglip")).hf.logit_scale.exp().item()
    assert start > 117
    model = model_of(hf_clip("siglip"))
    assert model.logit_scale.shape == () and model.logit_scale.item() == pytest.approx(start)
    with torch.no_grad():
        model.log_scale.add_(1)
    assert model.logit_scale.item() == pytest.approx(start)  # and is the highest
    cfg = hf_cfg("siglip", epochs=1, run_dir=str(tmp_path / "run"), head_lr=1e-6)
    run = main(cfg)
    assert [line["logit_scale"] for line in lines_of(run)] == pytest.approx([start] * 2, rel=1e-4)
    assert load(run).logit_scale.item() == pytest.approx(start, rel=1e-4)
    resumed = checkpoint.bare_model(run / "best", training=True)
    resumed.load_state_dict(last_of(run)["model"])
    assert resumed.max_log_scale.exp().item() == pytest.approx(start)


def test_clip_s_scale_stays_at_its_clamp(hf_clip):
    model = model_of(hf_clip("clip"))
    assert model.max_log_scale.item() == pytest.approx(np.log(100), abs=1e-4)
    with torch.no_grad():
        model.log_scale.fill_(5)
    assert model.logit_scale.item() == pytest.approx(100, abs=0.01)


@pytest.mark.parametrize(("kind", "loss"), [
    ("clip", "infonce"), ("clip", "sigmoid"), ("clip", "soft_target"),
    ("siglip", "auto"), ("siglip", "infonce"), ("siglip2", "auto"), ("chinese", "auto"), ("dual_timm", "auto"),
])  # fmt: skip
def test_every_loss_trains_every_kind(hf_cfg, tiny_data, kind, loss):
    model = HFCLIPModel(hf_cfg(kind, loss=loss, head_lr=1e-2))
    cfg = model.cfg
    loader = build_loaders(tiny_data.table[tiny_data.table["split"] == "train"], model.tokenizer, "train", cfg)
    batch = next(iter(loader))
    steps = []
    optimizer = build_optimizer(model, cfg)
    scale, bias = model.logit_scale.item(), model.logit_bias is not None and model.logit_bias.item()
    for epoch in range(6):
        train_epoch(model, loader.start(epoch, 0, 4), optimizer, cfg, on_step=steps.append)
    assert all(np.isfinite(step.loss) for step in steps)
    if loss != "soft_target":
        assert np.mean([s.loss for s in steps[-4:]]) < np.mean([s.loss for s in steps[:4]])
        assert model.logit_bias is None or model.logit_bias.item() != bias
    else:
        assert model.logit_scale.item() == pytest.approx(scale, rel=1e-5)  # its temperature is not learned
    assert compute_loss(model.eval(), batch, loss_function(model, cfg))[0].isfinite()


def test_clip_with_a_sigmoid_loss_keeps_its_bias(hf_cfg, plain, tmp_path):
    run = main(hf_cfg("clip", loss="sigmoid", epochs=1, run_dir=str(tmp_path / "run"), head_lr=0.01))
    state = load_file(run / "best/model.safetensors")
    assert "own_bias" in state
    last = last_of(run)["model"]
    assert last["own_bias"].item() != -10 and load(run).logit_bias.item() == state["own_bias"].item()


# ---- saved and loaded


@pytest.mark.parametrize("kind", KINDS)
def test_best_round_trip(hf_cfg, tmp_path, kind):
    """Weights that are not the folder's, in another folder, with the model's own folder out of reach."""
    model = HFCLIPModel(hf_cfg(kind)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    model.cfg.model_name = "gone/away"
    checkpoint.prepare_best(tmp_path, model, model.cfg)
    checkpoint.save_best(tmp_path, model, 1, {"rsum": 1.0})
    again = load(tmp_path)
    assert same(model.state_dict(), again.state_dict())
    assert dataclasses.asdict(again.cfg) == dataclasses.asdict(model.cfg)
    assert again.tokenizer.model_max_length == model.tokenizer.model_max_length
    assert torch.equal(encode_image(again, pictures()), encode_image(model, pictures()))
    captions = [*SENTENCES, "a red square " * 60]
    assert torch.equal(encode_text(again, captions), encode_text(model, captions))


def test_architecture_alone(hf_clip, monkeypatch):
    """--no-pretrained: the folder's architecture with random weights, of the same run every time."""
    a, b = model_of(hf_clip(), pretrained=False), model_of(hf_clip())
    assert {n: t.shape for n, t in a.state_dict().items()} == {n: t.shape for n, t in b.state_dict().items()}
    assert not torch.equal(a.hf.visual_projection.weight, b.hf.visual_projection.weight)


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2", "dual", "dual_timm"])
def test_each_tower_has_its_own_precision(hf_cfg, tiny_data, bf16, kind):
    """fp32/bf16: the image tower computes in fp32, the text tower in bf16 where the processor has it."""
    model = HFCLIPModel(hf_cfg(kind, precision="fp32/bf16")).eval()
    batch = next(iter(build_loaders(tiny_data.table, model.tokenizer, "train", model.cfg)))
    seen = {"image": set(), "text": set()}  # dtypes of the outputs of linear layers and convolutions
    for tower, module in model.towers.items():
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                layer.register_forward_hook(lambda _, __, out, tower=tower: seen[tower].add(out.dtype))
    images, texts = model(batch)
    assert seen == {"image": {torch.float32}, "text": {torch.bfloat16 if bf16 else torch.float32}}
    exact = HFCLIPModel(hf_cfg(kind, precision="fp32")).eval()
    torch.testing.assert_close(images, exact(batch)[0])
    assert (texts * exact(batch)[1]).sum(1).min() > 0.99


def test_clip_s_published_architecture_needs_no_hub(hf_clip, monkeypatch):
    """ViT-B/32 as published: 151,277,313 parameters, 224 pixels, cropped."""
    for name in ("kaiming_uniform_", "uniform_", "normal_", "trunc_normal_"):  # drawing so many takes seconds
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
    model = HFCLIPModel(HFClip(pretrained=False, text_tokenizer=hf_clip()))
    assert sum(p.numel() for p in model.parameters()) == 151_277_313
    assert (model.cfg.size, model.cfg.resize, model.cfg.interpolation) == (224, "crop", "bicubic")
    with pytest.raises(UserError, match="Give text_tokenizer a local folder$"):
        HFCLIPModel(HFClip(pretrained=False))


def test_siglip_s_own_tokenizer(changed, tmp_path):
    """A SentencePiece model, as the published SigLIP has."""
    folder = changed("siglip")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    rng = np.random.default_rng(0)
    words = [" ".join(rng.choice(["a", "red", "dog", "runs", "blue", "in", "snow"], 9)) for _ in range(60)]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_prefix=str(folder / "spiece"), vocab_size=40, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    settings = {"tokenizer_class": "SiglipTokenizer", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    captions = ["a red dog", "a blue dog runs in snow"]
    model = model_of(folder)
    assert "Siglip" in type(model.tokenizer).__name__
    torch.testing.assert_close(encode_text(model, captions), Plain(folder).texts(captions), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "processor",
    [
        transformers.BitImageProcessor(size={"shortest_edge": 48}, crop_size=32, resample=3),
        transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.75, resample=2),
    ],
    ids=["resized to more than the crop", "crop_pct"],
)
def test_the_crop_is_the_processor_s(changed, processor):
    folder = changed("clip")
    processor.save_pretrained(folder)
    model = model_of(folder)
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((150, 100))
    theirs = AutoImageProcessor.from_pretrained(folder)(images=smooth, return_tensors="pt")["pixel_values"]
    ours = (model.image_transform()(image=np.array(smooth))["image"] - model.mean) / model.std
    assert (ours - theirs).abs().max() < 4 / 255 / min(processor.image_std)


# ---- what is refused


@pytest.mark.parametrize("name", ["image_weights", "text_encoder_model", "head", "projection_dim", "temperature"])
def test_a_setting_without_effect_is_refused(hf_clip, name):
    value = {"head": "linear", "projection_dim": 8, "temperature": 0.5}.get(name, "nonsense")
    assert f"{name} is for models from scratch" in refused(hf_clip(), **{name: value})


def test_a_siglip_without_its_head(changed):
    folder = changed("siglip")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["vision_use_head"] = False
    (folder / "config.json").write_text(json.dumps(config))
    assert "is a siglip model, without CLIP's two towers" in refused(folder)


def refused(folder, **settings):
    with pytest.raises(UserError) as stop:
        HFCLIPModel(HFClip(model_name=folder, **settings))
    line = str(stop.value)
    assert "\n" not in line
    return line


def test_a_folder_that_is_no_clip(tmp_path, tiny_tokenizer):
    bert = transformers.BertModel(transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50))  # fmt: skip
    bert.save_pretrained(tmp_path / "bert")
    tiny_tokenizer.save_pretrained(tmp_path / "bert")
    assert "is a bert model, without CLIP's two towers" in refused(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    assert f"transformers cannot load the CLIP {tmp_path / 'empty'}" in refused(tmp_path / "empty")
    (tmp_path / "file.bin").write_text("x")
    assert "file.bin" in refused(tmp_path / "file.bin")
    assert "there is no" in refused(tmp_path / "nowhere")


def test_a_folder_with_something_missing(changed):
    folder = changed()
    (folder / "preprocessor_config.json").rename(folder / "kept")
    assert "image processor" in refused(folder) or "preprocessor_config.json" in refused(folder)
    (folder / "kept").rename(folder / "preprocessor_config.json")
    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"], state["text_model.final_layer_norm.bias"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert "has no weights for 2 tensors, text_model.final_layer_norm.bias first" in refused(folder)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    assert "transformers cannot load the CLIP" in refused(folder)
    (folder / "config.json").write_text("{")
    assert "transformers cannot load the CLIP" in refused(folder)


@pytest.mark.parametrize("kind", ["clip", "dual"])
def test_a_folder_without_a_tokenizer(changed, kind):
    """transformers 5 makes up a tokenizer of two tokens, with which every caption reads the same."""
    folder = changed(kind)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "text_tokenizer" in refused(folder)


def test_a_processor_without_a_size(changed):
    folder = changed("dual_timm")
    settings = {"image_processor_type": "TimmWrapperImageProcessor", "architecture": "test_resnet"}
    settings |= {"pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    assert "image processor" in refused(folder).lower() or "ImageProcessor" in refused(folder)


def test_another_size_than_the_model_s(hf_clip):
    line = refused(hf_clip(), size=160)
    assert "size 160" in line and "takes 32 pixels a side" in line and "--size 0" in line


def test_a_tokenizer_too_large_for_the_text_tower(hf_clip, changed):
    folder = changed()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{i}" for i in range(500)])
    tokenizer.save_pretrained(folder / "larger")
    assert "text_tokenizer has" in refused(hf_clip(), text_tokenizer=str(folder / "larger"))


# ---- a run


def test_the_command_end_to_end(hf_clip, tmp_path, monkeypatch, capsys):
    """`python -m clip_scratch.train hf_clip --model-name FOLDER` on built-in scenes, then every command on the run.

    The architecture is openai/clip-vit-base-patch32's, but smaller; the epoch-0 figures are computed again, by
    plain transformers.
    """
    from clip_scratch.compare import Arguments as CompareArguments
    from clip_scratch.compare import main as compare

    words = ["hf_clip", "--model-name", hf_clip(), "--n-scenes", "60", "--epochs", "1", "--batch-size", "16"]
    words += ["--run-dir", "run", "--device", "cpu", "--precision", "fp32", "--warmup-steps", "1"]
    monkeypatch.chdir(tmp_path)
    main(parse([str(word) for word in words]))
    said = capsys.readouterr().out
    run = Path("run")
    zero, *lines = lines_of(run)
    assert (zero["epoch"], zero["step"], zero["train_loss"]) == (0, 0, None) and [x["epoch"] for x in lines] == [1]
    assert zero.keys() == lines[0].keys() and lines[0]["train_loss"] > 0
    assert "epoch   0  zero-shot" in said and "parameters train (freeze: none)" in said

    cfg = checkpoint.run_config(run / "best")
    assert (cfg.size, cfg.resize, cfg.interpolation, cfg.loss) == (32, "crop", "bicubic", "infonce")
    table = check_images(read_captions(cfg), image_folder(cfg, read_captions(cfg)), "error")
    table = split_of(table, "valid", cfg.captions_path)
    names = table["image"].drop_duplicates().tolist()
    plain = Plain(hf_clip())
    pixels = [model_pixels(cfg, image_folder(cfg, table) / name) for name in names]
    independent = recall_at_k(plain.images(pixels), plain.texts(table["caption"]), [
        names.index(name) for name in table["image"]])  # fmt: skip
    assert {k: zero[k] for k in independent} == pytest.approx(independent, abs=1e-6)
    measured = read_zero_shot(run / "zero_shot.json")
    assert measured.images == names
    assert {k: measured.metrics[k] for k in independent} == pytest.approx(independent, abs=1e-6)

    best = max([zero, *lines], key=lambda line: line["rsum"])
    assert json.loads((run / "best/metrics.json").read_text())["epoch"] == best["epoch"]
    assert {k: evaluate(run)[k] for k in independent} == pytest.approx({k: best[k] for k in independent}, abs=1e-6)
    model = load(run)
    embeddings = encode_image(model, [image_folder(cfg, table) / name for name in names])
    found = find_matches(model, embeddings, "a red circle", names)
    assert len({name for name, _ in found}) == len(found)
    update_index(run, image_folder(cfg, table), "index", device="cpu")
    assert dict(Index.open("index").search("a red circle", n=100))[found[0][0]] == pytest.approx(found[0][1], abs=2e-3)
    capsys.readouterr()
    evaluate_verb.main(evaluate_verb.Arguments("run", device="cpu", json="figures.json"))
    assert "R@1" in capsys.readouterr().out and json.loads(Path("figures.json").read_text())["rsum"] == best["rsum"]
    compare(CompareArguments(("run",), device="cpu"))
    assert "zero-shot clip" in capsys.readouterr().out


def model_pixels(cfg, path):
    """A picture in the model's own geometry, so that the processor has nothing to resize."""
    from clip_scratch.data.images import image_transform, load_image

    return Image.fromarray(image_transform(cfg, False)(image=load_image(path))["image"].permute(1, 2, 0).numpy())


@pytest.mark.real_data
def test_clip_s_own_tokenizer_and_architecture(hf_clip, tmp_path, plain, tiny_data):
    """CLIPConfig()'s own 49,408 tokens and 77 positions with the published tokenizer files, towers cut down."""
    tokenizer_folder = Path(__file__).resolve().parents[2] / "shared" / "clip_tokenizer"
    if not tokenizer_folder.is_dir():
        pytest.skip(f"there is no {tokenizer_folder}")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(text_config=small, vision_config={**small, "image_size": 64})
    assert config.text_config.vocab_size == len(tokenizer) == 49408 and config.vision_config.patch_size == 32
    folder = tmp_path / "model"
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    plain_model, model = Plain(folder), model_of(folder)
    assert model.tokenizer.model_max_length == 77 and model.cfg.projection_dim == 512
    captions = [*SENTENCES, *many_captions(70), "Crème brûlée, 3 €!", "a photo of a cat " * 30]
    torch.testing.assert_close(encode_text(model, captions), plain_model.texts(captions), atol=1e-5, rtol=0)
    settings = {"captions_path": tiny_data.captions_path, "valid_fraction": 0.2, "epochs": 1, "device": "cpu"}
    run = main(HFClip(model_name=folder, batch_size=8, run_dir=str(tmp_path / "run"), **settings))
    shutil.rmtree(folder)
    assert encode_text(load(run), captions).shape == (len(captions), 512)
    assert len(lines_of(main(CFG(resume=str(run))))) == 2


# ---- resume


def interrupt_at(monkeypatch, step):
    show = Report.step

    def and_interrupt(self, state, steps):
        show(self, state, steps)
        if state.progress.step == step:
            monkeypatch.setattr(Report, "step", show)
            os.kill(os.getpid(), 2)

    monkeypatch.setattr(Report, "step", and_interrupt)


EVERYTHING = {
    "lora": {"image_freeze": "lora", "text_freeze": "lora", "ema": 0.7, "accumulation": 2, "lora_lr": 1e-2},
    "plateau": {
        "scheduler": "plateau",
        "patience": 0,
        "factor": 0.5,
        "loss": "sigmoid",
        "image_freeze": "all-but-last:1",
    },
    "mixed": {"image_freeze": "lora", "text_freeze": "first:1", "ema": 0.5, "wise_ft": "0.5", "layer_decay": 0.7},
}


@pytest.mark.parametrize(
    ("name", "kind", "step"), [("lora", "clip", 2), ("plateau", "clip", 7), ("mixed", "dual_timm", 10)]
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(hf_cfg, tmp_path, monkeypatch, plain, name, kind, step):
    """In the middle of an epoch and after the last step; two and three runs in one process, the model gone."""
    folder = tmp_path / "model"
    shutil.copytree(hf_cfg(kind).model_name, folder)
    cfg = dataclasses.replace(hf_cfg(kind, **EVERYTHING[name]), model_name=str(folder))
    whole = main(dataclasses.replace(cfg, run_dir=str(tmp_path / "whole")))
    interrupt_at(monkeypatch, step)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        main(dataclasses.replace(cfg, run_dir=str(tmp_path / "run")))
    shutil.rmtree(folder)
    torch.manual_seed(999)
    run = main(parse(["--resume", str(tmp_path / "run")]))
    assert untimed(run) == untimed(whole) and [line["epoch"] for line in lines_of(run)] == [0, 1, 2]
    assert same(last_of(run)["model"], last_of(whole)["model"])
    assert "average" not in last_of(run) or same(last_of(run)["average"], last_of(whole)["average"])
    ours, theirs = (load_file(f / "best/model.safetensors") for f in (run, whole))
    assert same(ours, theirs) and not any("lora" in tensor for tensor in ours)
    steps = [line["step"] for line in lines_of(run)]
    assert steps == ([0, 3, 6] if name == "lora" else [0, 5, 10])
    before = (run / "best/model.safetensors").read_bytes(), (run / "metrics.jsonl").read_text()
    main(CFG(resume=str(run)))  # of a finished run
    assert before == ((run / "best/model.safetensors").read_bytes(), (run / "metrics.jsonl").read_text())


def test_a_lora_run_needs_no_peft_to_load(hf_cfg, plain, tmp_path, monkeypatch):
    run = main(hf_cfg(image_freeze="lora", lora_lr=0.05, epochs=1, run_dir=str(tmp_path / "run")))
    monkeypatch.setitem(sys.modules, "peft", None)
    for name in [n for n in sys.modules if n.startswith("peft.")]:
        monkeypatch.delitem(sys.modules, name)
    assert encode_text(load(run), SENTENCES).isfinite().all()
    with pytest.raises(UserError, match=r"clip_scratch\[lora\]"):
        main(CFG(resume=str(run)))


def test_lora_s_kept_epoch_is_what_was_measured(hf_cfg, plain, tmp_path):
    """The figures of best/ come out again from its merged weights."""
    settings = {"image_freeze": "lora", "text_freeze": "lora", "lora_lr": 0.03, "epochs": 3, "ema": 0.5}
    run = main(hf_cfg(**settings, run_dir=str(tmp_path / "run"), precision="fp32"))
    best = json.loads((run / "best/metrics.json").read_text())
    assert evaluate(run)["rsum"] == pytest.approx(best["rsum"], abs=1e-6)
    assert len({line["rsum"] for line in lines_of(run)}) > 1


# ---- what a run says


def scripted(monkeypatch, rsums):
    """Have each validation give the next of `rsums`, the first that of the untouched model."""
    import clip_scratch.evaluation.retrieval as retrieval
    from clip_scratch.training import start

    real, zero_shot, values = retrieval.recall_at_k, start.recalls_of, iter(rsums)
    monkeypatch.setattr(retrieval, "recall_at_k", lambda *args: real(*args) | {"rsum": next(values)})
    monkeypatch.setattr(start, "recalls_of", lambda *args: zero_shot(*args) | {"rsum": next(values)})


def test_epoch_0_can_be_the_best(hf_cfg, hf_clip, tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, [300.0, 200.0, 250.0, 290.0])
    run = main(hf_cfg(epochs=9, early_stopping=2, run_dir=str(tmp_path / "run")))
    said = capsys.readouterr()
    assert [line["epoch"] for line in lines_of(run)] == [0, 1, 2] and "stopped early" in said.out
    assert "best epoch: 0" in said.out and "best/ is the untouched, zero-shot model" in said.out
    assert "2 epochs of fine-tuning did not improve on it" in said.out
    assert "is below where training started (300.0)" in said.err
    assert json.loads((run / "best/metrics.json").read_text())["epoch"] == 0
    untouched = HFCLIPModel(hf_cfg()).state_dict()
    assert same(load(run).state_dict(), untouched)


def test_no_epoch_is_the_zero_shot_run(hf_cfg, hf_clip, tmp_path, capsys):
    run = main(hf_cfg(epochs=0, run_dir=str(tmp_path / "run")))
    assert [line["epoch"] for line in lines_of(run)] == [0]
    assert same(load(run).state_dict(), HFCLIPModel(hf_cfg()).state_dict())
    assert "untouched" in capsys.readouterr().out


def test_the_first_rates_are_warmed_up_and_the_last_are_zero(hf_cfg, plain, tmp_path):
    run = main(hf_cfg(warmup_steps=4, epochs=4, run_dir=str(tmp_path / "cosine")))
    rates = [line["image_encoder_lr"] for line in lines_of(run)]
    assert rates[0] == pytest.approx(1e-3 / 4) and rates[-1] == pytest.approx(0, abs=1e-12)


def test_a_plateau_lowers_the_rates(hf_cfg, plain, tmp_path, monkeypatch):
    scripted(monkeypatch, [100.0, 90.0, 80.0, 70.0])
    run = main(hf_cfg(scheduler="plateau", patience=0, factor=0.5, epochs=3, run_dir=str(tmp_path / "run")))
    assert [line["head_lr"] for line in lines_of(run)] == pytest.approx([1e-3, 1e-3, 5e-4, 2.5e-4])


def test_captions_over_the_limit_are_counted(hf_cfg, plain, tmp_path, capsys):
    main(hf_cfg(max_length=6, epochs=0, run_dir=str(tmp_path / "run")))
    assert "captions are longer than 6 tokens and are cut off there" in capsys.readouterr().out


# ---- presets


def test_the_recipes(tmp_path):
    for name in ("hf_clip", "food", "indo_fashion", "flickr8k_clip", "flickr30k_clip"):
        cfg = parse([name, "--batch-size", "8", "--image-freeze", "all-but-last:2", "--run-dir", str(tmp_path)])
        assert isinstance(cfg, PRESETS[name]) and (cfg.backend, cfg.batch_size) == ("hf_clip", 8)
        assert (cfg.model_name, cfg.size, cfg.loss) == ("openai/clip-vit-base-patch32", 0, "auto")
        assert (cfg.image_encoder_lr, cfg.text_encoder_lr, cfg.head_lr) == (1e-5, 1e-5, 1e-5)
        assert cfg.early_stopping and PRESETS[name].__doc__.splitlines()[0].endswith(
            (f"clip_scratch.train {name}`.", "--captions-path my.csv`.")
        )
    food, fashion = PRESETS["food"](), PRESETS["indo_fashion"]()
    assert food.scheduler == "plateau" and food.epochs == 20 and food.hue_jitter and food.horizontal_flip
    assert food.color_jitter and food.crop_scale < 1 and food.weight_decay
    assert fashion.accumulation > 1 and fashion.image_freeze == "first:6"
