"""Images and sentences -> embeddings, in batches, with progress."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from ..data.captions import image_folder
from ..data.images import load_image
from ..data.loaders import Batch, on_device
from ..data.tokenizer import tokenize
from ..errors import UserError
from ..models.clip import CLIPModel, DualEncoder
from ..models.saved import load

ImageLike = str | Path | Image.Image | np.ndarray


def _pixels(image: ImageLike, transform) -> torch.Tensor:
    try:
        array = load_image(image)
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError and classes of their own
        name = image if isinstance(image, str | Path) else "an image"
        raise UserError(f"{name} cannot be read as an image: {error}") from error
    return transform(image=array)["image"]


@torch.no_grad()
def encode_image(
    model: CLIPModel, images: ImageLike | Sequence[ImageLike], batch_size: int = 64, progress: bool = False
) -> torch.Tensor:
    """Paths, PIL images, RGB uint8 arrays (H, W, 3) or a mix -> float32 (N, P) on the CPU, L2-normalised.

    Raises UserError that names the file that cannot be read.
    """
    images = [images] if isinstance(images, ImageLike) else list(images)
    model.eval()
    transform = model.image_transform(train=False)
    rows = [torch.empty(0, model.cfg.projection_dim)]
    for start in tqdm(range(0, len(images), batch_size), desc="images", unit="batch", disable=not progress):
        pixels = torch.stack([_pixels(image, transform) for image in images[start : start + batch_size]])
        rows.append(model.encode_image(pixels.to(model.device)).cpu())
    return torch.cat(rows)


@torch.no_grad()
def encode_text(
    model: CLIPModel, captions: str | Sequence[str], batch_size: int = 256, progress: bool = False
) -> torch.Tensor:
    """A list of strings -> float32 (N, P) on the CPU, L2-normalised. Captions over the limit are cut."""
    captions = [captions] if isinstance(captions, str) else list(captions)
    model.eval()
    table = tokenize(captions, model.tokenizer, model.cfg.max_length)
    order = np.argsort(table.lengths(), kind="stable")  # captions of like length share a batch: little padding
    out = torch.empty(len(captions), model.cfg.projection_dim)
    for start in tqdm(range(0, len(captions), batch_size), desc="captions", unit="batch", disable=not progress):
        rows = order[start : start + batch_size]
        input_ids, attention_mask = table.batch(rows)
        embeddings = model.encode_text(input_ids.to(model.device), attention_mask.to(model.device))
        out[torch.from_numpy(rows)] = embeddings.cpu()
    return out


def get_image_embeddings(valid_df: pd.DataFrame, model_path: str | Path) -> tuple[CLIPModel, torch.Tensor]:
    """The model of a run, and an embedding for each row of `valid_df` (tutorial name): (rows, P).

    Every distinct image is encoded once, however many captions (rows) it has, so the result lines up with
    `valid_df["image"]`. Images are looked for in the folder that the run was trained on.
    """
    model = load(model_path)
    numbers, names = pd.factorize(valid_df["image"])
    folder = image_folder(model.cfg, valid_df)
    embeddings = encode_image(model, [folder / name for name in names], progress=True)
    return model, embeddings[torch.from_numpy(numbers)]


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
