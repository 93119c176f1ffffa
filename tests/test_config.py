"""CFG: the four ways to set, what is refused and how, the presets, and the trips a settings object makes."""

import copy
import dataclasses
import errno
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tyro
from safetensors import SafetensorError

from clip_scratch import CFG, PRESETS
from clip_scratch.errors import UserError, run_command, suggest

FIELDS = {field.name: field for field in dataclasses.fields(CFG)}


class Mine(CFG):
    """A preset of one's own."""

    model_name = "convnext_tiny"
    batch_size: int = 16

    def steps(self, n):
        return n // self.batch_size

    @property
    def pixels(self):
        return self.size**2


@pytest.fixture
def restored():
    """Puts the class attributes back, whatever a test sets."""
    before = {name: getattr(CFG, name) for name in FIELDS}
    yield
    for name, value in before.items():
        setattr(CFG, name, value)


def cli(*args, preset=CFG):
    return tyro.cli(preset, default=preset(), args=list(args))


# ---- four ways


def test_class_attribute(restored):
    CFG.batch_size = 64
    assert CFG().batch_size == 64
    assert CFG(batch_size=8).batch_size == 8
    assert PRESETS["flickr8k"]().batch_size == 64  # a preset that says nothing about it follows
    assert PRESETS["scenes"]().batch_size != 64 or PRESETS["scenes"].batch_size == 64
    assert cli("--size", "96").batch_size == 64


def test_the_class_is_as_before():
    assert CFG.batch_size == CFG().batch_size == FIELDS["batch_size"].default


def test_a_class_attribute_of_a_preset_stays_there(restored):
    before = Mine.size
    Mine.size = 128
    try:
        assert Mine().size == 128 and CFG().size == FIELDS["size"].default
    finally:
        Mine.size = before


def test_subclass():
    cfg = Mine()
    assert (cfg.model_name, cfg.batch_size, cfg.size) == ("convnext_tiny", 16, CFG.size)
    assert cfg.steps(33) == 2 and cfg.pixels == CFG.size**2

    class Ours(Mine):
        size = 160

    assert (Ours().model_name, Ours(batch_size=4).batch_size, Ours().size) == ("convnext_tiny", 4, 160)
    assert CFG().model_name == FIELDS["model_name"].default


def test_keyword():
    cfg = CFG(model_name="resnet18", size=160)
    assert (cfg.model_name, cfg.size) == ("resnet18", 160)
    assert (CFG.model_name, CFG.size) == (FIELDS["model_name"].default, FIELDS["size"].default)


def test_instance_attribute():
    cfg = CFG()
    cfg.size = 96
    assert cfg.size == 96 and CFG.size == FIELDS["size"].default


def test_command_line():
    cfg = cli("--batch-size", "64", "--no-pretrained", "--head-lr", "3e-4", "--loss", "sigmoid", preset=Mine)
    assert (cfg.batch_size, cfg.pretrained, cfg.head_lr, cfg.loss) == (64, False, 3e-4, "sigmoid")
    assert type(cfg) is Mine and cfg.model_name == "convnext_tiny"
    assert cli() == CFG()


# ---- what is refused


def misspelt_attribute():
    CFG.batchsize = 3


def misspelt_subclass():
    class Wrong(CFG):
        batchsize = 3


def misspelt_instance():
    CFG().batchsize = 3


def misspelt_keyword():
    CFG(batchsize=3)


@pytest.mark.parametrize("way", [misspelt_attribute, misspelt_subclass, misspelt_keyword, misspelt_instance])
def test_a_misspelt_setting_suggests_the_right_one(way):
    with pytest.raises(UserError, match="no setting 'batchsize'.* Did you mean batch_size"):
        way()
    assert not hasattr(CFG, "batchsize")


def test_a_misspelt_setting_on_the_command_line(capsys):
    with pytest.raises(SystemExit) as stop:
        cli("--batch-sise", "3")
    assert stop.value.code == 2
    assert "--batch-size" in capsys.readouterr().err


def test_nothing_near_suggests_nothing():
    with pytest.raises(UserError) as error:
        CFG(zzzzqqq=1)
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batch_size": 0}, "batch_size is at least 1, not 0"),
        ({"batch_size": "64"}, "batch_size takes int, not '64'"),
        ({"batch_size": 1.5}, "batch_size takes int"),
        ({"batch_size": True}, "batch_size takes int"),
        ({"pretrained": 1}, "pretrained takes bool"),
        ({"head_lr": "fast"}, "head_lr takes float"),
        ({"head_lr": True}, "head_lr takes float"),
        ({"head_lr": -1e-3}, "head_lr is at least 0"),
        ({"dropout": 1.5}, "dropout is between 0 and 0.99"),
        ({"temperature": 0}, "temperature is at least"),
        ({"temperature": float("nan")}, "temperature is at least"),
        ({"crop_scale": 0}, "crop_scale is between"),
        ({"captions_path": 3}, "captions_path takes str"),
        ({"captions_path": None}, "captions_path takes str"),
        ({"loss": "info_nce"}, "loss is one of .*Did you mean infonce"),
        ({"precision": "fp8"}, "precision is auto, fp32, bf16, fp16, or one for each tower .*, not 'fp8'"),
        ({"precision": "fp16/fp32"}, "precision is auto"),  # one gradient scaler serves both towers
        ({"resize": "crop:0"}, "resize is stretch, crop or crop:PIXELS, not 'crop:0'"),
        ({"seed": -1}, "seed is between 0 and 4294967295, not -1"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(settings, says):
    with pytest.raises(UserError, match=says):
        CFG(**settings)
    (name, value), cfg = next(iter(settings.items())), CFG()
    with pytest.raises(UserError, match=says):
        setattr(cfg, name, value)
    with pytest.raises(UserError, match=says):
        type("Wrong", (CFG,), dict(settings))()


def test_values_in_near_types_become_the_setting_s_own():
    cfg = CFG(head_lr=1, captions_path=Path("a") / "b.csv", batch_size=np.int64(7), weight_decay=np.float64(0.5))
    assert (cfg.head_lr, type(cfg.head_lr)) == (1.0, float)
    assert cfg.captions_path == str(Path("a/b.csv"))
    assert (cfg.batch_size, type(cfg.batch_size)) == (7, int)
    json.dumps(dataclasses.asdict(cfg))


def test_every_default_is_valid_and_every_setting_explained():
    assert all(CFG(**{name: getattr(CFG, name)}) == CFG() for name in FIELDS)
    source = Path(__import__("clip_scratch.config").config.__file__).read_text()
    for name in FIELDS:
        line = next(line for line in source.splitlines() if line.startswith(f"    {name}: "))
        assert "  # " in line, f"{name} has no comment for --help"


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        cli("--help")
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{name.replace('_', '-')}" in said for name in FIELDS)
    assert "in pixels" in said and "(default: 224)" in said


# ---- presets


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    cfg = PRESETS[name]()
    assert isinstance(cfg, CFG)
    assert "python -m clip_scratch.train" in PRESETS[name].__doc__
    assert cli("--size", "72", preset=PRESETS[name]) == dataclasses.replace(cfg, size=72)
    assert dataclasses.replace(cfg, size=72).model_name == cfg.model_name
    if cfg.scheduler == "plateau":
        assert cfg.warmup_steps == 0, "warm-up has no effect"


def test_the_scenes_keep_what_their_captions_name():
    scenes = PRESETS["scenes"]()
    assert scenes.horizontal_flip == 0 and scenes.hue_jitter == 0 and not scenes.pretrained
    assert not scenes.captions_path and scenes.text_tokenizer == "train"


# ---- trips


@pytest.mark.parametrize("cfg", [CFG(size=96), PRESETS["compact"](batch_size=3), Mine(seed=1)], ids=lambda c: type(c))
def test_round_trips(cfg):
    assert pickle.loads(pickle.dumps(cfg)) == cfg
    assert copy.deepcopy(cfg) == cfg and copy.deepcopy(cfg) is not cfg
    assert type(cfg)(**dataclasses.asdict(cfg)) == cfg
    assert CFG(**json.loads(json.dumps(dataclasses.asdict(cfg)))).batch_size == cfg.batch_size
    assert f"size={cfg.size}" in repr(cfg)
    other = dataclasses.replace(cfg, size=40)
    assert other != cfg and type(other) is type(cfg)
    with pytest.raises(UserError):
        dataclasses.replace(cfg, size=-1)


# ---- errors and exit statuses


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (UserError("no file x"), 2, "no file x"),
        (KeyboardInterrupt("resume"), 130, "resume"),
        (OSError(errno.ENOSPC, "No space left on device", "a"), 2, "a: No space left on device"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 2, "no space left on the disk"),
        (RuntimeError("could not create a primitive"), 2, "out of memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 2, "lower --num-workers"),
    ],
)
def test_exit_status_and_one_line(error, status, says, capsys):
    def command():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(command)
    said = capsys.readouterr().err
    assert stop.value.code == status and says in said and "Traceback" not in said


def test_a_bug_keeps_its_traceback_and_success_is_silent(capsys):
    run_command(lambda: 3)
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)
    assert capsys.readouterr().err == ""


def test_suggest():
    assert suggest("resnet5O", ["resnet50", "vit"]) == " Did you mean resnet50?"
    assert suggest("zzz", ["resnet50"]) == ""


# ---- the forms of freezing and of WiSE-FT


@pytest.mark.parametrize("name", ["image_freeze", "text_freeze"])
def test_freezing_is_one_vocabulary(name):
    for value in ("none", "first:1", "first:6", "all-but-last:1", "all-but-last:12", "backbone", "all", "lora"):
        assert getattr(CFG(**{name: value}), name) == value
    for value in ("first:0", "all-but-last:-1", "first:", "first", "last:one", "None", "", "first:6 ", "lora:8"):
        with pytest.raises(UserError, match=f"{name} is none, first:N, all-but-last:N, backbone, all or lora, not"):
            CFG(**{name: value})


def test_a_misspelt_setting_of_freezing_is_refused_with_the_right_one():
    with pytest.raises(UserError, match="no setting 'image_freezing'. Did you mean image_freeze"):
        CFG(image_freezing="none")


def test_the_share_of_wise_ft():
    for value in ("", "auto", "0", "1", "0.5", "1.0", "0.75"):
        assert CFG(wise_ft=value).wise_ft == value
    for value in ("1.5", "-0.5", "half", "2", "0.", "1.01"):
        with pytest.raises(UserError, match="wise_ft is empty, auto, or a number from 0 to 1"):
            CFG(wise_ft=value)


def test_size_0_leaves_it_to_the_model():
    assert CFG(size=0).size == 0 and CFG(size=8).size == 8
    for size in (-1, 1, 7):
        with pytest.raises(UserError, match="size"):
            CFG(size=size)


@pytest.mark.parametrize("name", ["hf_clip", "food", "indo_fashion", "flickr8k_clip", "flickr30k_clip"])
def test_a_recipe_on_the_command_line(name):
    from clip_scratch.cli import parse

    cfg = parse([name, "--accumulation", "4", "--text-freeze", "lora", "--wise-ft", "auto", "--ema", "0.99"])
    assert (cfg.backend, cfg.accumulation, cfg.text_freeze, cfg.wise_ft) == ("hf_clip", 4, "lora", "auto")
    assert type(cfg) is PRESETS[name] and cfg.early_stopping > 0
    settings = dataclasses.asdict(cfg)
    assert dataclasses.asdict(CFG(**settings)) == settings
