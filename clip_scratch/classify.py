"""Classify images, zero-shot or by a linear probe: `python -m clip_scratch.classify RUN [--labels F] [--images D]`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from .errors import UserError, run_command

if TYPE_CHECKING:
    from .evaluation.classification import Classified
    from .models.clip import DualEncoder


@dataclass
class Arguments:
    """Classify images zero-shot: each gets the label whose prompts are nearest. Or measure a linear probe."""

    run: Positional[str]  # run folder, or its best/
    labels: str = "table"  # file of labels, one a line; table: the labels of the captions file
    templates: str = ""  # file of prompts, one a line, with {} where the label goes
    images: str = ""  # classify the images below this folder, whose sub-folders are their true labels, not a split
    linear_probe: bool = False  # fit a logistic regression on the embeddings of the training images instead
    split: Literal["train", "valid", "test"] = "valid"  # which images to classify
    captions_path: str = ""  # another captions file than the run's own
    image_path: str = ""  # folder of its images
    json: str = ""  # write the results to this file too
    confusion: str = ""  # draw the confusion matrix into this PNG
    device: str = "auto"  # cpu, cuda, ...; auto: the best available


def main(arguments: Arguments) -> None:
    """Print the results, and write them to files where asked."""
    from .config import CFG
    from .device import out_of_memory_advice, pick_device
    from .evaluation.classification import confusion_matrix, draw_confusion, format_classification
    from .files import check_target, write_json
    from .models.saved import load

    if arguments.linear_probe and (arguments.labels != "table" or arguments.templates or arguments.images):
        raise UserError("--linear-probe learns from the captions file: leave out --labels, --templates and --images")
    check_target(arguments.json)
    check_target(arguments.confusion, ".png")
    with out_of_memory_advice("free some memory, or use --device cpu"):
        model = load(arguments.run, str(pick_device(CFG(device=arguments.device))))
        found = linear_probe(model, arguments) if arguments.linear_probe else zero_shot(model, arguments)
    result = found if isinstance(found, dict) else found.metrics
    if arguments.json:
        write_json(Path(arguments.json), result)
    if isinstance(found, dict):
        for name, ranked in found["best_labels"].items():
            print(f"{name}  " + ", ".join(f"{label} {probability:.2f}" for label, probability in ranked))
        return
    matrix = confusion_matrix(found.scores, found.targets)
    print(format_classification(found.metrics, matrix, found.labels, found.title))
    if arguments.confusion:
        draw_confusion(matrix, found.labels, arguments.confusion)


def zero_shot(model: DualEncoder, arguments: Arguments) -> Classified | dict[str, object]:
    """The scores of the images; without true labels a dictionary with the three best labels of each image."""
    from .data.images import images_below
    from .evaluation import labels as classes
    from .evaluation.classification import Classified, classification_metrics
    from .evaluation.measure import checked_split, open_captions
    from .evaluation.zero_shot import TEMPLATES, label_embeddings, ranked_labels
    from .retrieval.embed import encode_image

    templates = classes.read_templates(arguments.templates) if arguments.templates else TEMPLATES
    from_table = arguments.labels == "table"
    if from_table or not arguments.images:
        source = open_captions(model.cfg, arguments.captions_path, arguments.image_path)
    labels = classes.labels_of(source.table, source.name) if from_table else classes.read_labels(arguments.labels)
    if arguments.images:
        folder = Path(arguments.images)
        images = classes.labelled_folder(folder, images_below(folder))
    else:
        images = classes.labelled_split(*checked_split(source, arguments.split))
    if arguments.confusion and not images.labels:
        raise UserError(f"--confusion: the images of {images.folder} have no true labels: give each label a sub-folder")
    targets = classes.targets_of(images, labels) if images.labels else None

    embeddings = encode_image(model, images.paths, progress=True, on_bad_image="skip").double()
    readable = embeddings.any(1)
    names = [name for name, is_readable in zip(images.names, readable.tolist(), strict=True) if is_readable]
    cosine = embeddings[readable] @ label_embeddings(model, labels, templates).double().T  # (N, P) -> (N, K)
    if targets is None:
        best = {n: ranked[:3] for n, ranked in zip(names, ranked_labels(model, cosine, labels), strict=True)}
        return {"n_images": len(names), "n_classes": len(labels), "best_labels": best}
    targets = targets[readable]
    title = (
        f"zero-shot, {images.source}: {len(names):,} images, {len(labels):,} classes, {len(templates):,} templates"
    )  # fmt: skip
    metrics = {"split": images.source, **classification_metrics(cosine, targets, labels)}
    return Classified(metrics, cosine, targets, labels, title)


def linear_probe(model: DualEncoder, arguments: Arguments) -> Classified:
    """A linear probe fitted on the training split; C is chosen on the validation split where another is reported."""
    from .evaluation.labels import labelled_split
    from .evaluation.linear_probe import linear_probe as fit_probe
    from .evaluation.measure import WHOLE, checked_split, open_captions
    from .retrieval.embed import encode_image

    source, reported = open_captions(model.cfg, arguments.captions_path, arguments.image_path), arguments.split
    splits = set(source.table["split"])
    if splits == {WHOLE}:
        raise UserError(
            f"{arguments.captions_path} has no splits: a linear probe needs training images besides those that it "
            "reports. Give the file a split column (train, valid, test)."
        )
    parts = {}
    for split in dict.fromkeys(["train", reported, *({"valid"} & splits)]):
        images = labelled_split(*checked_split(source, split))
        parts[split] = encode_image(model, images.paths, progress=True).double().numpy(), images.labels
    found = fit_probe(parts["train"], parts[reported], parts.get("valid") if reported != "valid" else None)
    found.metrics = {"split": reported, **found.metrics}
    found.title = (
        "linear probe, {split}: {n_images:,} images, {n_classes:,} classes, {n_train_images:,} training images, C {C:g}"
    ).format(**found.metrics)
    if found.metrics["n_unseen"]:
        found.title += f"\n{found.metrics['n_unseen']:,} images are of classes without a training image: they are wrong"
    return found


if __name__ == "__main__":
    import tyro

    run_command(lambda: main(tyro.cli(Arguments, prog="python -m clip_scratch.classify")))
