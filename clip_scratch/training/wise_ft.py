"""WiSE-FT: a fine-tuned model averaged, weight by weight, with the zero-shot model it came from.

Wortsman et al. 2022, Robust fine-tuning of zero-shot models (arXiv:2109.01903): the average retains more of what the
pretrained model knew, and is often better than both on the data it was fine-tuned for.
"""

import json
import shutil
from pathlib import Path

import torch

from ..data.loaders import Loader
from ..files import write_atomically, write_json
from ..models.clip import DualEncoder
from ..models.freezing import merged_state
from ..models.saved import WEIGHTS, load, save_best
from .engine import valid_epoch

ZERO_SHOT = "zero_shot.safetensors"
_ALPHAS = [i / 10 for i in range(11)]
Weights = dict[str, torch.Tensor]  # a state dict


def save_start(folder: Path) -> None:
    """Copy the weights of epoch 0, which are now in `best/`, for `average_with_start`."""
    write_atomically(folder / ZERO_SHOT, lambda temporary: shutil.copyfile(folder / "best" / WEIGHTS, temporary))


def interpolate(zero_shot: Weights, fine_tuned: Weights, alpha: float) -> Weights:
    """(1 - alpha) times the zero-shot and alpha times the fine-tuned weights; integers are the fine-tuned ones."""
    pairs = ((name, zero_shot[name], tuned) for name, tuned in fine_tuned.items())
    return {name: torch.lerp(old, new, alpha) if new.is_floating_point() else new for name, old, new in pairs}


def average_with_start(folder: Path, last: DualEncoder, epochs: int, valid_loader: Loader, alpha: str) -> str:
    """Replace the best model of a run by its average with the zero-shot one, and return how each alpha did.

    Where no epoch was better than zero-shot, `last`, the model after all `epochs`, is averaged instead: an average can
    correct fine-tuning that went too far. "auto" takes the alpha with the highest validation rsum. Does nothing where
    that has been done before.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(folder / "best" / WEIGHTS, "pt") as file:  # metrics.json is written after the weights
        header = file.metadata()
    record = {"epoch": int(header["epoch"]), **json.loads(header["metrics"])}
    if "wise_ft_alpha" in record:
        write_json(folder / "best" / "metrics.json", record | {"git_commit": header["git_commit"]})
        return f"WiSE-FT: best/ is the average with alpha {record['wise_ft_alpha']:g} already"
    if not epochs:
        return "WiSE-FT: nothing to average, no epoch was trained"
    device = last.device
    model = load(folder, str(device))
    epoch = record["epoch"] or epochs
    tuned = model.state_dict() if record["epoch"] else merged_state(last)
    ends = [load_file(folder / ZERO_SHOT, device=str(device)), {name: t.clone() for name, t in tuned.items()}]
    measured = {}
    for candidate in _ALPHAS if alpha == "auto" else [float(alpha)]:
        model.load_state_dict(interpolate(*ends, candidate))
        measured[candidate] = valid_epoch(model, valid_loader)
    best = max(measured, key=lambda candidate: (measured[candidate]["rsum"], candidate))
    model.load_state_dict(interpolate(*ends, best))
    save_best(folder / "best", model, epoch if best else 0, measured[best] | {"wise_ft_alpha": best})
    lines = [f"  alpha {candidate:.2f}  rsum {metrics['rsum']:.1f}" for candidate, metrics in measured.items()]
    return "\n".join([f"WiSE-FT, from zero-shot (0) to epoch {epoch} (1):", *lines, f"saved: alpha {best:g}"])
