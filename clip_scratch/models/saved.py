"""A saved model: the folder `best/` of a run, which needs nothing else to be loaded.

model.safetensors    weights; epoch, metrics and git commit in its header
config.json          the settings of the model, as resolved; the run folder's own config.json holds those asked for
text_config.json     the transformers configuration of the text tower (clip_config.json for a pretrained CLIP)
metrics.json         epoch, metrics and git commit again, beside the tokenizer's files

Nothing is unpickled. An encoder of the user's own, `module:function`, is imported, but not from the run folder.
"""

import dataclasses
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import torch

from ..config import CFG
from ..device import pick_device
from ..environment import git_commit
from ..errors import UserError, first_line
from ..files import write_atomically, write_json
from ..hub import HUB, hub_cache, hub_snapshot, is_function
from .build import model_class
from .clip import DualEncoder
from .freezing import merged_state

WEIGHTS, SETTINGS = "model.safetensors", "config.json"
RELEASED = Path(__file__).parents[1] / "released"  # models that come with the package


def prepare_best(folder: Path, model: DualEncoder, cfg: CFG) -> None:
    """Write the files of `best/` that never change: settings, tokenizer, the transformers configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, dataclasses.asdict(cfg))
    architecture = model.architecture()
    write_json(folder / model.ARCHITECTURE, architecture and json.loads(architecture.to_json_string(use_diff=False)))
    model.tokenizer.save_pretrained(folder)


def save_best(
    folder: Path, model: torch.nn.Module, epoch: int, metrics: dict[str, float],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """Replace the weights of `best/` in one rename, by the model's or, where these are sharded, by `weights`.

    LoRA's updates are merged into the weights, so that loading needs no PEFT; in bf16 the merged model's metrics may
    differ from `metrics` in the last digit shown.
    """
    header = {"format": "pt", "epoch": str(epoch), "metrics": json.dumps(metrics), "git_commit": git_commit() or ""}
    write_tensors(folder / WEIGHTS, merged_state(model) if weights is None else weights, header)
    write_json(folder / "metrics.json", {"epoch": epoch, **metrics, "git_commit": header["git_commit"]})


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file, atomically. Raises OSError where it cannot be written, a full disk included."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Copies, since safetensors refuses tensors that share their memory, as T5's embeddings do
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    try:
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header))
    except SafetensorError as error:
        reason = re.search(r"(.*) \(os error (\d+)\)", str(error))
        if not reason:
            raise OSError(None, str(error), str(path)) from error
        needed = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
        reason, number = reason[1].rpartition(": ")[2], int(reason[2])
        raise OSError(number, f"{reason}; {needed:,.1f} MB are needed", str(path)) from error


def best_metrics(best: Path) -> dict[str, float]:
    """Epoch and metrics that `save_best` wrote; {} where there is no such file. Raises UserError for a damaged one."""
    path = best / "metrics.json"
    try:
        metrics = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(metrics, dict) or (path.is_file() and "epoch" not in metrics):
        raise UserError(f"{path} is damaged: it has no epoch")
    return metrics


def best_folder(run: str | Path) -> Path:
    """The `best/` of a run that is named by its folder or by `best/` itself; `hub:USER/NAME` is downloaded.

    A name such as "scenes-tiny", where there is no such folder, is that of a model that comes with the package. Raises
    UserError where the hub does not have it.
    """
    if str(run).startswith(HUB):
        return hub_snapshot(str(run).removeprefix(HUB))
    if os.path.isdir(Path(run, "best")):
        return Path(run, "best")
    is_released = str(run) and not os.path.exists(run) and os.path.isdir(RELEASED / run)
    return RELEASED / run if is_released else Path(run)


def run_config(folder: str | Path) -> CFG:
    """The settings in the config.json of exactly this folder. Raises UserError where there is none."""
    path = Path(folder) / SETTINGS
    if not os.path.isfile(path):
        raise UserError(f"{folder} is not a run folder: there is no {path}")
    try:
        saved = json.loads(path.read_text())
        return CFG(**{name: value for name, value in saved.items() if hasattr(CFG, name)})
    except (OSError, ValueError, AttributeError, UserError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def bare_model(best: Path, training: bool = False) -> DualEncoder:
    """The model that the settings in a `best/` folder describe, with random weights and without asking a hub.

    For `training` with LoRA's matrices, where its settings have them. Raises UserError for another or a damaged folder.
    """
    from transformers import AutoConfig, AutoTokenizer

    cfg = run_config(best)
    _refuse_code_in(best, cfg)
    model_cls = model_class(cfg)
    try:
        config = json.loads((best / model_cls.ARCHITECTURE).read_text())
        architecture = None if config is None else AutoConfig.for_model(**config)
        options = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(best, config=architecture, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{best} is damaged: {first_line(error)}") from error
    bare = dataclasses.replace(cfg, pretrained=False, image_weights="", text_tokenizer="")
    for name in ("image_freeze", "text_freeze"):
        if not training and getattr(cfg, name) == "lora":
            setattr(bare, name, "none")  # its updates are merged
    model = model_cls(bare, tokenizer, architecture)
    model.cfg = cfg
    return model


def _refuse_code_in(best: Path, cfg: CFG) -> None:
    """Raise UserError where an encoder's module lies in the run folder, whose author may be somebody else."""
    run = best.resolve().parent if best.resolve().name == "best" else best.resolve()
    for name in filter(is_function, (cfg.model_name, cfg.text_encoder_model)):
        if best.is_relative_to(hub_cache()):
            raise UserError(f"{best / SETTINGS}: {name} would run code that a model from a hub names: refused")
        file = Path(*name.partition(":")[0].split("."))
        if any(Path(entry, file).resolve().is_relative_to(run) for entry in sys.path):
            remedy = f"Put the module of {name} elsewhere"
            raise UserError(f"{best / SETTINGS}: no code is imported from a run folder. {remedy}")


def load(path: str | Path, device: str = "cpu") -> DualEncoder:
    """The trained model of a run folder or of its `best/`, in eval mode.

    Raises UserError where the folder is no run, has no best model yet, or is damaged, and for a `device` that is not
    available; "auto" is the best one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    target, best = pick_device(CFG(device=device, precision="auto")), best_folder(path)
    model = bare_model(best)
    try:
        model.load_state_dict(load_file(best / WEIGHTS))
    except FileNotFoundError as error:
        raise UserError(f"{best} holds no weights yet: the run has not finished its first epoch") from error
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{best / WEIGHTS} does not fit its settings: {first_line(error)}") from error
    return model.to(target).eval()


def model_fingerprint(model: DualEncoder) -> str:
    """A hash of a model's weights: two models with the same one give the same embeddings."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
