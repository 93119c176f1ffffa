"""Files that are complete or absent: atomic writes, file locks, room on the disk, and the cache folder."""

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from .config import CFG
from .errors import UserError

_ANNOUNCED = 5e8  # bytes from which a cache is announced before it is written


def write_atomically(path: Path, write: Callable[[Path], object], size: int = 0) -> None:
    """Have `write` fill a temporary file beside `path`, of `size` bytes at first, sync it and rename it to `path`.

    Raises OSError with the file's name, which Python leaves out where a disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        allocate(temporary, size)
        mode = temporary.stat().st_mode
        write(temporary)
        os.chmod(temporary, mode)  # safetensors puts a file in its place that only its owner may read
        with open(temporary, "rb+") as file:  # Windows cannot sync a file that is open for reading
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # Windows cannot delete a file that a traceback still maps
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def allocate(path: Path, size: int) -> None:
    """Make a file of `size` bytes that can be mapped: writing to a map whose disk is full would kill the process."""
    with open(path, "wb") as file:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        file.truncate(size)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable, where the file system can."""
    with contextlib.suppress(OSError):  # Windows and some network file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 text, atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode()))


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def check_target(path: str | Path, suffix: str = "") -> None:
    """Raise UserError where no file can be written at `path`, before the work that would fill it; "" names no file."""
    target, folder = Path(path), Path(path).parent
    faults = {
        f"there is no folder {folder}": not folder.is_dir(),
        "it is a folder; name a file in it": target.is_dir(),
        f"the folder {folder} is not writable": not os.access(folder, os.W_OK),
        f"its name must end in {suffix}": suffix and target.suffix.lower() != suffix,
    }
    if path and (fault := next((fault for fault, applies in faults.items() if applies), "")):
        raise UserError(f"cannot write {path}: {fault}")


def write_figure(figure, path: str | Path) -> Path:
    """Write a matplotlib figure in the format of the path's suffix. Raises UserError where it cannot be written."""
    path = Path(path)
    suffix = path.suffix.lstrip(".").lower()
    supported = figure.canvas.get_supported_filetypes()
    if suffix not in supported:
        raise UserError(f"cannot write the picture {path}: its name must end in one of {', '.join(sorted(supported))}")
    try:
        write_atomically(path, lambda temporary: figure.savefig(temporary, format=suffix))
    except OSError as error:
        raise UserError(f"cannot write the picture {path}: {error.strerror}") from error
    return path


def is_unfinished(path: Path) -> bool:
    """Whether a file is temporary: one of ours, or safetensors' .tmp and six letters."""
    return path.name[:1] == "." and (path.suffix == ".tmp" or re.fullmatch(r"\.tmp\w{6}", path.name) is not None)


def remove_unfinished(folder: Path) -> None:
    """Delete the temporary files that killed processes left anywhere in `folder`."""
    for temporary in filter(is_unfinished, folder.rglob(".*")):
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder`, which is missing or empty; it is deleted where anything goes wrong."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Hold the lock file beside `path`. Raises OSError where the folder cannot be written or its disk has no locks."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that is building {path}", file=sys.stderr)
        lock.acquire()
    except NotImplementedError as error:
        raise OSError(f"the disk of {path.parent} has no file locks") from error
    try:
        yield
    finally:
        lock.release()


def check_room(folder: Path, size: int, what: str, off_switch: str) -> None:
    """Raise OSError unless `size` bytes take at most half of the free disk space; announce a large file."""
    free = shutil.disk_usage(folder).free
    if size > free / 2:
        raise OSError(f"{size / 1e9:.1f} GB needed, and at most half of the {free / 1e9:.1f} GB free is used")
    if size > _ANNOUNCED:
        print(f"caching {what}, {size / 1e9:.1f} GB, in {folder} ({off_switch} turns this off)")


def cache_folder(cfg: CFG | None = None) -> Path:
    """cfg.cache_path, or clip_scratch in the user's cache folder. Raises OSError where there is no home folder."""
    try:
        if cfg and cfg.cache_path:
            return Path(cfg.cache_path).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "clip_scratch")
    except RuntimeError as error:
        raise OSError("there is no home folder") from error
