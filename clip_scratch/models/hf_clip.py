"""A pretrained CLIP from transformers: CLIP, SigLIP and SigLIP 2, Chinese-CLIP, VisionTextDualEncoder and the like."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ..config import CFG
from ..data.tokenizer import build_tokenizer
from ..errors import UserError
from ..hub import load_pretrained
from .clip import MAX_LOGIT_SCALE, DualEncoder, check_vocabulary, features_in_chunks
from .convolutions import prepare_convolutions
from .encoders import max_positions
from .freezing import freeze

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

OPENAI_BASE = "openai/clip-vit-base-patch32"  # its architecture is the default of transformers' CLIPConfig
_REMEDY = "Download it where there is a network (hf download NAME --local-dir FOLDER); set --model-name to that folder"
# Settings of encoders and heads that are built from scratch; a pretrained CLIP has its own
_FROM_SCRATCH = (
    "train_size", "image_weights", "image_dropout", "text_encoder_model", "text_pooling", "text_dropout", "head",
    "projection_dim", "dropout", "temperature",
)  # fmt: skip


class HFCLIPModel(DualEncoder):
    """A transformers model as `hf`, with its own image size, pixel statistics, tokenizer and longest caption.

    `tokenizer` and `hf_config` rebuild a saved model without a hub; its weights and pixel statistics are loaded
    afterwards. Raises UserError for a model without CLIP's two towers or not available.
    """

    ARCHITECTURE = "clip_config.json"  # of a run's best/: what `hf_config` is

    def __init__(
        self, cfg: CFG | type[CFG], tokenizer: PreTrainedTokenizerBase | None = None,
        hf_config: PretrainedConfig | None = None,
    ):  # fmt: skip
        super().__init__()
        cfg = cfg() if isinstance(cfg, type) else cfg
        self.hf = _hf_model(cfg, hf_config)
        config = self.hf.config
        if not _is_clip(self.hf):
            raise UserError(f"model_name {cfg.model_name!r} is a {config.model_type} model, without CLIP's two towers")
        own, mean, std = {}, [0.5] * 3, [0.5] * 3
        if not hf_config:
            own, mean, std = image_geometry(cfg)
            if cfg.size not in (0, own["size"]):
                raise UserError(f"size {cfg.size}: {cfg.model_name} takes {own['size']} pixels a side: use --size 0")
            for name in _FROM_SCRATCH:
                if getattr(cfg, name) != getattr(CFG, name):
                    raise UserError(f"{name} is for models from scratch, and {cfg.model_name} is none. Leave it out")
        if cfg.loss == "auto":
            own["loss"] = "sigmoid" if hasattr(self.hf, "logit_bias") else "infonce"
        own["projection_dim"] = getattr(config, "projection_dim", 0) or self.heads["text"].out_features  # SigLIP's
        self.cfg = cfg = dataclasses.replace(cfg, **own)

        self.tokenizer = tokenizer or build_tokenizer(cfg)
        if cfg.text_tokenizer:
            check_vocabulary(self.tokenizer, config.text_config.vocab_size)
        positions = max_positions(config.text_config) or cfg.max_length
        self.tokenizer.model_max_length = min(cfg.max_length, positions, self.tokenizer.model_max_length)
        # SigLIP (Zhai et al. 2023) was trained on captions padded to one length, and no mask hides the padding
        self.padded_length = positions if config.model_type.startswith("siglip") else None

        # Saved with the weights, since a run holds no image processor
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1))
        lacks_bias = cfg.loss == "sigmoid" and not hasattr(self.hf, "logit_bias")
        self.own_bias = nn.Parameter(torch.tensor(-10.0)) if lacks_bias else None
        # Some models, SigLIP among them, were trained beyond CLIP's clamp
        highest = self.hf.logit_scale.detach().reshape(()).clamp(min=math.log(MAX_LOGIT_SCALE))
        self.register_buffer("max_log_scale", highest.clone())
        self.log_scale.requires_grad_(cfg.loss != "soft_target")
        freeze(self, cfg)
        network = getattr(self.towers["image"], "timm_model", None)
        prepare_convolutions(network or self.towers["image"], cfg, fold=network is not None)
        self.apply_memory_format()

    @property
    def towers(self) -> dict[str, nn.Module]:
        return {"image": self.hf.vision_model, "text": self.hf.text_model}

    @property
    def heads(self) -> dict[str, nn.Module]:
        """The projections into the shared space: layers beside the towers, or SigLIP's last layer of each tower."""
        hf = self.hf
        return {
            "image": hf.visual_projection if hasattr(hf, "visual_projection") else hf.vision_model.head,
            "text": hf.text_projection if hasattr(hf, "text_projection") else hf.text_model.head,
        }

    @property
    def log_scale(self) -> nn.Parameter:
        return self.hf.logit_scale

    @property
    def logit_bias(self) -> nn.Parameter | None:
        """The bias that the sigmoid loss adds to every logit; None for the other losses."""
        own = self.own_bias if self.own_bias is not None else getattr(self.hf, "logit_bias", None)
        return own if self.cfg.loss == "sigmoid" else None

    def architecture(self) -> PretrainedConfig:
        return self.hf.config

    def forward_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        is_naflex = self.hf.config.model_type == "siglip2"
        inputs = self._patches(pixel_values) if is_naflex else {"pixel_values": pixel_values}
        return self.hf.get_image_features(**inputs).pooler_output  # (B, P)

    def _patches(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """SigLIP 2's input for images of any shape (NaFlex): (B, 3, S, S) -> patches, their mask and their grid."""
        side = self.hf.config.vision_config.patch_size
        n = pixel_values.shape[-1] // side
        patches = pixel_values.unflatten(2, (n, side)).unflatten(4, (n, side))  # (B, 3, n, side, n, side)
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, n * n, side * side * 3)
        mask = patches.new_ones(patches.shape[:2], dtype=torch.long)
        grid = torch.full((len(patches), 2), n, device=patches.device)
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": grid}

    def forward_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        if self.padded_length:
            length = self.padded_length
            input_ids = F.pad(input_ids, (0, length - input_ids.shape[1]), value=self.tokenizer.pad_token_id)  # (C, L)
            if self.tokenizer.padding_side == "left":
                column = torch.arange(length, device=input_ids.device) + attention_mask.sum(1, keepdim=True)
                input_ids = input_ids.gather(1, column % length)
            return self.hf.get_text_features(input_ids=input_ids).pooler_output
        return features_in_chunks(self._masked_text_features, input_ids, attention_mask)

    def _masked_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.hf.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output


def _is_clip(hf: nn.Module) -> bool:
    """Whether a transformers model has the towers, projections and methods that this backend uses."""
    projected = [("vision_model", "visual_projection"), ("text_model", "text_projection")]
    towers = all(hasattr(hf, t) and (hasattr(hf, p) or hasattr(getattr(hf, t), "head")) for t, p in projected)
    return towers and all(hasattr(hf, name) for name in ("get_image_features", "get_text_features", "logit_scale"))


def _hf_model(cfg: CFG, config: PretrainedConfig | None) -> nn.Module:
    """The pretrained model in fp32, or one of random weights from `config` or with --no-pretrained."""
    from transformers import AutoConfig, AutoModel, CLIPConfig

    if not config and not cfg.pretrained:
        is_default = cfg.model_name == OPENAI_BASE
        config = CLIPConfig() if is_default else _load(AutoConfig, cfg, "the configuration of the CLIP")
    if config:
        return AutoModel.from_config(config, dtype=torch.float32)
    model, loading = _load(AutoModel, cfg, "the CLIP", dtype=torch.float32, output_loading_info=True)
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"model_name: {cfg.model_name} has no weights for {len(missing)} tensors, {missing[0]} first")
    return model


def _load(auto_class, cfg: CFG, what: str, **options: object):
    return load_pretrained(auto_class, cfg.model_name, "model_name", what, _REMEDY, **options)


def image_geometry(cfg: CFG) -> tuple[dict[str, object], list[float], list[float]]:
    """The settings size, resize and interpolation of the model's image processor, and its mean and std.

    SigLIP 2 for images of any shape (NaFlex) keeps their aspect ratio; here they are stretched to a square.
    """
    from PIL.Image import Resampling
    from transformers import AutoImageProcessor, CLIPImageProcessor

    if not cfg.pretrained and cfg.model_name == OPENAI_BASE:
        processor = CLIPImageProcessor()
    else:
        processor = _load(AutoImageProcessor, cfg, "the image processor of the CLIP")
    size = dict(getattr(processor, "size", None) or {})
    if getattr(processor, "max_num_patches", None):  # NaFlex: the square of so many patches
        size = {"height": processor.patch_size * int(processor.max_num_patches**0.5)}
    short = size.get("shortest_edge")
    crop = bool(getattr(processor, "do_center_crop", False))
    side = dict(processor.crop_size)["height"] if crop else size.get("height") or short
    if short and short < 384 and getattr(processor, "crop_pct", None):  # ConvNeXT's: resized to more, then cropped
        crop, short = True, int(short / processor.crop_pct)
    if not side or any(getattr(processor, name, None) is None for name in ("resample", "image_mean", "image_std")):
        raise UserError(f"model_name: {cfg.model_name} has a {type(processor).__name__}, without its images' size")
    settings = {
        "size": int(side),
        "resize": (f"crop:{short}" if short and short != side else "crop") if crop else "stretch",
        "interpolation": "bilinear" if processor.resample == Resampling.BILINEAR else "bicubic",  # the usual two
    }
    return settings, list(processor.image_mean), list(processor.image_std)
