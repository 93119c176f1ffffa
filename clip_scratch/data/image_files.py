"""Image files, on their own or in a tar shard, .../00000.tar/000000012.jpg: their bytes, and whether they changed.

A shard is a local file, or at a URL that fsspec knows: then it is copied to the user's cache folder when it is needed,
where the last ones used stay. Images in it are read by their place; shards.py records the places.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import tarfile
from pathlib import Path, PurePosixPath

from ..files import cache_folder, sole_writer, write_atomically

_KEPT = 32  # copies of shards at URLs
_FORMAT = 1  # of the records


def split_member(path: str | Path) -> tuple[str, str] | None:
    """The shard and the name in it of .../00000.tar/000000012.jpg; None for the path of an ordinary file."""
    shard, found, name = os.fspath(path).replace(os.sep, "/").partition(".tar/")
    # Path makes one slash of the two in s3://
    return (re.sub(r"^(\w\w+):/(?!/)", r"\1://", shard) + ".tar", name) if found else None


def image_source(path: str | Path | io.BytesIO) -> str | Path | io.BytesIO:
    """What Image.open takes: the path or the bytes as they are, or the bytes of an image in a shard. Raises OSError."""
    if isinstance(path, io.BytesIO) or (member := split_member(path)) is None:
        return path
    shard, name = member
    if (place := _places(shard).get(name)) is None:
        raise FileNotFoundError(f"{shard} has no {name}")
    with open_shard(shard) as file:
        file.seek(place[0])
        return io.BytesIO(file.read(place[1]))


def stamp(path: str | Path) -> list[int] | None:
    """Size in bytes and modification time in ns; None where there is no such file."""
    try:
        if member := split_member(path):
            shard, name = member
            return [_places(shard)[name][1], 0 if is_url(shard) else os.stat(shard).st_mtime_ns]
        status = os.stat(path)
    except (OSError, KeyError, ValueError):  # ValueError: a name with a null byte
        return None
    return [status.st_size, status.st_mtime_ns]


def is_url(path: str) -> bool:
    """Whether a shard is not a local file."""
    return "://" in path


def record_of(shard: str) -> Path:
    """Where shards.py records what is in a shard. Raises OSError where there is no home folder."""
    return cache_folder() / f"shard-{_hash(shard if is_url(shard) else os.path.abspath(shard))}.json"


@functools.lru_cache(32)
def _places(shard: str) -> dict[str, tuple[int, int]]:
    """The offset and the size of each file in a shard."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        kept = json.loads(record_of(shard).read_text())
        if is_url(shard) or kept["version"] == local_version(shard):
            return {name: (offset, size) for name, offset, size, *_ in kept["samples"]}
    places = {}
    with contextlib.suppress(tarfile.TarError), open_shard(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            places[str(PurePosixPath(member.name))] = member.offset_data, member.size
            tar.members = []  # else they stay in memory
    return places


def local_version(shard: str) -> list[int]:
    """What changes when a local shard does, and the format of its record. Raises OSError."""
    status = os.stat(shard)
    return [_FORMAT, status.st_size, status.st_mtime_ns]


def open_shard(shard: str):
    """A shard for reading; one at a URL is copied to the cache folder first. Raises OSError."""
    if not is_url(shard):
        return open(shard, "rb")
    path = copy_of(shard)
    while True:
        if not path.is_file():
            _copy(shard, path)
        with contextlib.suppress(FileNotFoundError):  # removed by another process just now
            os.utime(path)
            return open(path, "rb")


def copy_of(shard: str) -> Path:
    """Where the copy of a shard at a URL is kept. Raises OSError where there is no home folder."""
    return cache_folder() / "shards" / f"{_hash(shard)}.tar"


def _copy(shard: str, path: Path) -> None:
    import fsspec

    with sole_writer(path):
        if path.is_file():  # another process was faster
            return
        fs, inner = fsspec.url_to_fs(shard)
        try:
            write_atomically(path, lambda temporary: fs.get_file(inner, str(temporary)))
        except OSError:
            raise
        except Exception as error:  # each file system has its own errors
            raise OSError(str(error) or type(error).__name__) from error
    with contextlib.suppress(FileNotFoundError):  # another process removes some as well
        for copy in sorted(path.parent.glob("*.tar"), key=os.path.getmtime)[:-_KEPT]:
            copy.unlink()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
