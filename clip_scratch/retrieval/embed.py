"""Images and sentences -> embeddings, in batches, with progress."""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from ..config import CFG
from ..data.captions import image_folder
from ..data.images import fault_of, load_image, wanted_side
from ..data.loaders import Batch, on_device
from ..data.tokenizer import tokenize
from ..errors import UserError
from ..models.clip import CLIPModel, DualEncoder
from ..models.saved import load

ImageLike = str | Path | Image.Image | np.ndarray


@torch.no_grad()
def encode_image(
    model: CLIPModel,
    images: ImageLike | Sequence[ImageLike],
    batch_size: int = 64,
    progress: bool = False,
    on_bad_image: Literal["error", "skip"] = "error",
) -> torch.Tensor:
    """Paths, PIL images, RGB uint8 arrays (H, W, 3) or a mix -> float32 (N, P) on the CPU, L2-normalised.

    An image that cannot be read raises UserError, or with `on_bad_image` "skip" has a row of zeros (`find_matches`
    leaves them out) and is counted on stderr.
    """
    images = [images] if isinstance(images, ImageLike) else list(images)
    model.eval()
    transform, side = model.image_transform(train=False), wanted_side(model.cfg)
    out = torch.zeros(len(images), model.cfg.projection_dim)
    faults: dict[str, str] = {}
    for start in tqdm(range(0, len(images), batch_size), desc="images", unit="batch", disable=not progress):
        pixels = {}
        for row, image in enumerate(images[start : start + batch_size], start):
            try:
                pixels[row] = transform(image=load_image(image, side))["image"]
            except Exception as error:  # decoders raise OSError, ValueError, SyntaxError and classes of their own
                is_file = isinstance(image, str | Path)
                name, fault = (str(image), fault_of(image, error)) if is_file else (f"image {row}", str(error))
                if on_bad_image == "error":
                    raise UserError(f"{name} cannot be read as an image: {fault}") from error
                faults[name] = fault
        if pixels:
            out[list(pixels)] = model.encode_image(torch.stack(list(pixels.values())).to(model.device)).cpu()
    if faults and len(faults) == len(images):
        raise UserError(f"none of the {len(images):,} images can be read, such as {name}: {fault}")
    if faults:
        some = "".join(f"\n  {name}: {fault}" for name, fault in list(faults.items())[:10])
        print(
            f"skipped {len(faults):,} of {len(images):,} images, which cannot be read, such as{some}", file=sys.stderr
        )
    return out


@torch.no_grad()
def encode_text(
    model: CLIPModel, captions: str | Sequence[str], batch_size: int = 256, progress: bool = False
) -> torch.Tensor:
    """A list of strings -> float32 (N, P) on the CPU, L2-normalised. Longer captions than max_length are truncated."""
    captions = [captions] if isinstance(captions, str) else list(captions)
    model.eval()
    table = tokenize(captions, model.tokenizer, model.cfg.max_length)
    order = np.argsort(table.lengths(), kind="stable")  # captions of similar length share a batch: little padding
    out = torch.empty(len(captions), model.cfg.projection_dim)
    for start in tqdm(range(0, len(captions), batch_size), desc="captions", unit="batch", disable=not progress):
        rows = order[start : start + batch_size]
        input_ids, attention_mask = table.batch(rows)
        embeddings = model.encode_text(input_ids.to(model.device), attention_mask.to(model.device))
        out[torch.from_numpy(rows)] = embeddings.cpu()
    return out


def get_image_embeddings(
    valid_df: pd.DataFrame, model_path: str | Path, device: str = "auto"
) -> tuple[CLIPModel, torch.Tensor]:
    """The model of a run, and an embedding for each row of `valid_df` (tutorial name): (rows, P).

    Each distinct image is read once, from the folder that the run was trained on. Where the run skips bad images
    (`on_bad_image`), so does this: see `encode_image`.
    """
    model = load(model_path, device)
    numbers, names = pd.factorize(valid_df["image"])
    folder = trained_folder(model.cfg, valid_df)
    paths = [folder / name for name in names]
    embeddings = encode_image(model, paths, progress=True, on_bad_image=model.cfg.on_bad_image)
    return model, embeddings[torch.from_numpy(numbers)]


def trained_folder(cfg: CFG, table: pd.DataFrame | None = None) -> Path:
    """The image folder of the run with settings `cfg`: the one that training found, if it is still there.

    Otherwise it is looked for as in training, beside the captions file (see `image_folder`).
    """
    folder = Path(cfg.image_path).expanduser()
    if cfg.image_path and folder.is_dir():
        return folder
    return image_folder(dataclasses.replace(cfg, image_path=""), table)


@torch.no_grad()
def embed_batches(model: DualEncoder, batches: Iterable[Batch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings of all images (N, P) and captions (C, P) of a loader, and the image row of each caption (C,)."""
    model.eval()
    images, texts, ids, caption_ids = [], [], [], []
    for batch in on_device(batches, model.device):
        image_embeddings, text_embeddings = model(batch)
        images.append(image_embeddings.cpu())
        texts.append(text_embeddings.cpu())
        ids.append(batch["image_ids"].cpu())
        caption_ids.append(batch["caption_image_ids"].cpu())
    order, rows = torch.cat(ids).sort()
    return torch.cat(images), torch.cat(texts), rows[torch.searchsorted(order, torch.cat(caption_ids))]
