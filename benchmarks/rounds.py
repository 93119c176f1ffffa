"""Contenders in separate processes that take turns: one computes, the others wait.

Allocator setting and peak memory belong to a process, so contenders cannot share one. All are started first; then each
runs round 1, each runs round 2, and so on. Other load on the machine affects all alike, so a ratio within a round is
fair.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from clip_scratch.errors import UserError

Figures = dict[str, tuple[float, float]]  # of one round: name -> (count, seconds)
Rounds = list[dict[str, Figures]]  # a round: contender -> its figures

# Imported once in the fork server, before any thread runs there
_PRELOAD = ["torch", "timm", "transformers", "albumentations", "cv2", "pandas", "benchmarks.contenders"]


def process_context() -> multiprocessing.context.BaseContext:
    os.environ.setdefault("TQDM_DISABLE", "1")  # inherited by the children
    if sys.platform != "linux":  # elsewhere fork is unsafe or does not exist
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def peak_memory() -> int:
    """Peak resident memory of this process in bytes; 0 on Windows."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes, except on macOS


def _release_memory() -> None:
    """Return freed memory to the system, so that waiting children do not fill the machine together."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc
        trim(0)


def _serve(pipe, build: Callable[[], object]) -> None:
    """Main function of a child: build the contender, then answer requests until the pipe closes."""
    try:
        contender = build()
        _release_memory()
        pipe.send(("ready", None))
        while (request := pipe.recv()) != "close":
            if request == "round":
                figures = contender.round()
                _release_memory()
                pipe.send(("figures", figures))
            else:
                pipe.send(("facts", contender.facts() | {"peak_memory": peak_memory()}))
    except (EOFError, KeyboardInterrupt):  # the parent has ended
        pass
    except UserError as error:
        pipe.send(("user error", str(error)))
    except Exception:
        pipe.send(("failure", traceback.format_exc()))


class Child:
    """A contender in its own process, where `build` returns an object with `round()` and `facts()`."""

    def __init__(self, name: str, build: Callable[[], object]):
        self.name = name
        context = process_context()
        self.pipe, far_end = context.Pipe()
        # not a daemon: a contender may start workers
        self.process = context.Process(target=_serve, args=(far_end, build), name=name)
        self.process.start()
        far_end.close()

    def ready(self, timeout: float | None = None) -> None:
        """Wait until it is built. Raises UserError if it fails, dies or takes more than `timeout` seconds."""
        self._answer(timeout)

    def round(self) -> Figures:
        """Run one round. Raises UserError if the child fails or dies."""
        return self._ask("round")

    def facts(self) -> dict[str, object]:
        """What is the same in every round, and the peak memory in bytes."""
        return self._ask("facts")

    def _ask(self, request: str) -> dict:
        try:
            self.pipe.send(request)
        except OSError:
            self._died()
        return self._answer(None)

    def _answer(self, timeout: float | None) -> dict:
        if not self.pipe.poll(timeout):
            raise UserError(f"the benchmark's contender {self.name!r} was not ready within {timeout:.0f} s")
        try:
            status, answer = self.pipe.recv()
        except (EOFError, OSError):
            self._died()
        if status == "user error":
            raise UserError(answer)
        if status == "failure":
            print(answer, file=sys.stderr)
            raise UserError(f"the benchmark's contender {self.name!r} failed: {answer.strip().splitlines()[-1]}")
        return answer

    def _died(self) -> None:
        self.process.join(10)
        raise UserError(
            f"the benchmark's contender {self.name!r} died (exit status {self.process.exitcode}): free some memory, "
            "or choose other groups with --only"
        )

    def close(self) -> None:
        """End the process."""
        try:
            self.pipe.send("close")
            self.process.join(5)
        except OSError:
            pass
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


def take_turns(
    builds: dict[str, Callable[[], object]], rounds: int, log: Callable[[str], None], timeout: float | None = None
) -> tuple[Rounds, dict[str, dict[str, object]]]:
    """Build the contenders, run `rounds` rounds in turns, and return the figures and the facts. `log` prints a line."""
    children: list[Child] = []
    results: Rounds = []
    try:
        for name, build in builds.items():
            log(f"  {name}: building and warming up")
            children.append(Child(name, build))
            children[-1].ready(timeout)
        for number in range(rounds):
            results.append({child.name: child.round() for child in children})
            rates = [
                f"{name} {measure} {count / seconds:.4g}/s"
                for name, figures in results[-1].items()
                for measure, (count, seconds) in figures.items()
            ]
            log(f"  round {number + 1}/{rounds}: {', '.join(rates)}")
        facts = {child.name: child.facts() for child in children}
    finally:
        for child in children:
            child.close()
    return results, facts


@dataclass
class Spread:
    """Median, least and greatest of a figure over the rounds."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


def rates(rounds: Rounds, contender: str, measure: str) -> list[float]:
    """Counts per second, one value per round."""
    return [figures[contender][measure][0] / figures[contender][measure][1] for figures in rounds]


def paired_ratio(rounds: Rounds, ours: tuple[str, str], other: tuple[str, str]) -> Spread:
    """How many times as fast `ours` is as `other`, each (contender, measure), taken within each round."""
    pairs = zip(rates(rounds, *ours), rates(rounds, *other), strict=True)
    return Spread.of([rate / base for rate, base in pairs])
