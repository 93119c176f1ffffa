"""Where weights and tokenizers come from: a local path, an installed package, or a hub that answers quickly.

Without a network the hub libraries retry silently for a minute. Here one short request decides, and the
user is told how to go on without the hub.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError

PACKAGE = "package:"
# Published BERT sizes (Turc et al. 2019, https://arxiv.org/abs/1908.08962): layers, hidden size
SMALL_BERTS = {"bert-tiny": (2, 128), "bert-mini": (4, 256), "bert-small": (4, 512), "bert-medium": (8, 512)}
_TIMEOUT = 5.0  # seconds that the hub has to answer at all


def local_path(name: str, setting: str) -> Path | None:
    """The file or folder that `name` means, or None where it is the name of a model on a hub.

    `package:NAME/PATH` is a path inside the installed Python package NAME. Raises UserError for a package
    that is not installed or has no such path, and for what looks like a path but does not exist.
    """
    if name.startswith(PACKAGE):
        package, _, inside = name[len(PACKAGE) :].partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"{setting} {name!r} needs the Python package {package.replace('_', '-')!r}: "
                "install it, or the extra that brings it (pip install 'clip_scratch[compact]')"
            )
        path = Path(next(iter(spec.submodule_search_locations)), inside)
    else:
        path = Path(name).expanduser()
        looks_like_path = name.startswith((".", "/", "~")) or path.suffix in {".safetensors", ".pth", ".pt", ".bin"}
        if not path.exists() and not looks_like_path:
            return None
    if not path.exists():
        raise UserError(f"{setting}: there is no {path}")
    return path


def hub_name(name: str) -> str:
    """The name on the hub of a text encoder that is called by its size here."""
    if name not in SMALL_BERTS:
        return name
    layers, hidden = SMALL_BERTS[name]
    return f"google/bert_uncased_L-{layers}_H-{hidden}_A-{hidden // 64}"


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
    """Run a hub look-up that ends within seconds: from the local cache alone where the hub does not answer.

    Raises UserError with `remedy` where the look-up fails.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline = before or not _hub_answers(constants.ENDPOINT)
    try:
        yield
    except (OSError, ValueError, ImportError) as error:  # a missing model, or a library that it needs
        if offline:
            reason = f"{constants.ENDPOINT} cannot be reached and nothing is cached here"
        else:
            reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot get {what}: {reason}. {remedy}") from error
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def no_loading_bar() -> Iterator[None]:
    """Without transformers' progress bar, which for weights on the local disk is gone before it can be read."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
