"""A dual encoder as an ordinary transformers folder: written, and read back as plain transformers reads it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..config import CFG
from ..data.images import shorter_side
from ..data.loaders import Batch
from ..errors import UserError
from ..hub import is_function
from ..models.clip import CLIPModel, DualEncoder
from ..models.hf_clip import HFCLIPModel
from .dual_encoder import to_dual_encoder

if TYPE_CHECKING:
    from transformers import BaseImageProcessor


def foreign_encoders(model: DualEncoder) -> dict[str, str]:
    """Setting -> value of the encoders that no library has one class for: the user's own, and several side by side."""
    if isinstance(model, HFCLIPModel):
        return {}
    names = {name: getattr(model.cfg, name) for name in ("model_name", "text_encoder_model")}
    return {
        name: value for name, value in names.items() if is_function(value) or (name == "model_name" and "+" in value)
    }


def check_exportable(model: DualEncoder) -> None:
    """Raise UserError, which names the setting, where no class of transformers computes what the model does."""
    if isinstance(model, HFCLIPModel):
        return
    for name, value in foreign_encoders(model).items():
        fix = "Use one tower by its name in timm or transformers, or --format onnx"
        raise UserError(f"{name} {value!r}: transformers has no class for such an encoder. {fix}")
    if model.cfg.head != "linear":
        fix = "Train with --head linear, or choose --format sentence-transformers or onnx"
        raise UserError(f"head 'mlp' cannot be exported: transformers projects linearly. {fix}")
    architecture = model.text_encoder.model.config.model_type
    if architecture != "bert":  # as bert-mini, bert-base-uncased and MiniLM are
        fix = "only one of type bert, such as bert-mini; --format sentence-transformers and onnx take others"
        raise UserError(f"text_encoder_model: a {architecture} text tower cannot be exported, {fix}")


def write_transformers_folder(model: DualEncoder, folder: Path, batches: Iterable[Batch]) -> None:
    """Write weights, tokenizer and image processor for AutoModel, AutoTokenizer and AutoImageProcessor.

    A model from scratch becomes a VisionTextDualEncoderModel, whose image head is fitted to the images of `batches`.
    """
    is_hf = isinstance(model, HFCLIPModel)
    hf = model.hf if is_hf else to_dual_encoder(model, _image_features(model, batches))
    hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    image_processor(model).save_pretrained(folder)


def read_transformers_folder(folder: Path, max_length: int) -> HFCLIPModel:
    """The model of a written folder, in fp32 and eval mode, with captions cut at `max_length` tokens."""
    cfg = CFG(backend="hf_clip", model_name=folder, size=0, loss="auto", max_length=max_length, precision="fp32")
    return HFCLIPModel(cfg).eval()


@torch.no_grad()
def _image_features(model: CLIPModel, batches: Iterable[Batch]) -> torch.Tensor:
    """What enters the image head, for all images of the batches: (N, D) on the CPU."""
    pixel_values = (batch["pixel_values"].to(model.device) for batch in batches)
    return torch.cat([model.image_encoder(model.normalize_pixels(pixels)).cpu() for pixels in pixel_values])


def image_processor(model: DualEncoder) -> BaseImageProcessor:
    """The transformers image processor for the images that `model` evaluates.

    There is no area filter in transformers: bilinear, which has antialiasing there, is the nearest to it.
    """
    from PIL.Image import Resampling
    from transformers import CLIPImageProcessor, Siglip2ImageProcessor, ViTImageProcessor

    cfg = model.cfg
    settings = {
        "resample": Resampling.BICUBIC if cfg.interpolation == "bicubic" else Resampling.BILINEAR,
        "image_mean": (model.mean / 255).flatten().tolist(),
        "image_std": (model.std / 255).flatten().tolist(),
        "do_convert_rgb": True,
    }
    square = {"height": cfg.size, "width": cfg.size}
    if isinstance(model, HFCLIPModel) and model.hf.config.model_type == "siglip2":  # takes patches
        patch = model.hf.config.vision_config.patch_size
        return Siglip2ImageProcessor(patch_size=patch, max_num_patches=(cfg.size // patch) ** 2, **settings)
    if short := shorter_side(cfg):
        return CLIPImageProcessor(size={"shortest_edge": short}, crop_size=square, **settings)
    return ViTImageProcessor(size=square, **settings)
