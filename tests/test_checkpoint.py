"""Files that are whole or not there, and what `load` and a resume say to damaged ones."""

import copy
import dataclasses
import json
import os
import random

import numpy as np
import pytest
import torch
from safetensors import safe_open

from clip_scratch import load
from clip_scratch.errors import UserError
from clip_scratch.models.clip import CLIPModel
from clip_scratch.training import checkpoint


@pytest.fixture
def saved(tiny_cfg, tiny_tokenizer, tmp_path):
    """(folder of a best/ that has just been saved, its model)."""
    torch.manual_seed(1)
    model = CLIPModel(tiny_cfg, tiny_tokenizer)
    checkpoint.prepare_best(tmp_path / "run/best", model, tiny_cfg)
    checkpoint.save_best(tmp_path / "run/best", model, 3, {"rsum": 12.5})
    return tmp_path / "run/best", model


def test_weights_that_are_shared_are_saved(tiny_cfg, tiny_tokenizer, tmp_path):
    """T5's encoder and its embeddings are one tensor under two names."""
    from transformers import AutoConfig

    sizes = {"d_model": 32, "num_layers": 2, "num_decoder_layers": 2, "d_ff": 64, "num_heads": 2, "d_kv": 16}
    cfg = dataclasses.replace(tiny_cfg, text_pooling="mean")
    model = CLIPModel(cfg, tiny_tokenizer, AutoConfig.for_model("t5", **sizes)).eval()
    checkpoint.prepare_best(tmp_path, model, cfg)
    checkpoint.save_best(tmp_path, model, 1, {"rsum": 1.0})
    tokens = {"input_ids": torch.tensor([[2, 7, 9, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    assert torch.equal(load(tmp_path).encode_text(**tokens), model.encode_text(**tokens))


# ---- writing


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    checkpoint.write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.write_atomically(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_file_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    did = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (did.append("sync"), real_sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (did.append("rename"), real_replace(a, b)))
    checkpoint.write_json(tmp_path / "x.json", {"a": 1})
    assert did == ["sync", "rename", "sync"] and json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / "last").mkdir()
    for name in (".metrics.jsonl.77.tmp", "last/.training.pt.77.tmp", "last/training.pt", "notes.tmp"):
        (tmp_path / name).write_text("x")
    checkpoint.remove_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["notes.tmp", "training.pt"]
    checkpoint.remove_unfinished(tmp_path / "nowhere")


# ---- best/


def test_best_round_trip(saved):
    best, model = saved
    loaded = load(best)
    assert not loaded.training and not any(module.training for module in loaded.modules())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.cfg == model.cfg and loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert loaded.tokenizer.model_max_length == model.tokenizer.model_max_length
    with safe_open(best / "model.safetensors", "pt") as file:
        header = file.metadata()
    assert header["epoch"] == "3" and json.loads(header["metrics"]) == {"rsum": 12.5}
    assert (
        header["git_commit"] == checkpoint.git_commit() == json.loads((best / "metrics.json").read_text())["git_commit"]
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "sigmoid"},
        {"head": "linear", "text_pooling": "mean", "ema": 0.9},
        {"image_freeze": "first:1", "freeze_batch_norm": True, "image_precision": "fp32", "channels_last": False},
        {"model_name": "vit_tiny_patch16_224", "image_trainable": False},
    ],
)
def test_every_kind_of_model_is_rebuilt(tiny_cfg, tiny_tokenizer, tmp_path, settings):
    cfg = dataclasses.replace(tiny_cfg, **settings)
    model = CLIPModel(cfg, tiny_tokenizer).eval()
    checkpoint.prepare_best(tmp_path, model, cfg)
    checkpoint.save_best(tmp_path, model, 1, {})
    batch = {
        "pixel_values": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8),
        "input_ids": torch.randint(5, 20, (2, 6)),
        "attention_mask": torch.ones(2, 6, dtype=torch.long),
    }
    with torch.inference_mode():
        for ours, theirs in zip(load(tmp_path)(batch), model(batch), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_settings_of_another_version_are_left_out(saved):
    best, _ = saved
    settings = json.loads((best / "config.json").read_text())
    (best / "config.json").write_text(json.dumps(settings | {"a_setting_of_tomorrow": 3}))
    assert load(best) is not None


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("model.safetensors", b"", "does not fit its settings"),
        ("model.safetensors", b"not weights at all", "does not fit its settings"),
        ("model.safetensors", None, "holds no weights yet"),
        ("config.json", b'{"size": 3', "config.json is damaged"),
        ("config.json", b"[]", "config.json is damaged"),
        ("config.json", b'{"size": "large"}', "config.json is damaged: size takes int"),
        ("config.json", None, "is not a run folder"),
        ("text_config.json", b"{", "best is damaged"),
        ("text_config.json", b"[]", "best is damaged"),
        ("text_config.json", None, "best is damaged"),
        ("tokenizer.json", b"{", "best is damaged"),
    ],
)
def test_a_damaged_best_is_one_clear_line(saved, file, content, says):
    best, _ = saved
    if content is None:
        (best / file).unlink()
    else:
        (best / file).write_bytes(content)
    with pytest.raises(UserError) as stop:
        load(best)
    assert says in str(stop.value) and "\n" not in str(stop.value)


def test_weights_cut_short_or_of_another_model(saved, tiny_tokenizer):
    best, model = saved
    whole = (best / "model.safetensors").read_bytes()
    (best / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="does not fit its settings"):
        load(best)
    other = CLIPModel(dataclasses.replace(model.cfg, projection_dim=16), tiny_tokenizer)
    checkpoint.save_best(best, other, 1, {})
    with pytest.raises(UserError, match="does not fit its settings"):
        load(best)


def test_a_path_that_is_no_run(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", str(tmp_path / "x/best")):
        with pytest.raises(UserError, match="is not a run folder"):
            load(path)


# ---- last/


def test_last_round_trip(tmp_path):
    model = torch.nn.Linear(3, 2).to(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": {"step": 1}}
    checkpoint.save_last(tmp_path / "last", copy.deepcopy(state))
    found = checkpoint.load_last(tmp_path / "last")
    assert found["progress"] == {"step": 1} and torch.equal(found["model"]["weight"], state["model"]["weight"])
    assert os.listdir(tmp_path / "last") == ["training.pt"]


def test_random_states_come_back():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    states = checkpoint.random_states()
    first = draw()
    assert draw() != first
    checkpoint.restore_random_states(states)
    assert draw() == first


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "half"])
def test_a_damaged_last_is_one_clear_line(tmp_path, content):
    checkpoint.save_last(tmp_path / "last", {"model": torch.zeros(1000)})
    file = tmp_path / "last/training.pt"
    file.write_bytes(file.read_bytes()[:2000] if content == "half" else content)
    with pytest.raises(UserError, match=r"training.pt is damaged .*best may still be loaded") as stop:
        checkpoint.load_last(tmp_path / "last")
    assert "\n" not in str(stop.value)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="nothing to resume: there is no .*training.pt"):
        checkpoint.load_last(tmp_path)
