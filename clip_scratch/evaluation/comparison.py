"""One table of runs: zero-shot first, then each strategy, measured on the same images with the same captions."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..config import CFG
from ..device import pick_device
from ..errors import UserError
from ..files import write_atomically
from ..presets import PRESETS
from ..training.checkpoint import load
from . import comparison_table
from .bootstrap import interval, resampled_recalls
from .measure import ZERO_SHOT, Measured, measure, read_zero_shot
from .run_record import UNTRAINED, RunRecord, read_record, run_folder
from .sample import captions_for, count_ambiguous, part_of

if TYPE_CHECKING:
    pass

# The settings that say which images and captions a run validates on
_DATA = (
    "captions_path", "image_path", "captions_format", "image_column", "caption_column", "valid_captions_path",
    "test_captions_path", "valid_fraction", "test_fraction", "on_bad_image", "n_scenes", "seed",
)  # fmt: skip


# ---- the table


@dataclass
class Row:
    """A line of the table: a run, or a pretrained model as it came."""

    name: str
    source: str  # the run folder, or the file that the ranks come from
    cfg: CFG  # the run's
    measured: Measured
    record: RunRecord
    is_zero_shot: bool

    @property
    def model_name(self) -> str:
        return self.cfg.model_name


@dataclass
class Difference:
    """R@1 of a run minus that of zero-shot, image to text and text to image, as fractions: arrays (2,)."""

    name: str
    zero_shot: str
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass
class Comparison:
    """Rows that were measured on the same images with the same captions, zero-shot first."""

    rows: list[Row]
    split: str
    n_ambiguous: int  # captions
    notes: list[str] = field(default_factory=list)

    @property
    def n_images(self) -> int:
        return len(self.rows[0].measured.images)

    @property
    def n_captions(self) -> int:
        return len(self.rows[0].measured.image_of_caption)

    @cached_property
    def samples(self) -> np.ndarray:
        """R@1 of every bootstrap resample of the images: (resamples, rows, 2), image to text and text to image."""
        hits, sizes = zip(*(row.measured.hits() for row in self.rows), strict=True)
        flat = resampled_recalls(np.concatenate(hits, 1), np.concatenate(sizes, 1))  # (resamples, 2 * rows)
        return flat.reshape(len(flat), len(self.rows), 2)

    @cached_property
    def intervals(self) -> np.ndarray:
        """The 95 % interval of each R@1: lower and upper ends, (2, rows, 2)."""
        return interval(self.samples)

    @cached_property
    def differences(self) -> list[Difference]:
        """Each run against its model's zero-shot row, or the first there is; [] without one."""
        references: dict[str, int] = {}
        for number, row in enumerate(self.rows):
            if row.is_zero_shot:
                references.setdefault(row.model_name, number)
        found = []
        for number, row in enumerate(self.rows):
            if row.is_zero_shot or not references:
                continue
            reference = references.get(row.model_name, 0)
            low, high = interval(self.samples[:, number] - self.samples[:, reference])
            value = _recall_at_1(row) - _recall_at_1(self.rows[reference])
            found.append(Difference(row.name, self.rows[reference].name, value, low, high))
        return found

    def text(self, ansi: bool = False) -> str:
        """The table for a terminal: best figures bold where it shows `ansi` codes, else with a star."""
        return comparison_table.text(self, ansi)

    def markdown(self) -> str:
        """The table in Markdown, best figures bold."""
        return comparison_table.markdown(self)

    def csv(self) -> str:
        """The table for a spreadsheet: recalls, intervals and differences in percent, to six digits."""
        return comparison_table.csv_text(self)

    def write(self, markdown: str | Path = "", csv: str | Path = "", chart: str | Path = "") -> None:
        """Write the table to the files that are named. Raises UserError where one cannot be written."""
        for path, content in ((markdown, self.markdown), (csv, self.csv)):
            if path:
                write_atomically(Path(path), lambda temporary, content=content: temporary.write_text(content()))
        if chart:
            self.chart(chart)

    def chart(self, path: str | Path) -> Path:
        """Write a bar chart of R@1 both ways, with the intervals. Raises UserError where it cannot be written."""
        return comparison_table.chart(self, path)


def _recall_at_1(row: Row) -> np.ndarray:
    return np.array([row.measured.metrics[f"{kind}_retrieval_recall@1"] for kind in ("text", "image")])


def compare(
    runs: Sequence[str | Path],
    split: str = "valid",
    captions_path: str = "",
    image_path: str = "",
    device: str = "cpu",
) -> Comparison:
    """Measure the best model of each run afresh, on a split of its own captions or on those of another file.

    Zero-shot rows stand first: runs that trained no epoch, and, on the runs' own validation split, what the runs
    recorded of the model they began with. Raises UserError for a path that is no run, and for runs whose images
    or captions differ.
    """
    if not runs:
        raise UserError("there is nothing to compare: name at least one run")
    device = str(pick_device(CFG(device=device)))
    records = [read_record(run) for run in runs]  # all are runs, before the first is measured
    rows, n_ambiguous = [], 0
    for number, (run, record) in enumerate(zip(runs, records, strict=True), 1):
        print(f"measuring {run} ({number} of {len(runs)})", file=sys.stderr)
        model = load(run, device)
        cfg, table = captions_for(model.cfg, captions_path, image_path)
        table, measured_split = part_of(cfg, table, split)
        is_zero_shot = cfg.backend == "hf_clip" and record.epochs == 0
        measured = measure(model, cfg, table)
        rows.append(Row(str(run_folder(run)), str(run), model.cfg, measured, record, is_zero_shot))
        n_ambiguous = count_ambiguous(table)
        _check_same(rows[0], rows[-1])
    recorded = [] if captions_path or split != "valid" else _recorded(rows)
    for row in recorded:
        _check_same(row, rows[0])
    notes = _notes(rows, recorded, captions_path, image_path)
    _name(rows, recorded)
    ordered = [*recorded, *sorted(rows, key=lambda row: not row.is_zero_shot)]
    return Comparison(ordered, measured_split, n_ambiguous, notes)


def _recorded(rows: list[Row]) -> list[Row]:
    """A zero-shot row of each model that has none yet, from the first run that recorded it."""
    covered = {row.model_name for row in rows if row.is_zero_shot}
    found = []
    for row in rows:
        path = run_folder(row.source) / ZERO_SHOT
        if row.cfg.backend == "hf_clip" and row.model_name not in covered and path.is_file():
            covered.add(row.model_name)
            found.append(Row("", str(path), row.cfg, read_zero_shot(path)[1], UNTRAINED, is_zero_shot=True))
    return found


def _check_same(one: Row, other: Row) -> None:
    """Raise UserError unless both were measured on the same images with the same captions."""
    a, b = one.measured, other.measured
    known = a.fingerprint and b.fingerprint
    if (a.fingerprint == b.fingerprint) if known else (a.captions_per_image() == b.captions_per_image()):
        return
    sizes = [f"{len(m.images):,} images with {len(m.image_of_caption):,} captions" for m in (a, b)]
    detail = f"{sizes[0]} against {sizes[1]}" if sizes[0] != sizes[1] else f"{sizes[0]} each, but not the same ones"
    raise UserError(
        f"{one.source} and {other.source} were measured on different images or captions ({detail}), so their figures "
        "cannot be compared: give one file to measure all runs on, --captions-path FILE"
    )


def _notes(rows: list[Row], recorded: list[Row], captions_path: str, image_path: str) -> list[str]:
    """Where zero-shot figures are wanting, the command that makes a run of them on the captions of the table."""
    notes = [
        f"{row.source} has not finished an epoch: its row is that of the untouched model."
        for row in rows
        if row.is_zero_shot and row.cfg.epochs
    ]
    covered = {row.model_name for row in [*rows, *recorded] if row.is_zero_shot}
    wanting: dict[str, CFG] = {}
    for row in rows:
        if row.cfg.backend == "hf_clip" and row.model_name not in covered:
            wanting.setdefault(row.model_name, row.cfg)
    for name, cfg in wanting.items():
        notes.append(
            f"There are no zero-shot figures of {name} on these captions. "
            f"`{_zero_shot_command(cfg, captions_path, image_path, name)}` makes a run of the untouched model: compare "
            "with it too."
        )
    if not covered and not wanting:
        notes.append(
            f"There is no zero-shot row. `{_zero_shot_command(rows[0].cfg, captions_path, image_path)}` makes a run of "
            "an untouched pretrained CLIP to compare with."
        )
    return notes


def _zero_shot_command(cfg: CFG, captions_path: str, image_path: str, model_name: str = "") -> str:
    """The command that makes a zero-shot run on the captions of a run with settings `cfg`, or on another file's."""
    preset = PRESETS["hf_clip"]()
    if captions_path:
        cfg = dataclasses.replace(preset, captions_path=captions_path, image_path=image_path)
    elif image_path:
        cfg = dataclasses.replace(cfg, image_path=image_path)
    options = {name: getattr(cfg, name) for name in _DATA if getattr(cfg, name) != getattr(preset, name)}
    if model_name:
        options = {"model_name": model_name, **options}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return "python -m clip_scratch.train hf_clip --epochs 0" + "".join(f" {shlex.quote(word)}" for word in words)


def _name(rows: list[Row], recorded: list[Row]) -> None:
    """Give every row its name: the end of the run's path, or zero-shot and the end of the model's name."""
    runs = _short([row.name for row in rows])
    zero_shot = [row for row in [*recorded, *rows] if row.is_zero_shot]
    models = _short([row.model_name for row in zero_shot])
    several = len(zero_shot) > len(models)  # runs of the same untouched model
    for row in [*recorded, *rows]:
        run = runs.get(row.name, "")
        name = f"zero-shot {models[row.model_name]}" if row.is_zero_shot else run
        row.name = f"{name} ({run})" if row.is_zero_shot and several and run else name


def _short(paths: list[str]) -> dict[str, str]:
    """Each path's last part, or the whole where two last parts are alike."""
    last = {path: Path(path).absolute().name for path in paths}
    return {path: name if list(last.values()).count(name) == 1 else path for path, name in last.items()}
