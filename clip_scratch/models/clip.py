"""The dual encoder: two towers, two projection heads, one temperature.

Shapes: B images, C captions, L tokens, S pixels a side, D features of a tower, P projected dimensions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ..config import CFG
from ..data.images import image_transform
from ..data.tokenizer import build_tokenizer
from ..errors import UserError
from .convolutions import prepare_convolutions
from .dropout import speed_up_dropout
from .encoders import TextEncoder, Tower, build_image_encoder, build_text_encoder
from .freezing import freeze, keep_frozen_in_eval
from .precision import autocast, memory_format

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


class DualEncoder(nn.Module):
    """The interface of both backends: two towers with heads, and the temperature.

    A subclass has `cfg`, `tokenizer`, `log_scale`, `logit_bias` (None without one), `mean` and `std` (of pixels
    in 0 to 255), `towers` and `heads` (modules by "image" and "text"), and through tower and head `forward_image`,
    (B, 3, S, S) normalised pixels -> (B, P), and `forward_text`, (C, L) token ids and mask -> (C, P).
    """

    cfg: CFG
    tokenizer: PreTrainedTokenizerBase
    max_log_scale: float | torch.Tensor  # training clamps `log_scale` here
    padded_length: int | None = None  # of every caption in the text tower; None: padded to the longest of the batch

    @property
    def logit_scale(self) -> torch.Tensor:
        """The factor between cosines and logits, already exponentiated: 1 / temperature."""
        return self.log_scale.clamp(max=self.max_log_scale).exp().reshape(())

    @property
    def device(self) -> torch.device:
        return self.log_scale.device

    def image_transform(self, train: bool = False):
        """The albumentations pipeline whose uint8 output `encode_image` takes."""
        return image_transform(self.cfg, train)

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) pixels -> (B, P) L2-normalised. uint8 pixels are normalised here, floats are not."""
        if pixel_values.dtype == torch.uint8:
            pixel_values = self.normalize_pixels(pixel_values)
        return self._embed("image", self.forward_image, pixel_values.contiguous(memory_format=memory_format(self.cfg)))

    def normalize_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 pixels -> float32, with the mean and deviation that the image tower expects.

        In one pass over rows of S x 3 numbers, which is nine times as fast on a CPU as over three channels.
        """
        b, _, height, width = pixel_values.shape
        rows = pixel_values.permute(0, 2, 3, 1).reshape(b * height, width * 3)
        scale, offset = 1 / self.std, -self.mean / self.std
        rows = torch.addcmul(offset.flatten().repeat(width), rows, scale.flatten().repeat(width))
        return rows.view(b, height, width, 3).permute(0, 3, 1, 2)

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(C, L) token ids and mask -> (C, P) L2-normalised."""
        return self._embed("text", self.forward_text, input_ids, attention_mask)

    def project(self, tower: str, features: torch.Tensor) -> torch.Tensor:
        """Features of the "image" or "text" tower, (N, D), through its head -> (N, P) L2-normalised."""
        return self._embed(tower, self.heads[tower], features)

    def _embed(self, tower: str, forward: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        with autocast(self.cfg, tower, self.device):
            embeddings = forward(*inputs)
        # In fp32, or in the float64 of a model that tests exactness
        return F.normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=-1)

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch -> image embeddings (B, P) and text embeddings (C, P).

        Instead of pixels or tokens it may have `image_features` (B, D) or `text_features` (C, D), cached outputs of a
        frozen backbone.
        """
        if self.training:  # at its clamp or beyond, the scale has no gradient and would never come back
            self.log_scale.data.clamp_(max=self.max_log_scale - 1e-6)
        if "image_features" in batch:
            images = self.project("image", batch["image_features"])
        else:
            images = self.encode_image(batch["pixel_values"])
        if "text_features" in batch:
            return images, self.project("text", batch["text_features"])
        return images, self.encode_text(batch["input_ids"], batch["attention_mask"])

    def apply_memory_format(self) -> None:
        """Convert the image tower's weights to the memory format of `cfg`."""
        self.towers["image"].to(memory_format=memory_format(self.cfg))

    def compile_towers(self) -> None:
        """torch.compile both towers, in place; compilation happens when they are first called."""
        for part, tower in self.towers.items():
            tower.compile(dynamic=part == "text")  # the length of captions changes from batch to batch

    def train(self, mode: bool = True) -> DualEncoder:
        super().train(mode)
        if mode:
            for part, tower in self.towers.items():
                keep_frozen_in_eval(tower, self.cfg.freeze_batch_norm and part == "image")
                keep_frozen_in_eval(self.heads[part])
        return self


def features_in_chunks(tower, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """`tower(input_ids, attention_mask)` (C, D); on a CPU, where padding costs time, by captions of similar length."""
    # An exported graph takes any number of captions, and cannot branch on it
    if attention_mask.device.type != "cpu" or torch.compiler.is_exporting() or len(attention_mask) <= _CHUNK:
        return tower(input_ids, attention_mask)
    lengths, order = attention_mask.sum(1).sort(stable=True)
    chunks = zip(order.split(_CHUNK), lengths.split(_CHUNK), strict=True)
    parts = [tower(input_ids[rows, : n[-1]], attention_mask[rows, : n[-1]]) for rows, n in chunks]
    return torch.cat(parts)[order.argsort()]  # (C, D)


class CLIPModel(DualEncoder):
    """An image tower and a text tower whose L2-normalised projections meet in one space.

    `tokenizer` defaults to the text encoder's own; `text_config` rebuilds a saved text tower without a hub.
    """

    ARCHITECTURE = "text_config.json"  # of a run's best/: what `text_config` is
    max_log_scale = math.log(MAX_LOGIT_SCALE)

    def __init__(
        self, cfg: CFG | type[CFG] = CFG, tokenizer: PreTrainedTokenizerBase | None = None, text_config: object = None
    ):
        super().__init__()
        cfg = cfg() if isinstance(cfg, type) else cfg
        self.tokenizer = tokenizer or build_tokenizer(cfg)
        self.image_encoder = build_image_encoder(cfg)
        self.text_encoder = build_text_encoder(cfg, len(self.tokenizer), text_config)
        if cfg.text_tokenizer and isinstance(self.text_encoder, TextEncoder):
            check_vocabulary(self.tokenizer, self.text_encoder.model.config.vocab_size)
        loss = "infonce" if cfg.loss == "auto" else cfg.loss  # there is no pretrained CLIP whose loss it could be
        self.cfg = cfg = dataclasses.replace(cfg, size=cfg.size or getattr(self.image_encoder, "size", 224), loss=loss)
        longest = getattr(self.text_encoder, "max_length", cfg.max_length)
        self.tokenizer.model_max_length = min(cfg.max_length, longest, self.tokenizer.model_max_length)
        self.image_projection = _head(self.image_encoder.out_dim, cfg.image_dropout, cfg)
        self.text_projection = _head(self.text_encoder.out_dim, cfg.text_dropout, cfg)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / cfg.temperature)), cfg.loss != "soft_target")
        # SigLIP's bias (Zhai et al. 2023, section 3): without it the many negatives swamp the first steps
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if cfg.loss == "sigmoid" else None
        for name, imagenet in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            values = torch.tensor(list(getattr(self.image_encoder, name, imagenet))).view(1, 3, 1, 1)
            self.register_buffer(name, 255 * values, persistent=False)
        freeze(self, cfg)
        # A module of the user's own is not called before it is needed
        prepare_convolutions(self.towers["image"], cfg, fold=isinstance(self.image_encoder, Tower))
        self.apply_memory_format()
        speed_up_dropout(self)

    @property
    def towers(self) -> dict[str, nn.Module]:
        encoders = {"image": self.image_encoder, "text": self.text_encoder}  # ours, or modules of the user's own
        return {part: encoder.model if isinstance(encoder, Tower) else encoder for part, encoder in encoders.items()}

    @property
    def heads(self) -> dict[str, nn.Module]:
        return {"image": self.image_projection, "text": self.text_projection}

    def architecture(self) -> object:
        """The transformers configuration that, with `cfg`, rebuilds this model; None for a text encoder without one."""
        return self.text_encoder.model.config if isinstance(self.text_encoder, TextEncoder) else None

    def forward_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.image_projection(self.image_encoder(pixel_values))  # (B, 3, S, S) -> (B, D) -> (B, P)

    def forward_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.text_projection(features_in_chunks(self.text_encoder, input_ids, attention_mask))


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise UserError where a tokenizer has more tokens than a text tower has embeddings."""
    if len(tokenizer) > vocab_size:
        sizes = f"has {len(tokenizer):,} tokens, but the text encoder has embeddings for {vocab_size:,}"
        raise UserError(f"text_tokenizer {sizes}: leave text_tokenizer empty for the encoder's own")
