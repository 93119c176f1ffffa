"""A run folder, held by one process: its settings, best and last checkpoints, metrics, and how it is resumed.

config.json                 the settings that were asked for
environment.json            machine, versions, commit, and the fingerprints of the data
metrics.jsonl               a line per epoch
best/                       the best model (models/saved.py); its config.json has the resolved settings
last/training.safetensors   all that a resume needs: tensors and JSON, nothing is unpickled

Every file is replaced in one rename: a run that is killed at any moment leaves only whole files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import torch

from ..config import CFG
from ..environment import RECORD, environment
from ..errors import UserError, first_line
from ..files import is_unfinished, remove_unfinished, write_atomically, write_json
from ..models.clip import DualEncoder
from ..models.saved import bare_model, prepare_best, run_config, write_tensors
from ..presets import PRESETS
from .distributed import any_process, from_main, is_main
from .state import TrainState

STATE = "training.safetensors"
# A run that was killed before its settings were written holds no more than these, and starts again
_UNFINISHED = {"best", "last", "retrieval.png", "zero_shot.json", "zero_shot.safetensors", RECORD}
# What a resume may change: nothing that touches the shapes of the weights, the data or the order of batches
FREE_ON_RESUME = {
    "resume", "run_dir", "device", "num_workers", "checkpoint_steps", "on_bad_image", "image_cache", "cache_path",
}  # fmt: skip


def resumed(cfg: CFG, defaults: CFG | type[CFG] = CFG) -> CFG:
    """The settings of the run `cfg.resume`, with those that `cfg` changes.

    A setting of `cfg` that equals the one in `defaults` counts as not given. Raises UserError for a setting that a
    resume cannot change, and for a folder that is not a run. Applying it twice changes nothing.
    """
    settings = dataclasses.asdict(run_config(cfg.resume))
    is_complete = cfg.run_dir == cfg.resume  # returned by this function: no setting is a default
    for name, saved in settings.items():
        given = getattr(cfg, name)
        if name in FREE_ON_RESUME:
            settings[name] = given if is_complete or given != getattr(defaults, name) else saved
        elif given not in (saved, getattr(defaults, name)):
            raise UserError(f"{cfg.resume} was trained with {name}={saved!r}; a resume cannot change it to {given!r}")
    return CFG(**settings | {"run_dir": cfg.resume, "resume": cfg.resume})


class Run:
    """The folder of a new or resumed run; a context manager that frees it for other processes at the end.

    Of several processes that train together the first one writes it.

    `cfg` are the settings that were asked for, a resumed run's own. A new folder is made by `begin`, when everything
    that can be refused has been. Raises UserError for a folder that holds another run or cannot be made.
    """

    def __init__(self, cfg: CFG):
        self.cfg = resumed(cfg) if cfg.resume else cfg
        self.is_resumed = bool(cfg.resume)
        self.writes = is_main()
        self.data: dict[str, str] = {}  # fingerprints of the splits, set when the captions have been read
        self._lock = self.board = None
        self.lines: list[str] = []  # of metrics.jsonl
        if self.is_resumed:
            self.folder = Path(cfg.resume)
            self._claim()
        else:
            self.folder = Path(cfg.run_dir or from_main(str(_free_folder(cfg))))
            self.cfg = dataclasses.replace(cfg, run_dir=str(self.folder))
            if self.writes:
                _check_new(self.folder)
        self.best, self._last = self.folder / "best", self.folder / "last" / STATE

    def __enter__(self) -> Run:
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        has_vanished = self._lock and isinstance(error, FileNotFoundError) and not self.folder.exists()
        if self.board and not has_vanished:
            self.board.close()
        if self._lock:
            self._lock.release()
        if has_vanished:
            raise UserError(f"{self.folder} has vanished: {error.filename} cannot be written") from error

    def _fingerprint(self) -> str:
        """Of what a resume trains on."""
        return self.data["train"] + self.data["valid"]

    def begin(self, model: DualEncoder) -> None:
        """Make the folder of a new run, with what never changes."""
        if not self.writes:
            return
        self._claim()
        prepare_best(self.best, model, model.cfg)
        write_json(self.folder / RECORD, environment() | {"data": self.data})

    def resumed_model(self) -> DualEncoder:
        """The model of a resumed run without its weights, and with its resolved settings."""
        model = bare_model(self.best, training=True)
        model.cfg = dataclasses.replace(model.cfg, **{name: getattr(self.cfg, name) for name in FREE_ON_RESUME})
        return model

    def resume(self, state: TrainState) -> None:
        """Put back what was saved last. Raises UserError where it does not fit, or the captions have changed."""
        saved = load_tree(self._last)
        if saved["fingerprint"] != self._fingerprint():
            source = self.cfg.captions_path or "the built-in data set"
            raise UserError(f"{source} has changed since {self.folder} was started: restore it, or start a new run")
        try:
            state.load_state_dict(saved)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"{self._last} does not fit the settings of {self.folder}: {first_line(error)}") from error

    def save_last(self, state: TrainState) -> None:
        """Replace the checkpoint that a resume starts from."""
        saved = {**state.state_dict(), "fingerprint": self._fingerprint()}
        if self.writes:
            self._last.parent.mkdir(exist_ok=True)
            save_tree(self._last, saved)

    def open_log(self, epochs: int, steps: int) -> None:
        """Open metrics.jsonl and the TensorBoard events, both cut back to finished `epochs` and `steps`."""
        from torch.utils.tensorboard import SummaryWriter

        path = self.folder / "metrics.jsonl"
        try:
            lines = path.read_text().splitlines() if path.is_file() else []
            self.lines = [line for line in lines if json.loads(line)["epoch"] <= epochs]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): delete it to go on without its lines") from error
        self.board = SummaryWriter(str(self.folder), purge_step=steps + 1) if self.writes else None

    def log_epoch(self, line: dict[str, object]) -> None:
        """Append a line to metrics.jsonl, and its numbers to TensorBoard at its optimizer step."""
        self.lines.append(json.dumps(line))
        if not self.writes:
            return
        content = "\n".join(self.lines) + "\n"
        write_atomically(self.folder / "metrics.jsonl", lambda temporary: temporary.write_text(content))
        for name, value in line.items():
            if isinstance(value, int | float):
                self.board.add_scalar(f"epoch/{name}", value, line["step"])
        self.board.flush()

    def _claim(self) -> None:
        """Lock the folder for this process, and delete what killed ones left unfinished."""
        from filelock import FileLock, Timeout

        if not self.writes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / ".lock")
            self._lock.acquire(timeout=0)
        except Timeout as error:
            self._lock = None
            raise UserError(f"another process is training into {self.folder}: choose another --run-dir") from error
        except OSError as error:
            raise UserError(f"the run folder {self.folder} cannot be written: {error}") from error
        if not self.is_resumed:
            _check_new(self.folder)  # another process may have finished a run here in the meantime
        remove_unfinished(self.folder)


def _free_folder(cfg: CFG) -> Path:
    """runs/PRESET-DATE-TIME, with a number where another run began in the same second."""
    preset = next((name for name, preset in PRESETS.items() if type(cfg) is preset), "run")
    name = f"runs/{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    return next(path for n in range(1, 1000) if not (path := Path(name if n == 1 else f"{name}-{n}")).exists())


def _check_new(folder: Path) -> None:
    """Raise UserError where `folder` holds something already, or cannot be made."""
    try:
        entries = list(folder.iterdir()) if folder.is_dir() else []
        names = {e.name for e in entries if not is_unfinished(e) and e.name != ".lock"}
        if names - _UNFINISHED:
            raise UserError(f"{folder} is not empty: continue with --resume {folder}, or choose another --run-dir")
        parent = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    except OSError as error:  # a folder above it is closed, or the name is too long
        raise UserError(f"the run folder {folder} cannot be made: {error.strerror}") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"the run folder {folder} cannot be made: {parent} cannot be written to")


# ---- nested dicts and lists with tensors, as one safetensors file


def save_tree(path: Path, tree: dict) -> None:
    """Write nested dicts and lists of tensors, numbers, strings and None, atomically: JSON in the file's header."""
    tensors: dict[str, torch.Tensor] = {}

    def pack(value: object, name: str) -> object:
        if isinstance(value, torch.Tensor):
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, dict):  # as pairs: JSON turns the numbers of an optimizer's parameters into strings
            return {"dict": [[key, pack(item, f"{name}.{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return [pack(item, f"{name}.{i}") for i, item in enumerate(value)]
        return value

    header = {"tree": json.dumps(pack(tree, ""))}
    write_tensors(path, tensors, header)


def load_tree(path: Path) -> dict:
    """What `save_tree` wrote, tuples as lists. Raises UserError where the file is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"nothing to resume: there is no {path}")
    try:
        with safe_open(path, "pt") as file:

            def unpack(value: object) -> object:
                if isinstance(value, list):
                    return [unpack(item) for item in value]
                if not isinstance(value, dict):
                    return value
                if "tensor" in value:  # a copy: Windows cannot replace a file that a tensor maps
                    return file.get_tensor(value["tensor"]).clone()
                return {key: unpack(item) for key, item in value["dict"]}

            return unpack(json.loads(file.metadata()["tree"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        best = path.parent.parent / "best"
        raise UserError(f"{path} is damaged ({first_line(error)}); {best} may still be loaded") from error


class Interrupt:
    """Ctrl-C and SIGTERM ask to stop after the current step; a second one stops at once."""

    def __init__(self, folder: Path) -> None:
        self.is_asked, self._before = False, {}
        self._advice = f"resume with: python -m clip_scratch.train --resume {folder}"

    def __enter__(self) -> Interrupt:
        with contextlib.suppress(ValueError):  # not the main thread, as in some notebooks: an interrupt stops at once
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number, frame) -> None:
        if self.is_asked:
            raise KeyboardInterrupt(self._advice)
        self.is_asked = True

    def asked(self) -> bool:
        """Whether this process or another of the run was asked to stop."""
        self.is_asked = any_process(self.is_asked)
        return self.is_asked

    def stop_if_asked(self) -> None:
        """Raise KeyboardInterrupt here, where the last checkpoint is whole and up to date."""
        if self.asked():
            raise KeyboardInterrupt(self._advice)

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
