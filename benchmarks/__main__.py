"""Measure this package against a classical loop and a peer: `python -m benchmarks [--captions-path F]`.

Writes results.json (every round, the machine), table.md and ratios.png. README.md beside this file explains the rows.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from clip_scratch.errors import UserError, run_command, suggest


@dataclass
class Arguments:
    """Measure speed and memory against a classical loop and a peer, in turns on this machine."""

    captions_path: str = ""  # captions file or folder, as `train` takes it; empty: the built-in scenes
    image_path: str = ""  # folder of its images, if it is not found automatically
    output_dir: str = "benchmarks/results"  # where results.json, table.md and ratios.png go
    # imports, loader, training, compact, heads, tricks, compile, peer, search, gpu; none: all
    only: list[str] = field(default_factory=list)
    rounds: int = 3  # rounds of each contender
    quick: bool = False  # tiny towers, few scenes, one round: checks that everything runs


def main(arguments: Arguments) -> Path:
    """Run the groups one after the other and return the folder of the results. Raises UserError."""
    from .contenders import Setup
    from .groups import GROUPS

    if arguments.rounds < 1:
        raise UserError(f"--rounds is at least 1, not {arguments.rounds}")
    for name in arguments.only:
        if name not in GROUPS:
            raise UserError(f"--only takes {', '.join(GROUPS)}, not {name!r}.{suggest(name, GROUPS)}")
    output = Path(arguments.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {output} cannot be made: {error.strerror}. Set --output-dir.") from error
    with tempfile.TemporaryDirectory(prefix="clip-scratch-benchmarks-") as work:
        captions, data = arguments.captions_path, f"data: {Path(arguments.captions_path).name}"
        if not captions:
            from clip_scratch.data.scenes.write import write_scenes

            n = 60 if arguments.quick else 1500
            print(f"drawing {n:,} scenes", flush=True)
            write_scenes(Path(work) / "scenes", n, seed=0, progress=False)
            captions, data = str(Path(work) / "scenes"), f"data: {n:,} built-in scenes"
        setup = Setup(captions, arguments.image_path, str(Path(work) / "cache"))
        if arguments.quick:
            setup = Setup(
                captions, arguments.image_path, setup.cache_path, "test_resnet", "bert-tiny", size=32, batch_size=8,
                seconds=0.05, matmul=128,
            )  # fmt: skip
        run(arguments, setup, output, work, data)
    return output


def run(arguments: Arguments, setup, output: Path, work: str, data: str) -> None:
    """Measure group by group; results are written after each, so that a later error loses none."""
    from clip_scratch.environment import environment

    from . import groups, rows, table
    from .rounds import take_turns

    began = time.perf_counter()
    rounds = 1 if arguments.quick else arguments.rounds
    measured: dict[str, dict] = {}
    machine = environment()

    def log(text: str) -> None:
        print(f"{(time.perf_counter() - began) / 60:5.1f} min  {text}", flush=True)

    for name in groups.GROUPS:
        if arguments.only and name not in arguments.only:
            continue
        reason = groups.why_left_out(name)
        if arguments.quick and name in ("compile", "peer", "search"):
            reason = "--quick leaves it out"
        log(f"{name}: left out, {reason}" if reason else name)
        if reason:
            measured[name] = {"left_out": reason}
        elif name == "imports":
            counts = (1, 1) if arguments.quick else (7, 3)
            measured[name] = {"rounds": groups.import_rounds(*counts), "facts": {}}
        else:
            timeout = groups.BUILD_TIMEOUT.get(name)
            try:
                done, facts = take_turns(groups.contenders(name, setup, work), rounds, log, timeout)
                measured[name] = {"rounds": done, "facts": facts}
            except UserError as error:
                if timeout is None:
                    raise
                log(f"  {error}")  # torch.compile does not work everywhere
                measured[name] = {"left_out": str(error)}
        results = {
            "environment": machine,
            "data": data,
            "setup": {key: value for key, value in asdict(setup).items() if not key.endswith("_path")},
            "seconds": time.perf_counter() - began,
            "targets": rows.reached(rows.TARGETS, measured),
            "further": rows.reached(rows.TRICKS, measured),
            "arithmetic": rows.arithmetic(measured),
            "groups": measured,
        }
        (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (output / "table.md").write_text(table.markdown(results))
    table.draw(results, output / "ratios.png")
    print(f"\n{table.markdown(results)}\nwritten: {output}/results.json, table.md and ratios.png")


if __name__ == "__main__":
    import tyro

    run_command(lambda: main(tyro.cli(Arguments, prog="python -m benchmarks")))
