"""Write a run's model for others: `python -m clip_scratch.export RUN FOLDER`, an ordinary transformers folder."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from .errors import UserError, run_command
from .hub import no_loading_bar

if TYPE_CHECKING:
    import torch

    from .config import CFG
    from .models.clip import CLIPModel, DualEncoder

_FEATURES = 3000  # training images, at most, that the image head's bias is fitted to


def export(
    run: str | Path, folder: str | Path, captions_path: str = "", image_path: str = "", device: str = "cpu"
) -> dict[str, object]:
    """Write the best model of a run to `folder`, which must not exist or be empty, and measure both.

    The folder holds the weights, the tokenizer and the image processor: AutoModel, AutoTokenizer and
    AutoImageProcessor load it without clip_scratch and without a network. A model from scratch becomes a
    VisionTextDualEncoderModel, a fine-tuned CLIP is written as the class that it is. Returns, of the validation
    split in fp32, the recalls of the "run" and of the "folder" as read back, `n_images`, `n_captions`, and the
    cosines between both models' embeddings, "image_cosines" (N,) and "text_cosines" (C,). Raises UserError for a
    folder that is no run, a model that transformers' classes cannot express, a `folder` that is in use, and a device
    that is not there.
    """
    from ..device import pick_device
    from .config import CFG
    from .data.captions import check_images, image_folder, read_captions, split_of
    from .data.loaders import build_loaders
    from .evaluation.retrieval import recall_at_k
    from .exporting.dual_encoder import check_expressible
    from .models.saved import load
    from .retrieval.embed import embed_batches

    model = load(run, str(pick_device(CFG(device=device))))
    if model.cfg.backend == "from_scratch":
        check_expressible(model)
    model.cfg = cfg = _data_settings(model.cfg, captions_path, image_path)
    with _new_folder(Path(folder)) as unfinished:
        cfg = dataclasses.replace(cfg, image_cache=False)  # each image is looked at once
        table = read_captions(cfg)
        images = image_folder(cfg, table)
        valid = check_images(split_of(table, "valid", cfg.captions_path), images, cfg.on_bad_image)
        if cfg.backend == "hf_clip":
            with no_loading_bar():
                model.hf.save_pretrained(unfinished)
        else:
            train = split_of(table, "train", cfg.captions_path).drop_duplicates("image_id")
            train = check_images(train.iloc[:: -(-len(train) // _FEATURES)], images, cfg.on_bad_image)
            _write_dual_encoder(model, build_loaders(train, model.tokenizer, "valid", cfg), unfinished)
        _write_preprocessing(model, unfinished)
        before = embed_batches(model, build_loaders(valid, model.tokenizer, "valid", cfg))
        written = _read_back(model, unfinished)
        after = embed_batches(written, build_loaders(valid, written.tokenizer, "valid", cfg))
    return {
        "run": recall_at_k(*before),
        "folder": recall_at_k(*after),
        "n_images": len(before[0]),
        "n_captions": len(before[1]),
        "image_cosines": (before[0] * after[0]).sum(1),
        "text_cosines": (before[1] * after[1]).sum(1),
    }


def _data_settings(cfg: CFG, captions_path: str, image_path: str) -> CFG:
    """The run's settings in fp32, for its data set where it is now."""
    cfg = dataclasses.replace(cfg, precision="fp32")
    if captions_path:
        moved = {"captions_path": captions_path, "image_path": image_path}
        return dataclasses.replace(cfg, **moved, valid_captions_path="", test_captions_path="")
    return dataclasses.replace(cfg, image_path=image_path or cfg.image_path)


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `folder` at the end and vanishes where anything goes wrong."""
    folder = folder.expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already. Name a new or empty folder to export to")
    unfinished = folder.with_name(f"{folder.name}.tmp")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # of an export that was killed
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}. Name another folder to export to") from error
    try:
        yield unfinished
        if folder.exists():
            folder.rmdir()
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_dual_encoder(model: CLIPModel, loader, folder: Path) -> None:
    import torch

    from .exporting.dual_encoder import to_dual_encoder

    with torch.inference_mode():
        pixels = (batch["pixel_values"].to(model.device) for batch in loader)
        features = torch.cat([model.image_encoder((p - model.mean) / model.std).cpu() for p in pixels])  # (N, D)
    with no_loading_bar():
        to_dual_encoder(model, features.clone()).save_pretrained(folder)


def _write_preprocessing(model: DualEncoder, folder: Path) -> None:
    from .exporting.dual_encoder import image_processor

    model.tokenizer.save_pretrained(folder)
    image_processor(model).save_pretrained(folder)


def _read_back(model: DualEncoder, folder: Path) -> torch.nn.Module:
    """The model that plain transformers makes of the folder; it embeds batches, and has a `tokenizer`.

    Of a fine-tuned CLIP it takes the place of the one in `model`, so that not both are held.
    """
    from transformers import AutoModel, AutoTokenizer

    from .exporting.dual_encoder import ExportedModel

    if model.cfg.backend == "from_scratch":
        return ExportedModel(folder, model.mean, model.std).eval()
    device = model.device
    model.hf = None
    with no_loading_bar():
        model.hf = AutoModel.from_pretrained(folder, local_files_only=True).float().to(device)
    model.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval()


@dataclass
class Arguments:
    """Write a run's best model as a transformers folder, which loads without clip_scratch, and compare the two."""

    run: Positional[str]  # run folder, or its best/
    folder: Positional[str]  # folder to write, new or empty
    captions_path: str = ""  # the run's captions, where they have moved
    image_path: str = ""  # the folder of its images, where that has moved
    device: str = "auto"  # cpu, cuda, ...; auto: the best at hand


def main(arguments: Arguments) -> None:
    """Write the folder, and print how true to the run it is."""
    from ..device import keep_freed_memory, pick_device
    from .config import CFG

    device = pick_device(CFG(device=arguments.device))
    keep_freed_memory()
    result = export(arguments.run, arguments.folder, arguments.captions_path, arguments.image_path, str(device))
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
