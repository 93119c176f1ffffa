"""find_matches and find_captions: what fits a query best, as a result that draws itself in Jupyter."""

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import pandas as pd
import torch

from ..data.images import load_image
from ..errors import UserError
from ..files import write_figure
from ..models.clip import CLIPModel
from .embed import ImageLike, encode_image, encode_text, trained_folder
from .exact import ExactSearch


class Matches(Sequence):
    """(image name, cosine score) pairs, best first, for one query; a grid of pictures in Jupyter.

    `folder` holds the images, or is a function that finds it, called when they are first drawn.
    """

    def __init__(self, query: str, pairs: list[tuple[str, float]], folder: str | Path | Callable[[], Path]):
        self.query, self.pairs, self._folder = query, pairs, folder

    @cached_property
    def folder(self) -> Path:
        return self._folder() if callable(self._folder) else Path(self._folder)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i):
        return self.pairs[i]

    def __repr__(self) -> str:
        return "\n".join([f"{self.query!r}", *(f"  {score:6.3f}  {name}" for name, score in self.pairs)])

    def figure(self):
        """A matplotlib figure: a square grid of the images under the query."""
        return draw_matches([self], _columns(len(self)))

    def save(self, path: str | Path) -> Path:
        """Write the grid as a picture in the format of the path's suffix."""
        return write_figure(self.figure(), path)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure().savefig(buffer, format="png")
        return buffer.getvalue()


def _columns(n: int) -> int:
    """The side of the smallest square grid for n images."""
    return max(1, math.ceil(math.sqrt(n)))


def draw_matches(results: Sequence[Matches], columns: int):
    """A figure with `columns` images a line, each query's images below its text, best first."""
    from matplotlib.figure import Figure

    lines = [-(-max(1, len(result)) // columns) for result in results]
    figure = Figure(figsize=(2.2 * columns, sum(2.2 * n + 0.5 for n in lines)), dpi=100, layout="constrained")
    parts = figure.subfigures(len(results), 1, height_ratios=[2.2 * n + 0.5 for n in lines], squeeze=False)[:, 0]
    for result, n, part in zip(results, lines, parts, strict=True):
        words = "\n".join(textwrap.wrap(result.query, 24 * columns, max_lines=4, placeholder=" ..."))
        part.suptitle(words, fontsize=11, fontweight="bold", parse_math=False)  # $5 is not a formula
        axes = part.subplots(n, columns, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
        folder = result.folder if result else None
        for axis, (name, score) in zip(axes, result, strict=False):
            axis.set_title(f"{score:.3f}", fontsize=9)
            try:
                axis.imshow(load_image(folder / name), aspect="equal")
            except Exception as error:  # decoders raise OSError, ValueError, SyntaxError and classes of their own
                fault = "file is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
                text = f"{name}\n({fault})"
                axis.text(0.5, 0.5, text, ha="center", va="center", fontsize=8, wrap=True, parse_math=False)
    return figure


def save_grid(results: Sequence[Matches], path: str | Path, columns: int) -> Path:
    """Write several queries' results, one below the other, to one picture."""
    return write_figure(draw_matches(results, columns), path)


def _best(
    embeddings: torch.Tensor | ExactSearch, queries: torch.Tensor, names: Sequence[str], n: int
) -> list[list[tuple[str, float]]]:
    """For each query (Q, P) the n best distinct names; a name that occurs several times counts with its best score.

    Searches for 8 n rows (an image mostly has one, or one for each of five captions), and for 8 times as many where
    those have fewer than n names. Rows of zeros, which stand for images that could not be read, are left out.
    """
    if len(embeddings) != len(names):
        raise UserError(f"{len(embeddings)} embeddings do not line up with {len(names)} names")
    if n < 1:
        raise UserError(f"n is at least 1, not {n}")
    # For one search a bf16 copy would take longer to make than it saves
    search = embeddings if isinstance(embeddings, ExactSearch) else ExactSearch(embeddings, half=False)
    name_of = names.iloc if isinstance(names, pd.Series) else names
    results: list[dict[str, float]] = [{} for _ in queries]
    k, short = 8 * n, list(range(len(queries)))
    while short:
        for i, scores, rows in zip(short, *search.search(queries[short], k), strict=True):
            for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
                if len(results[i]) < n and (score or search.rows[row].any()):
                    results[i].setdefault(str(name_of[row]), score)
        short = [i for i in short if len(results[i]) < n] if k < len(search) else []
        k *= 8
    return [list(result.items()) for result in results]


def find_matches(
    model: CLIPModel,
    image_embeddings: torch.Tensor | ExactSearch,
    query: str | Sequence[str],
    image_filenames: Sequence[str],
    n: int = 9,
    image_path: str | Path | None = None,
    save: str | Path | None = None,
) -> Matches | list[Matches]:
    """The n distinct images that fit a query best, as (image name, cosine score), best first (tutorial name).

    `image_embeddings` (N, P) lines up with `image_filenames` (N,), which may name an image several times. The
    images are drawn from `image_path` (default: the folder the model was trained on) when Jupyter shows the
    result, or into the picture `save`. A list of queries gives a list of results. For many searches in many images,
    pass `ExactSearch(image_embeddings)`, which prepares them once. Raises UserError where the lengths differ or n is
    below 1.
    """
    queries = [query] if isinstance(query, str) else list(query)
    folder = image_path or partial(trained_folder, model.cfg)
    best = _best(image_embeddings, encode_text(model, queries), image_filenames, n)
    results = [Matches(q, pairs, folder) for q, pairs in zip(queries, best, strict=True)]
    if save and results:
        save_grid(results, save, _columns(len(results[0])))
    return results[0] if isinstance(query, str) else results


def find_captions(
    model: CLIPModel,
    image: ImageLike,
    captions: Sequence[str],
    n: int = 5,
    text_embeddings: torch.Tensor | ExactSearch | None = None,
) -> list[tuple[str, float]]:
    """The n distinct captions that fit an image best, as (caption, cosine score), best first.

    `text_embeddings` (C, P) of the captions, or an ExactSearch of them as in `find_matches`, are computed where they
    are not given. Raises UserError where the lengths differ or n is below 1.
    """
    if text_embeddings is None:
        text_embeddings = encode_text(model, captions)
    return _best(text_embeddings, encode_image(model, image), captions, n)[0]
