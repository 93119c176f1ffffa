"""What was tried to break the commands, and how often they survived: `python -m benchmarks.faults`.

    python -m benchmarks.faults --kills 200          as root, for the small disks; about an hour on two cores
    python -m benchmarks.faults --only captions images --fuzz 1000

kills      SIGKILL, one time in four SIGINT or SIGTERM, at a random moment of training, tuning, drawing, sharding,
           indexing and exporting: the same command, or --resume, goes on and ends with the same bytes
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

import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing import active_children
from pathlib import Path

from clip_scratch.errors import UserError, run_command
from clip_scratch.files import is_unfinished

from .accidents import accidents
from .fuzz import BROKEN, captions, image_files, images, mutated, silent, within
from .jobs import INDEX, JOBS, TRAIN, finish, go_on, materials, outcome_of, run_whole, start


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


def kills(arguments: Arguments, work: Path, count: Callable[[str, str], None]) -> None:
    """Signals at random moments of every job."""
    materials(work)
    chance = random.Random(arguments.seed)
    for number, (name, words) in enumerate(JOBS.items()):
        expected, seconds = run_whole(words, work)
        share = arguments.kills // len(JOBS) + (number < arguments.kills % len(JOBS))
        for n in range(share):
            kind = signal.SIGKILL if n % 4 else (signal.SIGINT, signal.SIGTERM)[n // 4 % 2]
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
            count(f"{kind.name} in {name}", outcome_of(go_on(words, folder, said), folder, expected, said))


def disks(arguments: Arguments, work: Path, count: Callable[[str, str], None]) -> None:
    """Small disks, which fill up at a random write."""
    materials(work)
    disk = work / "disk"
    disk.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True).returncode:
        print("disks: left out, only root can mount a small disk here")
        return
    chance = random.Random(arguments.seed)
    try:
        for name, words in JOBS.items():
            expected, _ = run_whole(words, work)
            size = sum(path.stat().st_size for path in (work / "whole/out").rglob("*") if path.is_file())
            for link in ("data", "clip", "run"):
                (disk / link).unlink(missing_ok=True)
                (disk / link).symlink_to(work / link)
            for _ in range(max(1, arguments.kills // 4 // len(JOBS))):
                folder, said = disk / "job", work / "said"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                room = int(size * chance.uniform(0.02, 0.98)) // 4096 * 4096 + 8192
                subprocess.run(["mount", "-o", f"remount,size={room}", str(disk)], check=True)
                status = finish(words, folder, said)
                text = said.read_text()
                subprocess.run(["mount", "-o", f"remount,size={100 * size}", str(disk)], check=True)
                if status not in (0, 2) or "Traceback" in text:
                    count(f"a full disk in {name}", f"STATUS {status}: {text[-300:]}")
                elif status == 0:
                    count(f"a full disk in {name}", "there was room enough")
                else:
                    outcome = outcome_of(go_on(words, folder, said), folder, expected, said)
                    count(f"a full disk in {name}", f"one line, then {outcome}")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # a process may be about to end


# ---- damaged files


def broken(arguments: Arguments, work: Path, count: Callable[[str, str], None]) -> None:
    """A run on a data set of which 1 % of the images are broken, each in a way of its own, and some unusual."""
    from clip_scratch.data.scenes.write import write_scenes

    folder = work / "some broken"
    write_scenes(folder, 600, seed=3, progress=False)
    names = sorted(path.name for path in (folder / "Images").iterdir())
    odd = {"cut in half": (folder / "Images" / names[0]).read_bytes()[:200]} | BROKEN
    bad = names[:: len(names) // len(odd)][: len(odd)]  # each kind once
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

    materials(work)
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

    materials(work)
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
    left = [path for path in work.rglob(".*") if is_unfinished(path)]
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
