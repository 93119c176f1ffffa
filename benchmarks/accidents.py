"""What befalls a training run from outside, or in its computation, as benchmarks/faults.py tries it."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .jobs import TRAIN, finish, go_on, materials, outcome_of, run_whole, start

if TYPE_CHECKING:
    from .faults import Arguments


def accidents(arguments: Arguments, work: Path, count: Callable[[str, str], None]) -> None:
    """What befalls a training run from outside, or in its computation."""
    materials(work)
    chance, said, other = random.Random(arguments.seed), work / "said", work / "other said"
    longer = [*TRAIN]
    longer[longer.index("--epochs") + 1] = "6"
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
        expected, _ = run_whole(words, work)
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
            text = said.read_text() + (other.read_text() if other.exists() else "")
            how = f"status {process.exitcode}"
            if "Traceback" in text and words is not torchrun:
                how = f"a TRACEBACK ({text.strip().splitlines()[-1][:300]})"
            status = 0 if process.exitcode == 0 else go_on(words, folder, said)
            count(name, f"{how}, then {outcome_of(status, folder, expected, said)}")
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
    """A learning rate that makes the loss NaN, and images for which 3 GiB are too little: pyarrow reserves one."""
    said = work / "said"
    for name, settings, room, wanted in (
        ("a loss that is NaN", ["--head-lr", "1e30", "--grad-clip", "0"], 0, "is nan at batch"),
        ("memory that runs out", ["--batch-size", "96", "--size", "448"], 3 * 2**30, "--micro-batch-size"),
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
