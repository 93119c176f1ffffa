"""Frozen layers computed once: the same losses, weights and embeddings as computed in every epoch."""

import copy
import dataclasses
import shutil

import pytest
import torch

from clip_scratch.data.loaders import build_loaders
from clip_scratch.models.clip import CLIPModel
from clip_scratch.models.hf_clip import HFCLIPModel
from clip_scratch.training import frozen_cache
from clip_scratch.training.device import computes_in_bf16
from clip_scratch.training.engine import embed, train_epoch
from clip_scratch.training.frozen_cache import FrozenLoader, freeze_features
from clip_scratch.training.optimizer import build_average, build_optimizer


@pytest.fixture
def setup(tiny_cfg, tiny_data, tiny_tokenizer, hf_cfg, tmp_path):
    """Make (model, training loader, validation loader, cfg) of settings; a `clip` is one of transformers."""

    def make(clip="", **settings):
        settings = {"precision": "fp32", "frozen_views": 2, "cache_path": str(tmp_path / "cache"), **settings}
        torch.manual_seed(0)
        if clip:
            model = HFCLIPModel(hf_cfg(clip, **settings))
        else:
            cfg = dataclasses.replace(tiny_cfg, image_encoder_lr=1e-3, text_encoder_lr=1e-3, **settings)
            model = CLIPModel(cfg, copy.deepcopy(tiny_tokenizer))
        cfg = model.cfg
        tables = [tiny_data.table[tiny_data.table["split"] == name] for name in ("train", "valid")]
        train, valid = tables
        return (
            model,
            build_loaders(train, model.tokenizer, "train", cfg),
            build_loaders(valid, model.tokenizer, "valid", cfg),
            cfg,
        )

    return make


def trained(model, loader, cfg, epochs):
    """Losses of every step of `epochs` epochs, and the weights after them. The dropout draws from a fixed seed."""
    optimizer, losses = build_optimizer(model, cfg), []
    average = build_average(model, cfg)
    torch.manual_seed(1)
    for epoch in range(epochs):
        loader.start(epoch)
        train_epoch(model, loader, optimizer, cfg, average=average, on_step=lambda step: losses.append(step.loss))
    return torch.tensor(losses), (average.module if average else model)


def assert_same_training(setup, epochs=2, tolerance=1e-5, **settings):
    model, loader, valid, cfg = setup(**settings)
    expected, after = trained(model, loader, cfg, epochs)
    embedded = embed(after, valid, cfg)
    model, loader, valid, cfg = setup(**settings)
    state = copy.deepcopy(model.state_dict())
    loader, valid = (freeze_features(model, which, cfg) for which in (loader, valid))
    assert isinstance(loader, FrozenLoader) and isinstance(valid, FrozenLoader)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    losses, found = trained(model, loader, cfg, epochs)
    assert len(losses) >= 4 and torch.allclose(losses, expected, atol=tolerance, rtol=0)
    for (name, a), b in zip(found.state_dict().items(), after.state_dict().values(), strict=True):
        if name.endswith(("k_proj.bias", "key.bias", "k_lin.bias")):
            continue  # its gradient is nought but rounding, which Adam makes a step of full size
        assert torch.allclose(a.float(), b.float(), atol=10 * tolerance), name
    for a, b in zip(embed(found, valid, cfg), embedded, strict=True):
        assert torch.allclose(a, b, atol=tolerance)
    return loader


@pytest.mark.parametrize(
    "settings",
    [
        {"image_freezing": "heads", "text_freezing": "heads"},
        {"image_freezing": "last:1", "text_freezing": "last:1"},
        {"image_freezing": "first:1", "text_freezing": "first:1", "image_dropout": 0.3, "captions_per_image": 0},
        {"image_freezing": "heads", "text_freezing": "full", "ema": 0.9, "captions_per_image": 2},
        {"image_freezing": "full", "text_freezing": "heads", "num_workers": 1},
        {"model_name": "test_convnext", "image_freezing": "last:2", "text_freezing": "frozen"},
        {"clip": "clip", "image_freezing": "last:1", "text_freezing": "last:1"},
        {"clip": "siglip", "image_freezing": "heads", "text_freezing": "last:1"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_trains_as_if_it_were_computed_in_every_epoch(setup, settings):
    assert_same_training(setup, **settings)


def test_each_epoch_sees_its_own_view(setup):
    loader = assert_same_training(setup, epochs=4, image_freezing="heads", frozen_views=3)
    assert loader.images.values.shape[:2] == (3, 20)
    views = loader.images.values
    assert not torch.equal(views[0], views[1]) and not torch.equal(views[1], views[2])


@pytest.mark.skipif(not computes_in_bf16(torch.device("cpu")), reason="the processor has no bf16")
@pytest.mark.parametrize("image_precision", ["same", "fp32"])
def test_activations_stay_in_bf16(setup, image_precision):
    # A caption's padding, which differs, may round a sum another way
    settings = {
        "precision": "bf16",
        "image_precision": image_precision,
        "image_freezing": "last:1",
        "text_freezing": "heads",
    }
    loader = assert_same_training(setup, tolerance=2e-2, **settings)
    assert loader.images.values.dtype == torch.bfloat16


def test_more_captions_than_one_chunk(setup, monkeypatch):
    monkeypatch.setattr("clip_scratch.models.clip._CHUNK", 8)
    monkeypatch.setattr(frozen_cache, "_CAPTIONS", 8)
    assert_same_training(setup, text_freezing="last:1", image_freezing="heads", captions_per_image=0)


@pytest.mark.parametrize("per_image", [0, 1, 2, 3])
@pytest.mark.parametrize("policy", ["heads", "last:1"])
def test_a_batch_has_all_the_rest(setup, per_image, policy):
    model, loader, _, cfg = setup(image_freezing="heads", text_freezing=policy, captions_per_image=per_image)
    frozen = freeze_features(model, loader, cfg)
    assert len(frozen) == len(loader) and frozen.dataset is loader.dataset and frozen.batches is loader.batches
    for ours, plain in zip(frozen.start(3, 1), list(loader.start(3, 1)), strict=True):
        assert "pixels" not in ours and frozen.batches.skip == 1
        assert ours["names"] == plain["names"]
        tokens = ("input_ids", "attention_mask") if policy == "last:1" else ()
        for name in ("image_ids", "caption_image_ids", "caption_ids", *tokens):
            assert torch.equal(ours[name], plain[name])


@pytest.mark.parametrize("policy", ["full", "lora"])
def test_nothing_is_kept_where_all_trains(setup, policy, tmp_path):
    if policy == "lora":
        pytest.importorskip("peft")
    model, loader, _, cfg = setup(image_freezing=policy, text_freezing=policy)
    assert freeze_features(model, loader, cfg) is loader
    assert not list((tmp_path / "cache").glob("frozen-*"))


def test_nothing_is_kept_unless_asked(setup):
    model, loader, _, cfg = setup(trainable=False, frozen_views=0)
    assert freeze_features(model, loader, cfg) is loader


# ---- the files


def counted(monkeypatch):
    """The parts that were computed, one entry a batch."""
    calls, real = [], frozen_cache.activations
    monkeypatch.setattr(
        frozen_cache, "activations", lambda model, part, *rest: (calls.append(part), real(model, part, *rest))[1]
    )
    return calls


def test_found_again_and_made_anew_when_something_changes(setup, monkeypatch, tmp_path):
    calls = counted(monkeypatch)

    def computed(change=lambda model: None, **settings):
        model, loader, _, cfg = setup(trainable=False, **settings)
        change(model)
        calls.clear()
        kept = freeze_features(model, loader, cfg)
        assert isinstance(kept, FrozenLoader)
        return calls.count("image") > 1, calls.count("text") > 1  # once is to see their shape

    def another_bias(model):
        model.image_encoder.model.layer1[0].bn1.bias.data[0] += 1e-3

    assert computed() == (True, True)
    for file in (tmp_path / "cache").glob("frozen-*.bin"):
        file.write_bytes(file.read_bytes()[:-1])  # damaged
    assert computed() == (True, True)
    assert computed() == (False, False)
    assert computed(lambda model: model.image_projection[1].fc.weight.data.zero_()) == (False, False)  # a head
    assert computed(another_bias) == (True, False)
    assert computed(color_jitter=0.5) == (True, False)
    assert computed(seed=3) == (True, False)  # other views of the images


def test_a_build_that_is_killed_begins_anew(setup, monkeypatch, tmp_path):
    expected, loader, _, cfg = setup(trainable=False)
    whole = next(iter(freeze_features(expected, loader, cfg).start(0)))
    for file in (tmp_path / "cache").glob("*.bin"):  # what a power cut leaves: unfinished, under another process's name
        file.replace(file.with_suffix(".99999.tmp"))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(frozen_cache.os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            freeze_features(expected, loader, cfg)
    assert not list((tmp_path / "cache").glob("*.bin"))
    again = next(iter(freeze_features(expected, loader, cfg).start(0)))
    assert torch.equal(again["image_activations"], whole["image_activations"])
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_no_room(setup, monkeypatch, capsys):
    model, loader, _, cfg = setup(trainable=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))
    assert freeze_features(model, loader, cfg) is loader
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("the frozen layers")]
    assert len(lines) == 2 and all("0.0 GB are free" in line and "--cache-path" in line for line in lines)


def test_a_cache_that_cannot_be_written(setup, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    model, loader, _, cfg = setup(trainable=False, cache_path=str(tmp_path / "file" / "cache"))
    assert freeze_features(model, loader, cfg) is loader
    assert "cannot keep what they give" in capsys.readouterr().err
