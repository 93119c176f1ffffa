"""--minutes: the number of steps that fits, fixed before the first step, and a resume that keeps to it."""

import dataclasses
import json

import pytest
import torch

from clip_scratch import CFG
from clip_scratch.data.loaders import build_loaders
from clip_scratch.models.clip import CLIPModel
from clip_scratch.train import main
from clip_scratch.training import budget, start
from clip_scratch.training.budget import measure_pace, steps_within
from clip_scratch.training.run import load_tree


@pytest.fixture(autouse=True)
def no_reserve(monkeypatch):
    monkeypatch.setattr(budget, "_RESERVE", 0.0)


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [
        (1000, 100),  # all of them: 10 epochs of 10 steps
        (120, 100),  # 10 epochs of 10 steps of 1 s and a validation of 2 s, exactly
        (119, 99),  # the last epoch is a step shorter, and validated too
        (12, 10),
        (7, 5),
        (3, 1),
        (2, 1),  # not even a step and its validation: one step all the same
        (-5, 1),
    ],
)
def test_steps_within_by_hand(seconds, steps):
    assert steps_within(seconds, step=1.0, validation=2.0, epoch_steps=10, most=100) == steps


def test_a_partial_epoch_must_leave_time_for_its_validation():
    assert steps_within(13.9, step=1.0, validation=2.0, epoch_steps=10, most=100) == 10
    assert steps_within(15.0, step=1.0, validation=2.0, epoch_steps=10, most=100) == 11


def test_measuring_the_pace_changes_nothing(tiny_cfg, tiny_data, tiny_tokenizer):
    torch.manual_seed(0)
    model = CLIPModel(tiny_cfg, tiny_tokenizer)
    loader = build_loaders(tiny_data.table, model.tokenizer, "train", tiny_cfg)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, state = next(iter(loader.start(0)))["names"], torch.get_rng_state()
    seconds = measure_pace(model, loader, tiny_cfg)
    assert 0 < seconds < 60
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and next(iter(loader))["names"] == first


def test_a_run_keeps_to_the_steps_that_fit(tiny_cfg, plain, tmp_path, monkeypatch, capsys):
    """3 of 4 steps; the cosine ends there, the number is in best/config.json, and a resume does not measure again."""
    measured = []
    monkeypatch.setattr(start, "measure_pace", lambda *_: measured.append(1) or 2.0)
    monkeypatch.setattr(start, "steps_within", lambda seconds, step, validation, epoch, most: most - 1)
    cfg = dataclasses.replace(tiny_cfg, minutes=7.0, scheduler="cosine", run_dir=str(tmp_path / "run"))
    run = main(cfg)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3] and lines[-1]["head_lr"] == pytest.approx(0, abs=1e-12)
    assert "7 minutes: 2.00 s a step" in capsys.readouterr().out
    assert json.loads((run / "best/config.json").read_text())["max_steps"] == 3
    assert json.loads((run / "config.json").read_text())["max_steps"] == 0  # what was asked for
    weights = load_tree(run / "last/training.safetensors")["model"]
    same_steps = main(dataclasses.replace(cfg, minutes=0.0, max_steps=3, run_dir=str(tmp_path / "fixed")))
    fixed = load_tree(same_steps / "last/training.safetensors")["model"]
    assert all(torch.equal(weights[name], fixed[name]) for name in weights)  # measuring left no trace
    main(CFG(resume=str(run)))
    assert len(measured) == 1


def test_a_budget_ends_a_run_of_many_epochs(tiny_cfg, plain, tmp_path):
    cfg = dataclasses.replace(tiny_cfg, epochs=10_000, early_stopping=0, run_dir=str(tmp_path / "run"))
    run = main(dataclasses.replace(cfg, minutes=0.15))
    steps = json.loads((run / "best/config.json").read_text())["max_steps"]
    assert 1 <= steps <= 10  # 9 seconds, 2 of them for each epoch of 2 steps
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == steps
