"""Memory and time of large batches, and the speed of several processes.

    python -m benchmarks.scaling [--plot docs/scaling.png]

Each figure comes from a process of its own, whose memory is the rise of its peak resident set (on a GPU of the
allocator's peak) over what batch, weights or embeddings take; times are medians of three, after one that is not
counted. The steps train the towers of the `scenes` preset at 64 pixels on random images, in fp32 on a CPU and bf16 on a
GPU. "plain" is a step at once with a matrix of logits, "tiled" at once with the loss in tiles, "parts" GradCache in
parts of 64 images.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_PART = 64
_DIMENSIONS = 256


@dataclass
class Arguments:
    """Measure large batches and several processes."""

    batch_sizes: tuple[int, ...] = (256, 1024, 4096, 16384, 32768)
    most_gigabytes: float = 12  # what is expected to take more memory is left out
    processes: tuple[int, ...] = (1, 2)
    plot: str = ""  # write memory by batch size to this PNG
    measure: tuple[str, ...] = ()  # of a process of its own: what, path, batch size


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_bytes() -> int:
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def synchronize() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def loss_step(path: str, n: int) -> Callable[[], object]:
    """Loss and gradients of n embeddings, as a matrix or in tiles."""
    from clip_scratch.training import losses

    losses.TILED_FROM = 2**63 if path == "plain" else 0
    images, texts = (torch.nn.functional.normalize(torch.randn(n, _DIMENSIONS, device=device())) for _ in range(2))
    ids = torch.arange(n, device=device())

    def step() -> None:
        leaves = images.clone().requires_grad_(), texts.clone().requires_grad_()
        losses.contrastive_loss(*leaves, 20.0, ids, ids, ids).backward()

    return step


def training_step(path: str, n: int) -> Callable[[], object]:
    """A whole step of two small towers on n images and captions."""
    from clip_scratch.models.build import build_model
    from clip_scratch.presets import Scenes
    from clip_scratch.training import losses
    from clip_scratch.training.engine import backward, loss_function

    losses.TILED_FROM = 2**63 if path == "plain" else 0
    precision = "bf16" if device().type == "cuda" else "fp32"
    words = ["a red circle left of a large blue square on a plain grey background"]
    cfg = Scenes(precision=precision, device=device().type)
    model = build_model(cfg, words * 100).to(device())
    model.apply_memory_format()
    ids = torch.arange(n, device=device())
    length = 24
    batch = {
        "pixel_values": torch.randint(0, 256, (n, 3, cfg.size, cfg.size), dtype=torch.uint8, device=device()),
        "input_ids": torch.randint(5, len(model.tokenizer), (n, length), device=device()),
        "attention_mask": torch.ones(n, length, dtype=torch.long, device=device()),
        "image_ids": ids, "caption_image_ids": ids, "caption_ids": ids,
    }  # fmt: skip
    parts = _PART if path == "parts" else 0

    def step() -> None:
        model.zero_grad(set_to_none=True)
        backward(model, batch, loss_function(model, model.cfg), None, 1.0, parts)

    return step


def measure(what: str, path: str, n: int) -> dict[str, float]:
    """Peak bytes above what is there before, and seconds."""
    from clip_scratch.device import keep_freed_memory

    keep_freed_memory()
    torch.manual_seed(0)
    make = loss_step if what == "loss" else training_step
    make(path, _PART)()  # libraries and their workspaces
    step = make(path, n)
    synchronize()
    before = peak_bytes()
    step()
    synchronize()
    peak = peak_bytes() - before
    seconds = []
    for _ in range(3 if n <= 4096 else 1):
        began = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return {"bytes": peak, "seconds": statistics.median(seconds)}


def in_own_process(*what: str) -> dict[str, float] | None:
    """`measure` in a new process; None where it is killed for memory."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", "--measure", *what], stdout=subprocess.PIPE, check=False
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def expected_gigabytes(what: str, path: str, n: int) -> float:
    """Of a matrix of logits about 30 bytes a pair; of a step at once 3.3 MB an image (measured at 1,024)."""
    matrix = 30e-9 * n * n if path == "plain" else 0
    return matrix + (3.3e-3 * n if what == "step" and path != "parts" else 0)


def pairs_per_second(processes: int) -> float:
    """Of `train` on the scenes, from the last of three epochs."""
    words = ["-m", "clip_scratch.train", "--n-scenes", "3000", "--epochs", "3", "--minutes", "0", "--run-dir", "run"]
    words += [] if device().type == "cuda" else ["--device", "cpu"]
    threads = max(1, (os.cpu_count() or 1) // processes)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.getcwd()}
        subprocess.run([*command, *words], cwd=folder, env=env, check=True, capture_output=True)
        lines = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["pairs_per_second"]


def main(arguments: Arguments) -> None:
    """Print three tables."""
    if arguments.measure:
        what, path, n = arguments.measure
        print(json.dumps(measure(what, path, int(n))))
        return
    found: dict[tuple[str, str], dict[int, dict]] = {}
    for what, paths in (("loss", ("plain", "tiled")), ("step", ("plain", "tiled", "parts"))):
        print(f"\n{what:<6} batch " + "".join(f"{path:>22}" for path in paths))
        for n in arguments.batch_sizes:
            cells = []
            for path in paths:
                fits = expected_gigabytes(what, path, n) <= arguments.most_gigabytes
                result = in_own_process(what, path, str(n)) if fits else None
                if result:
                    found.setdefault((what, path), {})[n] = result
                cells.append(f"{result['bytes'] / 1e9:9.2f} GB {result['seconds']:8.2f} s" if result else "left out")
            print(f"{'':<6}{n:>6} " + "".join(f"{cell:>22}" for cell in cells), flush=True)
    print("\nprocesses  pairs/s  efficiency")
    rates = [statistics.median(pairs_per_second(n) for _ in range(3)) for n in arguments.processes]
    for n, rate in zip(arguments.processes, rates, strict=True):
        share = rate / rates[0] * arguments.processes[0] / (n if device().type == "cuda" else 1)
        print(f"{n:>9}  {rate:>7.0f}  {100 * share:>8.0f} %", flush=True)
    if arguments.plot:
        draw(found, Path(arguments.plot))


def draw(found: dict[tuple[str, str], dict[int, dict]], path: Path) -> None:
    """Peak memory by batch size."""
    from matplotlib.figure import Figure

    from clip_scratch.files import write_figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("loss", "step"), strict=True):
        for (of, name), points in found.items():
            if of == what:
                axes.plot(list(points), [point["bytes"] / 1e9 for point in points.values()], marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="images in a batch", ylabel="peak memory, GB", title=what)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend()
    write_figure(figure, path)


if __name__ == "__main__":
    import tyro

    from clip_scratch.errors import run_command

    run_command(lambda: main(tyro.cli(Arguments, prog="python -m benchmarks.scaling")))
