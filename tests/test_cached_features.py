"""Frozen layers computed once: the same losses, weights and embeddings as computed in every epoch."""

import copy
import dataclasses
import shutil
import sys
import threading

import pytest
import torch

from clip_scratch.config import CFG
from clip_scratch.data.images import image_transform
from clip_scratch.data.loaders import build_loaders
from clip_scratch.models.clip import CLIPModel
from clip_scratch.models.hf_clip import HFCLIPModel
from clip_scratch.training import frozen_cache
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


def few_views(data, views):
    """Have a data set come round to the same pixels after so many epochs."""
    every = data.pixels
    data.pixels = lambda epoch, numbers: every(epoch % views, numbers)


def assert_same_training(setup, epochs=2, tolerance=1e-5, **settings):
    model, loader, valid, cfg = setup(**settings)
    if settings["image_freezing"] != "full":
        few_views(loader.dataset, cfg.frozen_views)
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


def test_a_tower_that_is_not_kept_goes_on_seeing_new_pixels(setup):
    loader = assert_same_training(setup, epochs=3, image_freezing="full", text_freezing="heads", frozen_views=1)
    first, second = (next(iter(loader.start(epoch)))["pixels"] for epoch in (0, 1))
    assert loader.images is None and not torch.equal(first, second)


def test_images_that_are_not_augmented_have_one_view(setup, tiny_data):
    plain = {"crop_scale": 1.0, "horizontal_flip": 0.0, "color_jitter": 0.0, "frozen_views": 3}
    model, loader, valid, cfg = setup(trainable=False, **plain)
    assert len(freeze_features(model, loader, cfg).images.values) == 1
    train = tiny_data.table[tiny_data.table["split"] == "train"]
    own = build_loaders(train, model.tokenizer, "train", cfg, image_transform(cfg, train=True))
    assert len(freeze_features(model, own, cfg).images.values) == 3  # a caller's pipeline may do anything
    assert len(freeze_features(model, valid, cfg).images.values) == 1


@pytest.mark.parametrize("image_precision", ["same", "fp32"])
def test_activations_stay_in_bf16(setup, image_precision, bf16):
    # A caption's padding, which differs, may round a sum another way
    settings = {
        "precision": "bf16",
        "image_precision": image_precision,
        "image_freezing": "last:1",
        "text_freezing": "heads",
    }
    loader = assert_same_training(setup, tolerance=2e-2, **settings)
    assert loader.images.values.dtype == (torch.bfloat16 if bf16 else torch.float32)


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
def test_nothing_is_kept_where_all_trains(setup, policy, tmp_path, capsys):
    if policy == "lora":
        pytest.importorskip("peft")
    model, loader, valid, cfg = setup(image_freezing=policy, text_freezing=policy)
    capsys.readouterr()
    assert freeze_features(model, loader, cfg) is loader and freeze_features(model, valid, cfg) is valid
    said = "frozen_views has no effect: no tower has frozen layers below the trained ones\n"
    assert capsys.readouterr().err == said  # once
    assert not list((tmp_path / "cache").glob("frozen-*"))


def test_nothing_is_kept_unless_asked(setup, capsys):
    model, loader, _, cfg = setup(trainable=False, frozen_views=0)
    capsys.readouterr()
    assert freeze_features(model, loader, cfg) is loader
    assert capsys.readouterr().err == ""


# ---- the files


def counted(monkeypatch):
    """The parts that were computed, one entry a batch."""
    calls, real = [], frozen_cache.activations
    monkeypatch.setattr(
        frozen_cache, "activations", lambda model, part, *rest: (calls.append(part), real(model, part, *rest))[1]
    )
    return calls


def test_found_again_and_computed_again_when_something_changes(setup, monkeypatch, tmp_path, bf16):
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
    assert computed(image_precision="fp32" if CFG.image_precision == "same" else "same") == (True, False)
    assert computed(text_precision="fp32" if CFG.text_precision == "same" else "same") == (False, True)
    alone = {"crop_scale": 1.0, "horizontal_flip": 0.0, "color_jitter": 0.0}
    assert computed(**alone) == (True, False)
    assert computed(**alone, seed=3, frozen_views=4) == (False, False)  # nothing is drawn
    assert computed(precision="bf16") == (bf16, bf16)  # without bf16 all of these are fp32
    assert computed(precision="auto") == (False, False)


def test_a_build_that_is_killed_begins_anew(setup, monkeypatch, tmp_path):
    expected, loader, _, cfg = setup(trainable=False)
    whole = next(iter(freeze_features(expected, loader, cfg).start(0)))
    files = list((tmp_path / "cache").glob("*.bin"))
    for file in files:  # what a power cut leaves: unfinished, perhaps with more in it than there should be
        file.write_bytes(file.read_bytes() + b"more")
        file.replace(file.with_suffix(".tmp"))

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
    assert sorted(files) == sorted((tmp_path / "cache").glob("*.bin"))


def test_of_two_that_build_at_once_one_waits(tiny_cfg, tmp_path, capsys):
    cfg = dataclasses.replace(tiny_cfg, cache_path=str(tmp_path))
    begun, go_on, filled, found = threading.Event(), threading.Event(), [], []

    def fill(values):
        filled.append(values.shape)
        begun.set()
        assert go_on.wait(20)
        values[:] = torch.arange(6).view(2, 3)

    def build():
        found.append(frozen_cache._computed_once("key", (2, 3), torch.bfloat16, fill, "image", cfg))

    threads = [threading.Thread(target=build) for _ in range(2)]
    threads[0].start()
    assert begun.wait(20)
    threads[1].start()
    said = ""
    while "waiting for another process" not in said and threads[1].is_alive():
        said += capsys.readouterr().err
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert "waiting for another process" in said
    assert filled == [(2, 3)] and len(found) == 2
    assert all(values.tolist() == [[0, 1, 2], [3, 4, 5]] and values.dtype == torch.bfloat16 for values in found)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere an empty file takes its whole room")
def test_a_file_may_be_larger_than_the_memory(tmp_path):
    rows = 1 << 36
    with open(tmp_path / "large", "wb") as file:
        try:
            file.truncate(rows * 16)  # 1 TiB, none of it on the disk
        except OSError:
            pytest.skip("a file system without such large files")
    values = frozen_cache._opened(tmp_path / "large", (rows, 4), torch.float32)
    assert values[-1].tolist() == [0, 0, 0, 0]


def test_no_room(setup, monkeypatch, capsys):
    model, loader, _, cfg = setup(trainable=False)
    free = int(0.04e9)

    def computed(key, size):
        return frozen_cache._computed_once(key, (size,), torch.uint8, torch.Tensor.zero_, "image", cfg)

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    assert computed("half", free // 2) is not None
    assert computed("more", free // 2 + 1) is None
    assert "the 0.0 GB that are free" in capsys.readouterr().err
    free = 10
    assert freeze_features(model, loader, cfg) is loader
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("the frozen layers")]
    assert len(lines) == 2 and all("0.0 GB that are free" in line and "--cache-path" in line for line in lines)


def test_a_cache_that_cannot_be_written(setup, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    model, loader, _, cfg = setup(trainable=False, cache_path=str(tmp_path / "file" / "cache"))
    assert freeze_features(model, loader, cfg) is loader
    assert "cannot keep what they give" in capsys.readouterr().err


def test_a_disk_without_locks(setup, monkeypatch, capsys):
    def acquire(*_, **__):
        raise NotImplementedError("no flock here")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    model, loader, _, cfg = setup(trainable=False)
    assert freeze_features(model, loader, cfg) is loader
    assert "cannot keep what they give (no flock here)" in capsys.readouterr().err


def test_a_large_file_is_announced(tiny_cfg, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(frozen_cache, "_WORTH_SAYING", 99)
    cfg = dataclasses.replace(tiny_cfg, cache_path=str(tmp_path))
    for key, size in (("small", 99), ("large", 100), ("large", 100)):  # the third time it is there
        frozen_cache._computed_once(key, (size,), torch.uint8, torch.Tensor.zero_, "text", cfg)
    (line,) = capsys.readouterr().out.splitlines()
    assert "text tower" in line and "0.0 GB" in line and str(tmp_path) in line
