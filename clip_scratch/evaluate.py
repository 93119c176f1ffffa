"""Measure a run: `python -m clip_scratch.evaluate RUN [--split train|valid|test] [--json F]`.

Recall by default; with --zero-shot or --linear-probe classification; with --compare a table of several runs.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from .errors import UserError, run_command


def evaluate(
    run: str | Path, split: str = "valid", captions_path: str = "", image_path: str = "", device: str = "cpu"
) -> dict[str, object]:
    """The recalls of a run on a split of the captions it was trained with, or of another captions file.

    As `recall_at_k`, with `split`, `n_images`, `n_captions` and `n_ambiguous_captions`. Of another file that has no
    splits all images are measured, and `split` is "all". Raises UserError for a folder that is no run, a split
    without images and a device that is not there.
    """
    from ..device import pick_device
    from .config import CFG
    from .evaluation.measure import measure
    from .evaluation.sample import captions_for, count_ambiguous, part_of
    from .models.saved import load

    model = load(run, str(pick_device(CFG(device=device))))
    cfg, table = captions_for(model.cfg, captions_path, image_path)
    table, split = part_of(cfg, table, split)
    counts = {"n_images": int(table["image_id"].nunique()), "n_captions": len(table)}
    counts["n_ambiguous_captions"] = count_ambiguous(table)
    return {**measure(model, cfg, table).metrics, "split": split, **counts}


@dataclass
class Arguments:
    """Measure a run: recall@1, 5 and 10 of image-to-text and text-to-image retrieval, median ranks and rsum."""

    run: Positional[str] = ""  # run folder, or its best/
    split: Literal["train", "valid", "test"] = "valid"  # which images to measure on
    captions_path: str = ""  # another captions file than the run's own
    image_path: str = ""  # folder of its images
    json: str = ""  # write the figures to this file too
    compare: tuple[str, ...] = ()  # runs to measure side by side, in one table, zero-shot first
    markdown: str = ""  # write that table to this file, as Markdown
    csv: str = ""  # ... and as CSV
    chart: str = ""  # ... and as a bar chart (PNG)
    zero_shot: str = ""  # classify images by the labels of this file, one a line; table: those of the captions file
    templates: str = ""  # file of prompts, one a line, with {} where the label goes
    images: str = ""  # classify the images below this folder; sub-folders are their true labels
    linear_probe: bool = False  # fit a logistic regression on the training images' projected, normalised embeddings
    confusion: str = ""  # draw the confusion matrix of --zero-shot or --linear-probe into this PNG
    device: str = "auto"  # cpu, cuda, ...; auto: the best at hand


def main(arguments: Arguments) -> None:
    """Print the figures that were asked for, and write them to files where asked."""
    from ..device import pick_device
    from .config import CFG
    from .files import write_json

    _check(arguments)
    device = str(pick_device(CFG(device=arguments.device)))
    if arguments.compare:
        _compare(arguments, device)
        return
    if arguments.zero_shot or arguments.linear_probe:
        result = _classification(arguments, device)
    else:
        result = _recall(arguments, device)
    if arguments.json:
        write_json(Path(arguments.json), result)


def _check(arguments: Arguments) -> None:
    """Raise UserError for words that do not go together and for files that cannot be written, before all work."""
    if not arguments.run and not arguments.compare:
        raise UserError("name the run to measure: python -m clip_scratch.evaluate RUN, or --compare RUN RUN ...")
    classifies = "--zero-shot or --linear-probe"
    needs = {
        "markdown": ("--compare", arguments.compare), "csv": ("--compare", arguments.compare),
        "chart": ("--compare", arguments.compare), "templates": ("--zero-shot", arguments.zero_shot),
        "images": ("--zero-shot", arguments.zero_shot),
        "confusion": (classifies, arguments.zero_shot or arguments.linear_probe),
    }  # fmt: skip
    for name, (other, given) in needs.items():
        if getattr(arguments, name) and not given:
            raise UserError(f"--{name} is for {other}")
    _check_images(arguments)
    if arguments.compare and (arguments.zero_shot or arguments.linear_probe):
        raise UserError(f"--compare is a table of recalls: leave out {classifies}")
    if arguments.compare and arguments.json:
        raise UserError("--compare writes no JSON: use --csv")
    if arguments.confusion and arguments.zero_shot and arguments.linear_probe:
        raise UserError(f"--confusion draws one matrix: ask for one of {classifies}")
    for name in ("json", "markdown", "csv", "chart", "confusion"):
        if target := getattr(arguments, name):
            _check_target(name, Path(target))


def _check_images(arguments: Arguments) -> None:
    """Raise UserError for what says where images or labels are, besides --images, and would not be looked at."""
    if not arguments.images or arguments.linear_probe:
        return
    names = ["split"] if arguments.split != Arguments.split else []
    if not _labels_in_table(arguments):
        names += [name for name in ("captions_path", "image_path") if getattr(arguments, name)]
    if names:
        raise UserError(f"--{names[0].replace('_', '-')} is of no use with --images: leave it out")


def _labels_in_table(arguments: Arguments) -> bool:
    """Whether --zero-shot means the labels of the captions file, and no file that is called table."""
    return arguments.zero_shot == "table" and not Path("table").is_file()


def _check_target(option: str, target: Path) -> None:
    if not target.parent.is_dir():
        raise UserError(f"--{option} {target}: there is no folder {target.parent}")
    if target.is_dir():
        raise UserError(f"--{option} {target} is a folder: name a file in it")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"--{option} {target}: the folder {target.parent} cannot be written to")
    if option in ("chart", "confusion") and target.suffix.lower() != ".png":
        raise UserError(f"--{option} {target} is a picture: its name ends in .png")


def _recall(arguments: Arguments, device: str) -> dict[str, object]:
    from .evaluation.comparison_table import ambiguity
    from .evaluation.retrieval import format_table

    result = evaluate(arguments.run, arguments.split, arguments.captions_path, arguments.image_path, device)
    print(format_table(result, result["split"], result["n_images"], result["n_captions"]))
    if n := result["n_ambiguous_captions"]:
        print(ambiguity(n, result["n_captions"]))
    return result


def _compare(arguments: Arguments, device: str) -> None:
    from .evaluation.comparison import compare
    from .files import write_atomically

    runs = [*([arguments.run] if arguments.run else []), *arguments.compare]
    comparison = compare(runs, arguments.split, arguments.captions_path, arguments.image_path, device)
    print(comparison.text(ansi=sys.stdout.isatty()))
    for target, content in ((arguments.markdown, comparison.markdown), (arguments.csv, comparison.csv)):
        if target:
            write_atomically(Path(target), lambda temporary, content=content: temporary.write_text(content()))
    if arguments.chart:
        comparison.chart(arguments.chart)


def _classification(arguments: Arguments, device: str) -> dict[str, object]:
    """The figures of --zero-shot and of --linear-probe; one below the other's name where both are asked for."""
    from .models.saved import load

    model = load(arguments.run, device)
    results = {}
    if arguments.zero_shot:
        results["zero_shot"] = _zero_shot(arguments, model)
    if arguments.linear_probe:
        results["linear_probe"] = _linear_probe(arguments, model)
    return results if len(results) > 1 else next(iter(results.values()))


def _zero_shot(arguments: Arguments, model) -> dict[str, object]:
    from .evaluation.classification import classification_metrics
    from .evaluation.sample import captions_for, image_labels, images_of_folder, images_of_split
    from .evaluation.zero_shot import (
        TEMPLATES,
        distinct_labels,
        label_embeddings,
        ranked_labels,
        read_labels,
        read_templates,
        targets_of,
    )
    from .retrieval.embed import encode_image
    from .search import images_below

    templates = read_templates(arguments.templates) if arguments.templates else TEMPLATES
    from_table = _labels_in_table(arguments)
    labels = [] if from_table else read_labels(arguments.zero_shot)
    if from_table or not arguments.images:
        cfg, table = captions_for(model.cfg, arguments.captions_path, arguments.image_path)
    if from_table:
        labels = distinct_labels(image_labels(cfg, table), cfg.captions_path or "the built-in data set")
    if arguments.images:
        folder = Path(arguments.images)
        images = images_of_folder(folder, images_below(folder))
    else:
        images = images_of_split(cfg, table, arguments.split)
    if arguments.confusion and not images.labels:
        raise UserError(f"--confusion: the images of {images.folder} have no true labels: give each label a sub-folder")
    targets = targets_of(images, labels) if images.labels else None

    per_label = label_embeddings(model, labels, templates)  # (K, P)
    cosine = encode_image(model, images.paths, progress=True).double() @ per_label.double().T  # (N, K)
    sizes = {"n_images": len(images.names), "n_classes": len(labels)}
    if targets is None:
        best = {n: ranked[:3] for n, ranked in zip(images.names, ranked_labels(model, cosine, labels), strict=True)}
        for name, ranked in best.items():
            print(f"{name}  " + ", ".join(f"{label} {probability:.2f}" for label, probability in ranked))
        return {**sizes, "best_labels": best}
    metrics = {"split": images.source, **classification_metrics(cosine, targets, labels)}
    title = "zero-shot, {}: {n_images:,} images, {n_classes:,} classes, {:,} templates"
    _show(metrics, cosine, targets, labels, title.format(images.source, len(templates), **sizes), arguments.confusion)
    return metrics


def _linear_probe(arguments: Arguments, model) -> dict[str, object]:
    from .evaluation.linear_probe import linear_probe
    from .evaluation.sample import WHOLE, captions_for, images_of_split
    from .retrieval.embed import encode_image

    cfg, table = captions_for(model.cfg, arguments.captions_path, arguments.image_path)
    there, report = set(table["split"]), arguments.split
    if there == {WHOLE}:
        raise UserError(
            f"{arguments.captions_path} has no splits: a linear probe needs training images besides those that it "
            "reports. Give the file a split column (train, valid, test)."
        )
    wanted = dict.fromkeys(["train", report, *({"valid"} & there)])
    images = {split: images_of_split(cfg, table, split) for split in wanted}
    parts = {
        split: (encode_image(model, some.paths, progress=True).double().numpy(), some.labels)
        for split, some in images.items()
    }
    probe = linear_probe(parts["train"], parts[report], parts.get("valid") if report != "valid" else None)
    metrics = {"split": report, **probe.metrics}
    title = (
        "linear probe, {split}: {n_images:,} images, {n_classes:,} classes, {n_train_images:,} training images, C {C:g}"
    )
    _show(metrics, probe.scores, probe.targets, probe.labels, title.format(**metrics), arguments.confusion)
    if metrics["n_unseen"]:
        print(f"{metrics['n_unseen']:,} images are of classes without a training image: they count as wrong.")
    return metrics


def _show(metrics: dict, scores, targets, labels: list[str], title: str, confusion: str) -> None:
    """Print the figures of a classifier, and draw its confusion matrix where a file is named for it."""
    from .evaluation.classification import confusion_matrix, draw_confusion, format_classification

    matrix = confusion_matrix(scores, targets)
    print(format_classification(metrics, matrix, labels, title))
    if confusion:
        draw_confusion(matrix, labels, confusion)


if __name__ == "__main__":
    import tyro

    run_command(lambda: main(tyro.cli(Arguments, prog="python -m clip_scratch.evaluate")))
