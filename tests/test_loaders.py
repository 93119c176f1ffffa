"""Image-centred batches: what belongs together stays together, and any batch is reproducible."""

import dataclasses
import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from clip_scratch.config import CFG
from clip_scratch.data.images import image_transform, load_image
from clip_scratch.data.loaders import EpochBatches, build_loaders


def loader_of(tiny_data, tokenizer, cfg, mode="train", table=None, **settings):
    table = tiny_data.table if table is None else table
    return build_loaders(table, tokenizer, mode, dataclasses.replace(cfg, **settings))


@pytest.fixture
def make(tiny_data, tiny_tokenizer, tiny_cfg):
    return lambda mode="train", **settings: loader_of(tiny_data, tiny_tokenizer, tiny_cfg, mode, **settings)


def same(one, other):
    assert one.keys() == other.keys() and one["names"] == other["names"]
    return all(torch.equal(one[key], other[key]) for key in one if key != "names")


def texts(batch, tokenizer):
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"]]


# ---- what belongs together


@pytest.mark.parametrize(("per_image", "most"), [(0, 0), (1, 0), (2, 0), (0, 2), (1, 2)])
@pytest.mark.parametrize("mode", ["train", "valid"])
def test_ids_names_and_captions_agree(make, tiny_data, tiny_tokenizer, mode, per_image, most):
    """Also where the first captions of each training image alone are used."""
    table = tiny_data.table
    if mode == "train" and most:
        table = table.groupby("image_id").head(most)
    id_of = dict(zip(table["image"], table["image_id"], strict=True))
    plain = {i: set() for i in id_of.values()}
    for row in table.itertuples():
        ids = tiny_tokenizer(row.caption, truncation=True, max_length=24)["input_ids"]
        plain[row.image_id].add(tiny_tokenizer.decode(ids, skip_special_tokens=True))
    for batch in make(mode, captions_per_image=per_image, max_captions=most).start(epoch=1):
        b, c = len(batch["pixel_values"]), len(batch["input_ids"])
        assert batch["pixel_values"].shape == (b, 3, 32, 32) and batch["pixel_values"].dtype == torch.uint8
        assert [id_of[name] for name in batch["names"]] == batch["image_ids"].tolist()
        assert len(batch["caption_image_ids"]) == len(batch["caption_ids"]) == len(batch["attention_mask"]) == c
        assert set(batch["caption_image_ids"].tolist()) == set(batch["image_ids"].tolist())
        for owner, text in zip(batch["caption_image_ids"].tolist(), texts(batch, tiny_tokenizer), strict=True):
            assert text in plain[owner]
        have = table.groupby("image_id").size()
        take = per_image if mode == "train" and per_image else 99
        assert c == sum(min(take, have[i]) for i in batch["image_ids"].tolist())
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]


def test_captions_that_read_the_same_share_an_id(make, tiny_tokenizer):
    (batch,) = make("valid", batch_size=100)
    said = texts(batch, tiny_tokenizer)
    assert len(set(said)) < len(said)
    equal = np.array(said)[:, None] == np.array(said)
    ids = batch["caption_ids"].numpy()
    np.testing.assert_array_equal(ids[:, None] == ids, equal)


def test_case_and_spacing_do_not_make_another_sentence(make, tiny_data):
    table = tiny_data.table.iloc[:3].assign(
        image_id=[0, 1, 2], image=["00.png", "01.png", "02.png"], caption=["A  dog .", "a dog .", "a dog"]
    )
    (batch,) = make("valid", table=table)
    assert batch["caption_ids"].tolist() == [0, 0, 1]


def test_pixels_are_the_named_image_s(make, tiny_data, tiny_cfg):
    transform = image_transform(tiny_cfg, train=False)
    for batch in make("valid"):
        for name, pixels in zip(batch["names"], batch["pixel_values"], strict=True):
            assert torch.equal(pixels, transform(image=load_image(tiny_data.image_path / name))["image"])


# ---- the cache and the augmentation


@pytest.mark.parametrize("mode", ["train", "valid"])
@pytest.mark.parametrize("settings", [{}, {"hue_jitter": 0.1, "interpolation": "bicubic"}, {"crop_scale": 1.0}])
def test_the_cache_makes_no_difference(make, mode, settings):
    cached = list(make(mode, **settings).start(1))
    for workers in (0, 1):
        decoded = make(mode, image_cache=False, num_workers=workers, **settings)
        assert decoded.dataset.decodes and decoded.num_workers == workers
        assert all(same(a, b) for a, b in zip(cached, decoded.start(1), strict=True))
    assert make(mode, num_workers=1).num_workers == 0


def test_pixels_and_captions_do_not_depend_on_the_rest_of_the_batch(make):
    data = make(captions_per_image=2).dataset
    whole = data.pixels(3, range(26))
    assert whole.is_contiguous(memory_format=torch.channels_last)
    for numbers in ([5], [20, 3, 7]):
        assert torch.equal(data.pixels(3, numbers), whole[numbers])
        assert data[[(3, number) for number in numbers]]["names"] == [f"{n:02d}.png" for n in numbers]
        assert np.array_equal(
            data.captions_of(3, numbers)[0], np.concatenate([data.captions_of(3, [n])[0] for n in numbers])
        )
    assert not torch.equal(data.pixels(4, range(26)), whole)


def test_cached_features_take_the_place_of_pixels_and_tokens(make):
    data = make(captions_per_image=0).dataset
    data.image_features = torch.arange(2 * 26.0).reshape(2, 26, 1)  # two views
    data.text_features = torch.arange(len(data.tokens))[:, None]
    batch = data[[(3, 5), (3, 1)]]
    assert batch["image_features"].tolist() == [[26 + 5], [26 + 1]]  # epoch 3 has view 1
    assert batch["text_features"].ravel().tolist() == data.captions_of(3, [5, 1])[0].tolist()
    assert not {"pixel_values", "input_ids", "attention_mask"} & set(batch)


def test_a_set_image_path_is_taken_at_once(make, monkeypatch):
    """So that a run looks for its images once, in open_data."""
    monkeypatch.setattr("clip_scratch.data.captions.locate", None)
    assert len(make("valid")) == 4


def test_the_images_of_an_epoch_bring_captions_of_each_kind(make, tiny_data):
    table = tiny_data.table
    place = table.groupby("image_id").cumcount().to_numpy()  # first, second, ... caption of its image
    data = make(captions_per_image=1).dataset
    rows, counts = data.captions_of(0, range(26))
    assert (counts == 1).all() and set(place[rows]) == {0, 1, 2, 3, 4}


def test_without_augmentation_training_sees_the_pixels_of_evaluation(make):
    plain = {"crop_scale": 1.0, "horizontal_flip": 0.0, "color_jitter": 0.0}
    train, valid = make(**plain).dataset, make("valid", **plain).dataset
    assert torch.equal(train.pixels(3, range(26)), valid.pixels(0, range(26)))
    flipped = make(**plain | {"horizontal_flip": 1.0}).dataset
    assert torch.equal(flipped.pixels(3, range(26)), valid.pixels(0, range(26)).flip(3))


@pytest.mark.parametrize("workers", [0, 1])
def test_any_albumentations_pipeline_can_replace_it(tiny_data, tiny_tokenizer, tiny_cfg, workers):
    cfg = dataclasses.replace(tiny_cfg, num_workers=workers)
    transform = image_transform(cfg, train=True)
    loader = build_loaders(tiny_data.table, tiny_tokenizer, "train", cfg, transform)
    assert loader.num_workers == workers and loader.dataset.augmented
    batches = list(loader.start(2, 1))
    for name, pixels in zip(batches[0]["names"], batches[0]["pixel_values"], strict=True):
        transform.set_random_seed(int(np.random.SeedSequence((cfg.seed, 2, int(name[:2]))).generate_state(1)[0]))
        assert torch.equal(pixels, transform(image=load_image(tiny_data.image_path / name))["image"])


def test_another_device_gets_the_same_pixels_within_rounding(make):
    data, on_device = make(hue_jitter=0.1).dataset, make(hue_jitter=0.1).dataset
    expected = data.pixels(1, range(26)).float()
    found = on_device._from_squares(1, list(range(26)), True).permute(0, 3, 1, 2).float()
    assert (found - expected).abs().mean() < 1
    valid = make("valid").dataset
    assert torch.equal(valid._from_squares(0, [3, 1], True).permute(0, 3, 1, 2), valid.pixels(0, [3, 1]))


def test_worker_processes_get_a_copy_of_the_data(make):
    """Windows and macOS start workers anew and send them the data."""
    data = make(image_cache=False).dataset
    copy = pickle.loads(pickle.dumps(data))
    assert same(copy[[(1, 4), (1, 2)]], data[[(1, 4), (1, 2)]])


def test_where_there_is_no_cuda_the_cpu_makes_the_pixels(tiny_data, tiny_tokenizer, tiny_cfg):
    on_cpu, for_mps = (
        build_loaders(tiny_data.table, tiny_tokenizer, "train", tiny_cfg, device=device) for device in ("cpu", "mps")
    )
    assert same(next(iter(for_mps)), next(iter(on_cpu))) and for_mps.dataset.held is None


def test_any_index_order_and_ids_of_the_table(make, tiny_data):
    """A split is a part of a table: its index has gaps, its ids too, and an image's rows need not be neighbours."""
    table = tiny_data.table.query("image_id % 3 == 1").assign(image_id=lambda t: 1000 - 7 * t["image_id"])
    table = table.sample(frac=1, random_state=1)
    batches = list(make("valid", table=table))
    assert [n for batch in batches for n in batch["names"]] == list(dict.fromkeys(table["image"]))
    pairs = pd.Series(torch.cat([batch["caption_image_ids"] for batch in batches]).numpy()).value_counts()
    assert pairs.to_dict() == table["image_id"].value_counts().to_dict()


# ---- epochs


def test_each_image_at_most_once_an_epoch_and_no_short_batch(make):
    loader = make(batch_size=8)
    for epoch in range(3):
        batches = list(loader.start(epoch))
        names = [name for batch in batches for name in batch["names"]]
        assert len(batches) == len(loader) == 3 and len(names) == len(set(names)) == 24
    assert sorted(n for b in make(batch_size=13) for n in b["names"]) == [f"{i:02d}.png" for i in range(26)]


def test_no_image_is_left_out_for_ever(make):
    loader = make(batch_size=20)
    seen = {name for epoch in range(6) for batch in loader.start(epoch) for name in batch["names"]}
    assert len(seen) == 26


def test_a_batch_larger_than_the_set_is_the_set(make):
    (batch,) = make(batch_size=1000)
    assert len(set(batch["names"])) == 26


@pytest.mark.parametrize("per_image", [1, 2, 3])
def test_every_caption_is_seen_as_soon_as_possible(make, tiny_data, per_image):
    loader = make(batch_size=26, captions_per_image=per_image)
    seen = set()
    for epoch in range(-(-5 // per_image)):  # no image has more than five
        for batch in loader.start(epoch):
            pairs = list(zip(batch["caption_image_ids"].tolist(), batch["caption_ids"].tolist(), strict=True))
            assert len(pairs) == len(set(pairs))
            seen.update(pairs)
    assert len(seen) == len(tiny_data.table)


def test_epochs_and_seeds_differ_in_order_and_pixels(make):
    one, two, other = make().start(0), make().start(1), make(seed=7).start(0)
    a, b, c = (next(iter(loader)) for loader in (one, two, other))
    assert a["names"] != b["names"] and a["names"] != c["names"]
    loader = make(batch_size=26)
    (first,), (second,) = list(loader.start(0)), list(loader.start(1))
    order = [second["names"].index(name) for name in first["names"]]
    assert (first["pixel_values"] != second["pixel_values"][order]).flatten(1).any(1).float().mean() > 0.9


def test_validation_has_every_caption_once_in_order(make, tiny_data, tiny_tokenizer):
    loader = make("valid", captions_per_image=1)
    assert len(loader) == 4
    for epoch in (0, 3):
        batches = list(loader.start(epoch))
        assert [n for b in batches for n in b["names"]] == list(dict.fromkeys(tiny_data.table["image"]))
        said = [text for batch in batches for text in texts(batch, tiny_tokenizer)]
        whole = tiny_tokenizer(tiny_data.table["caption"].tolist(), truncation=True, max_length=24)["input_ids"]
        assert said == [tiny_tokenizer.decode(ids, skip_special_tokens=True) for ids in whole]


def test_long_captions_are_cut_at_max_length(make):
    assert max(batch["input_ids"].shape[1] for batch in make("valid", max_length=5)) == 5


# ---- the same again


def test_the_same_settings_give_the_same_epoch(make):
    assert all(same(a, b) for a, b in zip(make().start(2), make().start(2), strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_is_resumed_where_it_stopped(make, workers):
    whole = list(make(captions_per_image=2).start(epoch=3))
    for skip in range(len(whole) + 1):
        if workers and skip != 1:
            continue
        rest = list(make(captions_per_image=2, num_workers=workers).start(epoch=3, skip=skip))
        assert len(rest) == len(whole) - skip
        assert all(same(a, b) for a, b in zip(rest, whole[skip:], strict=True))


def test_an_epoch_in_pieces(make):
    loader, whole = make(), list(make().start(1))
    pieces = [*loader.start(1, 0, 2), *loader.start(1, 2, 99)]
    assert len(pieces) == len(whole) and all(same(a, b) for a, b in zip(pieces, whole, strict=True))
    assert len(list(loader.start(1))) == len(whole)


def test_workers_make_no_difference(make):
    assert all(same(a, b) for a, b in zip(make(num_workers=1).start(1), make().start(1), strict=True))


@pytest.mark.parametrize("mode", ["train", "valid"])
def test_loading_draws_from_no_global_generator(make, mode):
    """A resumed run starts its loader once more, and would continue with another dropout."""
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(make(mode))
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_before, np.random.get_state()[1])


def test_global_seeds_do_not_matter(make):
    torch.manual_seed(1)
    np.random.seed(1)
    one = next(iter(make()))
    torch.manual_seed(2)
    np.random.seed(2)
    assert same(one, next(iter(make())))


def test_batches_alone():
    batches = EpochBatches(10, 4, seed=0)
    assert len(batches) == 2 and len(EpochBatches(10, 4, seed=None)) == 3
    whole = list(batches)
    batches.start(epoch=0, skip=1)
    assert list(batches) == whole[1:]
    assert list(EpochBatches(5, 2, None)) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4)]]


def test_the_settings_class_works_as_settings(tiny_data, tiny_tokenizer, tiny_cfg):
    cls = type("Tiny", (type(tiny_cfg),), dataclasses.asdict(tiny_cfg))
    loader = build_loaders(tiny_data.table, tiny_tokenizer, "valid", cls)
    assert len(list(loader)) == 4


@pytest.mark.parametrize("settings", [{}, {"crop_scale": 1.0}, {"image_cache": False}])
def test_training_images_of_another_size(make, settings):
    """As if size itself were that, with and without a random crop; evaluation keeps its own, and none grows."""
    whole = next(iter(make(size=32, **settings)))["pixel_values"]
    assert torch.equal(next(iter(make(size=32, train_size=48, **settings)))["pixel_values"], whole)
    found = next(iter(make(size=48, train_size=32, **settings)))["pixel_values"]
    assert torch.equal(found, whole)
    assert next(iter(make("valid", size=48, train_size=32, **settings)))["pixel_values"].shape[-2:] == (48, 48)
    for train, side in ((True, 32), (False, 48)):
        transform = image_transform(CFG(size=48, train_size=32), train)
        assert transform(image=np.zeros((64, 80, 3), np.uint8))["image"].shape == (3, side, side)
