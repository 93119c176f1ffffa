"""Write a run's model for others: `python -m clip_scratch.export RUN FOLDER [--format onnx]`."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from .config import CFG
from .errors import UserError, run_command

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from .data.source import DataSource
    from .models.clip import DualEncoder

Format = Literal["transformers", "sentence-transformers", "onnx"]
_CALIBRATION_IMAGES = 256  # training images, at most, whose ranges int8 takes
_FIT_IMAGES = 3000  # training images, at most, that the image head's bias is fitted to


def export(
    run: str | Path, folder: str | Path, captions_path: str = "", image_path: str = "", device: str = "cpu",
    format: Format = "transformers", int8: bool = False, max_drop: float = 1.0,
) -> dict[str, object]:  # fmt: skip
    """Write the best model of a run to `folder`, which must not exist or be empty, and measure both.

    transformers: AutoModel, AutoTokenizer and AutoImageProcessor load it without clip_scratch and without a network.
    sentence-transformers: SentenceTransformer(folder).encode takes images and sentences. onnx: two networks for
    onnxruntime, in fp32 or `int8`, and a run.py. Returns, of the validation split in fp32, the recalls of the "run" and
    of the "folder" as read back, `n_images`, `n_captions`, and the cosines between the embeddings of both,
    "image_cosines" (N,) and "text_cosines" (C,). Raises UserError for a model that the format cannot express, for
    captions other than those that the run was trained on, and where int8 costs more than `max_drop` points of R@1.
    """
    from .data.loaders import build_loaders
    from .evaluation.retrieval import recall_at_k
    from .exporting import onnx, sentence_transformers_folder, transformers_folder
    from .files import new_folder
    from .models.saved import load
    from .retrieval.embed import embed_batches

    if int8 and format != "onnx":
        raise UserError("int8 is for --format onnx")
    model = load(run, device)
    checks = {"onnx": onnx.check_onnx, "transformers": transformers_folder.check_exportable}
    checks["sentence-transformers"] = sentence_transformers_folder.check_sentence_transformers
    checks[format](model)  # that its library is there, and has classes for the parts of the model
    folder = Path(folder).expanduser().absolute()
    if os.path.exists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already. Name a new or empty folder to export to")
    where = {"image_path": image_path or model.cfg.image_path}
    if captions_path:
        where = {"captions_path": captions_path, "image_path": image_path}
    source = _trained_on(run, dataclasses.replace(model.cfg, precision="fp32", **where))
    train, valid = source.split("train").drop_duplicates("image_id"), source.split("valid")
    model.cfg = cfg = dataclasses.replace(source.cfg, image_cache=False)  # each image is read once
    try:
        with new_folder(folder) as temporary:
            after = _write(format, model, temporary, train, valid, int8)
            images, texts, own = embed_batches(model, build_loaders(valid, model.tokenizer, "valid", cfg))
            recalls = {"run": recall_at_k(images, texts, own), "folder": recall_at_k(*after)}
            if int8:
                _check_drop(recalls, max_drop)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}. Name another folder to export to") from error
    cosines = {"image_cosines": (images * after[0]).sum(1), "text_cosines": (texts * after[1]).sum(1)}
    return {**recalls, **cosines, "n_images": len(images), "n_captions": len(texts)}


def _trained_on(run: str | Path, cfg: CFG) -> DataSource:
    """The data of `cfg`. Raises UserError where the run was trained on another."""
    from .data.captions import fingerprint_of
    from .data.source import open_data
    from .models.saved import best_folder
    from .training.run import STATE, load_tree

    source = open_data(cfg)
    last = best_folder(run).absolute().parent / "last" / STATE
    fingerprint = fingerprint_of(source.split("train")) + fingerprint_of(source.split("valid"))
    if last.is_file() and load_tree(last)["fingerprint"] != fingerprint:
        risk = "its validation images may be training images. Set --captions-path to the captions of that time"
        raise UserError(f"{source.name} is not what {run} was trained on, so that {risk}")
    return source


def _write(
    format: str, model: DualEncoder, folder: Path, train: pd.DataFrame, valid: pd.DataFrame, int8: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Write a folder, and `embed_batches` of the validation split as the folder's own code computes it."""
    import torch

    from .data.image_files import image_source
    from .data.loaders import build_loaders
    from .exporting import onnx, sentence_transformers_folder, transformers_folder
    from .retrieval.embed import embed_batches

    cfg = model.cfg
    if format == "transformers":
        batches = build_loaders(train.iloc[:: -(-len(train) // _FIT_IMAGES)], model.tokenizer, "valid", cfg)
        transformers_folder.write_transformers_folder(model, folder, batches)
        written = transformers_folder.read_transformers_folder(folder, cfg.max_length).to(model.device)
        return embed_batches(written, build_loaders(valid, written.tokenizer, "valid", cfg))
    valid = valid.sort_values("image_id", kind="stable")
    images = [image_source(Path(cfg.image_path, name)) for name in valid["image"].drop_duplicates()]  # shards: bytes
    own = torch.from_numpy(valid["image_id"].factorize()[0])
    if format == "sentence-transformers":
        sentence_transformers_folder.write_sentence_transformers_folder(model, folder)
        embed, device = sentence_transformers_folder.embed_with_sentence_transformers, str(model.device)
        return *embed(folder, images, valid["caption"].tolist(), device), own
    onnx.write_onnx_folder(model, folder)
    if int8:
        few = train.iloc[:: -(-len(train) // _CALIBRATION_IMAGES)]
        small_batches = dataclasses.replace(cfg, batch_size=16)
        onnx.quantize_onnx_folder(folder, build_loaders(few, model.tokenizer, "valid", small_batches))
    return *onnx.embed_with_onnx_folder(folder, images, valid["caption"].tolist()), own


def _check_drop(recalls: dict[str, dict[str, float]], most: float) -> None:
    for way in ("text", "image"):
        before, after = (100 * recalls[of][f"{way}_retrieval_recall@1"] for of in ("run", "folder"))
        if before - after > most:
            fix = f"leave it out, or accept that with --max-drop {math.ceil(before - after)}"
            raise UserError(f"int8 lowers the R@1 of {way} retrieval from {before:.1f} to {after:.1f}: {fix}")


def push_to_hub(arguments: Arguments) -> str:
    """Measure a run, and upload its best model with a card; the address. Raises UserError."""
    from .evaluation.comparison import compare
    from .exporting.hub_model import model_card, push
    from .models.saved import best_folder, run_config

    where = arguments.captions_path, arguments.image_path
    text = compare([arguments.run], "valid", *where, arguments.device).text().splitlines()
    best = best_folder(arguments.run)
    cfg = run_config(best)
    name = Path(cfg.captions_path).name or f"{cfg.n_scenes:,} of the package's drawn scenes"
    table = "\n".join([text[0], "", *(line for line in text if line.startswith("|"))])
    return push(best, arguments.push_to_hub, model_card(arguments.push_to_hub, cfg, name, table, arguments.licence))


@dataclass
class Arguments:
    """Write a run's best model so that it runs without clip_scratch, and compare the two."""

    run: Positional[str]  # run folder, or its best/
    folder: Positional[str] = ""  # folder to write, new or empty
    captions_path: str = ""  # the run's captions file, if it has moved
    image_path: str = ""  # the folder of its images, if it has moved
    device: str = "auto"  # cpu, cuda, ...; auto: the best available
    format: Format = "transformers"  # for AutoModel, SentenceTransformer, or onnxruntime
    int8: bool = False  # quantise the ONNX networks
    max_drop: float = 1.0  # points of R@1 that int8 may cost
    push_to_hub: str = ""  # upload the run to a hub instead, as USER/NAME, for load("hub:USER/NAME")
    licence: str = ""  # of the data, for the model's card


def main(arguments: Arguments) -> None:
    """Write the folder, and print how well it agrees with the run."""
    from .device import keep_freed_memory

    keep_freed_memory()
    options = {name: value for name, value in vars(arguments).items() if name not in ("push_to_hub", "licence")}
    if bool(arguments.folder) == bool(arguments.push_to_hub):
        raise UserError("name a folder to write, or --push-to-hub USER/NAME")
    if arguments.push_to_hub and (arguments.format != "transformers" or arguments.int8):
        raise UserError("--push-to-hub uploads the run itself: leave out --format and --int8")
    if arguments.push_to_hub:
        print(f"uploaded: {push_to_hub(arguments)}")
        return
    result = export(**options)
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
