"""A comparison of runs: zero-shot first, then each run, all measured on the same images and captions."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from ..config import CFG
from ..device import pick_device
from ..errors import UserError
from ..files import write_atomically
from ..models.saved import load
from ..presets import PRESETS
from . import comparison_table
from .bootstrap import interval, resampled_recalls
from .measure import ZERO_SHOT, Measured, checked_split, count_ambiguous, measure, open_captions, read_zero_shot
from .run_record import UNTRAINED, RunRecord, read_record, run_folder

# The settings that determine a run's validation images and captions
_DATA = (
    "captions_path", "image_path", "captions_format", "image_column", "caption_column", "valid_captions_path",
    "test_captions_path", "valid_fraction", "test_fraction", "on_bad_image", "n_scenes", "seed",
)  # fmt: skip


@dataclass
class Row:
    """A row of the table: a run, or an untouched pretrained model."""

    name: str
    source: str  # the run folder, or the file with the ranks
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
    """Rows measured on the same images and captions, zero-shot first."""

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
        """Each run against the zero-shot row of its model, or else the first one; [] where there is none."""
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

    # Methods of comparison_table.py, which shows the table
    text, markdown = comparison_table.text, comparison_table.markdown
    csv, chart = comparison_table.csv_text, comparison_table.chart

    def write(self, markdown: str | Path = "", csv: str | Path = "", chart: str | Path = "") -> None:
        """Write the table to the files that are given."""
        for path, content in ((markdown, self.markdown), (csv, self.csv)):
            if path:
                text = content().encode()
                write_atomically(Path(path), lambda temporary, text=text: temporary.write_bytes(text))
        if chart:
            self.chart(chart)


def _recall_at_1(row: Row) -> np.ndarray:
    return np.array([row.measured.metrics[f"{kind}_retrieval_recall@1"] for kind in ("text", "image")])


def compare(
    runs: Sequence[str | Path],
    split: str = "valid",
    captions_path: str = "",
    image_path: str = "",
    device: str = "auto",
) -> Comparison:
    """Measure the best model of each run on a split of its own captions, or of those of another file.

    Zero-shot rows come first: runs that trained no epoch, and, on the runs' own validation split, what runs recorded
    of the model they started from. Raises UserError for a path that is no run, and for runs whose images or captions
    differ.
    """
    if not runs:
        raise UserError("there is nothing to compare: name at least one run")
    device = str(pick_device(CFG(device=device)))
    records = [read_record(run) for run in runs]  # all are runs, before the first is measured
    rows = []
    for number, (run, record) in enumerate(zip(runs, records, strict=True), 1):
        print(f"measuring {run} ({number} of {len(runs)})", file=sys.stderr)
        model = load(run, device)
        source, measured_split = checked_split(open_captions(model.cfg, captions_path, image_path), split)
        is_zero_shot = model.cfg.backend == "hf_clip" and record.epochs == 0
        rows.append(Row("", str(run), model.cfg, measure(model, source), record, is_zero_shot))
        _check_same(rows[0], rows[-1])
    recorded = [] if captions_path or split != "valid" else _recorded(rows)
    for row in recorded:
        _check_same(row, rows[0])
    notes = _notes(rows, recorded, captions_path, image_path)
    ordered = [*recorded, *sorted(rows, key=lambda row: not row.is_zero_shot)]
    _name(ordered)
    return Comparison(ordered, measured_split, count_ambiguous(source.table), notes)


def _recorded(rows: list[Row]) -> list[Row]:
    """A zero-shot row for each model that has none yet, from the first run that recorded it."""
    covered = {row.model_name for row in rows if row.is_zero_shot}
    found = []
    for row in rows:
        path = run_folder(row.source) / ZERO_SHOT
        if row.cfg.backend == "hf_clip" and row.model_name not in covered and path.is_file():
            covered.add(row.model_name)
            found.append(Row("", str(path), row.cfg, read_zero_shot(path), UNTRAINED, is_zero_shot=True))
    return found


def _check_same(one: Row, other: Row) -> None:
    """Raise UserError unless both were measured on the same images and captions."""
    if one.measured.fingerprint == other.measured.fingerprint:
        return
    a, b = (
        f"{len(row.measured.images):,} images with {len(row.measured.image_of_caption):,} captions"
        for row in (one, other)
    )
    detail = f"{a} against {b}" if a != b else f"{a} each, but not the same ones"
    raise UserError(
        f"{one.source} and {other.source} were measured on different images or captions ({detail}), so they cannot be "
        "compared: give one file to measure all runs on, --captions-path FILE"
    )


def _notes(rows: list[Row], recorded: list[Row], captions_path: str, image_path: str) -> list[str]:
    """For each model without a zero-shot row, the command that makes a zero-shot run on the table's captions."""
    notes = [
        f"{row.source} has not finished an epoch: its row is that of the untouched model."
        for row in rows
        if row.is_zero_shot and row.cfg.epochs
    ]
    covered = {row.model_name for row in [*rows, *recorded] if row.is_zero_shot}
    cfgs = {row.model_name: row.cfg for row in rows[::-1] if row.cfg.backend == "hf_clip"}
    missing = {name: cfg for name, cfg in cfgs.items() if name not in covered}
    if not covered and not missing:
        missing = {"": rows[0].cfg}
    for name, cfg in missing.items():
        command = _zero_shot_command(cfg, captions_path, image_path, name)
        which = f"row of {name} on these captions" if name else "row"
        notes.append(f"There is no zero-shot {which}. To compare with an untouched pretrained CLIP: `{command}`")
    return notes


def _zero_shot_command(cfg: CFG, captions_path: str, image_path: str, model_name: str) -> str:
    """The command that makes a zero-shot run on the captions of a run with settings `cfg`, or on another file's."""
    preset = PRESETS["hf_clip"]()
    if captions_path:
        cfg = dataclasses.replace(preset, captions_path=captions_path, image_path=image_path)
    elif image_path:
        cfg = dataclasses.replace(cfg, image_path=image_path)
    data = _DATA if cfg.captions_path else tuple(name for name in _DATA if name != "image_path")
    options = {"model_name": model_name} if model_name else {}
    options |= {name: getattr(cfg, name) for name in data if getattr(cfg, name) != getattr(preset, name)}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return shlex.join(["python", "-m", "clip_scratch.train", "hf_clip", "--epochs", "0", *words])


def _name(rows: list[Row]) -> None:
    """Name every row: the run's folder, or "zero-shot" and the last part of the model's name; equal names in full."""
    for row in rows:
        model, run = Path(row.model_name).name, run_folder(row.source).absolute().name
        row.name = f"zero-shot {model}" if row.is_zero_shot else run
    count = Counter(row.name for row in rows)
    for row in rows:
        if count[row.name] > 1:
            row.name = f"{row.name} ({row.source})"
