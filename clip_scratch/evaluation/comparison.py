"""One table of runs: zero-shot first, then each strategy, measured on the same images with the same captions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..config import CFG, PRESETS
from ..errors import UserError
from ..training.checkpoint import load, write_json
from ..training.device import pick_device
from . import comparison_table
from .bootstrap import interval, resampled_recalls
from .retrieval import ranks, recalls_of
from .run_record import UNTRAINED, RunRecord, read_record, run_folder
from .sample import captions_for, count_ambiguous, part_of

if TYPE_CHECKING:
    import pandas as pd

    from ..models.clip import DualEncoder

ZERO_SHOT = "zero_shot.json"  # in the folder of a run that began with a pretrained CLIP
# The settings that say which images and captions a run validates on
_DATA = (
    "captions_path", "image_path", "captions_format", "image_column", "caption_column", "valid_captions_path",
    "test_captions_path", "valid_fraction", "test_fraction", "on_bad_image", "n_scenes", "seed",
)  # fmt: skip


# ---- what a model found


@dataclass
class Measured:
    """The ranks that a model reached on a split: of every caption's image and of every image's best caption."""

    images: list[str]  # (N,) names
    image_of_caption: torch.Tensor  # (C,) rows of `images`
    image_rank: torch.Tensor  # (C,) from 1
    text_rank: torch.Tensor  # (N,) from 1
    fingerprint: str = ""  # `fingerprint_of` the captions; empty where it is not known

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The figures of `recall_at_k`."""
        return recalls_of(self.image_rank, self.text_rank)

    def captions_per_image(self) -> dict[str, int]:
        counts = torch.bincount(self.image_of_caption, minlength=len(self.images))
        return dict(zip(self.images, counts.tolist(), strict=True))

    def hits(self) -> tuple[np.ndarray, np.ndarray]:
        """R@1 image to text and text to image as counts of an image: its queries that hit, and all its queries.

        Both (N, 2), the images in the order of their names, so that those of two models line up.
        """
        n, own = len(self.images), self.image_of_caption
        found = torch.bincount(own, (self.image_rank <= 1).double(), minlength=n)
        hits = torch.stack([(self.text_rank <= 1).double(), found], 1)
        sizes = torch.stack([torch.ones(n).double(), torch.bincount(own, minlength=n).double()], 1)
        order = sorted(range(n), key=self.images.__getitem__)
        return hits[order].numpy(), sizes[order].numpy()


def measure(model: DualEncoder, cfg: CFG, table: pd.DataFrame) -> Measured:
    """Rank all images and captions of a caption table, in the protocol of `recall_at_k`."""
    from ..data.loaders import build_loaders
    from ..training.engine import embed

    cfg = dataclasses.replace(cfg, image_cache=False)  # each image is looked at once
    loader = build_loaders(table, model.tokenizer, "valid", cfg)
    images, texts, own = embed(model, loader, cfg)
    return Measured(loader.dataset.names, own, *ranks(images, texts, own), fingerprint_of(table))


def fingerprint_of(table: pd.DataFrame) -> str:
    """The SHA-256 of a caption table's (image, caption) pairs, whatever their order."""
    pairs = sorted(zip(table["image"], table["caption"], strict=True))
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def save_zero_shot(
    path: str | Path,
    model_name: str,
    names: Sequence[str],
    image_of_caption: torch.Tensor | Sequence[int],
    image_rank: torch.Tensor | Sequence[int],
    text_rank: torch.Tensor | Sequence[int],
    fingerprint: str = "",
) -> None:
    """Keep what the untouched model found on a run's validation split, for `read_zero_shot`.

    Names of the N images, the image row of each caption (C,), the two results of `ranks`, and `fingerprint_of` the
    split's captions.
    """
    lists = {"image_of_caption": image_of_caption, "image_rank": image_rank, "text_rank": text_rank}
    lists = {name: torch.as_tensor(values).tolist() for name, values in lists.items()}
    head = {"model_name": model_name, "split": "valid", "fingerprint": fingerprint, "images": list(names)}
    write_json(Path(path), head | lists)


def read_zero_shot(path: str | Path) -> tuple[str, Measured]:
    """The model's name and ranks that `save_zero_shot` wrote. Raises UserError where the file is damaged."""
    try:
        saved = json.loads(Path(path).read_text())
        own, image_rank, text_rank = (
            torch.tensor(saved[name], dtype=torch.long) for name in ("image_of_caption", "image_rank", "text_rank")
        )
        images = list(saved["images"])
        every_image = list(range(len(images)))
        if not images or len(text_rank) != len(images) or len(image_rank) != len(own):
            raise ValueError("its lists do not fit together")
        if sorted(set(own.tolist())) != every_image:
            raise ValueError("its captions are not those of its images")
        fingerprint = str(saved.get("fingerprint", ""))  # files of older runs have none
        return saved["model_name"], Measured(images, own, image_rank, text_rank, fingerprint)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({error}): train the run again, or delete the file") from error


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
