"""Measure a run: `python -m clip_scratch.evaluate RUN [--split train|valid|test] [--json F]`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from .errors import run_command


def evaluate(
    run: str | Path, split: str = "valid", captions_path: str = "", image_path: str = "", device: str = "auto"
) -> dict[str, object]:
    """The recalls of a run on a split of the captions it was trained with, or of another captions file.

    As `recall_at_k`, with `split`, `n_images`, `n_captions` and `n_ambiguous_captions`. Of another file that has no
    splits all images are measured, and `split` is "all". Raises UserError for a folder that is no run, a split
    without images and a device that is not available.
    """
    from .evaluation.measure import checked_split, count_ambiguous, data_changed, measure, open_captions
    from .models.saved import load

    model = load(run, device)
    source, split = checked_split(open_captions(model.cfg, captions_path, image_path), split)
    if not captions_path and data_changed(run, split, source.table):
        print(f"note: the {split} captions are not those that {run} was trained with", file=sys.stderr)
    counts = {"n_images": int(source.table["image_id"].nunique()), "n_captions": len(source.table)}
    counts["n_ambiguous_captions"] = count_ambiguous(source.table)
    return {**measure(model, source).metrics, "split": split, **counts}


@dataclass
class Arguments:
    """Measure a run: recall@1, 5 and 10 of image-to-text and text-to-image retrieval, median ranks and rsum."""

    run: Positional[str]  # run folder, or its best/
    split: Literal["train", "valid", "test"] = "valid"  # which images to measure on
    captions_path: str = ""  # another captions file than the run's own
    image_path: str = ""  # folder of its images
    json: str = ""  # write the results to this file too
    device: str = "auto"  # cpu, cuda, ...; auto: the best available


def main(arguments: Arguments) -> None:
    """Print the recalls, and write them to a file where asked."""
    from .evaluation.comparison_table import ambiguity
    from .evaluation.retrieval import format_table
    from .files import check_target, write_json

    check_target(arguments.json)
    result = evaluate(**{name: value for name, value in vars(arguments).items() if name != "json"})
    print(format_table(result, result["split"], result["n_images"], result["n_captions"]))
    if n := result["n_ambiguous_captions"]:
        print(ambiguity(n, result["n_captions"]))
    if arguments.json:
        write_json(Path(arguments.json), result)


if __name__ == "__main__":
    import tyro

    run_command(lambda: main(tyro.cli(Arguments, prog="python -m clip_scratch.evaluate")))
