"""Features of frozen towers computed once: the same losses, weights and embeddings as computed in every epoch."""

import copy
import dataclasses
import shutil
import sys
import threading

import pytest
import torch

from clip_scratch.data.images import image_transform
from clip_scratch.data.loaders import build_loaders
from clip_scratch.models.clip import CLIPModel
from clip_scratch.models.hf_clip import HFCLIPModel
from clip_scratch.retrieval.embed import embed_batches
from clip_scratch.training import cached_features
from clip_scratch.training.cached_features import cache_features
from clip_scratch.training.engine import train_epoch
from clip_scratch.training.optimizer import WeightAverage, build_optimizer


@pytest.fixture
def setup(tiny_cfg, tiny_data, tiny_tokenizer, hf_cfg, tmp_path):
    """Make (model, training loader, validation loader, cfg) of settings; `clip` names one of transformers."""

    def make(clip="", **settings):
        settings = {"precision": "fp32", "cached_views": 2, "cache_path": str(tmp_path / "cache"), **settings}
        torch.manual_seed(0)
        if clip:
            model = HFCLIPModel(hf_cfg(clip, **settings))
        else:
            cfg = dataclasses.replace(tiny_cfg, image_encoder_lr=1e-3, text_encoder_lr=1e-3, **settings)
            model = CLIPModel(cfg, copy.deepcopy(tiny_tokenizer))
        train, valid = (tiny_data.table[tiny_data.table["split"] == name] for name in ("train", "valid"))
        return (
            model,
            build_loaders(train, model.tokenizer, "train", model.cfg),
            build_loaders(valid, model.tokenizer, "valid", model.cfg),
            model.cfg,
        )

    return make


def trained(model, loader, cfg, epochs):
    """Losses of every step of `epochs` epochs, and the model after them. The dropout draws from a fixed seed."""
    optimizer, losses = build_optimizer(model, cfg), []
    average = WeightAverage(model, cfg.ema) if cfg.ema else None
    torch.manual_seed(1)
    for epoch in range(epochs):
        loader.start(epoch)
        train_epoch(model, loader, optimizer, cfg, average=average, on_step=lambda step: losses.append(step.loss))
    return torch.tensor(losses), (average.module if average else model)


def repeat_views(data, views):
    """Make a data set return the same pixels after so many epochs."""
    pixels = data.pixels
    data.pixels = lambda epoch, numbers: pixels(epoch % views, numbers)


def assert_same_training(setup, epochs=2, tolerance=1e-5, **settings):
    model, loader, valid, cfg = setup(**settings)
    if settings.get("image_freeze", "none") != "none":
        repeat_views(loader.dataset, cfg.cached_views)
    expected, after = trained(model, loader, cfg, epochs)
    embedded = embed_batches(after, valid)
    model, loader, valid, cfg = setup(**settings)
    state = copy.deepcopy(model.state_dict())
    loader, valid = (cache_features(model, which, cfg) for which in (loader, valid))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    losses, found = trained(model, loader, cfg, epochs)
    assert len(losses) >= 4 and torch.allclose(losses, expected, atol=tolerance, rtol=1e-6)
    for (name, a), b in zip(found.state_dict().items(), after.state_dict().values(), strict=True):
        if not name.endswith(("k_proj.bias", "key.bias", "k_lin.bias")):  # only rounding, which Adam makes a full step
            assert torch.allclose(a.float(), b.float(), atol=10 * tolerance), name
    for a, b in zip(embed_batches(found, valid), embedded, strict=True):
        assert torch.allclose(a, b, atol=tolerance)
    return loader.dataset


@pytest.mark.parametrize(
    "settings",
    [
        {"image_freeze": "backbone", "text_freeze": "backbone"},
        {"image_freeze": "backbone", "text_freeze": "none", "ema": 0.9, "captions_per_image": 2},
        {"image_freeze": "none", "text_freeze": "backbone", "num_workers": 1},
        {"image_freeze": "first:1", "text_freeze": "all", "captions_per_image": 0},
        {"clip": "clip", "image_freeze": "backbone", "text_freeze": "backbone"},
        {"clip": "siglip", "image_freeze": "backbone", "text_freeze": "backbone"},
        {"clip": "siglip2", "image_freeze": "backbone", "text_freeze": "none"},
        {"clip": "dual_timm", "image_freeze": "backbone", "text_freeze": "backbone"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_trains_as_if_it_were_computed_in_every_epoch(setup, settings):
    assert_same_training(setup, **settings)


def test_each_epoch_sees_its_own_view(setup):
    views = assert_same_training(setup, epochs=4, image_freeze="backbone", cached_views=3).image_features
    assert views.shape[:2] == (3, 20)
    assert not torch.equal(views[0], views[1]) and not torch.equal(views[1], views[2])


def test_a_tower_that_is_not_cached_still_sees_new_pixels(setup):
    model, loader, _, cfg = setup(text_freeze="backbone", cached_views=1)
    loader = cache_features(model, loader, cfg)
    first, second = (next(iter(loader.start(epoch))) for epoch in (0, 1))
    assert not torch.equal(first["pixel_values"], second["pixel_values"]) and "image_features" not in first
    assert len(first["text_features"]) == len(first["caption_ids"]) and "input_ids" not in first


def test_images_that_are_not_augmented_have_one_view(setup, tiny_data):
    plain = {"crop_scale": 1.0, "horizontal_flip": 0.0, "color_jitter": 0.0, "cached_views": 3}
    model, loader, valid, cfg = setup(trainable=False, **plain)
    assert len(cache_features(model, loader, cfg).dataset.image_features) == 1
    train = tiny_data.table[tiny_data.table["split"] == "train"]
    own = build_loaders(train, model.tokenizer, "train", cfg, image_transform(cfg, train=True))
    assert len(cache_features(model, own, cfg).dataset.image_features) == 3  # a caller's pipeline may do anything
    assert len(cache_features(model, valid, cfg).dataset.image_features) == 1


def test_features_are_cached_in_the_precision_of_the_tower(setup, bf16, monkeypatch):
    """And images are augmented outside of autocast, which would round them by up to 3 grey levels."""
    seen = []
    model, loader, _, cfg = setup(trainable=False, precision="bf16")
    pixels = loader.dataset.pixels
    loader.dataset.pixels = lambda *args: (seen.append(torch.is_autocast_enabled("cpu")), pixels(*args))[1]
    data = cache_features(model, loader, cfg).dataset
    assert seen and not any(seen) and data.image_features.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert_same_training(setup, tolerance=2e-2, precision="bf16", image_freeze="backbone", text_freeze="backbone")


@pytest.mark.parametrize("per_image", [0, 1, 2])
def test_a_batch_has_the_same_ids(setup, per_image):
    model, loader, _, cfg = setup(trainable=False, captions_per_image=per_image)
    cached = cache_features(model, loader, cfg)
    assert len(cached) == len(loader)
    for ours, plain in zip(cached.start(3, 1), list(loader.start(3, 1)), strict=True):
        assert ours["names"] == plain["names"] and not {"pixel_values", "input_ids"} & ours.keys()
        for name in ("image_ids", "caption_image_ids", "caption_ids"):
            assert torch.equal(ours[name], plain[name])


@pytest.mark.parametrize("freeze", ["none", "lora", "first:1"])
def test_nothing_is_cached_where_a_part_trains(setup, freeze, tmp_path, capsys):
    if freeze == "lora":
        pytest.importorskip("peft")
    model, loader, _, cfg = setup(image_freeze=freeze, text_freeze=freeze)
    capsys.readouterr()
    assert cache_features(model, loader, cfg) is loader
    assert capsys.readouterr().err == "cached_views has no effect: no tower is frozen as a whole\n"
    assert not list((tmp_path / "cache").glob("features-*"))


def test_nothing_is_cached_unless_asked(setup, capsys):
    model, loader, _, cfg = setup(trainable=False, cached_views=0)
    capsys.readouterr()
    assert cache_features(model, loader, cfg) is loader
    assert capsys.readouterr().err == ""


# ---- the files


def test_found_again_and_computed_again_when_something_changes(setup, monkeypatch, tmp_path, bf16):
    calls, real = [], cached_features.head_input
    monkeypatch.setattr(
        cached_features, "head_input", lambda model, tower, *rest: (calls.append(tower), real(model, tower, *rest))[1]
    )

    def computed(change=lambda model: None, **settings):
        model, loader, _, cfg = setup(trainable=False, **settings)
        change(model)
        calls.clear()
        data = cache_features(model, loader, cfg).dataset
        assert data.image_features is not None and data.text_features is not None
        return calls.count("image") > 1, calls.count("text") > 1  # once is to see their shape

    def another_bias(model):
        model.image_encoder.model.layer1[0].bn1.bias.data[0] += 1e-3

    assert computed() == (True, True)
    for file in (tmp_path / "cache").glob("features-*.bin"):
        file.write_bytes(file.read_bytes()[:-1])  # damaged
    assert computed() == (True, True)
    assert computed() == (False, False)
    assert computed(lambda model: model.image_projection[1].fc.weight.data.zero_()) == (False, False)  # a head
    assert computed(another_bias) == (True, False)
    assert computed(color_jitter=0.5) == (True, False)
    assert computed(seed=3) == (True, False)  # other views of the images
    alone = {"crop_scale": 1.0, "horizontal_flip": 0.0, "color_jitter": 0.0}
    assert computed(**alone) == (True, False)
    assert computed(**alone, seed=3, cached_views=4) == (False, False)  # nothing is drawn
    assert computed(precision="fp32/bf16") == (False, bf16)  # without bf16 all of these are fp32
    assert computed(precision="bf16") == (bf16, False)
    assert computed(precision="auto") == (False, False)


def test_a_build_that_is_killed_starts_again(setup, monkeypatch, tmp_path):
    model, loader, _, cfg = setup(trainable=False)
    whole = next(iter(cache_features(model, loader, cfg).start(0)))
    files = sorted((tmp_path / "cache").glob("*.bin"))
    for file in files:
        file.unlink()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("clip_scratch.files.os.fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            cache_features(model, loader, cfg)
    assert not list((tmp_path / "cache").glob("*.bin")) and not list((tmp_path / "cache").glob(".*.tmp"))
    again = next(iter(cache_features(model, loader, cfg).start(0)))
    assert torch.equal(again["image_features"], whole["image_features"])
    assert sorted((tmp_path / "cache").glob("*.bin")) == files


def test_of_two_that_build_at_once_one_waits(tiny_cfg, tmp_path, capsys):
    cfg = dataclasses.replace(tiny_cfg, cache_path=str(tmp_path))
    begun, may_finish, filled, found = threading.Event(), threading.Event(), [], []

    def fill(values):
        filled.append(values.shape)
        begun.set()
        assert may_finish.wait(20)
        values[:] = torch.arange(6).view(2, 3)

    def build():
        found.append(cached_features._computed_once("key", (2, 3), torch.bfloat16, fill, "image", cfg))

    threads = [threading.Thread(target=build) for _ in range(2)]
    threads[0].start()
    assert begun.wait(20)
    threads[1].start()
    printed = ""
    while "waiting for another process" not in printed and threads[1].is_alive():
        printed += capsys.readouterr().err
    may_finish.set()
    for thread in threads:
        thread.join(20)
    assert "waiting for another process" in printed
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
    values = cached_features._open_tensor(tmp_path / "large", (rows, 4), torch.float32)
    assert values[-1].tolist() == [0, 0, 0, 0]


def test_no_room(setup, monkeypatch, capsys):
    model, loader, _, cfg = setup(trainable=False)
    free = int(0.04e9)

    def computed(key, size):
        return cached_features._computed_once(key, (size,), torch.uint8, torch.Tensor.zero_, "image", cfg)

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    assert computed("half", free // 2) is not None
    assert computed("more", free // 2 + 1) is None
    assert "at most half of the 0.0 GB" in capsys.readouterr().err
    free = 10
    data = cache_features(model, loader, cfg).dataset
    assert data.image_features is None and data.text_features is None
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("the features of the frozen")]
    assert len(lines) == 2 and all("at most half" in line and "--cache-path" in line for line in lines)


def test_a_cache_that_cannot_be_written(setup, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    model, loader, _, cfg = setup(trainable=False, cache_path=str(tmp_path / "file" / "cache"))
    assert cache_features(model, loader, cfg).dataset.image_features is None
    assert "are not cached" in capsys.readouterr().err


def test_a_disk_without_locks(setup, monkeypatch, capsys):
    def acquire(*_, **__):
        raise NotImplementedError("no flock here")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    model, loader, _, cfg = setup(trainable=False)
    assert cache_features(model, loader, cfg).dataset.image_features is None
    assert "has no file locks" in capsys.readouterr().err


def test_a_large_file_is_announced(tiny_cfg, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("clip_scratch.files._ANNOUNCED", 99)
    cfg = dataclasses.replace(tiny_cfg, cache_path=str(tmp_path))
    for key, size in (("small", 99), ("large", 100), ("large", 100)):  # the third time it is there
        cached_features._computed_once(key, (size,), torch.uint8, torch.Tensor.zero_, "text", cfg)
    (line,) = capsys.readouterr().out.splitlines()
    assert "text tower" in line and "0.0 GB" in line and str(tmp_path) in line
