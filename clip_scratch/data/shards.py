"""WebDataset tar shards, as img2dataset writes them: image files with names such as 00000.tar/000000012.jpg.

A shard is read once from end to end, for its captions, for the place of each image in it, and to check that each can be
decoded; what was found is kept in the user's cache folder. From then on images are read by their place, as from a
folder, and what holds for folders holds for shards: exact resume, the same batches for any number of processes and
workers. The streams of `webdataset` and Hugging Face `datasets` do not resume exactly (no state, or none of the shuffle
buffer); webdataset's own answer, `wids`, reads by place as well.
"""

import contextlib
import functools
import glob
import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from ..errors import UserError
from ..files import cache_folder, sole_writer, write_atomically, write_text
from .image_files import copy_of, image_source, is_url, local_version, open_shard, record_of
from .images import IMAGE_SUFFIXES, images_below, load_image
from .readers import captions_in

_LANES = 8  # shards that a batch mixes, where this divides the batch
_WINDOW = 1000  # neighbours in a shard that are shuffled together


def is_shards(path: str | Path) -> bool:
    """Whether a captions_path or folder names shards."""
    return str(path).endswith(".tar")


def read_shards(pattern: str, root: Path, on_bad_image: str) -> pd.DataFrame:
    """The captions of all shards: image (below `root`), caption, file, row, and whether the image `decodes`.

    Raises UserError for a shard that is missing or damaged, and for a sample without image or caption; where
    on_bad_image is "skip" these are left out, and it is printed.
    """
    rows, left_out = [], []
    for shard, (samples, fault) in _read_all(list_shards(pattern)).items():
        left_out += [fault] if fault else []
        below = Path(shard).relative_to(root).as_posix()
        for row, (name, _, size, captions, decodes) in enumerate(samples, 1):
            if not (size and captions):
                left_out.append(f"{shard}: {name} has no {'caption' if size else 'image'}")
            rows += [(f"{below}/{name}", caption, below, row, decodes) for caption in captions if size]
    if left_out and on_bad_image != "skip":
        raise UserError(f"{left_out[0]}. Write it again, or leave bad samples out with --on-bad-image skip")
    if left_out:
        print(f"Bad shards and samples: {len(left_out):,}. The first: {left_out[0]}.", file=sys.stderr)
    if not rows:
        raise UserError(f"{pattern} has no images with captions. Set --captions-path to other shards")
    return pd.DataFrame(rows, columns=["image", "caption", "file", "row", "decodes"])


def list_shards(pattern: str) -> list[str]:
    """The paths or URLs of a pattern with braces ({00000..00099}, {a,b}) and wildcards. Raises UserError for none."""
    import fsspec

    found: list[str] = []
    for path in _expand_braces(pattern):
        try:
            if not is_url(path):
                path = os.path.abspath(os.path.expanduser(path))
                found += sorted(glob.glob(path)) if glob.has_magic(path) else [path]
            else:
                fs, inner = fsspec.url_to_fs(path)
                found += sorted(map(fs.unstrip_protocol, fs.glob(inner) if glob.has_magic(path) else [inner]))
        except Exception as error:  # each file system has its own errors
            raise UserError(f"{path} cannot be reached: {error}") from error
    missing = [path for path in found if not is_url(path) and not os.path.isfile(path)]
    if missing or not found:
        what = f"there is no shard {missing[0]}" if missing else f"no shard matches {pattern}"
        raise UserError(f"{what}. A pattern is 'shards/*.tar' or 'shards/{{00000..00099}}.tar'")
    return found


def images_in(place: str | Path) -> tuple[Path, list[str]]:
    """A folder and the names of all images in it; of shards, the folder that they are below. Raises UserError."""
    if not is_shards(place):
        return Path(place).expanduser().resolve(), images_below(Path(place).expanduser())
    folder, names = Path(common_folder([str(place)])), []
    for shard, (samples, fault) in _read_all(list_shards(str(place))).items():
        if fault:
            print(fault, file=sys.stderr)
        below = Path(shard).relative_to(folder).as_posix()
        names += [f"{below}/{name}" for name, _, size, *_ in samples if size]
    return folder, names


def _expand_braces(pattern: str) -> list[str]:
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if not braces:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    inside = braces[1].split(",")
    if numbers:
        inside = [f"{i:0{len(numbers[1])}d}" for i in range(int(numbers[1]), int(numbers[2]) + 1)]
    return [path for text in inside for path in _expand_braces(pattern.replace(braces[0], text, 1))]


def common_folder(patterns: list[str]) -> str:
    """The folder or URL that all shards of the patterns are below."""
    folders = [shard.rpartition("/")[0].split("/") for pattern in patterns for shard in list_shards(pattern)]
    return "/".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False)))


def shard_order(shard_of: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """A random order of N images, N the last multiple of the batch size, that reads few shards at a time.

    The shards, in random order, make a line of their images, which is cut into lanes of equal length. Each lane is
    shuffled within a window, and a batch takes equally many images of each. So of up to 8 processes that divide a
    batch, each reads shards of its own.
    """
    ends = np.flatnonzero(np.diff(shard_of)) + 1
    of_shard = np.split(np.arange(len(shard_of)), ends)
    line = np.concatenate([of_shard[i] for i in rng.permutation(len(of_shard))])
    n, lanes = len(line) // batch_size, int(np.gcd(batch_size, _LANES))
    line = line[: n * batch_size].reshape(lanes, -1)
    places = np.argsort(np.arange(line.shape[1]) + _WINDOW * rng.random(line.shape), axis=1)
    return np.take_along_axis(line, places, 1).reshape(lanes, n, -1).swapaxes(0, 1).ravel()


def write_shards(table: pd.DataFrame, image_folder: Path, folder: Path, shard_size: int) -> dict[str, int]:
    """Write a caption table as shards folder/SPLIT/00000.tar, ...; the number of shards of each split.

    A sample is the image as it is, its first caption as .txt, and all as `captions` in .json. Images are in random
    order. Each shard appears whole, and those that are there already are kept. Raises OSError.
    """
    written = {}
    for split, rows in table.groupby("split"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        images = list(rows.groupby("image", sort=False)["caption"].agg(list).items())
        images = [images[i] for i in np.random.default_rng(0).permutation(len(images))]
        starts = range(0, len(images), shard_size)
        for number, start in enumerate(starts):
            path, part = folder / split / f"{number:05d}.tar", images[start : start + shard_size]
            if not path.exists():
                write_atomically(path, functools.partial(_write, images=part, first=start, folder=image_folder))
        written[split] = len(starts)
    return written


def _write(path: Path, images: list[tuple[str, list[str]]], first: int, folder: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (name, captions) in enumerate(images, first):
            suffix = PurePosixPath(name).suffix.lower()
            record = json.dumps({"image": name, "captions": captions}).encode()
            source = image_source(folder / name)
            image = source.getvalue() if isinstance(source, io.BytesIO) else source.read_bytes()
            parts = {suffix if suffix in IMAGE_SUFFIXES else ".jpg": image, ".txt": captions[0].encode()}
            for end, content in {**parts, ".json": record}.items():
                info = tarfile.TarInfo(f"{number:09d}{end}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


# ---- reading a shard from end to end


def _read_all(shards: list[str]) -> dict[str, tuple[list, str]]:
    """`_samples` of each shard, several at a time."""
    from tqdm import tqdm

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # without a cache folder the shards are read each time
            stack.enter_context(sole_writer(cache_folder() / "shards"))  # of several processes one reads them
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count() or 1))  # decoders release the GIL
        found = pool.map(_samples, shards)
        found = list(tqdm(found, "Reading shards", len(shards), unit=" shards", leave=False))
    return dict(zip(shards, found, strict=True))


def _samples(shard: str) -> tuple[list, str]:
    """`_scan` of a shard, from the cache folder where it is known."""
    version = _version(shard)
    with contextlib.suppress(OSError, ValueError, KeyError):
        kept = json.loads(record_of(shard).read_text())
        if kept["version"] == version:
            return kept["samples"], ""
    if is_url(shard):  # a copy would be of another version
        copy_of(shard).unlink(missing_ok=True)
    samples, fault = _scan(shard)
    if not fault:
        with contextlib.suppress(OSError):  # without a cache folder the shard is read each time
            write_text(record_of(shard), json.dumps({"version": version, "samples": samples}))
    return samples, fault


def _scan(shard: str) -> tuple[list, str]:
    """[image name, offset, bytes, captions, whether it decodes] of each sample, and why the rest is unreadable."""
    samples, fault = [], ""
    try:
        with open_shard(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            samples.extend(_sample(key, members, tar) for key, members in _groups(tar))
            file.seek(-512, os.SEEK_END)
            if any(file.read()):  # a tar ends with zeros; tarfile takes any end between two members
                fault = "unexpected end of data"
    except (OSError, tarfile.TarError, EOFError) as error:
        fault = str(error)
    return samples, fault and f"the shard {shard} cannot be read to its end ({fault})"


def _groups(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The files of each sample, side by side in the tar, by their suffix."""
    key, members = "", {}
    for member in tar:
        name = PurePosixPath(member.name)
        own, _, suffix = name.name.partition(".")
        own = str(name.parent / own)
        if own != key and members:
            yield key, members
            members = {}
        if member.isfile():
            key, members[f".{suffix.lower()}"] = own, member
        tar.members = []  # else a long shard would be held in memory
    if members:
        yield key, members


def _sample(key: str, members: dict[str, tarfile.TarInfo], tar: tarfile.TarFile) -> list:
    content = {suffix: tar.extractfile(member).read() for suffix, member in members.items()}
    suffix = next((suffix for suffix in members if suffix in IMAGE_SUFFIXES), None)
    record: object = {}
    with contextlib.suppress(ValueError):
        record = json.loads(content.get(".json", b"{}"))
    record = record if isinstance(record, dict) else {}
    text = content.get(".txt", b"").decode(errors="replace")
    captions = list(dict.fromkeys(captions_in(record.get("captions") or text or record.get("caption"))))
    if suffix is None:
        return [key, 0, 0, captions, False]
    decodes = False
    with contextlib.suppress(Exception):  # decoders raise OSError, ValueError, SyntaxError and classes of their own
        decodes = bool(load_image(io.BytesIO(content[suffix])).size)
    image = members[suffix]
    return [str(PurePosixPath(image.name)), image.offset_data, image.size, captions, decodes]


def _version(shard: str) -> list:
    """What changes when a shard does: its size, and of local ones the time."""
    if not is_url(shard):
        return local_version(shard)
    import fsspec

    try:
        return [fsspec.url_to_fs(shard)[0].size(shard)]
    except Exception as error:  # each file system has its own errors
        raise UserError(f"the shard {shard} cannot be reached: {error or type(error).__name__}") from error
