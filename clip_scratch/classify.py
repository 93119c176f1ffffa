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
    from .files import check_target, write_json
    from .models.saved import load

    if arguments.linear_probe and (arguments.labels != "table" or arguments.templates or arguments.images):
        raise UserError("--linear-probe learns from the captions file: leave out --labels, --templates and --images")
    check_target(arguments.json)
    check_target(arguments.confusion, ".png")
    model = load(arguments.run, arguments.device)
    found = linear_probe(model, arguments) if arguments.linear_probe else zero_shot(model, arguments)
    if arguments.json:
        write_json(Path(arguments.json), found if isinstance(found, dict) else found.metrics)
    if isinstance(found, dict):
        for name, ranked in found["best_labels"].items():
            print(f"{name}  " + ", ".join(f"{label} {probability:.2f}" for label, probability in ranked))
        return
    print(found.text())
    if arguments.confusion:
        found.draw(arguments.confusion)


def zero_shot(model: DualEncoder, arguments: Arguments) -> Classified | dict[str, object]:
    """The results on the images; without true labels a dictionary with the three best labels of each image."""
    from .evaluation.classification import measure_classes
    from .evaluation.labels import folder_labels, image_labels, read_lines, targets_of
    from .evaluation.measure import checked_split, open_captions
    from .evaluation.zero_shot import TEMPLATES, label_embeddings, ranked_labels
    from .retrieval.embed import encode_image

    templates = read_lines(arguments.templates) if arguments.templates else TEMPLATES
    labels = None if arguments.labels == "table" else read_lines(arguments.labels)
    if labels is None or not arguments.images:
        source = open_captions(model.cfg, arguments.captions_path, arguments.image_path)
    if labels is None:
        labels = sorted(set(image_labels(source.table, source.name)))
    if arguments.images:
        where, folder = arguments.images, Path(arguments.images)
        true = folder_labels(folder)
    else:
        source, where = checked_split(source, arguments.split)
        folder, true = source.image_folder, image_labels(source.table, source.name)
    has_labels = true.any()
    if arguments.confusion and not has_labels:
        raise UserError(f"--confusion: the images of {folder} have no true labels: give each label a sub-folder")
    per_label = label_embeddings(model, labels, templates).double()  # (K, P)
    targets = targets_of(true, labels) if has_labels else None

    embeddings = encode_image(model, [folder / name for name in true.index], progress=True, on_bad_image="skip")
    readable = embeddings.any(1)
    cosine = embeddings[readable].double() @ per_label.T  # (N, P) -> (N, K)
    if targets is None:
        ranked = ranked_labels(model, cosine, labels)
        best = {name: row[:3] for name, row in zip(true.index[readable.numpy()], ranked, strict=True)}
        return {"n_images": len(best), "n_classes": len(labels), "best_labels": best}
    found = measure_classes(cosine, targets[readable], labels)
    found.metrics = {"split": where, **found.metrics}
    found.title = f"zero-shot, {where}: {len(cosine):,} images, {len(labels):,} classes, {len(templates):,} templates"
    return found


def linear_probe(model: DualEncoder, arguments: Arguments) -> Classified:
    """A linear probe fitted on the training split; C is chosen on the validation split where another is reported."""
    from .evaluation.labels import image_labels
    from .evaluation.linear_probe import linear_probe as fit_probe
    from .evaluation.measure import WHOLE, checked_split, open_captions
    from .retrieval.embed import encode_image

    source, reported = open_captions(model.cfg, arguments.captions_path, arguments.image_path), arguments.split
    splits = set(source.table["split"])
    if splits == {WHOLE}:
        needs = "a linear probe needs training images too. Give the file a split column (train, valid, test)"
        raise UserError(f"{arguments.captions_path} has no splits: {needs}")
    parts = {}
    for split in dict.fromkeys(["train", reported, *({"valid"} & splits)]):
        part, _ = checked_split(source, split)
        labels = image_labels(part.table, part.name)
        images = [part.image_folder / name for name in labels.index]
        parts[split] = encode_image(model, images, progress=True).double().numpy(), labels.to_numpy()
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
