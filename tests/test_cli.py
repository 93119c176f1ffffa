"""The command lines of train and evaluate: words to settings, and what they print."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from clip_scratch import evaluate
from clip_scratch.cli import parse
from clip_scratch.config import CFG
from clip_scratch.errors import UserError
from clip_scratch.files import write_json
from clip_scratch.presets import PRESETS
from clip_scratch.training.run import Run, resumed


def settings_of(*words):
    return dataclasses.replace(parse(words), run_dir="")


@pytest.fixture
def a_run(tmp_path, tiny_cfg):
    """A run folder as far as the command line looks into it."""
    (tmp_path / "run").mkdir()
    cfg = dataclasses.replace(tiny_cfg, run_dir=str(tmp_path / "run"), num_workers=3, on_bad_image="skip")
    write_json(tmp_path / "run/config.json", dataclasses.asdict(cfg))
    return str(tmp_path / "run"), cfg


# ---- train


def test_no_word_is_the_built_in_scenes():
    assert settings_of() == PRESETS["scenes"]() == settings_of("scenes")
    assert settings_of("--epochs", "3") == PRESETS["scenes"](epochs=3)


@pytest.mark.parametrize("option", ["--captions-path", "--captions_path"])
@pytest.mark.parametrize("equals", [True, False])
def test_captions_alone_take_the_defaults(option, equals):
    words = [f"{option}=my.csv"] if equals else [option, "my.csv"]
    assert settings_of(*words, "--size", "96") == CFG(captions_path="my.csv", size=96)


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_first_word_picks_the_preset(name):
    cfg = parse([name, "--batch-size", "7", "--no-pretrained", "--head-lr", "0.5"])
    assert type(cfg) is PRESETS[name]
    assert dataclasses.replace(cfg, run_dir="") == PRESETS[name](batch_size=7, pretrained=False, head_lr=0.5)


def test_the_run_folder_can_be_named():
    assert parse(["--run-dir", "runs/mine"]).run_dir == "runs/mine"


def test_the_run_folder_is_named_after_the_preset_and_the_time(tmp_path, monkeypatch):
    """Two of one second get two folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("clip_scratch.training.run.time.strftime", lambda _: "20260101-120000")
    assert Run(parse(["--captions-path", "x.csv"])).folder == Path("runs/run-20260101-120000")
    assert Run(parse(["compact"])).folder == Path("runs/compact-20260101-120000")
    Path("runs/compact-20260101-120000").mkdir(parents=True)
    assert Run(parse(["compact"])).folder == Path("runs/compact-20260101-120000-2")


def test_an_unknown_preset():
    with pytest.raises(UserError, match=r"there is no preset 'flicker8k'.*Did you mean flickr8k"):
        parse(["flicker8k"])


def test_help_names_the_presets(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and all(name in printed for name in PRESETS)
    fields = [field.name for field in dataclasses.fields(CFG)]
    assert all(f"--{name.replace('_', '-')}" in printed for name in fields)
    assert "in pixels" in printed and "(default: 64)" in printed  # the scenes' size
    topics = ["data", "images", "model", "loss", "optimization", "hardware", "run"]
    places = [printed.index(f" {topic} options ") for topic in topics]
    assert places == sorted(places)


# ---- resume


@pytest.mark.parametrize("equals", [True, False])
def test_a_resume_takes_the_settings_of_the_run(a_run, equals):
    folder, cfg = a_run
    words = [f"--resume={folder}"] if equals else ["--resume", folder]
    assert parse(words) == dataclasses.replace(cfg, resume=folder)
    assert parse(["compact", *words]) == dataclasses.replace(cfg, resume=folder)  # the run knows better
    same = parse([*words, "--model-name", cfg.model_name, "--size", str(cfg.size)])
    assert same == dataclasses.replace(cfg, resume=folder)


def test_a_resume_may_change_what_touches_no_result(a_run):
    folder, cfg = a_run
    changed = parse(["--resume", folder, "--num-workers", "0", "--checkpoint-steps", "5", "--on-bad-image", "error"])
    wanted = dataclasses.replace(cfg, resume=folder, num_workers=0, checkpoint_steps=5, on_bad_image="error")
    assert changed == wanted and resumed(changed) == wanted


@pytest.mark.parametrize(
    "words", [("--size", "64"), ("--seed", "1"), ("--captions-path", "x.csv"), ("--no-trainable",)]
)
def test_a_resume_may_change_nothing_else(a_run, words):
    with pytest.raises(UserError, match="was trained with"):
        parse(["--resume", a_run[0], *words])


def test_a_resume_in_python(a_run):
    folder, cfg = a_run
    assert resumed(CFG(resume=folder)) == dataclasses.replace(cfg, resume=folder)
    assert resumed(CFG(resume=folder, num_workers=1)).num_workers == 1
    with pytest.raises(UserError, match="was trained with size=32"):
        resumed(CFG(resume=folder, size=64))


def test_a_run_that_was_moved_goes_on_where_it_is(a_run, tmp_path):
    (tmp_path / "run").rename(tmp_path / "moved")
    assert parse(["--resume", str(tmp_path / "moved")]).run_dir == str(tmp_path / "moved")


def test_a_resume_of_no_run(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        parse(["--resume", str(tmp_path)])


# ---- evaluate, as typed


def test_evaluate_prints_and_writes(scene_run, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(scene_run.cwd)
    words = ["runs/scenes", "--split", "test", "--json", str(tmp_path / "test.json"), "--device", "cpu"]
    evaluate.main(tyro.cli(evaluate.Arguments, args=words))
    result = json.loads((tmp_path / "test.json").read_text())
    assert result["split"] == "test" and result["n_captions"] == 5 * result["n_images"]
    out = capsys.readouterr().out
    assert f"test: {result['n_images']} images" in out and f"rsum {result['rsum']:.1f}" in out


def test_evaluate_on_other_captions(scene_run, tiny_data):
    """A file that has no splits is measured whole; one with splits, on the split asked for."""
    result = evaluate.evaluate(scene_run.folder, "valid", str(tiny_data.captions_path))
    assert (result["split"], result["n_images"], result["n_captions"]) == ("all", 26, len(tiny_data.table))
    with_splits = tiny_data.folder / "splits.csv"
    tiny_data.table.to_csv(with_splits, index=False)
    result = evaluate.evaluate(scene_run.folder, "valid", str(with_splits), str(tiny_data.image_path))
    assert (result["split"], result["n_images"]) == ("valid", 6)


@pytest.mark.skipif(os.name == "nt", reason="a signal of POSIX")
def test_ctrl_c_while_a_command_is_imported_shows_no_traceback(tmp_path):
    """tyro, the first library that a command imports, is one that presses Ctrl-C."""
    (tmp_path / "tyro").mkdir()
    (tmp_path / "tyro/__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    words = [sys.executable, "-m", "clip_scratch.prepare", "--help"]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and not done.stderr and not done.stdout
