"""Unpack the wanted files of zip and tar archives, whoever made them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from ..errors import UserError
from ..files import new_folder, sync_folder

_MOST = 50  # times the archive's size that its files may have: images hardly shrink, texts to a tenth


def unpack(archive: Path, folder: Path, rules: dict[str, str]) -> int:
    """Unpack the files of an archive that match a rule into `folder`; returns how many.

    A rule is a pattern for a member's whole path, and where it goes: r"(?:.*/)?([^/]+\\.jpg)" -> r"Images/\\1". Nothing
    else is unpacked: no links, no devices, no hidden files, and nothing outside `folder`, since a place without ".."
    is made from the pattern's groups. Files take their places when the archive has been read to its end.
    Raises UserError for a damaged archive, and for one that unpacks to 50 times its size.
    """
    from tqdm import tqdm

    left, unpacked = _MOST * archive.stat().st_size, folder / f"unpacked-{archive.name}"
    shutil.rmtree(unpacked, ignore_errors=True)  # of a run that was killed
    try:
        with new_folder(unpacked) as unfinished, _members(archive) as members:
            for name, size, opened in tqdm(members, desc=archive.name, unit="file"):
                target = _place(name, rules)
                if target is None:
                    continue
                left -= size
                if left < 0:
                    raise UserError(f"{archive} unpacks to more than {_MOST} times its size: refused")
                (unfinished / target).parent.mkdir(parents=True, exist_ok=True)
                with opened() as source, open(unfinished / target, "wb") as file:
                    shutil.copyfileobj(source, file)  # a zip's checks the member's checksum at its end
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{archive} is damaged, or no zip or tar ({error}): remove it and run this again") from error
    except OSError as error:
        if error.errno:
            raise
        raise UserError(f"{archive} is damaged ({error}): remove it and run this again") from error  # gzip's own
    files = sorted(path for path in unpacked.rglob("*") if path.is_file())
    for path in files:
        target = folder / path.relative_to(unpacked)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(unpacked)
    sync_folder(folder)
    return len(files)


def _place(name: str, rules: dict[str, str]) -> str | None:
    """Where a member goes; None for one that is not wanted."""
    parts = name.replace("\\", "/").split("/")
    if any(part in ("..", "__MACOSX") or part.startswith("._") for part in parts):
        return None
    found = ((re.fullmatch(pattern, "/".join(parts)), target) for pattern, target in rules.items())
    return next((match.expand(target) for match, target in found if match), None)


@contextlib.contextmanager
def _members(archive: Path) -> Iterator[Iterator[tuple[str, int, Callable[[], IO[bytes]]]]]:
    """Name, size and opener of each ordinary file in an archive."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            files = (member for member in zipped.infolist() if not member.is_dir())
            yield ((m.filename, m.file_size, lambda m=m: zipped.open(m)) for m in files)
    else:
        with tarfile.open(archive) as tar:
            yield ((m.name, m.size, lambda m=m: tar.extractfile(m)) for m in tar if m.isreg())
