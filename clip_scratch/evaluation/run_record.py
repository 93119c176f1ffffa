"""How a run was trained, from its files: epochs, learning rates, trained parameters, time."""

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
    """The training of a run; None for what its files do not tell, for example where there is only `best/`."""

    epochs: int | None = None  # trained
    best_epoch: int | None = None
    learning_rates: str = "none"
    trained_parameters: int | None = 0
    wall_seconds: float | None = None
    frozen: str = "all"
    wise_ft_alpha: float | None = None  # weight of the fine-tuned model, where it was averaged with the zero-shot one


UNTRAINED = RunRecord(epochs=0, best_epoch=0, wall_seconds=0.0)


def run_folder(run: str | Path) -> Path:
    """The folder of a run, given that or its `best/`."""
    path = Path(run)
    return path.parent if path.name == "best" and (path.parent / "metrics.jsonl").is_file() else path


def read_record(run: str | Path) -> RunRecord:
    """The record of a run folder or of its `best/`. Raises UserError for a path that is no run or is damaged.

    A pretrained CLIP is untrained if its last epoch is 0, or, where only `best/` is there, if its best epoch is.
    """
    folder = run_folder(run)
    best = folder / "best" if (folder / "best").is_dir() else folder
    cfg = run_config(best)
    log, metrics = folder / "metrics.jsonl", best / "metrics.json"
    try:
        last = json.loads(log.read_text().splitlines()[-1]) if log.is_file() and log.stat().st_size else {}
        chosen = json.loads(metrics.read_text()) if metrics.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is damaged: {error} in metrics.jsonl or metrics.json") from error
    if cfg.backend == "hf_clip" and (last or chosen).get("epoch") == 0:
        return RunRecord(0, 0, wall_seconds=last.get("wall_seconds"))
    return RunRecord(
        epochs=last.get("epoch"),
        best_epoch=chosen.get("epoch"),
        learning_rates=_learning_rates(cfg),
        trained_parameters=last.get("trained_parameters"),
        wall_seconds=last.get("wall_seconds"),
        frozen=_frozen(cfg),
        wise_ft_alpha=chosen.get("wise_ft_alpha"),
    )


def _learning_rates(cfg: CFG) -> str:
    """The peak learning rates: one number where all are equal, else each with its parts."""
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
    """What was frozen, in the words of `image_freeze` and `text_freeze`."""
    image, text = frozen_parts(cfg).values()
    return image if image == text else f"image {image}, text {text}"
