"""Names -> local files, installed packages, functions of the user's own, or models on a hub."""

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import UserError, first_line

PACKAGE, HUB = "package:", "hub:"
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # of a run on a hub: settings, weights, tokenizer; no code
# Published BERT sizes (Turc et al. 2019, https://arxiv.org/abs/1908.08962): layers, hidden size
SMALL_BERTS = {"bert-tiny": (2, 128), "bert-mini": (4, 256), "bert-small": (4, 512), "bert-medium": (8, 512)}
_TIMEOUT = 5.0  # seconds that the hub has to answer


def local_path(name: str, setting: str) -> Path | None:
    """The file or folder of `name`, or of `package:NAME/PATH` in an installed package; None for a model on a hub.

    Raises UserError for a package that is not installed, and for what looks like a path but does not exist.
    """
    if name.startswith(PACKAGE):
        package, _, inside = name[len(PACKAGE) :].partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            remedy = "install it, or the extra that contains it (pip install 'clip_scratch[compact]')"
            raise UserError(f"{setting} {name!r} needs the Python package {package.replace('_', '-')!r}: {remedy}")
        path = Path(spec.submodule_search_locations[0], inside)
    else:
        path = Path(name).expanduser()
        looks_like_path = name.startswith((".", "/", "~")) or path.suffix in {".safetensors", ".pth", ".pt", ".bin"}
        if not os.path.exists(path) and not looks_like_path:
            return None
    if not os.path.exists(path):  # unlike Path.exists, False for a name that is too long
        raise UserError(f"{setting}: there is no {path}")
    return path


def is_function(name: str) -> bool:
    """Whether a model is named as `module:function`, which builds it."""
    return not name.startswith(PACKAGE) and re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", name) is not None


def import_function(name: str, setting: str) -> Callable:
    """The function that `module:function` names. Raises UserError where there is no such module or function."""
    module_name, _, function = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # an import inside the user's module
        missing = f"there is no module {module_name}. Is its folder on PYTHONPATH?"
        raise UserError(f"{setting} {name!r}: {missing}") from error
    if not callable(getattr(module, function, None)):
        raise UserError(f"{setting} {name!r}: {module.__file__} has no function {function}")
    return getattr(module, function)


def load_pretrained(auto_class, name: str, setting: str, what: str, remedy: str, **options: object):
    """`auto_class.from_pretrained` of a local folder or a model on the hub; any failure is a UserError."""
    path = local_path(name, setting)
    if path is None:
        with hub_access(f"{what} {hub_name(name)!r}", remedy):
            return auto_class.from_pretrained(hub_name(name), **options)
    path = _transformers_folder(path)
    try:
        return auto_class.from_pretrained(path, local_files_only=True, **options)
    except Exception as error:  # transformers, safetensors and torch each have their own
        raise UserError(f"{setting}: transformers cannot load {what} {path}: {first_line(error)}") from error


def _transformers_folder(path: Path) -> Path:
    """Of a sentence-transformers folder the one with the model and its processors, such as 0_CLIPModel; else `path`."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        if not (path / "config.json").is_file():
            return path / json.loads((path / "modules.json").read_text())[0]["path"]
    return path


def hub_name(name: str) -> str:
    """The name on the hub; that of "bert-tiny", say, is longer there."""
    if name not in SMALL_BERTS:
        return name
    layers, hidden = SMALL_BERTS[name]
    return f"google/bert_uncased_L-{layers}_H-{hidden}_A-{hidden // 64}"


def hub_snapshot(name: str) -> Path:
    """The folder of a model of ours on the hub, downloaded where it is not cached. Raises UserError."""
    from huggingface_hub import snapshot_download

    with hub_access(f"the model {name!r}", "A model on the hub is named hub:USER/NAME"):
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))


def hub_cache() -> Path:
    """Where models from the hub are kept."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


@functools.cache
def _hub_answers(endpoint: str) -> bool:
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(endpoint, timeout=_TIMEOUT)
    except Exception:  # whatever the HTTP library raises: no name, no route, refused, timed out, offline mode
        return False
    return True


@contextlib.contextmanager
def hub_access(what: str, remedy: str) -> Iterator[None]:
    """Run a hub look-up; any failure is a UserError with `remedy`.

    Without a network the hub libraries retry silently for a minute. Here one short request decides whether the hub is
    asked at all, or the local cache alone.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline = before or not _hub_answers(constants.ENDPOINT)
    try:
        yield
    except (OSError, ValueError, ImportError) as error:  # a missing model, or a library that it needs
        unreachable = f"{constants.ENDPOINT} cannot be reached and nothing is cached here"
        reason = unreachable if offline else first_line(error)
        raise UserError(f"cannot get {what}: {reason}. {remedy}") from error
    finally:
        constants.HF_HUB_OFFLINE = before
