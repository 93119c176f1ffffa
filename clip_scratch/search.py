"""Search your own pictures: `python -m clip_scratch.search index RUN FOLDER`, then `search find INDEX "a sentence"`."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg, subcommand

from .errors import UserError, run_command

if TYPE_CHECKING:
    from .retrieval.index import Index
    from .retrieval.indexing import IndexUpdate
    from .retrieval.results import Matches


@dataclass
class IndexArguments:
    """Embed the images of a folder, so that `find` answers at once. Run it again to update it.

    Under torchrun all processes embed.
    """

    run: Positional[str]  # run folder, or its best/
    images: Positional[str]  # folder of the images, with all below it, or tar shards ('shards/{00..99}.tar')
    index: str = ""  # folder of the index; empty: indexes/ and the name of the image folder
    table: str = ""  # CSV file with an image column; its other columns can be asked for by find --where
    ann: bool = False  # build an approximate index too, as is done from a million images on
    store: str = ""  # embeddings in Milvus: milvus://HOST:PORT/COLLECTION, or a file NAME.db; empty: in the index
    device: str = "auto"  # cpu, cuda, ...; auto: the best available


@dataclass
class FindArguments:
    """Find the images of an index that fit sentences or images, or captions that fit an image."""

    index: Positional[str]  # folder of the index
    queries: Positional[tuple[str, ...]] = ()  # sentences, or sums such as "photo.jpg + snow - 0.5*people"
    image: str = ""  # find images like this one
    n: Annotated[int, arg(aliases=["-n"])] = 9  # how many to show
    where: str = ""  # SQL condition on the images, such as "year >= 2020 and path like '%holiday%'"
    min_score: float | None = None  # leave out images of a lower score
    captions: bool = False  # find captions for --image instead
    explain: bool = False  # draw where in each picture the query lies, in the grid
    json: bool = False  # print JSON
    grid: str = ""  # write the pictures to this PNG
    open: bool = False  # show the pictures
    device: str = "cpu"  # device for images in queries and for --explain


Arguments = Annotated[IndexArguments, subcommand("index")] | Annotated[FindArguments, subcommand("find")]


def main(arguments: IndexArguments | FindArguments) -> None:
    """Build or update an index, or search one and print what it finds."""
    if isinstance(arguments, IndexArguments):
        _index(arguments)
    else:
        _find(arguments)


def _index(arguments: IndexArguments) -> None:
    from .data.shards import is_shards
    from .exporting.onnx import trace_text_tower, write_text_tower
    from .retrieval.indexing import embed_share, update_index
    from .retrieval.query import QUICK
    from .training.distributed import is_main, process_group, share

    images = Path(arguments.images)
    folder = Path(arguments.index or Path("indexes", (images.parent if is_shards(images) else images).resolve().name))

    def prepare(model, temporary: Path) -> None:
        for write in (write_text_tower, trace_text_tower):
            try:
                return write(model, temporary / QUICK)
            except UserError as error:
                print(f"find will start slower: {error}", file=sys.stderr)

    try:
        with process_group():
            if not is_main():
                embed_share(arguments.run, arguments.images, arguments.device, share)
                return
            report = update_index(
                arguments.run, arguments.images, folder, arguments.table, arguments.ann, arguments.store,
                arguments.device, prepare, share,
            )  # fmt: skip
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            f"What was embedded is kept in {folder}; run the same command again to continue"
        ) from interrupt
    _print_report(report, folder)


def _print_report(report: IndexUpdate, folder: Path) -> None:
    rate = f", {report.added / report.seconds:.0f} images/s" if report.added else ""
    print(f"{folder}: {report.images:,} images; {report.added:,} embedded{rate}, {report.removed:,} removed")
    if report.recall is not None:
        print(f"approximate index: recall {100 * report.recall:.1f} % of the exact 10 nearest images")
    if report.unmatched:
        print(f"{report.unmatched:,} rows of the table name no image", file=sys.stderr)
    if report.faults:
        some = "".join(f"\n  {name}: {fault}" for name, fault in list(report.faults.items())[:20])
        print(f"left out, since they cannot be read: {len(report.faults):,}{some}", file=sys.stderr)
    print(f"search it: python -m clip_scratch.search find {shlex.quote(str(folder))} 'a dog on a beach'")


def _find(arguments: FindArguments) -> None:
    from .files import check_target
    from .retrieval.index import Index

    if not arguments.queries and not arguments.image:
        raise UserError("nothing to look for: give a sentence, or --image FILE")
    if arguments.captions and (not arguments.image or arguments.queries):
        raise UserError("--captions finds captions for one image: give --image FILE, and no sentence")
    if arguments.explain and (arguments.image or not (arguments.grid or arguments.open)):
        raise UserError("--explain draws where sentences lie: give sentences, and --grid FILE.png or --open")
    check_target(arguments.grid)
    index = Index.open(arguments.index, arguments.device)
    if arguments.captions:
        captions = index.find_captions(_indexed_name(index, arguments.image) or arguments.image, arguments.n)
        print(json.dumps(captions) if arguments.json else "\n".join(f"{cosine:6.3f}  {c}" for c, cosine in captions))
        return
    results = index.search(list(arguments.queries), arguments.n, arguments.where, arguments.min_score)
    if arguments.image:
        results.append(_like(index, arguments))
    if arguments.json:
        content = [{"query": result.query, "results": result.records} for result in results]
        print(json.dumps(content, indent=2))
    else:
        from .retrieval.terminal import thumbnail

        for result in results:
            print(f"{result.query!r}" + ("" if result else "  no image"))
            for text, (name, _) in zip(result.captions(), result, strict=True):
                print(f"  {text}  {thumbnail(result.folder / name)}{name}")
    if arguments.grid or arguments.open:
        _draw(index, results, arguments)


def _indexed_name(index: Index, image: str) -> str:
    """The path of an image file in the index; "" where it is not indexed."""
    path = Path(image).expanduser().resolve()
    name = path.relative_to(index.folder).as_posix() if path.is_relative_to(index.folder) else image
    return name if index.store.vector(name) is not None else ""


def _like(index: Index, arguments: FindArguments) -> Matches:
    """The images most like `--image`, which may be indexed itself."""
    if name := _indexed_name(index, arguments.image):
        return index.similar(name, arguments.n, arguments.where, arguments.min_score)
    return index.search(Path(arguments.image), arguments.n, arguments.where, arguments.min_score)


def _draw(index: Index, results: list[Matches], arguments: FindArguments) -> None:
    """Write the grid of all results, and show it where asked."""
    import tempfile
    import webbrowser

    from .retrieval.results import columns_for, save_grid

    picture = None
    if arguments.explain:
        from .retrieval.explain import explain

        def picture(path: Path, query: str):
            return explain(index.model, path, query).overlay()

    path = Path(arguments.grid or Path(tempfile.mkdtemp(prefix="clip-scratch-"), "found.png"))
    save_grid(results, path, max(columns_for(len(result)) for result in results), picture)
    print(f"written: {path}", file=sys.stderr)
    if arguments.open:
        webbrowser.open(path.resolve().as_uri())


if __name__ == "__main__":
    import tyro

    run_command(lambda: main(tyro.cli(Arguments, prog="python -m clip_scratch.search")))
