"""Several processes on one machine: the losses and weights of one, whole runs, resumes, and what goes wrong."""

import dataclasses
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from distributed_worker import CASES, SHARDED, start, ten_steps
from processes import Command, together, torchrun

from clip_scratch import CFG, load
from clip_scratch.cli import parse
from clip_scratch.data.images import load_image
from clip_scratch.data.shards import write_shards
from clip_scratch.errors import UserError
from clip_scratch.models.clip import CLIPModel
from clip_scratch.retrieval.index import Index
from clip_scratch.retrieval.indexing import update_index
from clip_scratch.train import main
from clip_scratch.training import distributed

ROOT = Path(__file__).parents[1]
SCENES = [
    "--n-scenes", "120", "--size", "32", "--model-name", "test_resnet", "--batch-size", "16", "--epochs", "2",
    "--minutes", "0", "--max-length", "32", "--device", "cpu", "--precision", "fp32",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("cases", "words", "processes"), [(CASES, [], (2, 4)), (SHARDED, ["sharded"], (2,))])
def test_the_same_losses_and_weights_as_one_process(
    cases, words, processes, tiny_cfg, tiny_data, tiny_tokenizer, tmp_path
):
    """After ten steps, in float64; several captions an image, unequal ones a process."""
    inputs = dataclasses.replace(tiny_cfg, cache_path=str(tmp_path / "cache")), tiny_data.table, tiny_tokenizer
    torch.save(inputs, tmp_path / "inputs.pt")
    one = [ten_steps(*start(*inputs, *case)) for case in cases]
    for n in processes:
        for done in together(n, [ROOT / "tests/distributed_worker.py", tmp_path, *words], tmp_path):
            assert done.returncode == 0, done.stderr[-3000:]
        other = torch.load(tmp_path / f"{n}.pt", weights_only=False)
        for case, ours, theirs in zip(cases, other, one, strict=True):
            assert len(ours[0]) == 10 and ours[0] == pytest.approx(theirs[0], abs=1e-8), case
            for name, tensor in theirs[1].items():
                assert torch.allclose(ours[1][name].double(), tensor.double(), atol=1e-8, rtol=0), (case, name)
            for embeddings, wanted in zip(ours[2], theirs[2], strict=True):
                assert embeddings.shape == wanted.shape, case
                assert torch.allclose(embeddings.double(), wanted.double(), atol=1e-6), case
    if cases is SHARDED:  # one process goes on with what two have saved
        *_, state = start(*inputs, *cases[-1])
        state.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False))
        assert all(
            torch.equal(tensor.double(), other[-1][1][n].double()) for n, tensor in state.model.state_dict().items()
        )


KILLED = """
import os, signal, sys
import clip_scratch.training.engine as engine
from clip_scratch.cli import parse
from clip_scratch.train import main
from clip_scratch.training import distributed
from clip_scratch.training.distributed import rank

step, steps = engine._step, []

def killed(*args):
    steps.append(1)
    if rank() == 1 and len(steps) == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args)

engine._step = killed
main(parse(sys.argv[1:]))
"""


@pytest.mark.slow
def test_runs_of_two_processes(tmp_path):
    """The first process alone writes and prints. A run one of whose processes is killed in mid-step is restarted by
    torchrun and goes on from its last checkpoint, to the same weights; one process can go on with it."""
    words = [*SCENES, "--checkpoint-steps", "3", "--run-dir"]
    whole, other = together(2, ["-m", "clip_scratch.train", *words, "runs/whole"], tmp_path)
    assert whole.returncode == other.returncode == 0, whole.stderr[-3000:] + other.stderr[-3000:]
    assert whole.stdout.count("run folder: runs/whole") == 1 and whole.stdout.count("best epoch") == 1
    assert other.stdout == other.stderr == ""
    lines = [json.loads(line) for line in (tmp_path / "runs/whole/metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 6), (2, 12)]

    (tmp_path / "killed.py").write_text(KILLED)
    assert "resuming runs/killed" in torchrun(2, ["killed.py", *words, "runs/killed"], tmp_path, restarts=1)
    ours, theirs = (load(tmp_path / f"runs/{name}").state_dict() for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main(parse(["--resume", "runs/killed"])) == Path("runs/killed")


@pytest.mark.slow
def test_what_several_processes_cannot_do(tmp_path):
    """By the command `torchrun` itself, whose two processes start from nothing."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "clip_scratch.train", *SCENES, "--batch-size", "15"]
    done = Command(command, tmp_path, {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}).wait()
    assert done.returncode != 0
    assert done.stderr.count("batch_size (15) is not a multiple of the 2 processes") == 1
    assert "clip_scratch/train.py" not in done.stderr  # no traceback
    assert not (tmp_path / "runs").exists()


# The text tower is traced: this is not a test of the ONNX exporter, which takes seconds
INDEX = """
import runpy, sys
sys.modules["onnxscript"] = None
runpy.run_module("clip_scratch.search", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_all_processes_embed_into_one_index(scene_run, tmp_path):
    """Of a folder with a damaged image, and of shards of it; as one process does."""
    images = tmp_path / "images"
    images.mkdir()
    scenes = sorted((scene_run.cwd / "data").rglob("*.png"))[:70]
    names = [Path(shutil.copy(path, images)).name for path in scenes]
    (images / "bad.png").write_bytes(b"x")
    captions = pd.DataFrame({"image": names, "caption": names, "split": "train"})
    write_shards(captions, images, tmp_path / "tars", 20)
    (tmp_path / "index.py").write_text(INDEX)
    run = str(scene_run.folder.resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(scene_run.cwd)
        update_index(run, images, tmp_path / "one", device="cpu")
    for place, folder in ((images, "two"), (f"{tmp_path}/tars/train/*.tar", "shards")):
        words = ["index.py", "index", run, str(place), "--index", folder, "--device", "cpu"]
        done, other = together(2, words, tmp_path)
        assert done.returncode == other.returncode == 0, done.stderr[-3000:] + other.stderr[-3000:]
        assert done.stdout.count("70 images; 70 embedded") == 1 and other.stdout == ""
        assert ("bad.png" in done.stderr) == (folder != "shards")
    one, two, shards = (
        Index.open(tmp_path / folder).search("a red circle", n=70) for folder in ("one", "two", "shards")
    )
    assert dict(two) == pytest.approx(dict(one), abs=1e-3)
    assert [score for _, score in shards] == pytest.approx([score for _, score in one], abs=1e-3)
    assert (load_image(shards.folder / shards[0][0]) == load_image(images / one[0][0])).all()


def test_processes_of_different_versions_or_settings(monkeypatch):
    theirs = {"torch": "2.6.0", "batch_size": 8}
    monkeypatch.setattr(distributed, "from_main", lambda ours: ours | theirs)
    with pytest.raises(
        UserError, match=r"different settings or versions \(batch_size, torch\): start all with the same"
    ):
        distributed._check(CFG(batch_size=16))
    monkeypatch.setattr(distributed, "from_main", lambda ours: ours)
    distributed._check(CFG())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="fully_shard needs GPUs"):
        distributed._check(CFG(fully_shard=True))


def test_a_loss_without_a_temperature_has_no_gradient_of_it_to_sum(tiny_cfg, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(distributed, "summed", torch.Tensor.clone)
    model = CLIPModel(tiny_cfg, tiny_tokenizer)
    distributed.Replica(model).finish()
    assert model.log_scale.grad is None
