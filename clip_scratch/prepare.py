"""Get, check and cache a data set.

python -m clip_scratch.prepare scenes --n 10000 --out data/scenes
python -m clip_scratch.prepare flickr8k
python -m clip_scratch.prepare flickr30k
python -m clip_scratch.prepare check --captions-path captions.csv --image-path images
"""

from __future__ import annotations

import os
import shutil
import zipfile
import zlib
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from .errors import UserError, run_command

if TYPE_CHECKING:
    import pandas as pd

FLICKR8K_URL = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
FLICKR8K_COUNTS = (8091, 40460)  # images and captions as published; 8,000 of the images are in a split
TIMEOUT = 8  # seconds without a byte from the server


def scenes(n: int = 10_000, out: str = "data/scenes", seed: int = 42, workers: int | None = None) -> None:
    """Draw the built-in data set of coloured shapes.

    Args:
        n: images to draw; each has five captions.
        out: folder to make.
        seed: another seed gives other scenes.
        workers: processes; by default one a core.
    """
    from .data.scenes.write import write_scenes

    rate = write_scenes(out, n, seed, workers)
    print(f"{n:,} images and {5 * n:,} captions in {out} ({rate:,.0f} pairs per second)")
    # A mirrored scene belies its captions, so the mirroring that suits photos is off.
    print(
        f"Train on it:  python -m clip_scratch.train --captions-path {Path(out) / 'captions.txt'} --horizontal-flip 0"
    )


def flickr8k(out: str = "data/flickr8k", url: str = FLICKR8K_URL) -> None:
    """Download Flickr8k (1.1 GB) from its public mirror and unpack it; an interrupted download goes on where it was.

    Args:
        out: folder to make.
        url: where Flickr8k_Dataset.zip and Flickr8k_text.zip lie; zips placed in OUT by hand are used as they are.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "Flickr8k.token.txt").is_file():
            texts = unzip(_fetched(url, folder / "Flickr8k_text.zip"), folder / ".text.partial", ".txt")
            for text in sorted(texts.iterdir(), key=lambda path: path.name == "Flickr8k.token.txt"):
                os.replace(text, folder / text.name)  # the captions last: they stand for the whole
            texts.rmdir()
        if not (folder / "Images").is_dir():
            images = unzip(_fetched(url, folder / "Flickr8k_Dataset.zip"), folder / ".Images.partial", ".jpg")
            images.rename(folder / "Images")
        _check_flickr8k(folder)
    except OSError as error:
        raise UserError(f"cannot prepare {folder}: {error}") from error
    if zips := [str(path) for path in folder.glob("*.zip")]:
        print(f"No longer needed:  {' '.join(zips)}")
    print("Train on it:  python -m clip_scratch.train flickr8k")


def flickr30k(out: str = "data/flickr30k") -> None:
    """Check Flickr30k, which its licence lets nobody download for you.

    Args:
        out: folder that holds results.csv and flickr30k_images/.
    """
    captions, images = Path(out) / "results.csv", Path(out) / "flickr30k_images"
    missing = [str(path) for path in (captions, images) if not path.exists()]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not found. Flickr30k is free for research but not ours to pass on: ask at "
            "https://shannon.cs.illinois.edu/DenotationGraph/ or take https://www.kaggle.com/datasets/hsankesara/"
            f"flickr-image-dataset, then place the caption file as {captions} and the 31,783 images in {images}"
        )
    check(str(captions), str(images))
    print("Train on it:  python -m clip_scratch.train flickr30k")


def check(captions_path: str, image_path: str = "") -> None:
    """Read a captions file, decode every image, and print what is there.

    Args:
        captions_path: captions file, or the folder of a published data set.
        image_path: folder of the images; by default the captions file's own, or Images/ in it.
    """
    from .config import CFG
    from .data.captions import check_images, image_folder, read_captions

    cfg = CFG(captions_path=captions_path, image_path=image_path)
    print(summary(check_images(read_captions(cfg), image_folder(cfg), "error")))


def main(args: list[str] | None = None) -> None:
    import tyro

    commands = {"scenes": scenes, "flickr8k": flickr8k, "flickr30k": flickr30k, "check": check}
    tyro.extras.subcommand_cli_from_dict(
        commands, prog="python -m clip_scratch.prepare", description=__doc__.splitlines()[0], args=args
    )


def summary(table: pd.DataFrame) -> str:
    """A caption table in a dozen lines: its splits, its captions, one row."""
    lines = [f"{'split':<8}{'images':>10}{'captions':>10}{'captions an image (min / median / max)':>42}"]
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
        f"words a caption, median: {table.caption.str.split().str.len().median():g}",
        f"captions that another image has word for word: {shared.sum():,}",
        f"the first row: {row.image}: {row.caption}",
    ])  # fmt: skip


def _fetched(url: str, path: Path) -> Path:
    """`path`, downloaded from `url` unless it is there."""
    if not path.is_file():
        download(f"{url.rstrip('/')}/{path.name}", path)
    return path


def download(url: str, path: Path) -> None:
    """Download `url` to `path`, which appears once all of it is there; PATH.part keeps what came of it so far.

    Raises UserError where the server cannot be reached, refuses, or stops before the end.
    """
    part = path.with_name(f"{path.name}.part")
    by_hand = f"Or place it by hand as {path.absolute()} and run this again"
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            whole = _append(url, part, before)
        except HTTPError as error:
            if error.code != 416 or not before:
                raise UserError(f"{url} cannot be downloaded: {error}. {by_hand}") from error
            # The server has nothing beyond what is here: all of it came, or the file there is another by now.
            whole = error.headers.get("Content-Range") == f"bytes */{before}"
            if not whole:
                part.unlink()
                continue
        except (URLError, HTTPException, ConnectionError, TimeoutError, ValueError) as error:
            raise UserError(f"{url} cannot be reached: {getattr(error, 'reason', error)}. {by_hand}") from error
        if whole:
            os.replace(part, path)
            return
        if part.stat().st_size <= before:
            raise UserError(f"{url} stops at byte {before:,}. Run this again to go on from there. {by_hand}")


def _append(url: str, part: Path, before: int) -> bool:
    """Add to `part`, of `before` bytes, what the server still has, and say whether it is whole."""
    from tqdm import tqdm

    request = Request(url, headers={"Range": f"bytes={before}-"} if before else {})
    with urlopen(request, timeout=TIMEOUT) as response:
        start = before if response.status == 206 else 0  # a server that knows no ranges sends it all again
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
        return b""  # the line broke: what came is kept, and the size tells that more is to come


def unzip(archive: Path, folder: Path, suffix: str) -> Path:
    """Unpack the files of `archive` that end in `suffix`, without its folders, into a fresh `folder`.

    Raises UserError, and leaves no folder, where the archive is damaged or has a member that points outside it.
    """
    from tqdm import tqdm

    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir()
    try:
        with zipfile.ZipFile(archive) as zipped:
            paths = {member: PurePosixPath(member.filename.replace("\\", "/")) for member in zipped.infolist()}
            for path in paths.values():
                if path.is_absolute() or ".." in path.parts:
                    raise UserError(
                        f"{archive} is not to be trusted: it holds {path}, outside its own folder. Remove it"
                    )
            wanted = [m for m, path in paths.items() if path.suffix == suffix and path.parts[0] != "__MACOSX"]
            for member in tqdm(wanted, desc=archive.name, unit="file"):
                with zipped.open(member) as source, open(folder / paths[member].name, "wb") as target:
                    shutil.copyfileobj(source, target)  # checks the member's checksum at its end
        return folder
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"{archive} is damaged ({error}): remove it and run this again") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _check_flickr8k(folder: Path) -> None:
    images = {path.name for path in (folder / "Images").iterdir()}
    captions = (folder / "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines()
    for split in ("train", "dev", "test"):
        listing = folder / f"Flickr_8k.{split}Images.txt"
        if not listing.is_file():
            raise UserError(f"{listing} is missing: remove {folder / 'Flickr8k.token.txt'} and run this again")
        if missing := [name for name in listing.read_text().split() if name not in images]:
            raise UserError(
                f"{len(missing):,} images of {listing} are not in {folder / 'Images'}, {missing[0]} first: "
                f"remove {folder / 'Images'} and run this again"
            )
    print(f"{len(images):,} images and {len(captions):,} captions in {folder}")
    if (len(images), len(captions)) != FLICKR8K_COUNTS:
        print("note: Flickr8k as published has {:,} images and {:,} captions".format(*FLICKR8K_COUNTS))


if __name__ == "__main__":
    run_command(main)
