"""Get and check a data set, and manage the caches.

python -m clip_scratch.prepare scenes --n 10000
python -m clip_scratch.prepare flickr8k
python -m clip_scratch.prepare flickr30k --archive flickr30k-images.tar.gz
python -m clip_scratch.prepare shards --captions-path captions.csv --out shards
python -m clip_scratch.prepare check captions.csv images --html report.html
python -m clip_scratch.prepare cache --older-than 30
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path

from tyro.conf import Positional

from .config import CFG
from .data.sources import SOURCES, archives_in, fetch
from .errors import UserError, run_command, suggest
from .files import cache_folder, check_target, remove_unfinished, sole_writer, write_atomically, write_json
from .presets import PRESETS

CACHES = {  # in the cache folder
    "images-*": "images", "features-*.bin": "features of a frozen tower", "precision-*.json": "measured precision",
    "tokens-*.npz": "tokens of captions", "shard-*.json": "content of a shard", "shards/*.tar": "copy of a shard",
    ".*.tmp": "unfinished file",
}  # fmt: skip


def scenes(n: int = 6000, out: str = "", seed: int = 42, image_cache: bool = True) -> None:
    """Draw the built-in data set of coloured shapes.

    Args:
        n: images to draw; each has five captions.
        out: folder to make, which must be new; by default data/scenes-N-SEED, where training looks for it.
        seed: another seed gives other scenes.
        image_cache: build the caches of images and tokens that training reads.
    """
    from .data.scenes.write import ensure_scenes, write_scenes

    settings = {"captions_path": out} if out else {"n_scenes": n, "seed": seed}
    if out:
        write_scenes(out, n, seed)
    print(f"{n:,} images and {5 * n:,} captions in {out or ensure_scenes(CFG(**settings))[0].parent}")
    _make_ready("scenes", settings, image_cache)


def _make_ready(name: str, settings: dict[str, object], image_cache: bool, decoded: Collection[str] = ()) -> None:
    """Build the caches of the preset `name` with these settings, and say how to train with it."""
    if image_cache:
        try:
            _build_caches(PRESETS[name](**settings), decoded)
        except UserError as error:  # the data set is there all the same
            print(f"Not all is cached, as training would stop: {error}")
    words = [f" --{k.replace('_', '-')} {v}" for k, v in settings.items() if v != getattr(PRESETS[name], k)]
    print(f"Train on it:  python -m clip_scratch.train {name}{''.join(words)}")


def _build_caches(cfg: CFG, decoded: Collection[str]) -> None:
    """Build the image and token caches of a run of these settings; the images in `decoded` are known to be good."""
    from .data.image_cache import ImageCache, open_images
    from .data.images import of_split
    from .data.source import open_data
    from .data.tokenizer import build_tokenizer, tokenize

    if cfg.backend == "hf_clip":
        from .models.hf_clip import image_geometry

        cfg = dataclasses.replace(cfg, **image_geometry(cfg)[0])
    source, began = open_data(cfg, decoded), time.perf_counter()
    names = {split: source.split(split)["image"].unique() for split in ("train", "valid")}
    caches = [
        open_images(of, source.image_folder, of_split(cfg, split == "train"), split == "train")
        for split, of in names.items()
    ]
    if all(isinstance(cache, ImageCache) for cache in caches):  # else open_images has said why not
        n, size = sum(len(cache.ratios) for cache in caches), sum(cache.pixels.nbytes for cache in caches)
        how = f"built in {time.perf_counter() - began:.1f} s" if any(c.is_new for c in caches) else "built before"
        print(f"Image cache:  {n:,} training and validation images, {size / 1e6:,.0f} MB, {how}")
    captions = [source.split(split)["caption"].tolist() for split in names]
    tokenizer = build_tokenizer(cfg, captions[0])
    tables = [tokenize(of, tokenizer, cfg.max_length, cfg) for of in captions]
    print(f"Token cache:  {sum(map(len, tables)):,} captions, {sum(len(table.ids) for table in tables):,} tokens")


def data_set(name: str) -> Callable:
    """The subcommand that prepares a published data set."""
    source = SOURCES[name]
    what = "downloads it" if source.files and not source.by_hand else "says what to get by hand"

    def command(out: str = f"data/{name}", archive: tuple[str, ...] = (), url: str = "", image_cache: bool = True):
        from .data.doctor import examine

        folder = Path(out)
        try:
            fetch(name, folder, tuple(map(Path, archive)), url)
        except OSError as error:
            raise UserError(f"cannot prepare {folder}: {error}") from error
        report = examine(folder)
        print(report.text())
        if archives := archives_in(folder):
            print(f"No longer needed:  {' '.join(map(str, archives))}")
        settings = {"captions_path": out, "captions_format": "auto"}  # the preset food is of another set, on the hub
        _make_ready(name, settings, image_cache, report.images.index)

    command.__doc__ = f"""Get {name}: {what}, or takes archives that you have, and checks it.

    Args:
        out: folder to make.
        archive: archives that were fetched by hand, in place of downloads.
        url: a mirror, where the files have their published names.
        image_cache: build the caches of images and tokens that training reads.
    """
    return command


def check(
    captions: Positional[str],
    images: Positional[str] = "",
    html: str = "",
    fix: str = "",
    run: str = "",
    image_column: str = "",
    caption_column: str = "",
) -> None:
    """Read a captions file and every image; report all faults, and what training does about each.

    Args:
        captions: captions file, or the folder of a published data set.
        images: folder of the images; by default it is found beside the captions file.
        html: write the report with pictures to this HTML file.
        fix: write a cleaned captions file to this CSV file, which must not exist; the source is never changed.
        run: a trained run: also report the captions that fit their images worst.
        image_column: column or JSON field with the image name; by default it is recognised.
        caption_column: column or JSON field with the caption; by default it is recognised.
    """
    from .data.doctor import examine

    check_target(html, ".html")
    check_target(fix, ".csv")
    if fix and os.path.lexists(fix):
        raise UserError(f"{fix} exists, and no file is overwritten. Set --fix to a new one")
    settings: dict[str, object] = {"image_column": image_column, "caption_column": caption_column}
    if run:
        from .evaluation.misfits import add_misfits
        from .models.saved import load

        model = load(run, "auto")
        report = examine(captions, images, model.tokenizer, **settings, max_length=model.cfg.max_length)
        add_misfits(report, model)
    else:
        report = examine(captions, images, **settings)
    print(report.text())
    try:
        if html:
            write_atomically(Path(html), lambda temporary: temporary.write_text(report.html(), encoding="utf-8"))
            print(f"With pictures:  {html}")
        if fix:
            print(report.write_cleaned(fix))
    except OSError as error:
        raise UserError(f"cannot write {error.filename or html or fix}: {error.strerror}") from error


def shards(out: str, captions_path: str = "", image_path: str = "", shard_size: int = 1000) -> None:
    """Write a data set as WebDataset tar shards, OUT/SPLIT/00000.tar ...; the command again writes what is missing.

    Args:
        out: folder for the shards.
        captions_path: captions file, folder of a published data set, or shards; by default the built-in scenes.
        image_path: folder of the images; by default it is found beside the captions file.
        shard_size: images in a shard.
    """
    from .data.captions import fingerprint_of
    from .data.shards import write_shards
    from .data.source import open_data

    folder = Path(out)
    source = open_data(CFG(captions_path=captions_path, image_path=image_path, image_cache=False))
    made_from = {"captions": fingerprint_of(source.table), "shard_size": shard_size}
    record = folder / "source.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        if not record.is_file() and any(folder.iterdir()):
            raise UserError(f"{folder} holds other files: set --out to a new folder")
        if record.is_file() and json.loads(record.read_text()) != made_from:
            raise UserError(f"{folder} holds shards of other captions, or of another size: set --out to a new folder")
        write_json(record, made_from)
        for split, n in write_shards(source.table, source.image_folder, folder, shard_size).items():
            print(f"{split}: {n:,} shards, {folder}/{split}/*.tar")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the shards to {folder}: {error}") from error


def cache(remove: tuple[str, ...] = (), older_than: float = math.inf, cache_path: str = "") -> None:
    """List the caches of images, tokens, frozen features and precisions, with their sizes and ages; remove some.

    Args:
        remove: names of caches to remove.
        older_than: remove caches that have not been used for this number of days; 0: all.
        cache_path: folder of the caches; by default clip_scratch in the user's cache folder.
    """
    try:
        folder = cache_folder(CFG(cache_path=cache_path))
        found = ((path, kind) for pattern, kind in CACHES.items() for path in sorted(folder.glob(pattern)))
        kinds = {path.relative_to(folder).as_posix(): kind for path, kind in found}
        if unknown := set(remove) - set(kinds):
            raise UserError(f"{folder} has no cache {min(unknown)}.{suggest(min(unknown), kinds)}")
        print(f"{'cache':<26}{'size':>10}{'used':>14}  content")
        total = 0
        for name, kind in kinds.items():
            path = folder / name
            size, days, content = _describe_cache(path, kind)
            gone = name in remove or days >= older_than
            if gone:
                with sole_writer(path):  # wait for a process that is building it
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            total += 0 if gone else size
            print(f"{name:<26}{size / 1e6:>7,.0f} MB{days:>9.0f} days  {content}{' (removed)' if gone else ''}")
        print(f"total: {total / 1e6:,.0f} MB in {folder}")
    except OSError as error:
        raise UserError(f"cannot read or clear the cache folder: {error}") from error


def _describe_cache(path: Path, kind: str) -> tuple[int, float, str]:
    """Bytes, days since it was last written or read, and what is in it."""
    from .data.image_cache import rows_done

    stats = {file.name: file.stat() for file in (path.iterdir() if path.is_dir() else [path])}
    used = [stat.st_mtime for stat in stats.values()]
    # Every run reads the small files of all image caches
    used += [stat.st_atime for name, stat in stats.items() if name in ("pixels", path.name)]
    if path.is_dir():
        try:
            record = json.loads((path / "files.json").read_text())
            done, n = rows_done(path, len(record["names"]), record["side"]).sum(), len(record["names"])
            kind = f"{'' if done == n else f'unfinished, {done:,} of '}{n:,} images of {record['folder']}"
        except (OSError, ValueError):
            kind = "unfinished images"
    days = (time.time() - max(used, default=time.time())) / 86400
    return sum(stat.st_size for stat in stats.values()), days, kind


def main(args: list[str] | None = None) -> None:
    import tyro

    commands = {command.__name__: command for command in (scenes, shards, check, cache)}
    commands |= {name: data_set(name) for name in SOURCES}
    tyro.extras.subcommand_cli_from_dict(
        commands, prog="python -m clip_scratch.prepare", description=__doc__.splitlines()[0], args=args
    )


if __name__ == "__main__":
    run_command(main)
