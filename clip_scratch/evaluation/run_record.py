"""What the files of a run tell of its training: how long, how fast, how much of the model, to what end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import CFG
from ..errors import UserError
from ..models.freezing import frozen_parts
from ..models.saved import run_config


@dataclass
class RunRecord:
    """The training of a run; None for what its files do not tell, as where only `best/` was kept."""

    epochs: int | None = None  # trained
    best_epoch: int | None = None
    learning_rates: str = "none"
    trained_parameters: int | None = 0
    wall_seconds: float | None = None
    frozen: str = "all"
    wise_ft_alpha: float | None = None  # share of the fine-tuned weights, where they were mixed with zero-shot ones


UNTRAINED = RunRecord(epochs=0, best_epoch=0, wall_seconds=0.0)


def run_folder(run: str | Path) -> Path:
    """The folder of a run that was named by it or by its `best/`."""
    path = Path(run)
    return path.parent if path.name == "best" and (path.parent / "metrics.jsonl").is_file() else path


def settings_of(run: str | Path) -> CFG:
    """The settings of a run's best model. Raises UserError for a path that is no run."""
    return run_config(Path(run) / "best" if (Path(run) / "best").is_dir() else run)


def read_record(run: str | Path) -> RunRecord:
    """The record of a run folder or of its `best/`. Raises UserError for a path that is no run or is damaged.

    A pretrained CLIP counts as one that trained no epoch if its last epoch is 0, and, where only `best/` was kept, if
    that holds the weights of epoch 0.
    """
    cfg, folder = settings_of(run), run_folder(run)
    lines = _json_lines(folder / "metrics.jsonl")
    last = lines[-1] if lines else {}
    best = folder / "best" if (folder / "best").is_dir() else folder
    kept = _json(best / "metrics.json")
    if cfg.backend == "hf_clip" and (last or kept).get("epoch") == 0:
        return RunRecord(0, 0, wall_seconds=last.get("wall_seconds"))
    return RunRecord(
        epochs=last.get("epoch"),
        best_epoch=kept.get("epoch"),
        learning_rates=_learning_rates(cfg),
        trained_parameters=last.get("trained_parameters"),
        wall_seconds=last.get("wall_seconds"),
        frozen=_frozen(cfg),
        wise_ft_alpha=kept.get("wise_ft_alpha"),
    )


def _json(path: Path) -> dict:
    """The object of a JSON file; {} without the file."""
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _json_lines(path: Path) -> list[dict]:
    """The objects of a file with one a line; [] without the file."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _learning_rates(cfg: CFG) -> str:
    """The peak rates of what trains: one figure where all are alike, else each with its parts."""
    of_tower = {"image": cfg.image_encoder_lr, "text": cfg.text_encoder_lr}
    rates: dict[float, list[str]] = {}
    for tower, policy in frozen_parts(cfg).items():
        if policy == "lora":
            rates.setdefault(cfg.lora_lr, []).append(f"{tower} LoRA")
        elif policy not in ("all", "backbone"):
            rates.setdefault(of_tower[tower], []).append(tower)
    rates.setdefault(cfg.head_lr, []).append("heads")
    if len(rates) == 1:
        return _rate(cfg.head_lr)
    return ", ".join(f"{_rate(rate)} {' + '.join(parts)}" for rate, parts in rates.items())


def _rate(rate: float) -> str:
    return np.format_float_scientific(rate, trim="-", exp_digits=1)


def _frozen(cfg: CFG) -> str:
    """What of the towers did not train, in words."""
    said = {tower: _frozen_of(policy, cfg) for tower, policy in frozen_parts(cfg).items()}
    if len(set(said.values())) == 1:
        return said["image"]
    return "; ".join(f"{tower}: {words}" for tower, words in said.items())


def _frozen_of(policy: str, cfg: CFG) -> str:
    kind, _, n = policy.partition(":")
    return {
        "none": "nothing",
        "all": "all",
        "backbone": "all but the projection",
        "lora": f"all (LoRA, rank {cfg.lora_rank})",
        "first": f"first {n} blocks",
        "all-but-last": f"all but the last {n} blocks",
    }[kind]
