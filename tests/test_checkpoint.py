"""A saved model, and the last checkpoint of a run: written whole, read back equal, one clear line where damaged."""

import copy
import dataclasses
import json
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from clip_scratch import CFG, environment, files, load
from clip_scratch.errors import UserError
from clip_scratch.models import saved as checkpoint
from clip_scratch.models.clip import CLIPModel
from clip_scratch.train import main
from clip_scratch.training.run import load_tree, save_tree
from clip_scratch.training.state import random_states, restore_random_states


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
    files.write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_file_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    did = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (did.append("sync"), real_sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (did.append("rename"), real_replace(a, b)))
    files.write_json(tmp_path / "x.json", {"a": 1})
    assert did == ["sync", "rename", "sync"] and json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / "last").mkdir()
    for name in (
        ".metrics.jsonl.77.tmp",
        "last/.training.safetensors.77.tmp",
        "last/.tmpfYgg6L",  # safetensors' own
        "last/training.safetensors",
        "notes.tmp",
        ".tmp",
    ):
        (tmp_path / name).write_text("x")
    files.remove_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [".tmp", "notes.tmp", "training.safetensors"]
    files.remove_unfinished(tmp_path / "nowhere")


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
    assert (best / "model.safetensors").stat().st_mode == (best / "metrics.json").stat().st_mode  # others may read it
    assert (
        header["git_commit"]
        == (environment.git_commit() or "")
        == json.loads((best / "metrics.json").read_text())["git_commit"]
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "sigmoid"},
        {"head": "linear", "text_pooling": "mean", "ema": 0.9},
        {"image_freeze": "first:1", "freeze_batch_norm": True, "channels_last": False},
        {"model_name": "vit_tiny_patch16_224", "image_freeze": "backbone"},
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
    for path in (tmp_path, tmp_path / "nowhere", str(tmp_path / "x/best"), "x" * 300, tmp_path / "nul\0"):
        for read in (load, checkpoint.run_config):
            with pytest.raises(UserError, match="is not a run folder"):
                read(path)


def test_load_uses_the_resolved_settings_and_each_folder_has_its_own(saved):
    """The run folder holds the settings that were asked for: size=0, say."""
    best, model = saved
    asked = dataclasses.asdict(model.cfg) | {"size": 0, "precision": "auto"}
    (best.parent / "config.json").write_text(json.dumps(asked))
    assert checkpoint.best_folder(best) == checkpoint.best_folder(best.parent) == best
    assert load(best.parent).cfg == load(best).cfg == model.cfg
    assert (checkpoint.run_config(best.parent).size, checkpoint.run_config(best).size) == (0, 32)


# ---- last/


def test_a_tree_comes_back_as_it_was(tmp_path):
    """An optimizer's state has dicts with numbers as keys; tuples come back as lists."""
    model = torch.nn.Linear(3, 2).to(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    tree = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "fingerprint": "abc"}
    tree |= {"numbers": {"a": 1.5, "b": None, "c": [True, (2, "x")], "nan": float("inf")}, "empty": {}}
    path = tmp_path / "last" / "training.safetensors"
    path.parent.mkdir()
    save_tree(path, copy.deepcopy(tree))
    assert os.listdir(path.parent) == ["training.safetensors"]
    found = load_tree(path)
    assert (
        found["numbers"] == {"a": 1.5, "b": None, "c": [True, [2, "x"]], "nan": float("inf")} and found["empty"] == {}
    )
    assert torch.equal(found["model"]["weight"], model.weight) and found["model"]["weight"].dtype == torch.float64
    assert found["optimizer"]["param_groups"][0]["params"] == [0, 1]
    for number, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(found["optimizer"]["state"][number][name], value) for name, value in state.items())
    fresh = torch.optim.AdamW(model.parameters())
    fresh.load_state_dict(found["optimizer"])


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    shared = torch.arange(6.0)
    save_tree(tmp_path / "tree", {"a": shared, "b": shared, "c": shared.view(2, 3).T})
    found = load_tree(tmp_path / "tree")
    assert torch.equal(found["a"], shared) and torch.equal(found["c"], shared.view(2, 3).T)


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_run_folder_is_unpickled(tiny_cfg, tmp_path, plain):
    """A run from somebody else must not run their code, whatever pickles lie in it and under which names."""
    run = main(dataclasses.replace(tiny_cfg, run_dir=str(tmp_path / "run"), epochs=1))
    bomb, exploded = pickle.dumps(Bomb(tmp_path / "exploded")), tmp_path / "exploded"
    names = ("training.pt", "model.pt", "pytorch_model.bin", "model.safetensors.index.json.pkl", "tokenizer.pkl")
    for folder in (run, run / "best", run / "last"):
        for name in names:
            (folder / name).write_bytes(bomb)
    load(run)
    main(CFG(resume=str(run)))
    for path, read in ((run / "best/model.safetensors", load), (run / "last/training.safetensors", resume)):
        whole = path.read_bytes()
        path.write_bytes(bomb)
        with pytest.raises(UserError):
            read(run)
        path.write_bytes(whole)
    assert not exploded.exists()
    pickle.loads(bomb)
    assert exploded.exists()  # or this test would mean nothing


def resume(run):
    return main(CFG(resume=str(run)))


def test_a_tokenizer_s_code_is_not_imported(saved):
    best, _ = saved
    settings = json.loads((best / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Theirs"}
    settings["auto_map"] = {"AutoTokenizer": ["code.Theirs", None]}
    (best / "tokenizer_config.json").write_text(json.dumps(settings))
    (best / "code.py").write_text("raise AssertionError('imported')")
    load(best)


def test_random_states_come_back():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    states = random_states(torch.device("cpu"))
    first = draw()
    assert draw() != first
    restore_random_states(states, torch.device("cpu"))
    assert draw() == first


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "half", "no tree"])
def test_a_damaged_last_is_one_clear_line(tmp_path, content):
    path = tmp_path / "training.safetensors"
    save_tree(path, {"model": torch.zeros(1000)})
    if content == "no tree":
        from safetensors.torch import save_file

        save_file({"model": torch.zeros(3)}, path)
    else:
        path.write_bytes(path.read_bytes()[:2000] if content == "half" else content)
    with pytest.raises(UserError, match=r"training.safetensors is damaged .*best may still be loaded") as stop:
        load_tree(path)
    assert "\n" not in str(stop.value)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="nothing to resume: there is no .*training.safetensors"):
        load_tree(tmp_path / "last/training.safetensors")
