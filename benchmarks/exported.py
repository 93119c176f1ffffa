"""Images and captions per second of a run's towers: torch, onnxruntime and OpenVINO, fp32, bf16 and int8.

    python -m benchmarks.exported runs/speedrun --onnx models/speedrun-onnx --int8 models/speedrun-int8

The folders are those of `export --format onnx`. All take turns, three rounds, in one process with all cores; medians,
and the ratio to torch in fp32. What a machine does not have (bf16 arithmetic, OpenVINO) is left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tyro.conf import Positional

from clip_scratch.device import computes_in_bf16, keep_freed_memory
from clip_scratch.models.saved import load

IMAGES, CAPTIONS, TOKENS = 32, 64, 16


@dataclass
class Arguments:
    """Compare the speed of exported towers with torch's."""

    run: Positional[str]
    onnx: str = ""  # folder of the fp32 export
    int8: str = ""  # folder of the int8 export
    rounds: int = 3


def contenders(arguments: Arguments) -> dict[str, tuple[Callable, Callable]]:
    """Name -> functions that embed a batch of images, and of captions."""
    found = {}
    for precision in ("fp32", "bf16"):
        if precision == "fp32" or computes_in_bf16(torch.device("cpu")):
            model = load(arguments.run)
            model.cfg.precision = precision
            model.apply_memory_format()
            found[f"torch {precision}"] = model.encode_image, model.encode_text
    for kind, folder in (("fp32", arguments.onnx), ("int8", arguments.int8)):
        if folder:
            import onnxruntime

            image, text = (onnxruntime.InferenceSession(Path(folder) / f"{name}.onnx") for name in ("image", "text"))
            found[f"onnxruntime {kind}"] = (
                lambda pixels, image=image: image.run(None, {"pixel_values": pixels.numpy()}),
                lambda ids, mask, text=text: text.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}),
            )
            try:
                import openvino
            except ImportError:
                continue
            core = openvino.Core()
            for precision in (kind, "bf16") if kind == "fp32" and "torch bf16" in found else (kind,):
                hint = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32"}
                towers = [core.compile_model(Path(folder) / f"{name}.onnx", "CPU", hint) for name in ("image", "text")]
                found[f"OpenVINO {precision}"] = (
                    lambda pixels, tower=towers[0]: tower([pixels.numpy()]),
                    lambda ids, mask, tower=towers[1]: tower([ids.numpy(), mask.numpy()]),
                )
    return found


def rate(embed: Callable[[], object], n: int) -> float:
    """Rows per second, from about two seconds."""
    embed()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < 2:
        embed()
        done += n
    return done / (time.perf_counter() - began)


@torch.inference_mode()
def main(arguments: Arguments) -> None:
    """Print a table."""
    keep_freed_memory()
    cfg = load(arguments.run).cfg
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (IMAGES, 3, cfg.size, cfg.size), np.uint8))
    ids = torch.from_numpy(rng.integers(1000, 2000, (CAPTIONS, TOKENS)))
    mask = torch.ones_like(ids)
    towers = contenders(arguments)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in towers}
    for _ in range(arguments.rounds):
        for name, (image, text) in towers.items():
            own = rate(lambda image=image: image(pixels), IMAGES), rate(lambda text=text: text(ids, mask), CAPTIONS)
            rates[name].append(own)
    medians = {
        name: [statistics.median(column) for column in zip(*rounds, strict=True)] for name, rounds in rates.items()
    }
    base = medians["torch fp32"]
    print(f"{'':<20}{'images/s':>10}{'':>8}{'captions/s':>12}")
    for name, (images, captions) in medians.items():
        print(f"{name:<20}{images:>10.0f}{images / base[0]:>7.2f}x{captions:>12.0f}{captions / base[1]:>7.2f}x")


if __name__ == "__main__":
    import tyro

    from clip_scratch.errors import run_command

    run_command(lambda: main(tyro.cli(Arguments, prog="python -m benchmarks.exported")))
