"""The command line of `train` as settings: a preset word, --SETTING VALUE, or the settings of a run to go on with."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from .config import CFG, PRESETS
from .errors import UserError, suggest

# What may change when a run goes on: none of it touches the weights' shapes, the data or the order of batches.
_FREE_ON_RESUME = {
    "resume", "run_dir", "device", "num_workers", "checkpoint_steps", "on_bad_image", "image_cache", "cache_path",
}  # fmt: skip


def resumed(cfg: CFG, defaults: CFG | type[CFG] = CFG) -> CFG:
    """The settings of the run `cfg.resume`, with what `cfg` may change of them.

    A setting that `cfg` leaves as it is in `defaults` is the run's own. Raises UserError for one that a resume
    cannot change, and for a folder that is no run. What comes out may go in again.
    """
    from .training.checkpoint import run_config

    settings = dataclasses.asdict(run_config(cfg.resume))
    complete = cfg.run_dir == cfg.resume  # as this function leaves it: nothing is left to a default
    for name, was in settings.items():
        wanted = getattr(cfg, name)
        if name in _FREE_ON_RESUME:
            settings[name] = wanted if complete or wanted != getattr(defaults, name) else was
        elif wanted not in (was, getattr(defaults, name)):
            raise UserError(f"{cfg.resume} was trained with {name}={was!r}; a resume cannot make it {wanted!r}")
    return CFG(**settings | {"run_dir": cfg.resume, "resume": cfg.resume})


def parse(arguments: Sequence[str]) -> CFG:
    """The command line as settings: an optional preset word, then --SETTING VALUE.

    With --resume the run's own settings are the defaults. Raises UserError for an unknown preset and for a
    setting that a resumed run cannot change.
    """
    import tyro

    words = list(arguments)
    given = {word.partition("=")[0].replace("_", "-") for word in words}  # tyro takes --captions_path as well
    preset = CFG if given & {"--captions-path", "--resume"} else PRESETS["scenes"]
    if words and not words[0].startswith("-"):
        name = words.pop(0)
        if name not in PRESETS:
            raise UserError(f"no preset is called {name!r}: {', '.join(PRESETS)}.{suggest(name, PRESETS)}")
        preset = PRESETS[name]
    default = preset()
    folder = next((words[i + 1] for i, word in enumerate(words[:-1]) if word == "--resume"), "")
    folder = next((word.partition("=")[2] for word in words if word.startswith("--resume=")), folder)
    if folder:
        from .training.checkpoint import run_config

        preset, default = CFG, dataclasses.replace(run_config(folder), resume=folder)
    presets = "\n".join(f"  {name:<10} {cls.__doc__.splitlines()[0]}" for name, cls in PRESETS.items())
    cfg = tyro.cli(
        preset,
        default=default,
        args=words,
        prog="python -m clip_scratch.train [PRESET]",
        description=f"{preset.__doc__}\n\nPresets, as the first word:\n{presets}",
    )
    if folder:
        return resumed(cfg, default)
    if not cfg.run_dir:
        name = next((name for name, cls in PRESETS.items() if cls is preset), "run")
        cfg = dataclasses.replace(cfg, run_dir=f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    return cfg
