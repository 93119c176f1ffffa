"""WiSE-FT: the average by hand, the alpha that validation prefers, and that it is computed once."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import clip_scratch.evaluation.retrieval as retrieval
from clip_scratch import CFG, load
from clip_scratch.data.captions import read_captions, split_of
from clip_scratch.data.loaders import build_loaders
from clip_scratch.errors import UserError
from clip_scratch.evaluate import evaluate
from clip_scratch.models import saved
from clip_scratch.train import main
from clip_scratch.training import wise_ft
from clip_scratch.training.run import load_tree
from clip_scratch.training.wise_ft import ZERO_SHOT, average_with_start, interpolate

# Weights that differ from the zero-shot ones in every way that there is
TRAINING = {"image_freeze": "lora", "text_freeze": "none", "ema": 0.5, "lora_lr": 0.02, "precision": "fp32"}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def scripted(patch, rsums):
    """Have the epochs reach these `rsums`; an average is measured as it is."""
    real, values = retrieval.recall_at_k, iter(rsums)
    patch.setattr(retrieval, "recall_at_k", lambda *args: real(*args) | {"rsum": next(values)})


@pytest.fixture
def unmixed(hf_cfg, plain, tmp_path):
    """A run (dual_timm: batch norms, LoRA, EMA) that stopped before the average: make(alpha) -> its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wise_ft, "average_with_start", lambda *_: "")
        scripted(patch, [700.0, 800.0])  # better than any zero-shot model
        run = main(hf_cfg("dual_timm", **TRAINING, wise_ft="auto", run_dir=str(tmp_path / "unmixed")))

    def make(alpha):
        folder = shutil.copytree(run, tmp_path / f"alpha-{alpha}")
        for file in (folder / "config.json", folder / "best/config.json"):
            file.write_text(json.dumps(json.loads(file.read_text()) | {"wise_ft": alpha}))
        return folder

    return make


def valid_loader(folder):
    model = load(folder)
    table = split_of(read_captions(model.cfg), "valid", model.cfg.captions_path)
    return build_loaders(table, model.tokenizer, "valid", model.cfg)


def weights(folder):
    return load_file(folder / "best/model.safetensors")


def test_interpolation_by_hand():
    zero = {"w": torch.tensor([1.0, -2.0]), "steps": torch.tensor(3), "same": torch.tensor([0.1])}
    tuned = {"w": torch.tensor([3.0, 2.0]), "steps": torch.tensor(9), "same": torch.tensor([0.1])}
    mixed = interpolate(zero, tuned, 0.25)
    assert mixed["w"].tolist() == [1.5, -1.0] and mixed["steps"] == 9 and torch.equal(mixed["same"], zero["same"])
    assert same(interpolate(zero, tuned, 1.0), tuned)
    assert same(interpolate(zero, tuned, 0.0), zero | {"steps": tuned["steps"]})
    assert zero["w"].tolist() == [1.0, -2.0]


def test_the_ends_are_the_two_models(unmixed, hf_cfg):
    zero, one = unmixed("0"), unmixed("1")
    untouched = saved.load(zero)  # the fine-tuned, still
    tuned, start = weights(zero), load_file(zero / ZERO_SHOT)
    assert not same(tuned, start) and same(untouched.state_dict(), tuned)
    from clip_scratch.models.hf_clip import HFCLIPModel

    assert same(HFCLIPModel(hf_cfg("dual_timm")).state_dict(), start)
    report = average_with_start(zero, load(zero), 1, valid_loader(zero), "0")
    assert "saved: alpha 0" in report
    floats = {name for name, tensor in start.items() if tensor.is_floating_point()}
    assert all(torch.equal(weights(zero)[name], start[name]) for name in floats)
    first = json.loads((zero / "metrics.jsonl").read_text().splitlines()[0])
    measured = evaluate(zero)
    names = [name for name in first if "recall" in name]  # rsum was scripted
    assert {n: measured[n] for n in names} == pytest.approx({n: first[n] for n in names}, abs=1e-6)
    average_with_start(one, load(one), 1, valid_loader(one), "1")
    assert same(weights(one), tuned)


def test_an_average_by_hand_and_its_figures(unmixed):
    folder = unmixed("0.3")
    tuned, start = weights(folder), load_file(folder / ZERO_SHOT)
    average_with_start(folder, load(folder), 1, valid_loader(folder), "0.3")
    for name, tensor in weights(folder).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 0.7 * start[name] + 0.3 * tuned[name], atol=1e-6, rtol=1e-5)
    record = json.loads((folder / "best/metrics.json").read_text())
    assert record["wise_ft_alpha"] == 0.3 and record["epoch"] == 2
    assert evaluate(folder)["rsum"] == pytest.approx(record["rsum"], abs=1e-6)


def test_auto_takes_the_best_and_of_equals_the_more_fine_tuned(unmixed, tmp_path):
    folder = unmixed("auto")
    tuned, start, model, loader = weights(folder), load_file(folder / ZERO_SHOT), load(folder), valid_loader(folder)
    rsums = {}
    for tenth in range(11):
        model.load_state_dict(interpolate(start, tuned, tenth / 10))
        rsums[tenth / 10] = wise_ft.valid_epoch(model, loader)["rsum"]
    assert len(set(rsums.values())) > 1
    best = max(alpha for alpha, rsum in rsums.items() if rsum == max(rsums.values()))
    report = average_with_start(folder, load(folder), 1, loader, "auto")
    assert f"saved: alpha {best:g}" in report and report.count("  rsum ") == 11
    record = json.loads((folder / "best/metrics.json").read_text())
    assert (record["wise_ft_alpha"], record["rsum"]) == (best, pytest.approx(max(rsums.values())))
    assert same(weights(folder), interpolate(start, tuned, best))


def test_twice_changes_nothing(unmixed, monkeypatch):
    """Nor does a first time that was killed between the weights and their figures."""
    folder = unmixed("0.5")
    loader = valid_loader(folder)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saved, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            average_with_start(folder, load(folder), 1, loader, "0.5")
    once = weights(folder)
    assert "wise_ft_alpha" not in json.loads((folder / "best/metrics.json").read_text())
    assert "is the average with alpha 0.5 already" in average_with_start(folder, load(folder), 1, loader, "0.5")
    assert same(weights(folder), once)
    assert json.loads((folder / "best/metrics.json").read_text())["wise_ft_alpha"] == 0.5
    assert main(CFG(resume=str(folder))) == folder and same(weights(folder), once)


def test_a_run_that_ends_with_its_average(hf_cfg, plain, tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, [800.0, 700.0])
    run = main(hf_cfg(**TRAINING | {"wise_ft": "auto"}, run_dir=str(tmp_path / "run")))
    assert "WiSE-FT, from zero-shot (0) to epoch 1 (1):" in capsys.readouterr().out
    record = json.loads((run / "best/metrics.json").read_text())
    assert 0 <= record["wise_ft_alpha"] <= 1 and record["epoch"] == (record["wise_ft_alpha"] > 0)
    assert evaluate(run)["rsum"] == pytest.approx(record["rsum"], abs=1e-6)
    before = weights(run)
    main(CFG(resume=str(run)))
    assert "already" in capsys.readouterr().out and same(weights(run), before)


def test_nothing_to_average(hf_cfg, plain, tmp_path, capsys):
    run = main(hf_cfg(wise_ft="0.5", epochs=0, run_dir=str(tmp_path / "run")))
    assert "nothing to average" in capsys.readouterr().out and same(weights(run), load_file(run / ZERO_SHOT))


def test_a_run_that_overshot_is_averaged_with_its_last_epoch(hf_cfg, plain, tmp_path, capsys):
    """No epoch is better than zero-shot, so the last one is averaged."""
    run = main(hf_cfg(wise_ft="0.25", epochs=1, head_lr=1.0, image_encoder_lr=1.0, run_dir=str(tmp_path / "run")))
    record = json.loads((run / "best/metrics.json").read_text())
    assert "from zero-shot (0) to epoch 1 (1)" in capsys.readouterr().out
    assert record["epoch"] == 1 and record["wise_ft_alpha"] == 0.25
    last = load_tree(run / "last/training.safetensors")["model"]
    start, mixed = load_file(run / ZERO_SHOT), weights(run)
    assert not same(start, mixed)
    for name, tensor in last.items():
        torch.testing.assert_close(mixed[name], torch.lerp(start[name], tensor, 0.25))


def test_from_scratch_there_is_nothing_to_average_with(tiny_cfg, tmp_path):
    with pytest.raises(UserError, match="wise_ft averages with zero-shot weights: use a pretrained CLIP"):
        main(dataclasses.replace(tiny_cfg, wise_ft="auto", run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
