"""Fine-tune with every way of freezing, one run each, and compare: `python -m clip_scratch.sweep hf_clip ...`.

Takes the settings of `clip_scratch.train`. The same command continues a sweep that was interrupted.
"""

import dataclasses
import importlib.util
import sys
import time
from pathlib import Path

from .cli import parse
from .config import CFG
from .errors import UserError, run_command


def strategies(depth: int, head_lr: float) -> dict[str, dict[str, object]]:
    """The settings of each run after zero-shot, by its name; `depth` is the number of blocks of the image tower."""
    first = 6 if depth > 6 else depth // 2
    return {
        f"vision-first-{first}": {"image_freeze": f"first:{first}", "text_freeze": "none"},
        # Heads that learn alone take a higher rate: at a tower's they would hardly move
        "heads": {"image_freeze": "backbone", "text_freeze": "backbone", "head_lr": max(head_lr, 1e-3)},
        "full": {"image_freeze": "none", "text_freeze": "none"},
        "lora": {"image_freeze": "lora", "text_freeze": "lora"},
    }


def sweep(cfg: CFG) -> Path:
    """Measure zero-shot, fine-tune once per strategy below `run_dir`, and return that folder, with comparison.md ...

    The same call continues where it stopped: finished runs are not trained again, an interrupted one is resumed. Raises
    UserError where the model is not a pretrained CLIP, and without PEFT.
    """
    from .evaluation.comparison import compare
    from .models.freezing import blocks
    from .models.saved import SETTINGS, load

    if cfg.backend != "hf_clip":
        raise UserError("a sweep starts from zero-shot: it needs a pretrained CLIP, as the preset hf_clip has")
    if importlib.util.find_spec("peft") is None:  # now, not an hour later when LoRA's turn comes
        raise UserError("one of the strategies is LoRA, which needs another library: pip install 'clip_scratch[lora]'")
    if (cfg.image_freeze, cfg.text_freeze) != ("none", "none"):
        raise UserError("a sweep sets image_freeze and text_freeze itself: leave them out")
    if cfg.resume:
        raise UserError(f"a sweep continues with the same command and --run-dir {cfg.resume}")
    folder = Path(cfg.run_dir or f"runs/sweep-{time.strftime('%Y%m%d-%H%M%S')}")
    if (folder / SETTINGS).is_file():
        raise UserError(f"{folder} is a run: choose another --run-dir for the sweep's runs")
    try:
        runs = [_train(cfg, folder / "zero-shot", {"epochs": 0})]
        _, depth = blocks(load(runs[0]).towers["image"])
        runs += [_train(cfg, folder / name, changes) for name, changes in strategies(depth, cfg.head_lr).items()]
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"continue with the same command and --run-dir {folder}") from interrupt
    comparison = compare(runs, device=cfg.device)
    print(f"\n{comparison.text()}")
    comparison.write(folder / "comparison.md", folder / "comparison.csv", folder / "comparison.png")
    print(f"\nwritten: {folder}/comparison.md, .csv and .png")
    return folder


def _train(cfg: CFG, run: Path, changes: dict[str, object]) -> Path:
    """Train the run with these changes of the settings, or finish it."""
    from .models.saved import SETTINGS, run_config
    from .train import main
    from .training.run import resumed

    print(f"\n== {run.name}")
    wanted = dataclasses.replace(cfg, run_dir=str(run), **changes)
    if (run / SETTINGS).is_file():
        wanted = resumed(dataclasses.replace(wanted, resume=str(run)), defaults=run_config(run))
    return main(wanted)


if __name__ == "__main__":
    run_command(lambda: sweep(parse(sys.argv[1:], "python -m clip_scratch.sweep")))
