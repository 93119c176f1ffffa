"""Downloads that go on where they were cut, and that are whole when they have their name."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from ..errors import UserError

TIMEOUT = 8  # seconds without a byte from the server
_PAUSES = (1, 4)  # seconds before another attempt
_PASSING = {408, 429, 500, 502, 503, 504}  # statuses of a server that may answer later
_CUT = (HTTPException, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Remote:
    """A file on a server: its size in bytes and its digest, such as "md5:85ee...", where they are published."""

    url: str
    size: int = 0
    digest: str = ""

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]


def download(remote: Remote, folder: Path) -> Path:
    """The file in `folder`, downloaded unless it is there; NAME.part is what has arrived so far.

    A part is continued only if the server says that the file is still the same (If-Range). Raises UserError where the
    server cannot be reached, refuses, stops before the end, or sends another file than the published one.
    """
    path = folder / remote.name
    part = folder / f"{path.name}.part"
    by_hand = f"Or put it at {path.absolute()} yourself and run this again"
    pauses, most = list(_PAUSES), 0
    while not path.is_file():
        before = part.stat().st_size if part.exists() else 0
        try:
            if _append(remote, part, before):
                _check(remote, part, by_hand)
                os.replace(part, path)
                _tag(part).unlink(missing_ok=True)
                return path
            reason = f"stops at byte {part.stat().st_size:,}"
            if part.stat().st_size > most:  # every new byte is worth as many attempts again
                pauses, most = list(_PAUSES), part.stat().st_size
                continue
        except HTTPError as error:
            reason = f"cannot be downloaded: {error}"
            if error.code == 416 and before:
                part.unlink()  # the server has fewer bytes: the file has changed there
            elif error.code not in _PASSING:
                pauses = []
        except (URLError, ValueError, *_CUT) as error:
            reason = f"cannot be reached: {getattr(error, 'reason', error)}"
            pauses = [] if isinstance(error, ValueError) else pauses
        if not pauses:
            raise UserError(f"{remote.url} {reason}. Run this again to resume it. {by_hand}")
        time.sleep(pauses.pop(0))
    return path


def _tag(part: Path) -> Path:
    """The file that keeps which version of a file a part is of."""
    return part.with_name(f"{part.name}.version")


def _append(remote: Remote, part: Path, before: int) -> bool:
    """Add the rest of the file to `part`, of `before` bytes; returns whether it is complete."""
    from tqdm import tqdm

    headers = {"Range": f"bytes={before}-"} if before else {}
    version, _, told = _tag(part).read_text().partition("\n") if before and _tag(part).is_file() else ("", "", "")
    if version:
        headers["If-Range"] = version
    try:
        response = urlopen(Request(remote.url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        whole = error.code == 416 and error.headers.get("Content-Range") == f"bytes */{before}"
        if before and whole and told in ("", str(before)):
            return True  # killed after the last byte
        raise
    with response:
        start = _first_byte(response)
        length = response.headers.get("Content-Length")
        size = remote.size if length is None else start + int(length)
        if start not in (0, before) or (start and told not in ("", str(size))):
            part.unlink()
            raise HTTPException(f"the server sent bytes from {start:,} on of another file, not from {before:,}")
        if not start:
            part.write_bytes(b"")  # first: old bytes must not get a new version
            etag = response.headers.get("ETag", "W/")  # If-Range takes no weak ones
            version = response.headers.get("Last-Modified", "") if etag.startswith("W/") else etag
            _tag(part).write_text(f"{version}\n{size or ''}")
        bar = tqdm(desc=remote.name, initial=start, total=size or None, unit="B", unit_scale=True)
        with open(part, "ab") as file, bar:
            with contextlib.suppress(*_CUT):  # the size shows that the file is not complete
                while block := response.read(1 << 18):
                    file.write(block)
                    bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    return not size or part.stat().st_size == size


def _first_byte(response: HTTPResponse) -> int:
    """Where an answer begins in the file: a server without ranges, or with a newer file, sends everything again."""
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", "")) if response.status == 206 else None
    return int(found[1]) if found else 0


def _check(remote: Remote, part: Path, by_hand: str) -> None:
    """Raise UserError, and delete the part, where it is not the published file."""
    size, (kind, _, digest) = part.stat().st_size, remote.digest.partition(":")
    fault = f"{size:,} bytes, not {remote.size:,}" if remote.size not in (0, size) else ""
    if digest and not fault:
        found = hashlib.new(kind)
        with open(part, "rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
        fault = "" if found.hexdigest() == digest else f"the {kind} digest {found.hexdigest()}, not {digest}"
    if fault:
        part.unlink()
        _tag(part).unlink(missing_ok=True)
        raise UserError(f"{remote.url} is not the published file: it has {fault}. {by_hand}")
