"""A comparison of runs: zero-shot first, then each run, all measured on the same images and captions."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from ..config import CFG
from ..errors import UserError
from ..files import write_text
from ..models.freezing import frozen_parts
from ..models.saved import best_folder, best_metrics, load, run_config
from . import comparison_table
from .bootstrap import interval, resampled_recalls
from .measure import ZERO_SHOT, Measured, checked_split, count_ambiguous, measure, open_captions, read_zero_shot

WAYS = {"i2t": "text", "t2i": "image"}  # image to text retrieves texts
RECALLS = {f"{way}_r@{k}": f"{kind}_retrieval_recall@{k}" for way, kind in WAYS.items() for k in (1, 5, 10)}


@dataclass
class Record:
    """How a run was trained; None for what its files do not tell. The defaults are those of an untouched model."""

    epochs: int | None = 0
    best_epoch: int | None = 0
    learning_rates: str = "none"  # the peak ones
    trained_parameters: int | None = 0
    wall_seconds: float | None = None
    frozen: str = "all"
    wise_ft_alpha: float | None = None  # weight of the fine-tuned model, where it was averaged with the zero-shot one


@dataclass
class Row:
    """A row of the table: a run, or an untouched pretrained model."""

    source: str  # the run folder, or the file with the ranks
    cfg: CFG  # the run's
    measured: Measured
    record: Record
    name: str = ""

    @property
    def is_zero_shot(self) -> bool:
        return self.cfg.backend == "hf_clip" and self.record.epochs == 0


@dataclass
class Comparison:
    """Rows measured on the same images and captions, zero-shot first."""

    rows: list[Row]
    split: str
    n_ambiguous: int  # captions

    @cached_property
    def table(self) -> pd.DataFrame:
        """All figures; recalls, the 95 % intervals of R@1 and its differences to zero-shot are in percent.

        A run is compared with the zero-shot row of its model, or else with the first one: `compared_with`.
        """
        hits, sizes = zip(*(row.measured.hits() for row in self.rows), strict=True)
        samples = 100 * resampled_recalls(np.concatenate(hits, 1), np.concatenate(sizes, 1))
        samples = samples.reshape(len(samples), len(self.rows), len(WAYS))
        zero_shot = {row.cfg.model_name: i for i, row in enumerate(self.rows) if row.is_zero_shot}
        lines: list[dict[str, object]] = []
        for i, row in enumerate(self.rows):
            measured, model = row.measured, row.cfg.model_name
            reference = None if row.is_zero_shot or not zero_shot else zero_shot.get(model, 0)
            line = {
                "run": row.name, "zero_shot": int(row.is_zero_shot), "model_name": model, "split": self.split,
                "n_images": len(measured.images), "n_captions": len(measured.image_of_caption), **vars(row.record),
                "compared_with": None if reference is None else self.rows[reference].name,
            }  # fmt: skip
            line |= {column: 100 * measured.metrics[key] for column, key in RECALLS.items()}
            for j, way in enumerate(WAYS):
                column = f"{way}_r@1"
                line[f"{column}_low"], line[f"{column}_high"] = interval(samples[:, i, j])
                if reference is not None:
                    difference = f"{column}_minus_zero_shot"
                    line[difference] = line[column] - lines[reference][column]
                    ends = interval(samples[:, i, j] - samples[:, reference, j])
                    line[f"{difference}_low"], line[f"{difference}_high"] = ends
            lines.append({name: round(x, 4) + 0.0 if isinstance(x, float) else x for name, x in line.items()})
        return pd.DataFrame(lines, dtype=object)

    # Methods of comparison_table.py, which shows the table
    text, chart = comparison_table.text, comparison_table.chart

    def write(self, markdown: str | Path = "", csv: str | Path = "", chart: str | Path = "") -> None:
        """Write the table to the files that are given."""
        if markdown:
            write_text(Path(markdown), f"{self.text()}\n")
        if csv:
            write_text(Path(csv), self.table.to_csv(index=False, lineterminator="\n"))
        if chart:
            self.chart(chart)


def compare(
    runs: Sequence[str | Path], split: str = "valid", captions_path: str = "", image_path: str = "",
    device: str = "auto",
) -> Comparison:  # fmt: skip
    """Measure the best model of each run on a split of its own captions, or of those of another file.

    Zero-shot rows come first: runs that trained no epoch, and, on the runs' own validation split, what runs recorded
    of the model they started from. Raises UserError for a path that is no run, and for runs whose images or captions
    differ.
    """
    if not runs:
        raise UserError("there is nothing to compare: name at least one run")
    records = [read_record(run) for run in runs]  # all are runs, before the first is measured
    rows: list[Row] = []
    for number, (run, record) in enumerate(zip(runs, records, strict=True), 1):
        print(f"measuring {run} ({number} of {len(runs)})", file=sys.stderr)
        model = load(run, device)
        source, measured_split = checked_split(open_captions(model.cfg, captions_path, image_path), split)
        _add(rows, Row(str(run), model.cfg, measure(model, source), record))
    covered = {row.cfg.model_name for row in rows if row.is_zero_shot}
    for row in [] if captions_path or split != "valid" else list(rows):
        path = run_folder(row.source) / ZERO_SHOT
        if row.cfg.model_name not in covered and path.is_file():
            covered.add(row.cfg.model_name)
            _add(rows, Row(str(path), row.cfg, read_zero_shot(path), Record()))
    rows.sort(key=lambda row: not row.is_zero_shot)
    for row in rows:  # a run by its folder, zero-shot by the last part of the model's name; equal names in full
        model_name, run = Path(row.cfg.model_name).name, run_folder(row.source).absolute().name
        row.name = f"zero-shot {model_name}" if row.is_zero_shot else run
    count = Counter(row.name for row in rows)
    for row in rows:
        row.name += f" ({row.source})" if count[row.name] > 1 else ""
    return Comparison(rows, measured_split, count_ambiguous(source.table))


def _add(rows: list[Row], row: Row) -> None:
    """Append a row. Raises UserError where it was measured on other images or captions than the first."""
    rows.append(row)
    if row.measured.fingerprint != rows[0].measured.fingerprint:
        sources = f"{rows[0].source} and {row.source}"
        fix = "give one file to measure all runs on, --captions-path FILE"
        raise UserError(f"{sources} were measured on different images or captions: {fix}")


def run_folder(run: str | Path) -> Path:
    """The folder of a run, given that or its `best/`."""
    return Path(run).parent if Path(run).name == "best" else Path(run)


def read_record(run: str | Path) -> Record:
    """The record of a run folder or of its `best/`. Raises UserError for a path that is no run or is damaged.

    A pretrained CLIP is untrained if its last epoch is 0, or, where only `best/` is there, if its best epoch is.
    """
    folder, best = run_folder(run), best_folder(run)
    cfg, log, chosen = run_config(best), folder / "metrics.jsonl", best_metrics(best)
    try:
        lines = log.read_text().splitlines() if log.is_file() else []
        last = json.loads(lines[-1]) if lines else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{log} is damaged: {error}") from error
    if cfg.backend == "hf_clip" and (last or chosen).get("epoch") == 0:
        return Record(wall_seconds=last.get("wall_seconds"))
    frozen, rates = frozen_parts(cfg), {}
    for tower, policy in frozen.items():
        if policy not in ("all", "backbone"):
            rates[tower] = cfg.lora_lr if policy == "lora" else getattr(cfg, f"{tower}_encoder_lr")
    rates["heads"] = cfg.head_lr
    return Record(
        last.get("epoch"), chosen.get("epoch"), _by_part({part: f"{rate:g}" for part, rate in rates.items()}),
        last.get("trained_parameters"), last.get("wall_seconds"), _by_part(frozen), chosen.get("wise_ft_alpha"),
    )  # fmt: skip


def _by_part(values: dict[str, str]) -> str:
    """One value where all parts have the same, else each with its part: "image first:6, text none"."""
    same = len(set(values.values())) == 1
    return next(iter(values.values())) if same else ", ".join(f"{part} {value}" for part, value in values.items())
