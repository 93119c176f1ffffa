"""What a user gets wrong ends in one clear line and exit status 2: no traceback, and no half-written run folder."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from processes import Command
from safetensors.torch import save_file

import clip_scratch.train as train
import clip_scratch.training.report as report
from clip_scratch import CFG, evaluate, search
from clip_scratch.cli import parse
from clip_scratch.errors import run_command
from clip_scratch.training.run import load_tree, save_tree


@pytest.fixture
def refused(capsys):
    """Run a command that must be refused; its one line on stderr."""

    def run(command):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_command(command)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("error: ") == 1 and "Traceback" not in said
        line = said[said.index("error: ") :].strip()
        assert "\n" not in line
        return line

    return run


@pytest.fixture
def words(tiny_data):
    """The command line of a tiny run, without its folder."""
    settings = {"captions-path": tiny_data.captions_path, "model-name": "test_resnet", "device": "cpu"}
    settings |= {"text-encoder-model": "bert-tiny", "text-tokenizer": "train", "size": 32, "batch-size": 8}
    settings |= {"epochs": 1, "valid-fraction": 0.2, "max-length": 24, "projection-dim": 32}
    return ["--no-pretrained", *(str(part) for name, value in settings.items() for part in (f"--{name}", value))]


@pytest.fixture
def train_refused(refused, words, tmp_path):
    """As `refused`, for `train` with the tiny settings and some more; and there is no run folder."""

    def run(*more, run_dir=None):
        folder = Path(run_dir or tmp_path / "runs/run")
        line = refused(lambda: train.main(parse([*words, *more, "--run-dir", str(folder)])))
        assert run_dir or not folder.parent.exists()
        return line

    return run


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
    """The folder of a run of one step; copy it before you damage it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.Report, "picture", lambda *_, **__: None)
        patch.setattr(report.Report, "end", lambda *_, **__: None)
        return train.main(
            CFG(
                captions_path=tiny_data.captions_path,
                model_name="test_resnet",
                text_encoder_model="bert-tiny",
                text_tokenizer="train",
                pretrained=False,
                size=32,
                batch_size=8,
                epochs=1,
                max_steps=1,
                valid_fraction=0.2,
                max_length=24,
                projection_dim=32,
                device="cpu",
                run_dir=folder,
            )
        )


@pytest.fixture
def run_copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


# ---- captions and images


def test_captions_file(train_refused, tiny_data, tmp_path):
    assert "captions.text" in train_refused("--captions-path", str(tiny_data.folder / "captions.text"))
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    assert "empty.csv" in train_refused("--captions-path", str(empty))
    empty.write_text("image,caption\n")
    assert "empty.csv" in train_refused("--captions-path", str(empty))
    assert "'titel'" in train_refused("--caption-column", "titel")
    (tmp_path / "column.csv").write_text("id,image\n1,00.png\n2,01.png\n")
    assert "column" in train_refused("--captions-path", str(tmp_path / "column.csv"))


def test_images_and_splits(train_refused, tmp_path, tiny_data):
    (tmp_path / "elsewhere").mkdir()
    assert "none of the 26 images" in train_refused("--image-path", str(tmp_path / "elsewhere"))
    assert "no image folder" in train_refused("--image-path", str(tmp_path / "nowhere"))
    assert "has no images in the split 'valid'" in train_refused("--valid-fraction", "0")
    table = tiny_data.table.assign(split="valid")
    table.to_csv(tmp_path / "valid.csv", index=False)
    more = "--captions-path", str(tmp_path / "valid.csv"), "--image-path", str(tiny_data.image_path)
    assert "has no images in the split 'train'" in train_refused(*more)


def test_an_undecodable_image_is_listed_with_its_row(words, tiny_data, tmp_path, capsys):
    shutil.copytree(tiny_data.image_path, tmp_path / "Images")
    (tmp_path / "Images/03.png").write_bytes(b"no picture")
    (tmp_path / "Images/05.png").unlink()
    command = [*words, "--image-path", str(tmp_path / "Images"), "--run-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: train.main(parse(command)))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "2 of 26 images" in said and "--on-bad-image skip" in said
    assert "03.png (" in said and "05.png (" in said and ", row " in said and not (tmp_path / "run").exists()


# ---- encoders and weights


def test_encoder_names(train_refused):
    assert "Did you mean resnet50" in train_refused("--model-name", "resnet5O")
    assert "Did you mean bert-tiny" in train_refused("--text-encoder-model", "bert-tinny")
    assert "'zzz'" in train_refused("--model-name", "zzz")


def test_image_weights(train_refused, tmp_path):
    # The weights are read before the text tower is looked for, which no hub can give
    more = ["--pretrained", "--image-weights"]
    assert "there is no" in train_refused(*more, str(tmp_path / "none.safetensors"))
    save_file({"conv1.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    assert "does not fit: " in train_refused(*more, str(tmp_path / "other.safetensors"))
    (tmp_path / "text.pth").write_text("not weights")
    assert "cannot be read as weights" in train_refused(*more, str(tmp_path / "text.pth"))


def test_no_network_for_hub_weights(train_refused, tmp_path):
    began = time.monotonic()
    line = train_refused("--pretrained", "--model-name", "resnet18")
    assert "image_weights" in line and "--no-pretrained" in line and "resnet18" in line
    weights = tmp_path / "resnet.safetensors"
    save_file({k: v.contiguous() for k, v in timm.create_model("test_resnet").state_dict().items()}, weights)
    line = train_refused(
        "--pretrained", "--image-weights", str(weights), "--text-encoder-model", "distilbert-base-uncased"
    )
    assert "text_encoder_model" in line and "local folder" in line and "--no-pretrained" in line
    line = train_refused("--text-tokenizer", "no-such-tokenizer")
    assert "no-such-tokenizer" in line
    assert time.monotonic() - began < 20


# ---- the run folder


def test_a_run_folder_that_cannot_be_made(train_refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for folder in ("file", "file/run", "file/a/b"):
        assert "cannot be made" in train_refused(run_dir=tmp_path / folder)
    assert "cannot be made" in train_refused(run_dir=tmp_path / ("long" * 100))
    monkeypatch.setattr("clip_scratch.training.run.os.access", lambda *_: False)  # root may write anywhere
    assert "cannot be written to" in train_refused(run_dir=tmp_path / "closed/run")
    assert not (tmp_path / "closed").exists()


def test_a_run_folder_that_is_not_empty(train_refused, tmp_path, finished):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    assert "is not empty" in train_refused(run_dir=tmp_path / "mine")
    before = sorted(finished.rglob("*"))
    assert f"--resume {finished}" in train_refused(run_dir=finished)
    assert sorted(finished.rglob("*")) == before


# ---- a resume


def test_a_resume_cannot_change_the_model(refused, finished):
    line = refused(lambda: train.main(parse(["--resume", str(finished), "--model-name", "resnet18"])))
    assert "trained with model_name='test_resnet'" in line and "'resnet18'" in line
    line = refused(lambda: train.main(parse([f"--resume={finished}", "--projection-dim", "64"])))
    assert "projection_dim=32" in line
    line = refused(lambda: train.main(CFG(resume=str(finished), head_lr=0.5)))
    assert "head_lr" in line


def test_a_resume_of_what_is_no_run(refused, tmp_path, run_copy):
    for folder in (tmp_path / "nowhere", tmp_path):
        line = refused(lambda folder=folder: train.main(parse(["--resume", str(folder)])))
        assert "is not a run folder" in line
    assert not (tmp_path / "nowhere").exists()
    (run_copy / "last/training.safetensors").unlink()
    assert "nothing to resume" in refused(lambda: train.main(parse(["--resume", str(run_copy)])))


def test_a_resume_of_a_damaged_run(refused, run_copy):
    def resume():
        return refused(lambda: train.main(parse(["--resume", str(run_copy)])))

    last = run_copy / "last/training.safetensors"
    state, whole = load_tree(last), last.read_bytes()
    last.write_bytes(whole[:5000])
    assert "training.safetensors is damaged" in resume()
    state["model"]["log_scale"] = torch.zeros(3)
    save_tree(last, state)
    assert "does not fit the settings" in resume()
    del state["model"]
    save_tree(last, state)
    assert "does not fit the settings" in resume()
    last.write_bytes(whole)
    (run_copy / "config.json").write_text("{")
    assert "config.json is damaged" in resume()


# ---- settings


def test_presets_and_devices(refused, train_refused, monkeypatch):
    assert "Did you mean flickr8k" in refused(lambda: train.main(parse(["flicker8k"])))
    assert "precision fp16 needs a CUDA GPU" in train_refused("--precision", "fp16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if not torch.backends.cuda.is_built() or not torch.cuda.device_count():
        assert "device 'cuda'" in train_refused("--device", "cuda")
    assert "device 'gpu'" in train_refused("--device", "gpu")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--batchsize", "3"], "--batch-size"),
        (["--model", "resnet18"], "--model-name"),
        (["--batch-size", "many"], "many"),
        (["--batch-size", "0"], "batch_size is at least 1"),
        (["--loss", "infonse"], "infonce"),
        (["--epochs"], "epochs"),
        (["flickr8k"], "flickr8k"),
    ],
)
def test_settings_on_the_command_line(words, more, says, capsys):
    """tyro draws a box around what it refuses itself."""
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: parse([*words, *more]))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and says in said and "Traceback" not in said


# ---- fine-tuning a pretrained CLIP


@pytest.fixture
def tune_refused(refused, tiny_data, hf_clip, tmp_path):
    """Run `train hf_clip` on the tiny data, with some more settings, to the line that refuses it."""

    def run(*more, model=None):
        words = ["hf_clip", "--captions-path", str(tiny_data.captions_path), "--device", "cpu"]
        words += ["--model-name", str(model or hf_clip()), "--run-dir", str(tmp_path / "runs/run"), *more]
        line = refused(lambda: train.main(parse(words)))
        assert not (tmp_path / "runs").exists()
        return line

    return run


def test_freezing_that_does_not_fit(tune_refused, train_refused, monkeypatch):
    assert "image_freeze first:40: the tower has 3 blocks" in tune_refused("--image-freeze", "first:40")
    assert "text_freeze all-but-last:4: the tower has 3 blocks" in tune_refused("--text-freeze", "all-but-last:4")
    both = "--image-freeze", "all", "--text-freeze", "all"
    assert "nothing to train" in tune_refused(*both) and "nothing to train" in train_refused(*both)
    assert "image_freeze first:40: the tower has 4 blocks" in train_refused("--image-freeze", "first:40")
    monkeypatch.setitem(sys.modules, "peft", None)
    for refused_by in (tune_refused, train_refused):
        assert "pip install 'clip_scratch[lora]'" in refused_by("--text-freeze", "lora")


def test_what_needs_a_pretrained_clip(train_refused):
    assert "wise_ft averages with zero-shot weights" in train_refused("--wise-ft", "auto")
    assert "fully_shard works with precision bf16 or fp32" in train_refused("--fully-shard", "--precision", "fp16")


def test_models_that_are_no_clip(tune_refused, hf_clip, tmp_path):
    assert "takes 32 pixels a side" in tune_refused("--size", "160")
    folder = Path(shutil.copytree(hf_clip(), tmp_path / "copy"))
    (folder / "preprocessor_config.json").unlink()
    assert str(folder) in tune_refused(model=folder)
    assert "there is no" in tune_refused(model=tmp_path / "nowhere")


def test_no_network_for_a_pretrained_clip(tune_refused, refused, tmp_path):
    began = time.monotonic()
    for name in ("openai/clip-vit-base-patch32", "google/siglip-base-patch16-224"):
        line = tune_refused(model=name)
        assert name in line and "cannot be reached" in line and "--model-name to that folder" in line
        assert "(hf download NAME" in line  # huggingface_hub 1.0 has no huggingface-cli any more
    line = refused(lambda: train.main(parse(["food", "--device", "cpu", "--run-dir", str(tmp_path / "runs/food")])))
    assert "zmao/food_img_caption_small" in line and "set --captions-path to it" in line
    assert not (tmp_path / "runs").exists()
    assert time.monotonic() - began < 30


# ---- evaluate and search


def test_evaluate(refused, finished, tmp_path, tiny_data, run_copy):
    def wrong(run=finished, **settings):
        return refused(lambda: evaluate.main(evaluate.Arguments(str(run), device="cpu", **settings)))

    assert "is not a run folder" in wrong(tmp_path / "nowhere")
    assert "is not a run folder" in wrong(tiny_data.captions_path)
    assert "no images in the split 'test'" in wrong(split="test")
    assert "no captions file" in wrong(captions_path=str(tmp_path / "none.csv"))
    assert "no image folder" in wrong(image_path=str(tmp_path / "none"))
    assert "there is no folder" in wrong(json=str(tmp_path / "none/x.json"))
    assert "it is a folder" in wrong(json=str(tmp_path))
    weights = run_copy / "best/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "does not fit its settings" in wrong(run_copy)
    shutil.move(run_copy / "best/model.safetensors", tmp_path / "gone")
    assert "holds no weights yet" in wrong(run_copy)


def test_search(refused, finished, tmp_path):
    def index(run=finished, images=tmp_path / "photos", **settings):
        where = settings.pop("index", str(tmp_path / "index"))
        return refused(lambda: search.main(search.IndexArguments(str(run), str(images), where, **settings)))

    def find(*queries, index=tmp_path / "index", **settings):
        return refused(lambda: search.main(search.FindArguments(str(index), queries, **settings)))

    assert "there is no folder" in index()
    (tmp_path / "photos").mkdir()
    assert "there are no images" in index()
    (tmp_path / "photos/x.jpg").write_bytes(b"no picture")
    assert "is not a run folder" in index(run=tmp_path / "nowhere")
    assert "device 'nonsense' is not available" in index(device="nonsense")
    assert "cannot be read as a CSV file" in index(table=str(tmp_path / "none.csv"))
    (tmp_path / "file").write_text("")
    assert "is not an index" in find("a dog", index=tmp_path / "photos")
    assert "cannot be written" in index(index=str(tmp_path / "file"))
    assert "nothing to look for" in find()
    assert "there is no folder" in find("a dog", grid=str(tmp_path / "none/x.png"))
    assert "give --image FILE" in find("a dog", captions=True)
    assert "--explain draws" in find("a dog", explain=True)


def test_the_data_of_a_run_are_gone(refused, run_copy, tmp_path):
    best = run_copy / "best/config.json"
    settings = json.loads(best.read_text()) | {"captions_path": str(tmp_path / "moved/captions.txt")}
    best.write_text(json.dumps(settings))
    line = refused(lambda: evaluate.main(evaluate.Arguments(str(run_copy), device="cpu")))
    assert "captions.txt" in line and "--captions-path" in line


def test_the_commands_themselves(tmp_path):
    """The verbs as processes of their own: exit status 2, one line, nothing else."""
    mistakes = [["train", "flicker8k"], ["evaluate", "nowhere"], ["search", "find", "nowhere", "a dog"]]
    mistakes += [["compare", "nowhere"], ["classify", "nowhere"]]
    commands = [Command(["-m", f"clip_scratch.{verb}", *words], tmp_path) for verb, *words in mistakes]
    for done in [command.wait() for command in commands]:
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_into_a_pipe_that_is_closed(tmp_path):
    """As `train --help | head -1`."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "clip_scratch.train", "--help"]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=60) == 0
