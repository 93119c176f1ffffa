"""Image-centred batches: what belongs together stays together, and any batch can be had again."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

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


@pytest.mark.parametrize("per_image", [0, 1, 2])
@pytest.mark.parametrize("mode", ["train", "valid"])
def test_ids_names_and_captions_agree(make, tiny_data, tiny_tokenizer, mode, per_image):
    table = tiny_data.table
    id_of = dict(zip(table["image"], table["image_id"], strict=True))
    plain = {i: set() for i in id_of.values()}
    for row in table.itertuples():
        ids = tiny_tokenizer(row.caption, truncation=True, max_length=24)["input_ids"]
        plain[row.image_id].add(tiny_tokenizer.decode(ids, skip_special_tokens=True))
    for batch in make(mode, captions_per_image=per_image).start(epoch=1):
        b, c = len(batch["pixels"]), len(batch["input_ids"])
        assert batch["pixels"].shape == (b, 3, 32, 32) and batch["pixels"].dtype == torch.uint8
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
        for name, pixels in zip(batch["names"], batch["pixels"], strict=True):
            assert torch.equal(pixels, transform(image=load_image(tiny_data.image_path / name))["image"])


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
def test_every_caption_is_seen_as_soon_as_can_be(make, tiny_data, per_image):
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
    assert (first["pixels"] != second["pixels"][order]).flatten(1).any(1).float().mean() > 0.9


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
def test_an_epoch_goes_on_where_it_stopped(make, workers):
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
    """Else a resumed run, which starts its loader once more, would go on with another dropout."""
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


def test_the_settings_class_will_do(tiny_data, tiny_tokenizer, tiny_cfg):
    cls = type("Tiny", (type(tiny_cfg),), dataclasses.asdict(tiny_cfg))
    loader = build_loaders(tiny_data.table, tiny_tokenizer, "valid", cls)
    assert len(list(loader)) == 4
