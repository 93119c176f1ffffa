"""Contenders in processes of their own that take turns: one computes, the others wait.

The allocator's setting and the peak memory belong to a process, so contenders cannot share one. They are started
once, and asked for a round at a time over a pipe: round 1 of each, round 2 of each, and so on. What else the
machine does in the meantime then falls on all alike, and a ratio within a round is a fair one.
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

Figures = dict[str, tuple[float, float]]  # what one round measured: name -> (count, seconds)
Rounds = list[dict[str, Figures]]  # a round: contender -> its figures

# Imported once, before the children are forked from the process that imported them; no thread runs there yet
_PRELOAD = ["torch", "timm", "transformers", "albumentations", "cv2", "pandas", "benchmarks.contenders"]


def _context() -> multiprocessing.context.BaseContext:
    os.environ.setdefault("TQDM_DISABLE", "1")  # the children inherit it: their bars would mix with our lines
    if sys.platform != "linux":  # elsewhere a fork is unsafe or does not exist
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def peak_memory() -> int:
    """The most memory that this process has held so far, in bytes; 0 where Windows does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes, except on macOS


def _give_memory_back() -> None:
    """Let go of what the allocator keeps: children that wait would together hold more than a machine has."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc has it
        trim(0)


def _serve(pipe, build: Callable[[], object]) -> None:
    """A child's life: build the contender, then a round whenever it is asked for, until the pipe closes."""
    try:
        contender = build()
        _give_memory_back()
        pipe.send(("ready", None))
        while (question := pipe.recv()) != "close":
            if question == "round":
                figures = contender.round()
                _give_memory_back()
                pipe.send(("figures", figures))
            else:
                pipe.send(("facts", contender.facts() | {"peak_memory": peak_memory()}))
    except (EOFError, KeyboardInterrupt):  # the parent has gone
        pass
    except UserError as error:
        pipe.send(("mistake", str(error)))
    except Exception:
        pipe.send(("failure", traceback.format_exc()))


class Child:
    """A contender in a process of its own. `build` makes it there: an object with `round()` and `facts()`."""

    def __init__(self, name: str, build: Callable[[], object]):
        self.name = name
        context = _context()
        self.pipe, far_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(far_end, build), name=name)  # may have workers of its own
        self.process.start()
        far_end.close()

    def ready(self, timeout: float | None = None) -> None:
        """Wait until it is built. Raises UserError where it fails, dies, or takes more than `timeout` seconds."""
        self._answer(timeout)

    def round(self) -> Figures:
        """Run one round. Raises UserError where the child fails or dies."""
        return self._ask("round")

    def facts(self) -> dict[str, object]:
        """What does not change from round to round, and the peak memory in bytes."""
        return self._ask("facts")

    def _ask(self, question: str) -> dict:
        try:
            self.pipe.send(question)
        except OSError:
            self._died()
        return self._answer(None)

    def _answer(self, timeout: float | None) -> dict:
        if not self.pipe.poll(timeout):
            raise UserError(f"the benchmark's contender {self.name!r} was not ready within {timeout:.0f} s")
        try:
            kind, answer = self.pipe.recv()
        except (EOFError, OSError):
            self._died()
        if kind == "mistake":
            raise UserError(answer)
        if kind == "failure":
            print(answer, file=sys.stderr)
            raise UserError(f"the benchmark's contender {self.name!r} failed: {answer.strip().splitlines()[-1]}")
        return answer

    def _died(self) -> None:
        self.process.join(10)
        raise UserError(
            f"the benchmark's contender {self.name!r} died (exit status {self.process.exitcode}): free some memory, "
            "or choose other rows with --only"
        )

    def close(self) -> None:
        """End the process, whatever it is doing."""
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
    builds: dict[str, Callable[[], object]], rounds: int, say: Callable[[str], None], timeout: float | None = None
) -> tuple[Rounds, dict[str, dict[str, object]]]:
    """Build the contenders one after the other, run `rounds` rounds in turns, and return the figures and the facts."""
    children: list[Child] = []
    results: Rounds = []
    try:
        for name, build in builds.items():
            say(f"  {name}: building and warming up")
            children.append(Child(name, build))
            children[-1].ready(timeout)
        for number in range(rounds):
            results.append({child.name: child.round() for child in children})
            rates = [
                f"{name} {measure} {count / seconds:.4g}/s"
                for name, figures in results[-1].items()
                for measure, (count, seconds) in figures.items()
            ]
            say(f"  round {number + 1}/{rounds}: {', '.join(rates)}")
        facts = {child.name: child.facts() for child in children}
    finally:
        for child in children:
            child.close()
    return results, facts


@dataclass
class Spread:
    """A figure over the rounds: its median, the least and the greatest."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


def rates(rounds: Rounds, contender: str, measure: str) -> list[float]:
    """Counts per second, a value a round."""
    return [figures[contender][measure][0] / figures[contender][measure][1] for figures in rounds]


def paired_ratio(rounds: Rounds, ours: tuple[str, str], other: tuple[str, str]) -> Spread:
    """How many times as fast `ours` is as `other`, each (contender, measure): the ratios are taken within rounds."""
    pairs = zip(rates(rounds, *ours), rates(rounds, *other), strict=True)
    return Spread.of([rate / base for rate, base in pairs])
