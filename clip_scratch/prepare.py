"""Get and check a data set, and manage the caches.

python -m clip_scratch.prepare scenes --n 10000 --out data/scenes
python -m clip_scratch.prepare flickr8k
python -m clip_scratch.prepare flickr30k
python -m clip_scratch.prepare check --captions-path captions.csv --image-path images
python -m clip_scratch.prepare cache --older-than 30
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import zipfile
import zlib
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from .errors import UserError, run_command, suggest
from .files import cache_folder, new_folder, sole_writer, sync_folder

if TYPE_CHECKING:
    import pandas as pd

FLICKR8K_URL = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
TIMEOUT = 8  # seconds without a byte from the server
CACHES = ("images-*", "features-*.bin", "precision-*.json", ".*.tmp")  # in the cache folder


def scenes(n: int = 10_000, out: str = "data/scenes", seed: int = 42) -> None:
    """Draw the built-in data set of coloured shapes.

    Args:
        n: images to draw; each has five captions.
        out: folder to make.
        seed: another seed gives other scenes.
    """
    from .data.scenes.write import write_scenes

    rate = write_scenes(out, n, seed)
    print(f"{n:,} images and {5 * n:,} captions in {out} ({rate:,.0f} pairs per second)")
    # Left and right matter in the captions
    print(
        f"Train on it:  python -m clip_scratch.train --captions-path {Path(out) / 'captions.txt'} --horizontal-flip 0"
    )


def flickr8k(out: str = "data/flickr8k", url: str = FLICKR8K_URL) -> None:
    """Download Flickr8k (1.1 GB) from its public mirror and unpack it; an interrupted download is resumed.

    Args:
        out: folder to make.
        url: where Flickr8k_Dataset.zip and Flickr8k_text.zip are; zips that are in OUT already are not downloaded.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "Flickr8k.token.txt").is_file():
            texts = unzip(_fetched(url, folder / "Flickr8k_text.zip"), folder / ".text", ".txt")
            for text in sorted(texts.iterdir(), key=lambda path: path.name == "Flickr8k.token.txt"):
                os.replace(text, folder / text.name)  # the captions last: they show that all are there
            texts.rmdir()
        if not (folder / "Images").is_dir():
            unzip(_fetched(url, folder / "Flickr8k_Dataset.zip"), folder / "Images", ".jpg")
    except OSError as error:
        raise UserError(f"cannot prepare {folder}: {error}") from error
    check(str(folder), str(folder / "Images"))
    if zips := [str(path) for path in folder.glob("*.zip")]:
        print(f"No longer needed:  {' '.join(zips)}")
    print("Train on it:  python -m clip_scratch.train flickr8k")


def flickr30k(out: str = "data/flickr30k") -> None:
    """Check Flickr30k, whose licence does not allow an automatic download.

    Args:
        out: folder with results.csv and flickr30k_images/.
    """
    captions, images = Path(out) / "results.csv", Path(out) / "flickr30k_images"
    missing = [str(path) for path in (captions, images) if not path.exists()]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not found. Flickr30k is free for research, but may not be redistributed: request "
            "it at https://shannon.cs.illinois.edu/DenotationGraph/ or get https://www.kaggle.com/datasets/hsankesara/"
            f"flickr-image-dataset, then put the captions file at {captions} and the 31,783 images in {images}"
        )
    check(str(captions), str(images))
    print("Train on it:  python -m clip_scratch.train flickr30k")


def check(captions_path: str, image_path: str = "") -> None:
    """Read a captions file, decode every image, and print a summary.

    Args:
        captions_path: captions file, or the folder of a published data set.
        image_path: folder of the images; by default it is found beside the captions file.
    """
    from .config import CFG
    from .data.source import open_data

    print(summary(open_data(CFG(captions_path=captions_path, image_path=image_path, image_cache=False)).table))


def cache(remove: tuple[str, ...] = (), older_than: float = math.inf, cache_path: str = "") -> None:
    """List the caches of images, frozen features and measured precisions, with their sizes and ages; remove some.

    Args:
        remove: names of caches to remove.
        older_than: remove caches that have not been used for this number of days; 0: all.
        cache_path: folder of the caches; by default clip_scratch in the user's cache folder.
    """
    from .config import CFG

    try:
        folder = cache_folder(CFG(cache_path=cache_path))
        names = sorted(path.name for pattern in CACHES for path in folder.glob(pattern))
        if unknown := set(remove) - set(names):
            raise UserError(f"{folder} has no cache {min(unknown)}.{suggest(min(unknown), names)}")
        print(f"{'cache':<26}{'size':>10}{'made':>12}{'used':>12}  content")
        total = 0.0
        for name in names:
            size, made, used, content = _describe_cache(folder / name)
            gone = name in remove or used >= older_than
            if gone:
                with sole_writer(folder / name):  # wait for a process that is building it
                    shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
            total += 0 if gone else size
            days = "".join(f"{days:>7.0f} days" for days in (made, used))
            print(f"{name:<26}{size / 1e6:>7,.0f} MB{days}  {content}{' (removed)' if gone else ''}")
        print(f"total: {total / 1e6:,.0f} MB in {folder}")
    except OSError as error:
        raise UserError(f"cannot read or clear the cache folder: {error}") from error


def _describe_cache(path: Path) -> tuple[float, float, float, str]:
    """Bytes on the disk, days since it was written and since it was last used, and what is in it."""
    from .data.image_cache import rows_done

    stats = {file.name: file.stat() for file in (path.glob("*") if path.is_dir() else [path])}
    # Of a partial cache only some blocks are on the disk. Windows does not count blocks.
    size = sum(stat.st_blocks * 512 if hasattr(stat, "st_blocks") else stat.st_size for stat in stats.values())
    written = max((stat.st_mtime for stat in stats.values()), default=time.time())
    # The small files of all caches are read in every run
    read = max((stat.st_atime for name, stat in stats.items() if name in ("pixels", path.name)), default=written)
    made, used = ((time.time() - then) / 86400 for then in (written, max(written, read)))
    if not path.is_dir():
        kinds = {".tmp": "unfinished file", ".bin": "features of a frozen tower", ".json": "measured precision"}
        return size, made, used, kinds[path.suffix]
    try:
        record = json.loads((path / "files.json").read_text())
        done, n = rows_done(path, len(record["names"]), record["side"]).sum(), len(record["names"])
    except (OSError, ValueError):
        return size, made, used, "unfinished images"
    return size, made, used, f"{'' if done == n else f'unfinished, {done:,} of '}{n:,} images of {record['folder']}"


def main(args: list[str] | None = None) -> None:
    import tyro

    commands = {"scenes": scenes, "flickr8k": flickr8k, "flickr30k": flickr30k, "check": check, "cache": cache}
    tyro.extras.subcommand_cli_from_dict(
        commands, prog="python -m clip_scratch.prepare", description=__doc__.splitlines()[0], args=args
    )


def summary(table: pd.DataFrame) -> str:
    """A summary of a caption table in a few lines."""
    lines = [f"{'split':<8}{'images':>10}{'captions':>10}{'captions per image (min / median / max)':>42}"]
    splits = [(split, table[table.split == split]) for split in ("train", "valid", "test")]
    for name, rows in [*splits, ("all", table)]:
        if len(rows):
            an_image = rows.groupby("image_id").size()
            spread = f"{an_image.min()} / {an_image.median():g} / {an_image.max()}"
            lines.append(f"{name:<8}{len(an_image):>10,}{len(rows):>10,}{spread:>42}")
    shared = table.groupby("caption").image_id.transform("nunique") > 1
    row = table.iloc[0]
    return "\n".join([
        *lines,
        f"median words per caption: {table.caption.str.split().str.len().median():g}",
        f"captions that another image has too: {shared.sum():,}",
        f"first row: {row.image}: {row.caption}",
    ])  # fmt: skip


def _fetched(url: str, path: Path) -> Path:
    """`path`, downloaded from `url` unless it is there."""
    if not path.is_file():
        download(f"{url.rstrip('/')}/{path.name}", path)
    return path


def download(url: str, path: Path) -> None:
    """Download `url` to `path`, which appears when it is complete; PATH.part is what has arrived so far.

    Raises UserError where the server cannot be reached, refuses, or stops before the end.
    """
    part = path.with_name(f"{path.name}.part")
    by_hand = f"Or put it at {path.absolute()} yourself and run this again"
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            whole = _append(url, part, before)
        except HTTPError as error:
            if error.code != 416 or not before:
                raise UserError(f"{url} cannot be downloaded: {error}. {by_hand}") from error
            # The server has no more bytes: the file is complete, or it has changed on the server
            whole = error.headers.get("Content-Range") == f"bytes */{before}"
            if not whole:
                part.unlink()
                continue
        except (URLError, HTTPException, ConnectionError, TimeoutError, ValueError) as error:
            raise UserError(f"{url} cannot be reached: {getattr(error, 'reason', error)}. {by_hand}") from error
        if whole:
            os.replace(part, path)
            return sync_folder(path.parent)
        if part.stat().st_size <= before:
            raise UserError(f"{url} stops at byte {before:,}. Run this again to resume it. {by_hand}")


def _append(url: str, part: Path, before: int) -> bool:
    """Add the rest of the file to `part`, of `before` bytes; returns whether it is complete."""
    from tqdm import tqdm

    request = Request(url, headers={"Range": f"bytes={before}-"} if before else {})
    with urlopen(request, timeout=TIMEOUT) as response:
        start = before if response.status == 206 else 0  # 200: a server without ranges sends everything again
        length = response.headers.get("Content-Length")
        size = None if length is None else start + int(length)
        with (
            open(part, "ab" if start else "wb") as file,
            tqdm(desc=part.stem, initial=start, total=size, unit="B", unit_scale=True) as bar,
        ):
            while block := _read(response):
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    return size is None or part.stat().st_size == size


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read(1 << 18)
    except (HTTPException, ConnectionError, TimeoutError):
        return b""  # the connection broke: the size shows that the file is not complete


def unzip(archive: Path, folder: Path, suffix: str) -> Path:
    """Unpack the files of `archive` that end in `suffix`, without its folders, into a new `folder`.

    Raises UserError, and leaves no folder, where the archive is damaged or has a member that points outside it.
    """
    from tqdm import tqdm

    try:
        with zipfile.ZipFile(archive) as zipped, new_folder(folder) as unfinished:
            paths = {member: PurePosixPath(member.filename.replace("\\", "/")) for member in zipped.infolist()}
            for path in paths.values():
                if path.is_absolute() or ".." in path.parts:
                    raise UserError(f"{archive} is unsafe: it has a file outside its own folder, {path}. Remove it")
            wanted = [m for m, path in paths.items() if path.suffix == suffix and path.parts[0] != "__MACOSX"]
            for member in tqdm(wanted, desc=archive.name, unit="file"):
                with zipped.open(member) as source, open(unfinished / paths[member].name, "wb") as target:
                    shutil.copyfileobj(source, target)  # checks the member's checksum at its end
        return folder
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{archive} is damaged ({error}): remove it and run this again") from error


if __name__ == "__main__":
    run_command(main)
