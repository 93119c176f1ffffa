"""Search results that print, draw themselves as a grid in Jupyter, and become a DataFrame."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.images import load_image
from ..files import write_figure

if TYPE_CHECKING:
    import pandas as pd


class Matches(Sequence):
    """(image name, cosine score) pairs, best first, for one query; a grid of pictures in Jupyter.

    `folder` holds the images, or is a function that finds it, called when they are first drawn. `records` are what an
    index knows of each image (see `Index.search`).
    """

    def __init__(
        self, query: str, pairs: list[tuple[str, float]], folder: str | Path | Callable[[], Path],
        records: list[dict] | None = None,
    ):  # fmt: skip
        self.query, self.pairs, self._folder, self.records = query, pairs, folder, records

    @cached_property
    def folder(self) -> Path:
        return self._folder() if callable(self._folder) else Path(self._folder)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i):
        return self.pairs[i]

    def __repr__(self) -> str:
        lines = [f"  {text}  {name}" for text, (name, _) in zip(self.captions(), self, strict=True)]
        return "\n".join([f"{self.query!r}", *(lines or ["  no image"])])

    def captions(self) -> list[str]:
        """What stands over each image: its cosine, and its calibrated score where there is one."""
        if self.records is None:
            return [f"{cosine:6.3f}" for _, cosine in self]
        return [f"{r['score']:5.1f} ({r['cosine']:.3f})" for r in self.records]

    def to_frame(self) -> pd.DataFrame:
        """A DataFrame with a row per image: path and cosine, and what the index knows of it."""
        import pandas as pd

        return pd.DataFrame(self.records or [{"path": name, "cosine": cosine} for name, cosine in self])

    def figure(self):
        """A matplotlib figure: a square grid of the images under the query."""
        return draw_matches([self], columns_for(len(self)))

    def save(self, path: str | Path) -> Path:
        """Write the grid as a picture in the format of the path's suffix."""
        return write_figure(self.figure(), path)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure().savefig(buffer, format="png")
        return buffer.getvalue()


def columns_for(n: int) -> int:
    """The side of the smallest square grid for n images."""
    return max(1, math.ceil(math.sqrt(n)))


def draw_matches(results: Sequence[Matches], columns: int, picture: Callable[[Path, str], object] | None = None):
    """A figure with `columns` images a line, each query's images below its text, best first.

    `picture` draws an image file for a query: RGB uint8, (H, W, 3); by default the image itself.
    """
    from matplotlib.figure import Figure

    lines = [-(-max(1, len(result)) // columns) for result in results]
    figure = Figure(figsize=(2.2 * columns, sum(2.2 * n + 0.5 for n in lines)), dpi=100, layout="constrained")
    parts = figure.subfigures(len(results), 1, height_ratios=[2.2 * n + 0.5 for n in lines], squeeze=False)[:, 0]
    for result, n, part in zip(results, lines, parts, strict=True):
        words = "\n".join(textwrap.wrap(result.query, 24 * columns, max_lines=4, placeholder=" ..."))
        part.suptitle(words, fontsize=11, fontweight="bold", parse_math=False)  # $5 is not a formula
        no_ticks = {"xticks": (), "yticks": ()}  # laying out those of an axis that is off takes half of the time
        axes = part.subplots(n, columns, squeeze=False, subplot_kw=no_ticks).ravel()
        for axis in axes:
            axis.set_axis_off()
        folder = result.folder if result else None
        for axis, (name, _), text in zip(axes, result, result.captions(), strict=False):
            axis.set_title(text.strip(), fontsize=9)
            try:
                pixels = picture(folder / name, result.query) if picture else load_image(folder / name)
                axis.imshow(pixels, aspect="equal")
            except Exception as error:  # decoders raise OSError, ValueError, SyntaxError and classes of their own
                fault = "file is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
                text = f"{name}\n({fault})"
                axis.text(0.5, 0.5, text, ha="center", va="center", fontsize=8, wrap=True, parse_math=False)
    return figure


def save_grid(
    results: Sequence[Matches], path: str | Path, columns: int, picture: Callable[[Path, str], object] | None = None
) -> Path:
    """Write several queries' results, one below the other, to one picture; see `draw_matches`."""
    return write_figure(draw_matches(results, columns, picture), path)
