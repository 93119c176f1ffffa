"""Every strategy of freezing, one run each, and the table that compares them: `train hf_clip --sweep freezing`."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from pathlib import Path

from .config import CFG
from .errors import UserError

# Settings that say nothing about what was learned, or that a pretrained model settles for itself
_MAY_DIFFER = {
    "device", "num_workers", "checkpoint_steps", "on_bad_image",
    "size", "resize", "crop_from", "interpolation", "projection_dim", "loss",
}  # fmt: skip


def strategies(depth: int, head_lr: float) -> dict[str, dict[str, object]]:
    """What each run after zero-shot changes of the settings, by its name; `depth` is the image tower's in blocks."""
    first = 6 if depth > 6 else depth // 2
    return {
        f"vision-first-{first}": {"image_freezing": f"first:{first}", "text_freezing": "full"},
        # Heads that learn alone take a higher rate: at a tower's they would hardly move
        "heads": {"image_freezing": "heads", "text_freezing": "heads", "head_lr": max(head_lr, 1e-3)},
        "full": {"image_freezing": "full", "text_freezing": "full"},
        "lora": {"image_freezing": "lora", "text_freezing": "lora"},
    }


def sweep(cfg: CFG) -> Path:
    """Measure zero-shot, fine-tune once per strategy below `run_dir`, compare, and return that folder.

    The same call with the same folder goes on where it was stopped: finished runs are kept, an interrupted one is
    resumed. Writes comparison.md, comparison.csv and comparison.png. Raises UserError where the model is not a
    pretrained CLIP, and without PEFT.
    """
    from .evaluation.comparison import compare
    from .models.freezing import blocks
    from .training.checkpoint import SETTINGS, load, write_atomically

    if cfg.backend != "hf_clip":
        raise UserError("--sweep freezing starts from zero-shot: it needs a pretrained CLIP, as the preset hf_clip has")
    if importlib.util.find_spec("peft") is None:  # said now, not an hour later when LoRA's turn comes
        raise UserError("one of the strategies is LoRA, which needs another library: pip install 'clip_scratch[lora]'")
    if (cfg.image_freezing, cfg.text_freezing) != ("full", "full"):
        raise UserError("--sweep freezing sets image_freezing and text_freezing itself: leave them out")
    if cfg.resume:
        raise UserError(f"a sweep goes on with the same command and --run-dir {cfg.resume}")
    folder = Path(cfg.run_dir or f"runs/sweep-{time.strftime('%Y%m%d-%H%M%S')}")
    if (folder / SETTINGS).is_file():
        raise UserError(f"{folder} is a run: choose another --run-dir for the sweep's runs")
    try:
        runs = [_train(cfg, folder / "zero-shot", {"epochs": 0})]
        _, depth = blocks(load(runs[0]).towers["image"])
        runs += [_train(cfg, folder / name, changes) for name, changes in strategies(depth, cfg.head_lr).items()]
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"go on with the same command and --run-dir {folder}") from interrupt
    comparison = compare(runs, device=cfg.device)
    print(f"\n{comparison.text()}")
    for name, content in (("comparison.md", comparison.markdown()), ("comparison.csv", comparison.csv())):
        write_atomically(folder / name, lambda temporary, content=content: temporary.write_text(content))
    comparison.chart(folder / "comparison.png")
    print(f"\nwritten: {folder}/comparison.md, .csv and .png")
    return folder


def _train(cfg: CFG, run: Path, changes: dict[str, object]) -> Path:
    from .train import main
    from .training.checkpoint import SETTINGS, run_config

    print(f"\n== {run.name}")
    wanted = dataclasses.replace(cfg, sweep="", run_dir=str(run), **changes)
    if not (run / SETTINGS).is_file():
        return main(wanted)
    saved = dataclasses.asdict(run_config(run))
    for name, value in dataclasses.asdict(wanted).items():
        if name not in _MAY_DIFFER and value != saved[name]:
            raise UserError(
                f"{run} was trained with {name}={saved[name]!r}, not {value!r}: choose another --run-dir for the sweep"
            )
    return main(CFG(resume=str(run), device=cfg.device, num_workers=cfg.num_workers))  # a finished run trains nothing
