"""The dual encoder: two towers, two projection heads, one temperature.

Shapes: B images, C captions, L tokens, S pixels a side, D features of a tower, P projected dimensions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ..config import CFG
from ..data.images import image_transform
from ..data.tokenizer import build_tokenizer
from .encoders import ImageEncoder, TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LOGIT_SCALE = 100.0  # CLIP (Radford et al. 2021) clamps the learned scale here, that is the log-scale at ln 100

_CHUNK = 64  # captions that share a padded length on a CPU


class ProjectionHead(nn.Module):
    """Tower features -> the shared space: (N, D) -> (N, P). Linear, GELU, Linear, dropout, residual, LayerNorm."""

    def __init__(self, in_dim: int, projection_dim: int = 256, dropout: float = 0.1):
        super().__init__()
        self.projection = nn.Linear(in_dim, projection_dim)
        self.gelu = nn.GELU()
        self.fc = nn.Linear(projection_dim, projection_dim)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(projection_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        projected = self.projection(features)  # (N, D) -> (N, P)
        return self.layer_norm(projected + self.dropout(self.fc(self.gelu(projected))))


def _head(in_dim: int, feature_dropout: float, cfg: CFG) -> nn.Sequential:
    """Dropout on the tower's features, then the projection: (N, D) -> (N, P)."""
    linear = cfg.head == "linear"
    head = nn.Linear(in_dim, cfg.projection_dim) if linear else ProjectionHead(in_dim, cfg.projection_dim, cfg.dropout)
    return nn.Sequential(nn.Dropout(feature_dropout), head)


class CLIPModel(nn.Module):
    """An image tower and a text tower whose L2-normalised projections meet in one space.

    `tokenizer` defaults to the text encoder's own; `text_config` rebuilds a saved text tower without a hub.
    """

    def __init__(
        self,
        cfg: CFG | type[CFG] = CFG,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_config: object = None,
    ):
        super().__init__()
        self.cfg = cfg = cfg() if isinstance(cfg, type) else cfg
        self.tokenizer = tokenizer or build_tokenizer(cfg)
        self.image_encoder = ImageEncoder(
            cfg.model_name,
            cfg.pretrained and cfg.image_pretrained,
            cfg.trainable and cfg.image_trainable,
            cfg.image_weights,
            cfg.size,
            cfg.image_frozen_blocks,
            cfg.freeze_batch_norm,
        )
        if cfg.image_precision == "fp32":
            self.image_encoder.compute_trained_part_in_fp32()
        self.text_encoder = TextEncoder(
            cfg.text_encoder_model,
            cfg.pretrained and cfg.text_pretrained,
            cfg.trainable and cfg.text_trainable,
            cfg.text_pooling,
            len(self.tokenizer),
            text_config,
        )
        self.tokenizer.model_max_length = min(
            cfg.max_length, self.text_encoder.max_length, self.tokenizer.model_max_length
        )
        self.image_projection = _head(self.image_encoder.out_dim, cfg.image_dropout, cfg)
        self.text_projection = _head(self.text_encoder.out_dim, cfg.text_dropout, cfg)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / cfg.temperature)), cfg.loss != "soft_target")
        # SigLIP's bias (Zhai et al. 2023, section 3): without it the many negatives swamp the first steps
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if cfg.loss == "sigmoid" else None
        shape = (1, 3, 1, 1)
        self.register_buffer("mean", 255 * torch.tensor(self.image_encoder.mean).view(shape), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(self.image_encoder.std).view(shape), persistent=False)
        if cfg.channels_last:
            self.image_encoder.to(memory_format=torch.channels_last)

    @property
    def logit_scale(self) -> torch.Tensor:
        """What multiplies a cosine to make a logit: 1 / temperature, at most 100."""
        return self.log_scale.exp().clamp(max=MAX_LOGIT_SCALE)

    @property
    def device(self) -> torch.device:
        return self.log_scale.device

    def image_transform(self, train: bool = False):
        """The albumentations pipeline whose uint8 output `encode_image` takes."""
        return image_transform(self.cfg, train)

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) pixels -> (B, P) L2-normalised. uint8 pixels are normalised here, floats taken as they are."""
        if pixels.dtype == torch.uint8:
            pixels = (pixels - self.mean) / self.std
        if self.cfg.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        features = self.image_encoder(pixels)  # (B, D)
        return F.normalize(self.image_projection(features).float(), dim=-1)

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(C, L) token ids and mask -> (C, P) L2-normalised."""
        if input_ids.device.type == "cpu" and len(input_ids) > _CHUNK:
            features = self._text_features_in_chunks(input_ids, attention_mask)
        else:
            features = self.text_encoder(input_ids, attention_mask)  # (C, D)
        return F.normalize(self.text_projection(features).float(), dim=-1)

    def _text_features_in_chunks(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The text tower on captions of like length together: on a CPU padding costs as much as words do."""
        lengths, order = attention_mask.sum(1).sort(stable=True)
        parts = [
            self.text_encoder(input_ids[rows, : longest[-1]], attention_mask[rows, : longest[-1]])
            for rows, longest in zip(order.split(_CHUNK), lengths.split(_CHUNK), strict=True)
        ]
        return torch.cat(parts)[order.argsort()]  # (C, D)

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """A loader's batch -> image embeddings (B, P) and text embeddings (C, P)."""
        if self.training:  # at its clamp or beyond the scale has no gradient, and would never come back
            self.log_scale.data.clamp_(max=math.log(MAX_LOGIT_SCALE) - 1e-6)
        return self.encode_image(batch["pixels"]), self.encode_text(batch["input_ids"], batch["attention_mask"])
