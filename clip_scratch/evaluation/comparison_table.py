"""A comparison of runs as a Markdown table and a bar chart."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..files import write_figure
from .bootstrap import RESAMPLES

if TYPE_CHECKING:
    from .comparison import Comparison, Record


def text(comparison: Comparison) -> str:
    """The table in Markdown, aligned for a terminal, the best recalls bold, with differences and notes below."""
    table, records = comparison.table, [row.record for row in comparison.rows]
    columns = {"run": [name.replace("|", "\\|") for name in table["run"]]}
    for way in ("i2t", "t2i"):
        for k in (1, 5, 10):
            cells = [f"{value:.1f}" for value in table[f"{way}_r@{k}"]]
            columns[f"{way} R@{k}"] = [f"**{x}**" if x == max(cells, key=float) else x for x in cells]
        ends = zip(columns[f"{way} R@1"], table[f"{way}_r@1_low"], table[f"{way}_r@1_high"], strict=True)
        columns[f"{way} R@1"] = [f"{cell} [{low:.1f}, {high:.1f}]" for cell, low, high in ends]
    columns |= {
        "epochs": [_epochs(record) for record in records],
        "learning rate": [record.learning_rates for record in records],
        "trained": [_known(record.trained_parameters, "{:,}") for record in records],
        "seconds": [_known(record.wall_seconds, "{:.0f}") for record in records],
        "frozen": [record.frozen for record in records],
    }
    widths = [max(map(len, [name, *cells])) for name, cells in columns.items()]
    lines = [list(columns), ["-" * width for width in widths], *zip(*columns.values(), strict=True)]
    lines = [f"| {' | '.join(map(str.ljust, cells, widths))} |" for cells in lines]
    interval = f"in brackets the 95 % interval of R@1 ({RESAMPLES:,} bootstrap resamples of the images)"
    title = f"{_measured_on(comparison)}. Recalls in percent; {interval}."
    return "\n".join([title, "", *lines, *_differences(table), *_notes(comparison)])


def _measured_on(comparison: Comparison) -> str:
    line = comparison.table.iloc[0]
    return f"{line['split']}: {line['n_images']:,} images, {line['n_captions']:,} captions"


def _known(value: float | None, form: str) -> str:
    return "?" if value is None else form.format(value)


def _epochs(record: Record) -> str:
    if not record.epochs:
        return _known(record.epochs, "{}")
    alpha = record.wise_ft_alpha
    return f"{record.epochs} ({f'best {record.best_epoch}' if alpha is None else f'WiSE-FT {alpha:g}'})"


def _differences(table: pd.DataFrame) -> list[str]:
    """A list of R@1 minus that of zero-shot, with its heading; [] where nothing is compared with zero-shot."""
    lines = []
    for _, line in table[table["compared_with"].notna()].iterrows():
        ways = []
        for way in ("i2t", "t2i"):
            value, low, high = (line[f"{way}_r@1_minus_zero_shot{end}"] for end in ("", "_low", "_high"))
            ways.append(f"{way} {value:+.1f} [{low:+.1f}, {high:+.1f}]")
        lines.append(f"- {line['run']} - {line['compared_with']}: {', '.join(ways)}")
    heading = "R@1 minus that of zero-shot, in percentage points; where the 95 % interval excludes 0 they differ:"
    return ["", heading, "", *lines] if lines else []


def _notes(comparison: Comparison) -> list[str]:
    """What a reader needs to know about the rows, each sentence after an empty line."""
    notes, rows = [], comparison.rows
    if comparison.split == "valid" and any(row.record.epochs != 0 for row in rows):
        notes.append(
            "The best epoch of each trained run (and the alpha of WiSE-FT) was chosen on the validation split: on "
            "unseen images (--split test) trained runs tend to score a little lower."
        )
    if comparison.n_ambiguous:
        notes.append(ambiguity(comparison.n_ambiguous, comparison.table["n_captions"][0]))
    covered = {row.cfg.model_name for row in rows if row.is_zero_shot}
    missing = sorted({row.cfg.model_name for row in rows if row.cfg.backend == "hf_clip"} - covered)
    if missing or not covered:
        notes.append(
            f"There is no zero-shot row{' of ' * bool(missing)}{', '.join(missing)}. To have one, compare also with a "
            "run of `python -m clip_scratch.train hf_clip --epochs 0` on the same captions."
        )
    return [line for note in notes for line in ("", note)]


def ambiguity(n_ambiguous: int, n_captions: int) -> str:
    """The sentence about captions that belong to several images."""
    return (
        f"{n_ambiguous:,} of {n_captions:,} captions are ambiguous: another image has the same caption, so no model "
        "can tell the two apart."
    )


def chart(comparison: Comparison, path: str | Path) -> Path:
    """Write R@1 both ways as bars, a pair per row, with the 95 % intervals as error bars."""
    from matplotlib.figure import Figure

    table, n = comparison.table, len(comparison.rows)
    figure = Figure(figsize=(9, 1.8 + 0.75 * n), dpi=120, layout="constrained")
    axis = figure.subplots()
    for way, label, colour, offset in (("i2t", "image to text", "C0", -0.19), ("t2i", "text to image", "C1", 0.19)):
        value, low, high = (table[f"{way}_r@1{end}"].to_numpy(float) for end in ("", "_low", "_high"))
        # With few images the value may be outside its percentile interval; an error bar has no negative length
        errors = np.maximum(0, [value - low, high - value])
        bars = axis.barh(np.arange(n) + offset, value, 0.38, xerr=errors, label=label, color=colour, capsize=3)
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
    axis.set_yticks(range(n), [textwrap.fill(name, 28) for name in table["run"]], parse_math=False)
    axis.invert_yaxis()  # the first row on top, as in the table
    axis.margins(x=0.1)
    axis.set_xlabel("R@1 in percent, with its 95 % interval")
    axis.set_title(_measured_on(comparison), fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return write_figure(figure, path)
