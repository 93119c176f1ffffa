"""The commands that faults.py disturbs, each in a process of its own, and how what they leave is compared."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

from clip_scratch.files import is_unfinished

from .rounds import process_context

TRAIN = [
    "clip_scratch.train", "scenes", "--n-scenes", "120", "--size", "32", "--model-name", "test_resnet",
    "--text-encoder-model", "bert-tiny", "--batch-size", "16", "--epochs", "3", "--device", "cpu", "--ema", "0.9",
    "--checkpoint-steps", "2", "--precision", "fp32", "--minutes", "0", "--run-dir", "out",
]  # fmt: skip
TUNE = [
    "clip_scratch.train", "hf_clip", "--model-name", "../clip", "--n-scenes", "120", "--batch-size", "16", "--epochs",
    "2", "--device", "cpu", "--checkpoint-steps", "2", "--precision", "fp32", "--run-dir", "out",
]  # fmt: skip
SHARDS = ["clip_scratch.prepare", "shards", "--captions-path", "../data", "--out", "out", "--shard-size", "9"]
INDEX = ["clip_scratch.search", "index", "scenes-tiny", "../data/Images", "--device", "cpu", "--index", "out"]
JOBS = {
    "train": TRAIN,
    "train, micro-batches": [*TRAIN, "--micro-batch-size", "6"],
    "train, cached features": [*TRAIN, "--image-freeze", "backbone", "--cached-views", "2"],
    "fine-tune": TUNE,
    "prepare scenes": ["clip_scratch.prepare", "scenes", "--n", "400", "--out", "out"],
    "prepare shards": SHARDS,
    "search index": INDEX,
    "export": ["clip_scratch.export", "../run", "out"],
}
# Files that hold times or the order of a directory, and a picture that is not drawn again after a kill
_UNEQUAL = {"metrics.jsonl", "environment.json", "retrieval.png", ".lock"}
_UNEQUAL |= {"manifest.sqlite", "manifest.sqlite-wal", "manifest.sqlite-shm"}


def _child(words: list[str], cwd: Path, said: Path, room: int) -> None:
    import runpy

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    os.chdir(cwd)
    os.environ["XDG_CACHE_HOME"] = str(cwd / "cache")
    for number in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    import torch

    torch.set_num_threads(1)
    if room:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room,) * 2)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def start(words: list[str], cwd: Path, said: Path, room: int = 0):
    """A command in a process that is forked from one with the libraries, and may take `room` more bytes of memory."""
    said.unlink(missing_ok=True)
    process = process_context().Process(target=_child, args=(words, cwd, said, room))
    process.start()
    return process


def finish(words: list[str], cwd: Path, said: Path, room: int = 0) -> int:
    """Run a command to its end; its exit status."""
    process = start(words, cwd, said, room)
    process.join(600)
    process.kill()
    process.join()
    return process.exitcode


def go_on(words: list[str], cwd: Path, said: Path) -> int:
    """Run a command again as a user would: a run is resumed where there is one, what is done and not updated stays."""
    if words[0] == "clip_scratch.train" and (cwd / "out/config.json").exists():
        return finish([words[0], "--resume", "out"], cwd, said)
    once = words[0] == "clip_scratch.export" or words[:2] == ["clip_scratch.prepare", "scenes"]
    if once and (cwd / "out").exists():
        return 0
    return finish(words, cwd, said)


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file, those aside that hold times; of an index its embeddings by name."""
    from safetensors.torch import load_file

    from clip_scratch.training.run import load_tree

    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name in _UNEQUAL or "tfevents" in path.name:
            continue
        if path.suffix == ".safetensors":  # its header has no fixed order
            weights = load_tree(path)["model"] if path.name == "training.safetensors" else load_file(path)
            content = b"".join(name.encode() + weights[name].numpy().tobytes() for name in sorted(weights))
        else:
            content = path.read_bytes()
        found[path.relative_to(folder).as_posix()] = hashlib.sha256(content).hexdigest()
    if (folder / "index.json").exists():
        from clip_scratch.retrieval.index import Index

        results = Index.open(folder).search("a red circle", n=10_000)
        found["its results"] = repr(sorted((name, round(score, 2)) for name, score in results))
    return found


def materials(work: Path) -> None:
    """data/, run/ and clip/: what the jobs start from."""
    if (work / "clip").exists():
        return
    from clip_scratch.data.scenes.write import write_scenes

    from .same_figures import small_clip

    write_scenes(work / "data", 200, seed=3, progress=False)
    small_clip(work / "clip", ["a red circle left of a blue square", "a small green star above a big yellow heart"] * 9)
    assert finish([*TRAIN[:-1], "run", "--head", "linear"], work, work / "said") == 0, (work / "said").read_text()[
        -2000:
    ]


def run_whole(words: list[str], work: Path) -> tuple[dict[str, str], float]:
    """The digests of what a command leaves, and its seconds."""
    folder = work / "whole"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    began = time.monotonic()
    status = finish(words, folder, work / "said")
    assert status == 0, (work / "said").read_text()[-2000:]
    return digests(folder / "out"), time.monotonic() - began


def outcome_of(status: int, folder: Path, expected: dict[str, str], said: Path) -> str:
    if status:
        return f"FAILED to go on: {said.read_text()[-300:]}"
    if found := [path.name for path in filter(is_unfinished, (folder / "out").rglob(".*"))]:
        return f"LEFT temporary files: {found[:3]}"
    other = sorted(name for name, _ in digests(folder / "out").items() ^ expected.items())
    return f"OTHER bytes in the end: {other}" if other else "the same bytes in the end"
