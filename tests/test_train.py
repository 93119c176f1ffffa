"""Training end to end: what a run leaves behind, and that one that was interrupted ends as if it had not been."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from processes import Command
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import clip_scratch.evaluation.retrieval as retrieval
import clip_scratch.training.report as report
from clip_scratch import CFG, encode_image, encode_text, environment, find_matches, load
from clip_scratch.cli import parse
from clip_scratch.errors import UserError
from clip_scratch.evaluate import evaluate
from clip_scratch.train import main
from clip_scratch.training.losses import LOSSES
from clip_scratch.training.report import chance_loss
from clip_scratch.training.run import load_tree, resumed
from clip_scratch.training.state import Progress

RECALLS = {f"{kind}_retrieval_recall@{k}" for kind in ("image", "text") for k in (1, 5, 10)}
VALIDATION = RECALLS | {"image_median_rank", "text_median_rank", "rsum"}
TIMINGS = {"pairs_per_second", "images_per_second", "seconds", "wall_seconds"}
RATES = {"head_lr", "image_encoder_lr", "text_encoder_lr"}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder):
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines_of(folder)]


def scalars(folder, name="epoch/rsum"):
    return [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars(name)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


def last_of(folder):
    return load_tree(Path(folder) / "last/training.safetensors")


@pytest.fixture
def cfg(tiny_cfg, tmp_path):
    """5 steps an epoch, 2 epochs, with everything random switched on."""
    settings = {"batch_size": 4, "dropout": 0.3, "image_dropout": 0.2, "text_dropout": 0.2, "crop_scale": 0.5}
    return dataclasses.replace(tiny_cfg, **settings, head_lr=3e-3, run_dir=str(tmp_path / "run"))


def interrupt_at(monkeypatch, step, how=lambda: os.kill(os.getpid(), signal.SIGINT)):
    """Have `how` called in the loop once, after optimizer step `step`."""
    show = report.Report.step

    def and_interrupt(self, state, steps):
        show(self, state, steps)
        if state.progress.step == step:
            monkeypatch.setattr(report.Report, "step", show)
            how()

    monkeypatch.setattr(report.Report, "step", and_interrupt)


# ---- what a run leaves


def test_the_run_folder_is_complete(scene_run):
    folder = scene_run.folder
    assert {"config.json", "metrics.jsonl", "best", "last", "retrieval.png"} <= {p.name for p in folder.iterdir()}
    assert (folder / "retrieval.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("*.tmp"))
    settings = json.loads((folder / "config.json").read_text())
    assert settings["n_scenes"] == 240 and settings.keys() == {field.name for field in dataclasses.fields(CFG)}
    for number, line in enumerate(lines_of(folder), start=1):
        assert line["epoch"] == number
        wanted = {"epoch", "step", "train_loss", "logit_scale"} | TIMINGS | RATES | VALIDATION
        assert wanted <= line.keys()
        assert all(0 <= line[name] <= 1 for name in RECALLS)
        assert line["rsum"] == pytest.approx(100 * sum(line[name] for name in RECALLS))
        assert line["pairs_per_second"] == pytest.approx(2 * line["images_per_second"])  # captions_per_image
        assert line["images_per_second"] == pytest.approx(12 * 16 / line["seconds"])
    assert number == 5
    board = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert board.Tags()["images"] == ["retrieval"] and len(board.Images("retrieval")) == 5
    logged = [(line["step"], line["rsum"]) for line in lines_of(folder)]
    assert scalars(folder) == [(step, pytest.approx(rsum)) for step, rsum in logged]


def test_training_learns(scene_run):
    """The training loss falls below chance; twelve validation images are too few to ask more of the recall."""
    losses = [line["train_loss"] for line in lines_of(scene_run.folder)]
    assert losses[-1] < losses[0] - 0.1 and losses[-1] < chance_loss(16, 32)


def test_best_is_the_best_epoch_and_evaluate_agrees(scene_run, monkeypatch):
    monkeypatch.chdir(scene_run.cwd)
    best = json.loads((scene_run.folder / "best/metrics.json").read_text())
    lines = lines_of(scene_run.folder)
    assert best["rsum"] == max(line["rsum"] for line in lines) == lines[best["epoch"] - 1]["rsum"]
    measured = evaluate(scene_run.folder)
    assert (measured["split"], measured["n_images"], measured["n_captions"]) == ("valid", 24, 120)
    assert {name: measured[name] for name in VALIDATION} == pytest.approx({n: best[n] for n in VALIDATION}, abs=1e-6)
    test = evaluate(scene_run.folder / "best", "test")
    assert test["split"] == "test" and test["rsum"] != measured["rsum"]


def test_load_takes_the_run_or_its_best(scene_run):
    run, best = load(scene_run.folder), load(scene_run.folder / "best")
    assert same(run.state_dict(), best.state_dict()) and not run.training
    assert same(run.state_dict(), load_file(scene_run.folder / "best/model.safetensors"))


def test_best_alone_is_enough(scene_run, tmp_path):
    """In another folder, in a fresh process, with no hub, no data and no run around it."""
    shutil.copytree(scene_run.folder / "best", tmp_path / "model")
    code = (
        "import torch, numpy as np\n"
        "from clip_scratch import load, encode_image, encode_text\n"
        "model = load('model')\n"
        "image = np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)\n"
        "torch.save([encode_image(model, [image]), encode_text(model, ['a red circle', 'A blue square'])], 'out.pt')\n"
    )
    (tmp_path / "embed.py").write_text(code)
    done = Command(["embed.py"], tmp_path, {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}).wait()
    assert done.returncode == 0, done.stderr
    model = load(scene_run.folder)
    image = torch.arange(40 * 50 * 3).to(torch.uint8).view(40, 50, 3).numpy()
    images, texts = torch.load(tmp_path / "out.pt")
    assert torch.allclose(images, encode_image(model, [image]), atol=1e-6)
    assert torch.allclose(texts, encode_text(model, ["a red circle", "A blue square"]), atol=1e-6)


def test_search_finds_in_the_data_of_the_run(scene_run, monkeypatch):
    monkeypatch.chdir(scene_run.cwd)
    model = load(scene_run.folder)
    images = sorted((scene_run.cwd / "data/scenes-240-42/Images").glob("*"))[:20]
    matches = find_matches(model, encode_image(model, images), "a red circle", [image.name for image in images], n=3)
    scores = [score for _, score in matches]
    assert len({name for name, _ in matches}) == 3 and scores == sorted(scores, reverse=True)


def test_a_finished_run_resumes_to_itself(scene_run, monkeypatch, tmp_path, capsys):
    shutil.copytree(scene_run.folder, tmp_path / "run")
    monkeypatch.chdir(scene_run.cwd)
    before = (tmp_path / "run/metrics.jsonl").read_text()
    assert main(parse(["--resume", str(tmp_path / "run")])) == tmp_path / "run"
    assert (tmp_path / "run/metrics.jsonl").read_text() == before
    assert "best epoch" in capsys.readouterr().out


# ---- resume


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"scheduler": "cosine", "warmup_steps": 3, "ema": 0.8, "captions_per_image": 2}, [7]),
        ({"scheduler": "plateau", "patience": 0, "factor": 0.5, "loss": "sigmoid"}, [10]),
    ],
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(cfg, tmp_path, monkeypatch, plain, settings, steps):
    """Interrupted in the middle of an epoch, and after the very last step."""
    cfg = dataclasses.replace(cfg, **settings)
    whole = main(cfg)
    for step in steps:
        cfg.run_dir = str(tmp_path / f"stopped-{step}")
        interrupt_at(monkeypatch, step)
        with pytest.raises(KeyboardInterrupt, match=f"--resume {cfg.run_dir}"):
            main(cfg)
        stopped = last_of(tmp_path / f"stopped-{step}")["progress"]
        assert stopped["step"] == step and stopped["batch"] == (step - 1) % 5 + 1
        torch.manual_seed(12345)  # another process has other random states
        resumed = main(parse(["--resume", cfg.run_dir]))
        assert untimed(resumed) == untimed(whole)
        assert same(load_file(resumed / "best/model.safetensors"), load_file(whole / "best/model.safetensors"))
        ours, theirs = last_of(resumed), last_of(whole)
        assert same(ours["model"], theirs["model"])
        assert not settings.get("ema") or same(ours["average"], theirs["average"])
        assert [line["step"] for line in lines_of(resumed)] == [5, 10]
        assert [at for at, _ in scalars(resumed)] == [5, 10]


def test_a_run_goes_on_from_the_last_save(cfg, monkeypatch, plain):
    """What was done after the last save is done again: the log holds each epoch once."""
    cfg.checkpoint_steps = 3
    whole = main(dataclasses.replace(cfg, run_dir=cfg.run_dir + "-whole"))

    def crash():
        raise ZeroDivisionError

    end = Progress.end_epoch
    monkeypatch.setattr(Progress, "end_epoch", lambda self, *args: crash() if self.epoch else end(self, *args))
    with pytest.raises(ZeroDivisionError):
        main(cfg)
    monkeypatch.setattr(Progress, "end_epoch", end)
    assert last_of(Path(cfg.run_dir))["progress"]["step"] == 9
    resumed = main(CFG(resume=cfg.run_dir))
    assert untimed(resumed) == untimed(whole) and same(last_of(resumed)["model"], last_of(whole)["model"])


def test_a_resume_in_python_keeps_the_run_s_own_settings(cfg, plain):
    cfg.epochs, cfg.on_bad_image, cfg.checkpoint_steps = 1, "skip", 7
    run = main(cfg)
    again = resumed(CFG(resume=str(run), num_workers=1))
    assert again == dataclasses.replace(cfg, resume=str(run), num_workers=1)
    assert resumed(again) == again
    assert resumed(parse(["--resume", str(run), "--on-bad-image", "error"])).on_bad_image == "error"


def test_a_second_ctrl_c_stops_at_once(cfg, monkeypatch, plain):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    interrupt_at(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        main(cfg)
    assert signal.getsignal(signal.SIGINT) is before
    assert last_of(Path(cfg.run_dir))["progress"]["step"] == 0
    assert len(lines_of(main(CFG(resume=cfg.run_dir)))) == 2


def test_ctrl_c_ends_with_130_and_what_to_type(cfg, tmp_path, monkeypatch, plain):
    words = ["--captions-path", cfg.captions_path, "--no-pretrained", "--model-name", "test_resnet"]
    words += ["--text-encoder-model", "bert-tiny", "--text-tokenizer", "train", "--size", "32", "--batch-size", "4"]
    words += ["--epochs", "100000", "--early-stopping", "0", "--device", "cpu", "--run-dir", "run"]
    command = Command(["-m", "clip_scratch.train", *words], tmp_path)
    deadline = time.monotonic() + 90
    while "epoch   1" not in command.out and command.returncode is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(command.pid, signal.SIGINT)
    done = command.wait()
    assert done.returncode == 130
    assert "python -m clip_scratch.train --resume run" in done.stderr and "Traceback" not in done.stderr
    monkeypatch.chdir(tmp_path)
    step = last_of(Path("run"))["progress"]["step"]
    assert load("run") is not None and step >= 5
    interrupt_at(monkeypatch, step + 2)
    with pytest.raises(KeyboardInterrupt):
        main(parse(["--resume", "run"]))
    assert last_of(Path("run"))["progress"]["step"] == step + 2


# The process forks, before torch has threads, a child for each run that is killed.
KILLED = """
import copy, json, os, random, signal, sys, time, traceback
from pathlib import Path
import torch
import clip_scratch.train as train
from clip_scratch import CFG, load
from clip_scratch.models import saved
from clip_scratch.training import engine, report
from clip_scratch.training import run as run_module
from clip_scratch.training.run import load_tree
from clip_scratch.retrieval import matches
import clip_scratch.files as files
from clip_scratch.cli import parse

torch.set_num_threads(1)
report.Report.picture = report.Report.end = lambda *_, **__: None
settings, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
write = run_module.write_atomically
MOMENTS = ("before", "half", "written", "renamed")

def die_in(call, moment):
    calls = 0
    def write_and_die(path, fill):
        nonlocal calls
        calls += 1
        if calls != call:
            return write(path, fill)
        if moment == "renamed":
            write(path, fill)
        elif moment != "before":
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            fill(temporary)
            if moment == "half":
                os.truncate(temporary, temporary.stat().st_size // 2)
        os._exit(9)
    files.write_atomically = saved.write_atomically = run_module.write_atomically = write_and_die

def forked(function, *args, wait=True):
    pid = os.fork()
    if not pid:
        try:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            function(*args)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if wait else pid

def run(name, *death):
    if death:
        die_in(*death)
    train.main(CFG(**settings, run_dir=str(folder / name)))

def go_on(name):
    run = folder / name
    if (run / "config.json").exists():
        train.main(parse(["--resume", str(run)]))
    else:  # killed before it was a run: the same command begins it
        train.main(CFG(**settings, run_dir=str(run)))

def check(name):
    whole, run = folder / "whole", folder / name
    state = lambda folder: load_tree(folder / "last/training.safetensors")["model"]
    ours, theirs = state(run), state(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs), "last"
    ours, theirs = load(run).state_dict(), load(whole).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs), "best"
    epochs = [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [1, 2], epochs
    assert not list(run.rglob("*.tmp")), "temporary files are left"

assert forked(run, "whole") == 0
for call, moment in [(int(c), m) for c, m in (word.split(":") for word in sys.argv[3].split(","))]:
    name = f"{call}-{moment}"
    status = forked(run, name, call, moment)
    assert status == 9, (name, status)
    assert forked(go_on, name) == 0, name
    assert forked(check, name) == 0, name
chance = random.Random(0)
for number in range(2):
    name = f"random-{number}"
    pid = forked(run, name, wait=False)
    deadline = time.monotonic() + 60
    while not (folder / name / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.7))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert forked(go_on, name) == 0, name
    assert forked(check, name) == 0, name
print("all went on")
"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on(cfg, tmp_path):
    """Killed in the making of the folder, in the first and the last save, between the files of an epoch's end.

    The writes: 1 to 4 the folder (best/config.json, text_config.json, last, config.json), 5 to 9 the steps of the
    first epoch, 10 to 13 its end (weights, their metrics, metrics.jsonl, last), 14 to 18 the second, 19 to 22 its end
    (19 and 20 where it is not the best).
    """
    settings = dataclasses.asdict(dataclasses.replace(cfg, checkpoint_steps=1, scheduler="cosine", ema=0.5))
    del settings["run_dir"]
    moments = "4:written,5:half,10:renamed,12:renamed,20:half"
    (tmp_path / "killed.py").write_text(KILLED)
    done = Command(["killed.py", json.dumps(settings), tmp_path, moments], tmp_path).wait()
    assert done.returncode == 0 and "all went on" in done.stdout, done.stderr[-3000:]


# ---- how long a run lasts, and what it says


def scripted(monkeypatch, rsums):
    """Have the validation of each epoch give the next of `rsums`."""
    real, values = retrieval.recall_at_k, iter(rsums)
    monkeypatch.setattr(retrieval, "recall_at_k", lambda *args: real(*args) | {"rsum": next(values)})


def test_early_stopping_keeps_the_best(cfg, monkeypatch, plain, capsys):
    scripted(monkeypatch, [400.0, 500.0, 500.0, 450.0, 600.0])
    folder = main(dataclasses.replace(cfg, epochs=9, early_stopping=2, max_steps=0))
    assert [line["rsum"] for line in lines_of(folder)] == [400, 500, 500, 450]
    assert json.loads((folder / "best/metrics.json").read_text())["epoch"] == 2
    assert "stopped early" in capsys.readouterr().out
    assert main(CFG(resume=str(folder))) == folder and len(lines_of(folder)) == 4  # and stays stopped


def test_a_plateau_lowers_the_rates(cfg, monkeypatch, plain):
    scripted(monkeypatch, [100.0, 90.0, 95.0, 80.0, 85.0])
    settings = {"scheduler": "plateau", "patience": 1, "factor": 0.5, "early_stopping": 0}
    folder = main(dataclasses.replace(cfg, epochs=5, **settings))
    assert [line["head_lr"] for line in lines_of(folder)] == pytest.approx([3e-3, 3e-3, 1.5e-3, 1.5e-3, 0.75e-3])
    assert lines_of(folder)[-1]["text_encoder_lr"] == pytest.approx(cfg.text_encoder_lr / 4)


def test_max_steps_ends_in_the_middle_of_an_epoch(cfg, plain):
    folder = main(dataclasses.replace(cfg, max_steps=7, scheduler="cosine"))
    lines = lines_of(folder)
    assert [line["step"] for line in lines] == [5, 7] and lines[-1]["head_lr"] == pytest.approx(0, abs=1e-12)
    assert last_of(folder)["progress"]["step"] == 7


def test_no_epoch_measures_nothing(cfg, capsys):
    folder = main(dataclasses.replace(cfg, epochs=0))
    assert "no epoch was finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds no weights yet"):
        load(folder)


@pytest.mark.parametrize("settings", [{"trainable": False}, {"image_freeze": "backbone"}])
def test_a_frozen_tower_reaches_best_unchanged(cfg, plain, settings):
    folder = main(dataclasses.replace(cfg, **settings, epochs=1))
    torch.manual_seed(cfg.seed)
    line = lines_of(folder)[0]
    assert line["image_encoder_lr"] == 0 and line["head_lr"] == cfg.head_lr
    assert bool(line["text_encoder_lr"]) == ("trainable" not in settings)


def test_the_same_seed_gives_the_same_run_and_another_another(cfg, plain, tmp_path):
    runs = [
        main(dataclasses.replace(cfg, epochs=1, seed=seed, run_dir=str(tmp_path / name)))
        for name, seed in [("a", 1), ("b", 1), ("c", 2)]
    ]
    a, b, c = (last_of(run)["model"] for run in runs)
    assert same(a, b) and not same(a, c) and untimed(runs[0]) == untimed(runs[1])


def test_workers_make_no_difference_to_a_run(cfg, plain, tmp_path):
    cfg = dataclasses.replace(cfg, epochs=1, image_cache=False)
    a, *others = (
        main(dataclasses.replace(cfg, num_workers=workers, run_dir=str(tmp_path / f"{workers}")))
        for workers in (0, 1, 3)
    )
    assert all(same(last_of(a)["model"], last_of(other)["model"]) for other in others)


def test_a_run_records_what_its_figures_depend_on(cfg, plain, capsys, tmp_path, monkeypatch):
    asked, use = [], torch.use_deterministic_algorithms
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on, **_: asked.append(on) or use(on, **_))
    captions = Path(shutil.copy(cfg.captions_path, tmp_path / "captions.txt"))
    run = main(dataclasses.replace(cfg, epochs=1, captions_path=captions, deterministic=True))
    assert asked[0] and not asked[-1]
    record = json.loads((run / "environment.json").read_text())
    assert record["packages"]["torch"] and record["processor"] and set(record["data"]) == {"train", "valid"}
    evaluate(run)
    assert "are not those" not in capsys.readouterr().err
    rows = captions.read_text().splitlines()
    captions.write_text("\n".join([rows[0], *(row + "!" for row in rows[1:])]))
    evaluate(run)
    assert f"the valid captions are not those that {run} was trained with" in capsys.readouterr().err


def test_the_commit_is_this_package_s(tmp_path, monkeypatch):
    """Not that of a repository whose .venv has the package."""
    before = environment.git_commit.__wrapped__()
    folder = tmp_path / ".venv/clip_scratch"
    folder.mkdir(parents=True)
    for words in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(environment, "__file__", str(folder / "environment.py"))
    assert environment.git_commit.__wrapped__() is None
    shutil.move(folder, tmp_path / "clip_scratch")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "clip_scratch/environment.py"))
    assert environment.git_commit.__wrapped__() not in (None, "", before)


def test_a_loss_that_is_not_finite_stops_the_run(cfg, monkeypatch, plain):
    real, calls = LOSSES["infonce"], []

    def broken(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 8 else 1.0)

    monkeypatch.setitem(LOSSES, "infonce", broken)
    cfg.checkpoint_steps = 2
    with pytest.raises(UserError, match=r"epoch 2: the loss is nan at batch 3 of .*: \d\d\.png, .*") as stop:
        main(cfg)
    run = Path(cfg.run_dir)
    assert f"last good checkpoint is in {run}" in str(stop.value)
    state = last_of(run)
    assert state["progress"]["step"] == 6 and all(v.isfinite().all() for v in state["model"].values())
    assert [line["step"] for line in lines_of(main(CFG(resume=str(run))))] == [5, 10]


def test_too_large_a_batch_is_one_line(cfg, monkeypatch, plain):
    def full(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ...")

    monkeypatch.setitem(LOSSES, "infonce", full)
    with pytest.raises(UserError, match=r"out of memory with 4 images at once: --micro-batch-size 2 fits"):
        main(cfg)


def test_a_rate_that_is_far_too_high_is_one_line(cfg, plain):
    """The temperature is 1 / 0 before the loss is NaN."""
    with pytest.raises(UserError, match="the loss is nan at batch"):
        main(dataclasses.replace(cfg, head_lr=1e30, grad_clip=0.0))


def test_the_class_will_do(cfg, plain, monkeypatch):
    class Mine(CFG):
        epochs = 1

    for field in dataclasses.fields(cfg):
        if field.name != "epochs":
            setattr(Mine, field.name, getattr(cfg, field.name))
    assert len(lines_of(main(Mine))) == 1


# ---- speed: what is measured, kept and stopped


def test_a_run_stops_when_it_has_reached_its_recall_and_stays_stopped(cfg, plain, capsys):
    folder = main(dataclasses.replace(cfg, epochs=9, max_steps=0, stop_at=1.0))
    lines = lines_of(folder)
    assert len(lines) == 1 and lines[0]["image_retrieval_recall@10"] >= 0.01
    assert "has reached 1: stopped after" in capsys.readouterr().out
    main(CFG(resume=str(folder)))
    assert len(lines_of(folder)) == 1


def test_a_long_run_measures_its_precision_once_and_records_it_in_best(cfg, plain, monkeypatch, capsys):
    """The run's own config.json holds what was asked for, so that a sweep can compare it."""
    calls = []

    def measure(model, batch, cfg):
        calls.append(len(batch["pixel_values"]))
        return dataclasses.replace(cfg, precision="fp32", channels_last=False), "measured"

    monkeypatch.setattr("clip_scratch.training.start.choose_precision", measure)
    monkeypatch.setattr("clip_scratch.training.start.MIN_STEPS", 3)
    folder = main(dataclasses.replace(cfg, epochs=2, max_steps=0))
    assert calls == [cfg.batch_size] and "measured" in capsys.readouterr().out
    asked, resolved = (json.loads((folder / name).read_text()) for name in ("config.json", "best/config.json"))
    assert asked["precision"] == "auto" and asked["channels_last"]
    assert resolved["precision"] == "fp32" and not resolved["channels_last"]
    main(CFG(resume=str(folder)))
    main(dataclasses.replace(cfg, epochs=1, max_steps=2, run_dir=str(folder) + "-short"))
    assert len(calls) == 1


def test_a_run_on_cached_features_equals_one_that_recomputes_them(cfg, plain):
    heads = dataclasses.replace(
        cfg, image_freeze="backbone", text_freeze="backbone", crop_scale=1.0, horizontal_flip=0.0, color_jitter=0.0,
        precision="fp32",
    )  # fmt: skip
    kept = lines_of(main(dataclasses.replace(heads, cached_views=1)))
    recomputed = lines_of(main(dataclasses.replace(heads, run_dir=f"{cfg.run_dir}-recomputed")))
    assert [line["train_loss"] for line in kept] == pytest.approx([line["train_loss"] for line in recomputed], abs=1e-5)
    assert [line["rsum"] for line in kept] == pytest.approx([line["rsum"] for line in recomputed], abs=0.5)
