"""Write a run's model for others: `python -m clip_scratch.export RUN FOLDER`, an ordinary transformers folder."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from .errors import UserError, run_command

_FIT_IMAGES = 3000  # training images, at most, that the image head's bias is fitted to


def export(
    run: str | Path, folder: str | Path, captions_path: str = "", image_path: str = "", device: str = "cpu"
) -> dict[str, object]:
    """Write the best model of a run to `folder`, which must not exist or be empty, and measure both.

    AutoModel, AutoTokenizer and AutoImageProcessor load it without clip_scratch and without a network. Returns, of the
    validation split in fp32, the recalls of the "run" and of the "folder" as read back, `n_images`, `n_captions`, and
    the cosines between the embeddings of both, "image_cosines" (N,) and "text_cosines" (C,). Raises UserError for a
    model that transformers' classes cannot express, and for captions other than those that the run was trained on.
    """
    from .data.captions import fingerprint_of
    from .data.loaders import build_loaders
    from .data.source import open_data
    from .evaluation.retrieval import recall_at_k
    from .exporting.transformers_folder import check_exportable, read_transformers_folder, write_transformers_folder
    from .files import new_folder
    from .models.saved import best_folder, load
    from .retrieval.embed import embed_batches
    from .training.run import STATE, load_tree

    model = load(run, device)
    check_exportable(model)
    folder = Path(folder).expanduser().absolute()
    if os.path.exists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already. Name a new or empty folder to export to")
    where = {"image_path": image_path or model.cfg.image_path}
    if captions_path:
        where = {"captions_path": captions_path, "image_path": image_path}
    source = open_data(dataclasses.replace(model.cfg, precision="fp32", **where))
    train, valid = source.split("train"), source.split("valid")
    last = best_folder(run).absolute().parent / "last" / STATE
    if last.is_file() and load_tree(last)["fingerprint"] != fingerprint_of(train) + fingerprint_of(valid):
        raise UserError(
            f"{source.name} is not what {run} was trained on, so that its validation images may be training images. "
            "Set --captions-path to the captions of that time"
        )
    model.cfg = cfg = dataclasses.replace(source.cfg, image_cache=False)  # each image is read once
    train = train.drop_duplicates("image_id")
    train = train.iloc[:: -(-len(train) // _FIT_IMAGES)]
    try:
        with new_folder(folder) as temporary:
            write_transformers_folder(model, temporary, build_loaders(train, model.tokenizer, "valid", cfg))
            written = read_transformers_folder(temporary, cfg.max_length).to(model.device)
            images, texts, own = embed_batches(model, build_loaders(valid, model.tokenizer, "valid", cfg))
            after = embed_batches(written, build_loaders(valid, written.tokenizer, "valid", cfg))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}. Name another folder to export to") from error
    recalls = {"run": recall_at_k(images, texts, own), "folder": recall_at_k(*after)}
    cosines = {"image_cosines": (images * after[0]).sum(1), "text_cosines": (texts * after[1]).sum(1)}
    return {**recalls, **cosines, "n_images": len(images), "n_captions": len(texts)}


@dataclass
class Arguments:
    """Write a run's best model as a transformers folder, which loads without clip_scratch, and compare the two."""

    run: Positional[str]  # run folder, or its best/
    folder: Positional[str]  # folder to write, new or empty
    captions_path: str = ""  # the run's captions file, if it has moved
    image_path: str = ""  # the folder of its images, if it has moved
    device: str = "auto"  # cpu, cuda, ...; auto: the best available


def main(arguments: Arguments) -> None:
    """Write the folder, and print how well it agrees with the run."""
    from .device import keep_freed_memory

    keep_freed_memory()
    result = export(**vars(arguments))
    print(f"valid: {result['n_images']:,} images, {result['n_captions']:,} captions, in fp32")
    print(f"{'':<8}{'image to text R@1':>20}{'text to image R@1':>20}{'rsum':>8}")
    for name in ("run", "folder"):
        text, image, rsum = (result[name][k] for k in ("text_retrieval_recall@1", "image_retrieval_recall@1", "rsum"))
        print(f"{name:<8}{100 * text:>20.1f}{100 * image:>20.1f}{rsum:>8.1f}")
    for what in ("image", "text"):
        cosines = result[f"{what}_cosines"]
        print(f"cosine of each {what} between the two: mean {cosines.mean():.6f}, lowest {cosines.min():.6f}")
    print(f"written: {arguments.folder}")


if __name__ == "__main__":
    import tyro

    run_command(lambda: main(tyro.cli(Arguments, prog="python -m clip_scratch.export")))
