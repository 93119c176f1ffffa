"""A comparison of runs as text, Markdown, CSV and a bar chart."""

from __future__ import annotations

import csv
import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..files import write_figure
from .bootstrap import RESAMPLES

if TYPE_CHECKING:
    from .comparison import Comparison, Difference, Row
    from .run_record import RunRecord

_KS = (1, 5, 10)
_RECALLS = [(way, kind, k) for way, kind in (("i2t", "text"), ("t2i", "image")) for k in _KS]
_HEADER = [
    "run", *(f"{way} R@{k}" for way, _, k in _RECALLS),
    "epochs", "learning rate", "trained", "wall time", "frozen",
]  # fmt: skip
_UNKNOWN = "?"


def _percent(row: Row) -> list[float]:
    """The six recalls of a row, in percent."""
    return [100 * row.measured.metrics[f"{kind}_retrieval_recall@{k}"] for _, kind, k in _RECALLS]


def _cells(comparison: Comparison, mark: str) -> list[list[str]]:
    """The rows as strings, the best of each recall formatted by `mark`, like "**{}**"."""
    recalls = [[f"{value:.1f}" for value in _percent(row)] for row in comparison.rows]
    best = [max(column, key=float) for column in zip(*recalls, strict=True)]
    lines = []
    for number, (row, values) in enumerate(zip(comparison.rows, recalls, strict=True)):
        record = row.record
        marked = [mark.format(value) if value == top else value for value, top in zip(values, best, strict=True)]
        for way in (0, 1):
            low, high = 100 * comparison.intervals[:, number, way]
            marked[way * len(_KS)] += f" [{low:.1f}, {high:.1f}]"
        lines.append(
            [
                row.name, *marked, _epochs(record), record.learning_rates, _count(record.trained_parameters),
                _duration(record.wall_seconds), record.frozen,
            ]
        )  # fmt: skip
    return lines


def _epochs(record: RunRecord) -> str:
    if record.epochs is None:
        return _UNKNOWN
    if not record.epochs:
        return "0"
    chosen = "averaged" if record.wise_ft_alpha is not None else f"best {record.best_epoch}"
    return f"{record.epochs} ({chosen})"


def _count(n: int | None) -> str:
    if n is None:
        return _UNKNOWN
    return f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n:,}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return _UNKNOWN
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _headline(comparison: Comparison) -> str:
    return (
        f"{comparison.split}: {comparison.n_images:,} images, {comparison.n_captions:,} captions. Recalls in percent; "
        f"in brackets the 95 % interval of R@1 ({RESAMPLES:,} bootstrap resamples of the images)."
    )


def _notes(comparison: Comparison) -> list[str]:
    """What a reader needs to know about the rows."""
    notes = []
    for row in comparison.rows:
        alpha, epoch = row.record.wise_ft_alpha, row.record.best_epoch
        if alpha is not None:
            of = f" of epoch {epoch}" if epoch else ""
            notes.append(f"{row.name}: {alpha:g} of the fine-tuned weights{of}, the rest zero-shot (WiSE-FT).")
        elif row.record.epochs and epoch == 0:
            notes.append(f"{row.name}: no epoch was better than the untouched model, whose results these are.")
    if comparison.split == "valid" and any(row.record.epochs != 0 for row in comparison.rows):
        notes.append(
            "The best epoch of each trained run (and the alpha of WiSE-FT) was chosen on the validation split: on "
            "unseen images (--split test) trained runs tend to score a little lower."
        )
    if comparison.n_ambiguous:
        notes.append(ambiguity(comparison.n_ambiguous, comparison.n_captions))
    return notes + comparison.notes


def ambiguity(n_ambiguous: int, n_captions: int) -> str:
    """The sentence about captions that belong to several images."""
    return (
        f"{n_ambiguous:,} of {n_captions:,} captions are ambiguous: another image has the same caption, so no model "
        "can tell the two apart."
    )


_DIFFERENCES = "R@1 minus that of zero-shot, in percentage points, with the paired 95 % interval:"


def _difference_line(difference: Difference) -> str:
    ways, apart = [], []
    triples = zip(difference.value, difference.low, difference.high, strict=True)
    for way, triple in zip(("i2t", "t2i"), triples, strict=True):
        value, low, high = (round(100 * x, 6) + 0.0 for x in triple)  # equal recalls may differ by a rounding error
        ways.append(f"{way} {value:+.1f} [{low:+.1f}, {high:+.1f}]")
        if low > 0 or high < 0:
            apart.append(way)
    verdict = ["neither interval excludes 0", f"only {''.join(apart)} excludes 0", "both exclude 0"][len(apart)]
    return f"{difference.name} - {difference.zero_shot}: {', '.join(ways)}: {verdict}"


def text(comparison: Comparison) -> str:
    """Columns for a terminal, the best results with a star."""
    rows = [_HEADER, *_cells(comparison, "{}*")]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows]
    differences = [_difference_line(difference) for difference in comparison.differences]
    below = [*([_DIFFERENCES, *differences, ""] if differences else []), *_notes(comparison)]
    return "\n".join([_headline(comparison), "", *lines, "* the best of its column", "", *below]).rstrip()


def markdown(comparison: Comparison) -> str:
    """A Markdown table with the best results bold, between a headline and the notes."""
    rule = ["---", *["---:"] * len(_RECALLS), "---:", "---", "---:", "---:", "---"]
    rows = [[cell.replace("|", "\\|") for cell in cells] for cells in _cells(comparison, "**{}**")]
    lines = ["| " + " | ".join(cells) + " |" for cells in (_HEADER, rule, *rows)]
    parts = ["\n".join(lines)]
    if comparison.differences:
        listed = [f"- {_difference_line(difference)}" for difference in comparison.differences]
        parts.append("\n".join([_DIFFERENCES, "", *listed]))
    return "\n\n".join([_headline(comparison), *parts, *_notes(comparison)]) + "\n"


def csv_text(comparison: Comparison) -> str:
    """Recalls, interval ends and differences to zero-shot in percent, to six digits; empty where unknown."""
    differences = {difference.name: difference for difference in comparison.differences}
    lines = []
    for number, row in enumerate(comparison.rows):
        line = {"run": row.name, "zero_shot": int(row.is_zero_shot), "model_name": row.model_name}
        line |= {"split": comparison.split, "n_images": comparison.n_images, "n_captions": comparison.n_captions}
        line |= {f"{way}_r@{k}": value for (way, _, k), value in zip(_RECALLS, _percent(row), strict=True)}
        difference = differences.get(row.name)
        for i, way in enumerate(("i2t", "t2i")):
            line[f"{way}_r@1_low"], line[f"{way}_r@1_high"] = 100 * comparison.intervals[:, number, i]
            for name, end in (("value", ""), ("low", "_low"), ("high", "_high")):
                line[f"{way}_r@1_minus_zero_shot{end}"] = 100 * getattr(difference, name)[i] if difference else None
        lines.append(line | vars(row.record))
    out = io.StringIO()
    writer = csv.DictWriter(out, lines[0], lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()})
    return out.getvalue()


def chart(comparison: Comparison, path: str | Path) -> Path:
    """Write R@1 both ways as bars, a pair per row, with the 95 % intervals as error bars."""
    from matplotlib.figure import Figure

    rows = comparison.rows
    figure = Figure(figsize=(9, 1.8 + 0.75 * len(rows)), dpi=120, layout="constrained")
    axis = figure.subplots()
    middle = np.arange(len(rows))
    height = 0.38
    right = 100 * comparison.intervals[1].max()
    for way, (label, colour) in enumerate((("image to text", "#5b9fb8"), ("text to image", "#e08e45"))):
        values = np.array([_percent(row)[way * len(_KS)] for row in rows])
        low, high = 100 * comparison.intervals[:, :, way]
        place = middle + (way - 0.5) * height
        axis.barh(place, values, height, label=label, color=colour)
        # With few images the value may be outside its percentile interval; an error bar has no negative length
        errors = np.maximum(0, [values - low, high - values])
        axis.errorbar(values, place, xerr=errors, fmt="none", ecolor="#333333", elinewidth=1.2, capsize=3)
        for value, top, y in zip(values, high, place, strict=True):
            axis.text(max(value, top) + 0.01 * max(right, 1), y, f"{value:.1f}", va="center", fontsize=9)
    axis.set_yticks(middle, [textwrap.fill(row.name, 28) for row in rows], parse_math=False)
    axis.invert_yaxis()  # the first row on top, as in the table
    axis.set_xlim(0, 1.12 * max(right, 1))
    axis.set_xlabel("R@1 in percent, with its 95 % interval")
    axis.set_title(
        f"{comparison.split}: {comparison.n_images:,} images, {comparison.n_captions:,} captions", fontsize=11
    )
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return write_figure(figure, path)
