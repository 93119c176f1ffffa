"""What was tried to break the commands, and how often they survived: `python -m benchmarks.faults`.

    python -m benchmarks.faults --kills 200          as root, for the small disks; about an hour on two cores
    python -m benchmarks.faults --only captions images --fuzz 1000

kills      SIGKILL, SIGINT or SIGTERM at a random moment of training, tuning, drawing, sharding, indexing and exporting:
           the same command, or --resume, goes on and ends with the same bytes
disks      a tmpfs that fills up at a random write: one line and status 2; with more room it goes on to the same bytes
accidents  a loader's worker or a process of torchrun killed, two processes in one folder, a run folder that vanishes or
           becomes read-only, a loss that is NaN, memory that runs out: one line and status 2, and then the same bytes
captions   captions files of every format with bytes changed, cut, doubled: a table or one UserError
images     image files of every format, changed in the same ways: pixels, or one UserError
broken     a run on a data set with the broken and the unusual files that people have: it completes and lists them
models     files of a run, an index and an exported folder cut, changed, swapped, replaced by a pickle: a UserError or a
           model; the pickle is never opened
soak       training, indexing and searching in one process for --soak minutes: memory, file handles, temporary files
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing import active_children
from pathlib import Path

from clip_scratch.errors import UserError, run_command

from .fuzz import BROKEN, captions, image_files, images, mutated, silent, within
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


@dataclass
class Arguments:
    """Try to break the commands; prints a table of what was tried and survived."""

    only: list[str] = field(default_factory=list)  # kills, disks, accidents, captions, ...; none: all
    kills: int = 200  # processes to kill, a quarter as many disks to fill, and a fortieth of each accident
    fuzz: int = 10_000  # captions files, and images
    soak: float = 5.0  # minutes
    seed: int = 0


def main(arguments: Arguments) -> Counter:
    """Run the trials; returns how many of each kind ended how. Raises UserError for an unknown kind."""
    kinds = {kind.__name__: kind for kind in (kills, disks, accidents, captions, images, broken, models, soak)}
    for name in arguments.only:
        if name not in kinds:
            raise UserError(f"--only takes {', '.join(kinds)}, not {name!r}")
    tally: Counter = Counter()
    with tempfile.TemporaryDirectory(prefix="clip-scratch-faults-") as work:
        for name in arguments.only or kinds:
            found: Counter = Counter()
            try:
                kinds[name](arguments, Path(work), lambda what, outcome, found=found: found.update([(what, outcome)]))
            finally:
                print(f"\n{name:<60} {'times':>7}  outcome")
                for (what, outcome), times in sorted(found.items()):
                    print(f"{what:<60} {times:>7,}  {outcome}", flush=True)
            tally += found
    return tally


# ---- commands in processes of their own


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


def digest(folder: Path) -> str:
    """The SHA-256 of all files but those that hold times; of an index its embeddings by name."""
    from safetensors.torch import load_file

    from clip_scratch.training.run import load_tree

    sha = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name in _UNEQUAL or "tfevents" in path.name:
            continue
        if path.suffix == ".safetensors":  # its header has no fixed order
            weights = load_tree(path)["model"] if path.name == "training.safetensors" else load_file(path)
            content = b"".join(name.encode() + weights[name].numpy().tobytes() for name in sorted(weights))
        else:
            content = path.read_bytes()
        sha.update(path.relative_to(folder).as_posix().encode() + content)
    if (folder / "index.json").exists():
        from clip_scratch.retrieval.index import Index

        found = Index.open(folder).search("a red circle", n=10_000)
        sha.update(repr(sorted((name, round(score, 2)) for name, score in found)).encode())
    return sha.hexdigest()


def _materials(work: Path) -> None:
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


def _whole(words: list[str], work: Path) -> tuple[str, float]:
    """The digest of what a command leaves, and its seconds."""
    folder = work / "whole"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    began = time.monotonic()
    status = finish(words, folder, work / "said")
    assert status == 0, (work / "said").read_text()[-2000:]
    return digest(folder / "out"), time.monotonic() - began


def _outcome(status: int, folder: Path, expected: str, said: Path) -> str:
    if status:
        return f"FAILED to go on: {said.read_text()[-300:]}"
    if found := [path.name for path in (folder / "out").rglob(".*.tmp")]:
        return f"LEFT temporary files: {found[:3]}"
    return "the same bytes in the end" if digest(folder / "out") == expected else "OTHER bytes in the end"


def kills(arguments: Arguments, work: Path, count: Callable[[str, str], None]) -> None:
    """Signals at random moments of every job."""
    _materials(work)
    chance = random.Random(arguments.seed)
    for number, (name, words) in enumerate(JOBS.items()):
        expected, seconds = _whole(words, work)
        share = arguments.kills // len(JOBS) + (number < arguments.kills % len(JOBS))
        for n in range(share):
            kind = (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)[n % 4]
            folder, said = work / "killed", work / "said"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            process = start(words, folder, said)
            time.sleep(chance.uniform(0, seconds))
            if process.exitcode is None:
                os.kill(process.pid, kind)
            process.join()
            if kind == signal.SIGINT and said.exists() and "Traceback" in said.read_text():
                count(f"{kind.name} in {name}", "a TRACEBACK")
            count(f"{kind.name} in {name}", _outcome(go_on(words, folder, said), folder, expected, said))


def disks(arguments: Arguments, work: Path, count: Callable[[str, str], None]) -> None:
    """Small disks, which fill up at a random write."""
    _materials(work)
    disk = work / "disk"
    disk.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True).returncode:
        print("disks: left out, only root can mount a small disk here")
        return
    chance = random.Random(arguments.seed)
    try:
        for name, words in JOBS.items():
            expected, _ = _whole(words, work)
            size = sum(path.stat().st_size for path in (work / "whole").rglob("*") if path.is_file())
            for link in ("data", "clip", "run"):
                (disk / link).unlink(missing_ok=True)
                (disk / link).symlink_to(work / link)
            for _ in range(max(1, arguments.kills // 4 // len(JOBS))):
                folder, said = disk / "job", work / "said"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                room = int(size * chance.uniform(0.02, 0.7)) // 4096 * 4096 + 65536
                subprocess.run(["mount", "-o", f"remount,size={room}", str(disk)], check=True)
                status = finish(words, folder, said)
                text = said.read_text()
                subprocess.run(["mount", "-o", f"remount,size={100 * size}", str(disk)], check=True)
                if status not in (0, 2) or "Traceback" in text:
                    count(f"a full disk in {name}", f"STATUS {status}: {text[-300:]}")
                elif status == 0:
                    count(f"a full disk in {name}", "there was room enough")
                else:
                    outcome = _outcome(go_on(words, folder, said), folder, expected, said)
                    count(f"a full disk in {name}", f"one line, then {outcome}")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def accidents(arguments: Arguments, work: Path, count: Callable[[str, str], None]) -> None:
    """What befalls a training run from outside, or in its computation."""
    _materials(work)
    chance, said, other = random.Random(arguments.seed), work / "said", work / "other said"
    longer = ["12" if before == "--epochs" else word for before, word in zip(["", *TRAIN], TRAIN, strict=False)]
    decoding = [*longer, "--no-image-cache", "--num-workers", "2"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", *longer]
    befallen = {
        "a worker is killed": (decoding, _kill_a_child, None),
        "a process of torchrun is killed": (torchrun, _kill_a_child, None),
        "the folder vanishes": (longer, lambda p, out: out.rename(out.with_name("gone")), _back_again),
        "the folder becomes read-only": (longer, _read_only, lambda out: subprocess.run(["umount", out], check=True)),
        "another run in the folder": (longer, lambda p, out: finish(longer, out.parent, other), None),
    }
    for name, (words, befall, mend) in befallen.items():
        expected, _ = _whole(words, work)
        for _ in range(max(1, arguments.kills // 40)):
            folder = work / "befallen"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            process = start(words, folder, said)
            while process.is_alive() and not (folder / "out/config.json").exists():
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 0.5))
            befall(process, folder / "out")
            process.join(300)
            if mend:
                mend(folder / "out")
            text = (other if befall is befallen["another run in the folder"][1] else said).read_text()
            how = f"status {process.exitcode}"
            if "Traceback" in text and words is not torchrun:
                how = f"a TRACEBACK ({text.strip().splitlines()[-1][:300]})"
            status = 0 if process.exitcode == 0 else go_on(words, folder, said)
            count(name, f"{how}, then {_outcome(status, folder, expected, said)}")
    _not_finite_and_too_large(work, count)


def _kill_a_child(process, out: Path) -> None:
    """Kill a process that works for this one: a loader's, which a server forks, or one of torchrun's."""
    working = []
    while process.is_alive() and len(working) < 2:  # the server and a worker, which begins in each epoch
        time.sleep(0.005)
        working = _below(process.pid)
    if working:
        os.kill(max(working), signal.SIGKILL)


def _below(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    with contextlib.suppress(OSError):  # it has ended
        lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
        own = [int(child) for children in lists for child in children]
        return own + [other for child in own for other in _below(child)]
    return []


def _read_only(process, out: Path) -> None:
    subprocess.run(["mount", "--bind", out, out], check=True)
    # Busy while a file is open for writing
    while (
        subprocess.run(["mount", "-o", "remount,bind,ro", out], capture_output=True).returncode and process.is_alive()
    ):
        time.sleep(0.005)


def _back_again(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.with_name("gone").rename(out)


def _not_finite_and_too_large(work: Path, count: Callable[[str, str], None]) -> None:
    """A learning rate that makes the loss NaN, and images for which 1 GB is too little."""
    said = work / "said"
    for name, settings, room, wanted in (
        ("a loss that is NaN", ["--head-lr", "1e30", "--grad-clip", "0"], 0, "is nan at batch"),
        ("memory that runs out", ["--batch-size", "96", "--size", "448"], 2**30, "--micro-batch-size"),
    ):
        shutil.rmtree(work / "failed", ignore_errors=True)
        (work / "failed").mkdir()
        status, text = finish([*TRAIN, *settings], work / "failed", said, room), said.read_text()
        is_line = status == 2 and wanted in text and "Traceback" not in text
        count(name, "status 2 and one line" if is_line else f"STATUS {status}: {text[-300:]}")
        if is_line and room:
            size = text.partition("--micro-batch-size ")[2].split()[0]
            shutil.rmtree(work / "failed/out", ignore_errors=True)
            again = [*TRAIN, *settings, "--micro-batch-size", size, "--epochs", "1"]
            status = finish(again, work / "failed", said, room)
            count(
                f"{name}: the size that is named",
                "fits" if status == 0 else f"STATUS {status}: {said.read_text()[-300:]}",
            )


# ---- damaged files


def broken(arguments: Arguments, work: Path, count: Callable[[str, str], None]) -> None:
    """A run on a data set of which 3 % of the images are broken, each in a way of its own, and 5 % unusual."""
    _materials(work)
    folder = work / "some broken"
    shutil.copytree(work / "data", folder)
    names = sorted(path.name for path in (folder / "Images").iterdir())
    odd = {"cut in half": (folder / "Images" / names[0]).read_bytes()[:200]} | BROKEN
    bad = names[:: max(1, len(names) // len(odd))][: len(odd)]  # each kind once
    for name, content in zip(bad, odd.values(), strict=True):
        (folder / "Images" / name).write_bytes(content)
    fine = [name for name in names if name not in bad]
    for name, content in zip(fine, image_files().values(), strict=False):  # unusual, or under a wrong extension
        (folder / "Images" / name).write_bytes(content)
    settings = ["--captions-path", str(folder), "--on-bad-image", "skip"]
    words = [word for word in TRAIN if word not in ("--n-scenes", "120")]
    status = finish([*words, *settings], folder, work / "said")
    said = (work / "said").read_text()
    missing = [name for name in bad if name not in said]
    count("a run with broken images", f"MISSED {missing}" if status or missing else "completed, all were listed")


class _Bomb:
    def __reduce__(self):
        return os.mkdir, (str(Path(tempfile.gettempdir(), "clip-scratch-bomb")),)


DAMAGES = {
    "cut": lambda content, chance: content[: chance.randrange(len(content))],
    "changed": mutated,
    "a pickle": lambda content, chance: pickle.dumps(_Bomb()),
    "empty": lambda content, chance: b"",
    "other JSON": lambda content, chance: b'{"a": [1, {"b": null}]}',
}


def models(arguments: Arguments, work: Path, count: Callable[[str, str], None]) -> None:
    """Damaged and foreign files in a run, an index and an exported folder."""
    from clip_scratch import CFG, Index, load
    from clip_scratch.models.hf_clip import HFCLIPModel
    from clip_scratch.train import main as train

    _materials(work)
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    bomb = Path(tempfile.gettempdir(), "clip-scratch-bomb")
    bomb.rmdir() if bomb.exists() else None
    if not (work / "index").exists():
        assert finish([*INDEX[:-1], "../index"], work / "data", work / "said") == 0, (work / "said").read_text()[-2000:]
    opened = {
        "run": lambda folder: load(folder, "cpu"),
        "run, resumed": lambda folder: train(CFG(resume=str(folder))),
        "index": lambda folder: Index.open(folder).search("a red circle"),
        "clip": lambda folder: HFCLIPModel(CFG(backend="hf_clip", model_name=str(folder), device="cpu")),
    }
    chance = random.Random(arguments.seed)
    for kind, open_folder in opened.items():
        whole = work / kind.partition(",")[0]
        files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file() and path.stat().st_size]
        for name in files:
            for damage, change in DAMAGES.items():
                folder = work / "damaged"
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(whole, folder)
                (folder / name).write_bytes(change((whole / name).read_bytes(), chance))
                with silent():
                    outcome = within(120, open_folder, folder)
                outcome = outcome if outcome[0].islower() or outcome.startswith("UNEXPECTED") else "opened"
                if outcome.startswith("UNEXPECTED"):
                    outcome = f"{name}: {outcome}"
                count(f"{kind}: {damage}", "EXECUTED" if bomb.exists() else outcome)


# ---- hours of it


def _state() -> tuple[float, int, int]:
    """Resident MB, open file handles, and processes that this one started."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6, len(os.listdir("/proc/self/fd")), len(active_children())


def soak(arguments: Arguments, work: Path, count: Callable[[str, str], None]) -> None:
    """Train, index and search again and again in one process."""
    from clip_scratch import Index
    from clip_scratch.cli import parse
    from clip_scratch.retrieval.indexing import update_index
    from clip_scratch.train import main as train

    _materials(work)
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    began, rounds, states = time.monotonic(), 0, []
    cfg, before = parse(TRAIN[1:-2]), os.getcwd()  # once a process, as in a command: tyro keeps what it parsed
    os.chdir(work)
    while time.monotonic() - began < 60 * arguments.soak or rounds < 4:
        folder = work / f"soak{rounds % 2}"
        shutil.rmtree(folder, ignore_errors=True)
        with silent():
            workers = {"image_cache": False, "num_workers": 1} if rounds % 2 else {}
            run = train(replace(cfg, run_dir=str(folder / "run"), **workers))
            update_index(run, work / "data/Images", folder / "index", device="cpu")
            index = Index.open(folder / "index")
            for n in range(200):
                index.search(f"a red circle {n}")
        states.append(_state())
        rounds += 1
    os.chdir(before)
    left = list(work.rglob(".*.tmp"))
    print("round: MB, file handles, processes")
    for number in sorted({2, *range(rounds // 8, rounds, max(1, rounds // 8)), rounds - 1}):
        print(f"{number + 1:>5}: {states[number][0]:.0f}, {states[number][1]}, {states[number][2]}")
    count(
        "rounds of training, indexing, 200 searches",
        f"{rounds} in {(time.monotonic() - began) / 60:.0f} min: {states[2][0]:.0f} MB and {states[2][1]} file handles "
        f"after the third, {states[-1][0]:.0f} MB and {states[-1][1]} after the last, {states[-1][2]} processes and "
        f"{len(left)} temporary files left",
    )


if __name__ == "__main__":
    import tyro

    run_command(lambda: main(tyro.cli(Arguments, prog="python -m benchmarks.faults")))
