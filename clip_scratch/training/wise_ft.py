"""WiSE-FT: a fine-tuned model mixed, weight by weight, with the zero-shot model it came from.

Wortsman et al. 2022, Robust fine-tuning of zero-shot models (arXiv:2109.01903): the mixture keeps more of what
the pretrained model knew, and is often better than both on the data it was fine-tuned for.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from ..data.loaders import Loader
from ..models.clip import DualEncoder
from ..models.freezing import merged_state
from .checkpoint import WEIGHTS, load, run_config, save_best, write_atomically, write_json
from .engine import valid_epoch

ZERO_SHOT = "zero_shot.safetensors"
_ALPHAS = [i / 10 for i in range(11)]


def keep_start(folder: Path) -> None:
    """Keep a copy of the weights of epoch 0, which are now in `best/`, for `mix`."""
    write_atomically(folder / ZERO_SHOT, lambda temporary: shutil.copyfile(folder / "best" / WEIGHTS, temporary))


def interpolate(
    zero_shot: dict[str, torch.Tensor], fine_tuned: dict[str, torch.Tensor], alpha: float
) -> dict[str, torch.Tensor]:
    """(1 - alpha) of the zero-shot and alpha of the fine-tuned weights; whole numbers are the fine-tuned ones."""
    return {
        name: torch.lerp(zero_shot[name], tuned, alpha) if tuned.is_floating_point() else tuned
        for name, tuned in fine_tuned.items()
    }


def mix(folder: Path, last: DualEncoder, epochs: int, valid_loader: Loader, device: torch.device) -> str:
    """Put the mixture that `wise_ft` asks for in the place of the best epoch, and say how each alpha does.

    Where no epoch was better than zero-shot, the model `last` of all `epochs` is mixed in: to overshoot is what a
    mixture mends. "auto" takes the alpha with the highest validation rsum. Does nothing where that has been done.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(folder / "best" / WEIGHTS, "pt") as file:  # metrics.json is written after the weights
        header = file.metadata()
    record = {"epoch": int(header["epoch"]), **json.loads(header["metrics"])}
    if "wise_ft_alpha" in record:
        write_json(folder / "best" / "metrics.json", record | {"git_commit": header["git_commit"]})
        return f"WiSE-FT: best/ is the mixture with alpha {record['wise_ft_alpha']:g} already"
    if not epochs:
        return "WiSE-FT: nothing to mix, no epoch was trained"
    model = load(folder, str(device))
    asked = run_config(folder).wise_ft
    epoch = record["epoch"] or epochs
    tuned = model.state_dict() if record["epoch"] else merged_state(last)
    ends = [load_file(folder / ZERO_SHOT, device=str(device)), {name: t.clone() for name, t in tuned.items()}]
    measured = {}
    for alpha in _ALPHAS if asked == "auto" else [float(asked)]:
        model.load_state_dict(interpolate(*ends, alpha))
        measured[alpha] = valid_epoch(model, valid_loader, model.cfg)
    best = max(measured, key=lambda alpha: (measured[alpha]["rsum"], alpha))
    model.load_state_dict(interpolate(*ends, best))
    save_best(folder / "best", model, epoch if best else 0, measured[best] | {"wise_ft_alpha": best})
    lines = [f"  alpha {alpha:.2f}  rsum {metrics['rsum']:.1f}" for alpha, metrics in measured.items()]
    return "\n".join([f"WiSE-FT, from zero-shot (0) to epoch {epoch} (1):", *lines, f"kept: alpha {best:g}"])
