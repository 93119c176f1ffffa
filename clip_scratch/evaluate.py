"""Measure a run: `python -m clip_scratch.evaluate RUN [--split train|valid|test] [--json F]`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from .errors import UserError, run_command


def evaluate(
    run: str | Path, split: str = "valid", captions_path: str = "", image_path: str = "", device: str = "cpu"
) -> dict[str, object]:
    """The recalls of a run on a split of the captions it was trained with, or of another captions file.

    As `recall_at_k`, with `split`, `n_images` and `n_captions`. Of another file that has no splits all images
    are measured, and `split` is "all". Raises UserError for a folder that is no run and a split without images.
    """
    from .data.captions import check_images, image_folder, read_captions, split_of
    from .data.loaders import build_loaders
    from .training.checkpoint import load
    from .training.engine import valid_epoch

    model = load(run, device)
    cfg = model.cfg
    if captions_path:
        cfg = dataclasses.replace(
            cfg, captions_path=captions_path, image_path=image_path, captions_format="auto", image_column="",
            caption_column="", label_column="", valid_captions_path="", test_captions_path="",
            valid_fraction=0.0, test_fraction=0.0,
        )  # fmt: skip
    elif image_path:
        cfg = dataclasses.replace(cfg, image_path=image_path)
    table = read_captions(cfg)
    if captions_path and set(table["split"]) == {"train"}:
        split = "all"
    else:
        table = split_of(table, split, cfg.captions_path)
    table = check_images(table, image_folder(cfg, table), cfg.on_bad_image)
    metrics = valid_epoch(model, build_loaders(table, model.tokenizer, "valid", cfg), cfg)
    return {**metrics, "split": split, "n_images": int(table["image_id"].nunique()), "n_captions": len(table)}


@dataclass
class Arguments:
    """Measure a run: recall@1, 5 and 10 of image-to-text and text-to-image retrieval, median ranks and rsum."""

    run: Positional[str]  # run folder, or its best/
    split: Literal["train", "valid", "test"] = "valid"  # which images to measure on
    captions_path: str = ""  # another captions file than the run's own
    image_path: str = ""  # folder of its images
    json: str = ""  # write the figures to this file too
    device: str = "auto"  # cpu, cuda, ...; auto: the best at hand


def main(arguments: Arguments) -> None:
    """Print the recall table, and write it as JSON where asked."""
    from .config import CFG
    from .evaluation.retrieval import format_table
    from .training.checkpoint import write_json
    from .training.device import pick_device

    target = Path(arguments.json) if arguments.json else None
    if target and not target.parent.is_dir():
        raise UserError(f"--json {target}: there is no folder {target.parent}")
    if target and target.is_dir():
        raise UserError(f"--json {target} is a folder: name a file in it")
    device = pick_device(CFG(device=arguments.device))
    result = evaluate(arguments.run, arguments.split, arguments.captions_path, arguments.image_path, str(device))
    print(format_table(result, result["split"], result["n_images"], result["n_captions"]))
    if target:
        write_json(target, result)


if __name__ == "__main__":
    import tyro

    run_command(lambda: main(tyro.cli(Arguments, prog="python -m clip_scratch.evaluate")))
