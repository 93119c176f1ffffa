"""Several processes on one machine: the losses and weights of one, whole runs, resumes, and what goes wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import CASES, ten_steps

from clip_scratch import load

ROOT = Path(__file__).parents[1]
SCENES = [
    "--n-scenes", "240", "--size", "32", "--model-name", "test_resnet", "--batch-size", "16", "--epochs", "2",
    "--minutes", "0", "--max-length", "32", "--device", "cpu", "--precision", "fp32",
]  # fmt: skip


def torchrun(processes, *words, cwd, **environment):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        *words,
    ]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_the_same_losses_and_weights_as_one_process(tiny_cfg, tiny_data, tiny_tokenizer, tmp_path):
    """Of 1, 2 and 4 processes after ten steps, in float64; several captions an image, unequal ones a process."""
    torch.save((tiny_cfg, tiny_data.table, tiny_tokenizer), tmp_path / "inputs.pt")
    one = [ten_steps(tiny_cfg, tiny_data.table, tiny_tokenizer, *case) for case in CASES]
    for processes in (2, 4):
        done = torchrun(processes, str(ROOT / "tests/distributed_worker.py"), str(tmp_path), cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    for other in (torch.load(tmp_path / f"{n}.pt", weights_only=False) for n in (2, 4)):
        for case, (losses, weights, embeddings), (losses_1, weights_1, embeddings_1) in zip(
            CASES, other, one, strict=True
        ):
            assert len(losses) == 10 and losses == pytest.approx(losses_1, abs=1e-8), case
            for name, tensor in weights_1.items():
                assert torch.allclose(weights[name].double(), tensor.double(), atol=1e-8, rtol=0), (case, name)
            for ours, theirs in zip(embeddings, embeddings_1, strict=True):
                assert ours.shape == theirs.shape and torch.allclose(ours.double(), theirs.double(), atol=1e-6), case


@pytest.mark.slow
def test_a_run_of_two_processes_resumed_by_one(tmp_path):
    """Rank 0 alone writes and prints; its checkpoint is one of any number of processes."""
    done = torchrun(2, "-m", "clip_scratch.train", *SCENES, "--max-steps", "12", "--run-dir", "runs/two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("run folder: runs/two") == 1 and done.stdout.count("best epoch") == 1
    lines = [json.loads(line) for line in (tmp_path / "runs/two/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1] and lines[0]["step"] == 12
    assert load(tmp_path / "runs/two")
    (tmp_path / "runs/two/metrics.jsonl").rename(tmp_path / "kept")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    again = subprocess.run(
        [sys.executable, "-m", "clip_scratch.train", "--resume", "runs/two"], cwd=tmp_path, env=env, text=True,
        capture_output=True,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_what_several_processes_cannot_do(tmp_path):
    done = torchrun(2, "-m", "clip_scratch.train", *SCENES, "--batch-size", "15", cwd=tmp_path)
    assert done.returncode != 0
    assert "error: batch_size (15) is not a multiple of the 2 processes" in done.stderr
    assert "clip_scratch/train.py" not in done.stderr  # no traceback
    assert not (tmp_path / "runs").exists()
