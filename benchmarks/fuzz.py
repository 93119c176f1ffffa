"""Damaged captions files and images, as benchmarks/faults.py makes them by the thousand."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from clip_scratch.errors import UserError

if TYPE_CHECKING:
    from .faults import Arguments


def mutated(content: bytes, chance: random.Random) -> bytes:
    """A file's content with one to three of the things done to it that happen to files, and some that do not."""
    for _ in range(chance.randint(1, 3)):
        at, from_, n = (
            chance.randrange(len(content) + 1),
            chance.randrange(len(content) + 1),
            chance.choice((1, 4, 256)),
        )
        piece = chance.choice((
            b"", bytes(n), chance.randbytes(n), content[from_ : from_ + n],
            chance.choice((b'"', b"\n", b"\r", b",", b"{", b"]", b"\xff", b"\\", b"\t")),
        ))  # fmt: skip
        skipped = chance.choice((0, n, len(content)))  # inserted, in the place of others, or the end is cut off
        content = content[:at] + piece + content[at + skipped :]
    return content.decode("latin-1").encode("utf-16") if chance.random() < 0.02 else content


def within(seconds: float, call: Callable, *args: object) -> str:
    """How a call ended: its result's type, a UserError, or what it should not."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return type(call(*args)).__name__
    except UserError as error:
        return "one clear error" if len(str(error)) < 2000 else f"a LONG error: {str(error)[:200]}"
    except TimeoutError:
        return f"longer than {seconds:g} s"
    except Exception as error:
        return f"UNEXPECTED {type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _captions_files() -> dict[str, bytes]:
    rows = [(f"{i % 7}.jpg", f"a dog, number {i}, runs “fast”") for i in range(21)]
    table = "\n".join(f'{image},"{caption}",{"train" if i % 3 else "val"}' for i, (image, caption) in enumerate(rows))
    records = [{"image": image, "caption": caption, "label": "dog"} for image, caption in rows]
    described = {"split": "train", "sentences": [{"raw": caption} for _, caption in rows[:5]]}
    karpathy = {"dataset": "x", "images": [{"filename": f"{i}.jpg", **described} for i in range(7)]}
    texts = {
        "captions.csv": f"image,caption,split\n{table}\n",
        "captions.tsv": "image\tcaption\n" + "\n".join("\t".join(row) for row in rows),
        "Flickr8k.token.txt": "\n".join(f"{image}#{i % 5}\t{caption}" for i, (image, caption) in enumerate(rows)),
        "results.csv": "image_name| comment_number| comment\n"
        + "\n".join(f"{image}| {i % 5}| {caption}" for i, (image, caption) in enumerate(rows)),
        "dataset_flickr8k.json": json.dumps(karpathy),
        "captions.json": json.dumps(records),
        "captions.jsonl": "\n".join(map(json.dumps, records)),
    }  # fmt: skip
    return {name: text.encode() for name, text in texts.items()}


def captions(arguments: Arguments, work: Path, count: Callable[[str, str], None]) -> None:
    """Fuzzed captions files, through every reader."""
    from clip_scratch.config import CFG
    from clip_scratch.data.captions import read_captions

    files, chance = list(_captions_files().items()), random.Random(arguments.seed)
    for n in range(arguments.fuzz):
        name, content = files[n % len(files)]
        folder = work / "fuzz"
        folder.mkdir(exist_ok=True)
        path = folder / name
        path.write_bytes(mutated(content, chance))
        with silent():
            outcome = within(10, read_captions, CFG(captions_path=str(path), image_path=str(folder)))
        count(f"fuzzed {name}", outcome)
        path.unlink()


def image_files() -> dict[str, bytes]:
    """Small images of every format, and files as people have them."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    image, files = Image.fromarray(pixels), {}

    def save(name: str, image: Image.Image, **options: object) -> None:
        buffer = io.BytesIO()
        image.save(buffer, name.rpartition(".")[2].replace("jpg", "jpeg").replace("tif", "tiff"), **options)
        files[name] = buffer.getvalue()

    exif = Image.Exif()
    exif[274], exif[306] = 6, "2020:07:14 18:30:00"
    save("exif.jpg", image, exif=exif)
    save("progressive.jpg", image, progressive=True)
    save("cmyk.jpg", image.convert("CMYK"))
    save("grey.png", image.convert("L"))
    save("palette.png", image.convert("P"))
    save("alpha.png", image.convert("RGBA"))
    save("16bit.png", Image.fromarray(pixels[..., 0].astype(np.uint16) << 8))
    save("float.tif", Image.fromarray(pixels[..., 0].astype(np.float32) / 255))
    save("animated.gif", image, save_all=True, append_images=[image.rotate(90), image.rotate(180)])
    save("animated.webp", image, save_all=True, append_images=[image.rotate(90)])
    save("plain.bmp", image)
    return files


BROKEN = {
    "zero bytes": b"",
    "HTML": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "EXIF garbage": b"\xff\xd8\xff\xe1\x00\x20Exif\x00\x00" + bytes(range(200, 224)) + b"\xff\xd9",
    "a bomb": b"BM" + bytes(16) + (100_000).to_bytes(4, "little") * 2 + bytes(28),
}


def images(arguments: Arguments, work: Path, count: Callable[[str, str], None]) -> None:
    """Fuzzed image files, one by one."""
    from clip_scratch.data.images import load_image, reading

    def load(path: Path):
        with reading(path):
            return load_image(path)

    files, chance = list(image_files().items()), random.Random(arguments.seed)
    for n in range(arguments.fuzz):
        name, content = files[n % len(files)]
        path = work / name
        path.write_bytes(mutated(content, chance))
        with silent():
            outcome = within(10, load, path)
        count(f"fuzzed {name}", outcome)
        path.unlink()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with (
        open(os.devnull, "w") as sink,
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
