"""The run folder: one process at a time, the data it was started with, and checkpoints without pickle."""

import dataclasses
import json
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from clip_scratch import CFG
from clip_scratch.errors import UserError
from clip_scratch.files import write_atomically
from clip_scratch.train import main
from clip_scratch.training.run import Run, load_tree, save_tree
from clip_scratch.training.state import random_states, restore_random_states


@pytest.fixture
def cfg(tiny_cfg, tmp_path):
    return dataclasses.replace(tiny_cfg, epochs=1, run_dir=str(tmp_path / "run"))


# ---- one process at a time


def test_two_processes_cannot_train_into_one_folder(cfg, plain, tmp_path):
    """A new run beside one that is being made, and a resume of a run that is training."""
    folder = tmp_path / "run"
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(UserError, match=f"another process is training into {folder}"):
        main(cfg)
    run = main(cfg)  # the lock of the other process is gone
    with FileLock(run / ".lock"), pytest.raises(UserError, match="another process is training into"):
        main(CFG(resume=str(run)))
    assert main(CFG(resume=str(run))) == run


def test_a_run_that_was_finished_meanwhile_is_not_overwritten(cfg):
    run = Run(cfg)
    (run.folder / "best").mkdir(parents=True)
    (run.folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is not empty: continue with --resume"):
        run.begin(model=None)


def test_a_folder_that_vanishes_is_one_line(cfg, plain, monkeypatch):
    moved = Path(f"{cfg.run_dir}-moved")

    def vanishes(run, state, *_):
        run.folder.rename(moved)
        run.save_last(state)

    monkeypatch.setattr("clip_scratch.train._train_epoch", vanishes)
    with pytest.raises(UserError, match=f"^{cfg.run_dir} has vanished: {cfg.run_dir}/last cannot be written"):
        main(cfg)
    moved.rename(cfg.run_dir)
    assert load_tree(Path(cfg.run_dir, "last/training.safetensors"))["progress"]["epoch"] == 0


# ---- the data it was started with


def test_a_resume_notices_that_the_captions_have_changed(cfg, plain, tiny_data, tmp_path):
    """A changed file shifts the split: validation images would move into training."""
    captions = tmp_path / "captions.csv"
    captions.write_text(tiny_data.captions_path.read_text())
    run = main(dataclasses.replace(cfg, captions_path=captions))
    content = captions.read_text()
    captions.write_text(content.replace("grey ground", "gray ground", 1))
    with pytest.raises(UserError, match=f"captions.csv has changed since {run} was started: restore it") as stop:
        main(CFG(resume=str(run)))
    assert "\n" not in str(stop.value)
    captions.write_text(content)
    assert main(CFG(resume=str(run))) == run


# ---- checkpoints


def test_a_tree_comes_back_as_it_was(tmp_path):
    tree = {
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 12: {"exp_avg": torch.randn(2, 3)}}, "lr": 1e-3},
        "flag": True, "nothing": None, "rates": [0.1, float("-inf")], "key": "tensor", "empty": {},
        "bytes": torch.arange(5, dtype=torch.uint8),
    }  # fmt: skip
    save_tree(tmp_path / "tree.safetensors", tree)
    found = load_tree(tmp_path / "tree.safetensors")
    assert found["optimizer"]["state"].keys() == {0, 12} and found["optimizer"]["lr"] == 1e-3
    assert torch.equal(found["optimizer"]["state"][12]["exp_avg"], tree["optimizer"]["state"][12]["exp_avg"])
    assert torch.equal(found["bytes"], tree["bytes"]) and found["bytes"].dtype == torch.uint8
    for name in ("flag", "nothing", "rates", "key", "empty"):
        assert found[name] == tree[name]


def test_nothing_in_a_run_folder_is_unpickled(cfg, plain, monkeypatch):
    """A run from somebody else must not execute code when it is resumed, loaded or measured."""
    run = main(cfg)
    monkeypatch.setattr(pickle, "Unpickler", None)
    monkeypatch.setattr(torch, "load", None)
    assert main(CFG(resume=str(run))) == run
    assert {p.suffix for p in run.rglob("*") if p.is_file()} <= {".json", ".jsonl", ".safetensors", ".lock", ""} | {
        p.suffix for p in run.glob("events.*")
    }


def test_random_states_come_back(monkeypatch):
    cpu = torch.device("cpu")
    states = json.loads(json.dumps({k: v for k, v in random_states(cpu).items() if k != "torch"}))
    states["torch"] = torch.get_rng_state()

    def draw():
        return random.random(), np.random.random(), np.random.standard_normal(), torch.rand(1).item()

    first = draw()
    restore_random_states(states, cpu)
    assert draw() == first
    restore_random_states({**states, "cuda": torch.zeros(16, dtype=torch.uint8)}, cpu)  # saved on a GPU
    assert draw() == first


def test_the_random_state_of_the_training_device_is_saved(monkeypatch):
    """Of that device alone: a machine with fewer GPUs can resume."""
    calls = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: calls.append(device) or torch.zeros(1))
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.ones(1))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: calls.append(device))
    states = random_states(torch.device("cuda:1"))
    restore_random_states(states, torch.device("cuda:0"))
    assert calls == [torch.device("cuda:1"), torch.device("cuda:0")]
    assert random_states(torch.device("mps"))["mps"] == 1


def test_files_are_synced_by_a_descriptor_that_may_write(tmp_path, monkeypatch):
    """Windows cannot sync a file that is open for reading only."""
    synced, fsync = [], os.fsync

    def watched(descriptor):
        import fcntl
        import stat

        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            synced.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    write_atomically(tmp_path / "file", lambda temporary: temporary.write_text("x"))
    assert synced == [os.O_RDWR] and Path(tmp_path / "file").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    (tmp_path / "file").write_text("old")

    def full(temporary):
        temporary.write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_atomically(tmp_path / "file", full)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "old")]
