"""Unpack the wanted files of zip and tar archives, whoever made them."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from ..errors import UserError
from ..files import new_folder, sync_folder

_MOST = 50  # times the archive's size that its files may have: images hardly shrink, texts to a tenth
_SMALL = 10**6  # bytes that any archive may have: a tar is padded
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, RuntimeError, ValueError)


def unpack(archive: Path, folder: Path, rules: dict[str, str]) -> int:
    """Unpack the files of an archive that match a rule into `folder`; returns how many.

    A rule is a pattern for a member's whole path, and where it goes: r"(?:.*/)?([^/]+\\.jpg)" -> r"Images/\\1". Nothing
    else is unpacked: no links, no devices, no hidden files, and nothing outside `folder`, since a place without ".."
    is made from the pattern's groups. Files take their places when the archive has been read to its end.
    Raises UserError for a damaged archive, and for one that unpacks to 50 times its size.
    """
    from tqdm import tqdm

    left, unpacked = _limit(archive), folder / f"unpacked-{archive.name}"
    shutil.rmtree(unpacked, ignore_errors=True)  # of a run that was killed
    try:
        with new_folder(unpacked) as unfinished, _members(archive) as members:
            for name, size, opened in tqdm(members, desc=archive.name, unit="file"):
                target = _place(name, rules)
                if target is None:
                    continue
                left -= size
                if left < 0:
                    raise _too_large(archive)
                (unfinished / target).parent.mkdir(parents=True, exist_ok=True)
                with opened() as source, open(unfinished / target, "wb") as file:
                    shutil.copyfileobj(source, file)  # a zip's checks the member's checksum at its end
    except _DAMAGED as error:
        raise UserError(f"{archive} is damaged, or no zip or tar ({error}): remove it and run this again") from error
    files = sorted(path for path in unpacked.rglob("*") if path.is_file())
    for path in files:
        target = folder / path.relative_to(unpacked)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(unpacked)
    sync_folder(folder)
    return len(files)


def _limit(archive: Path) -> int:
    return max(_SMALL, _MOST * archive.stat().st_size)


def _too_large(archive: Path) -> UserError:
    return UserError(f"{archive} unpacks to more than {_MOST} times its size: refused")


def _place(name: str, rules: dict[str, str]) -> str | None:
    """Where a member goes; None for one that is not wanted."""
    parts = name.replace("\\", "/").split("/")
    if any(part in ("..", "__MACOSX") or part.startswith("._") or ":" in part for part in parts):
        return None
    found = ((re.fullmatch(pattern, "/".join(parts)), target) for pattern, target in rules.items())
    return next((match.expand(target) for match, target in found if match), None)


@contextlib.contextmanager
def _members(archive: Path) -> Iterator[Iterator[tuple[str, int, Callable[[], IO[bytes]]]]]:
    """Name, size and opener of each ordinary file in an archive."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            files = (m for m in zipped.infolist() if stat.S_IFMT(m.external_attr >> 16) in (0, stat.S_IFREG))
            yield ((m.filename, m.file_size, lambda m=m: zipped.open(m)) for m in files if not m.is_dir())
        return
    with open(archive, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    with (gzip.open if is_gzip else open)(archive, "rb") as file:
        stream = _Limited(file, archive)
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            yield ((m.name, m.size, lambda m=m: tar.extractfile(m)) for m in tar if m.isreg() and not m.issparse())
        while stream.read(1 << 20):  # tarfile takes a damaged header for the end; gzip's checksum is there
            pass


class _Limited:
    """The bytes of a tar, no more than plausible: a header may be a bomb too."""

    def __init__(self, file: IO[bytes], archive: Path):
        self.file, self.archive, self.left = file, archive, _limit(archive)

    def read(self, size: int) -> bytes:
        block = self.file.read(size)
        self.left -= len(block)
        if self.left < 0:
            raise _too_large(self.archive)
        return block
