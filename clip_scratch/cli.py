"""The command line of `train` and `sweep`: a preset, --SETTING VALUE, or the settings of a run to resume."""

import dataclasses
import inspect
import re
from collections.abc import Sequence
from typing import Annotated

from .config import CFG
from .errors import UserError, suggest
from .presets import PRESETS


def parse(arguments: Sequence[str], prog: str = "python -m clip_scratch.train") -> CFG:
    """The command line as settings: an optional preset, then --SETTING VALUE.

    With --resume the run's own settings are the defaults. Raises UserError for an unknown preset and for a setting
    that a resumed run cannot change.
    """
    words = list(arguments)
    given = {word.partition("=")[0].replace("_", "-") for word in words}  # tyro accepts --captions_path too
    preset = CFG if given & {"--captions-path", "--resume"} else PRESETS["scenes"]
    if words and not words[0].startswith("-"):
        name = words.pop(0)
        if name not in PRESETS:
            raise UserError(f"there is no preset {name!r}: {', '.join(PRESETS)}.{suggest(name, PRESETS)}")
        preset = PRESETS[name]
    folder = next((words[i + 1] for i, word in enumerate(words[:-1]) if word == "--resume"), "")
    folder = next((word.partition("=")[2] for word in words if word.startswith("--resume=")), folder)
    if not folder:
        return preset(**_settings(words, preset(), preset.__doc__, prog))

    from .models.saved import run_config
    from .training.run import resumed

    default = dataclasses.replace(run_config(folder), resume=folder)
    return resumed(CFG(**_settings(words, default, CFG.__doc__, prog)), default)


def _settings(words: Sequence[str], default: CFG, doc: str, prog: str) -> dict[str, object]:
    """All settings as the words of a command line change `default`; --help groups them by topic."""
    import tyro

    topics = []
    for topic, fields in _topics().items():
        settings = [
            (name, Annotated[kind, tyro.conf.arg(help=text)], dataclasses.field(default=getattr(default, name)))
            for name, kind, text in fields
        ]
        topics.append((topic, dataclasses.make_dataclass(topic, settings)))
    nested = dataclasses.make_dataclass(
        "Settings", [(name, cls, dataclasses.field(default_factory=cls)) for name, cls in topics]
    )
    presets = "\n".join(f"  {name:<15} {cls.__doc__.splitlines()[0]}" for name, cls in PRESETS.items())
    parsed = tyro.cli(
        nested,
        args=words,
        prog=f"{prog} [PRESET]",
        description=f"{doc}\n\nPresets, as the first word:\n{presets}",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return {name: value for topic, _ in topics for name, value in vars(getattr(parsed, topic)).items()}


def _topics() -> dict[str, list[tuple[str, type, str]]]:
    """(name, type, comment) of every setting, by the comment lines that head them in config.py."""
    from typing import get_type_hints

    kinds, topics = get_type_hints(CFG), {}
    for line in inspect.getsource(CFG).splitlines():
        if topic := re.fullmatch(r"    # (\w+)", line):
            fields = topics.setdefault(topic[1].lower(), [])
        elif setting := re.fullmatch(r"    (\w+): .*?  # (.*)", line):
            fields.append((setting[1], kinds[setting[1]], setting[2]))
    return topics
