"""A from-scratch model in transformers' stock classes: TimmWrapperModel + BertModel in a VisionTextDualEncoderModel.

Those classes differ from ours in three ways: the projections have no bias, the text tower always pools the first
token, and through tanh. The weights are set so that the embeddings come out nearly the same all the same, up to a
scale, which the final normalisation removes; how is told where it is done. The construction is our own, of no paper.

It is not exact. The image head's bias becomes a ridge fit; with mean pooling and P >= D - 1 one direction of the text
features is lost; tanh is only nearly linear. Measured on Flickr8k's dev split: rsum 360.0 -> 359.8, lowest cosine
between an embedding and the exported one 0.99988 of an image, 0.999999 of a caption.

Shapes: N images, D features of a tower, P projected dimensions.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ..data.images import shorter_side
from ..errors import UserError
from ..hub import no_loading_bar
from ..models.clip import CLIPModel, DualEncoder

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, BertModel, VisionTextDualEncoderModel

# How loud the mean of the tokens is beside the first token that BERT's residual connection adds to it
_LOUDNESS = 1000.0
# Root mean square of what reaches the pooler's tanh: its relative error there is a third of the square
_NEARLY_LINEAR = 0.02


def check_expressible(model: CLIPModel) -> None:
    """Raise UserError, which names the setting, where the stock classes cannot compute what the model does."""
    cfg, kind = model.cfg, model.text_encoder.model.config.model_type
    if cfg.head != "linear":
        raise UserError(
            f"head {cfg.head!r} cannot be exported: transformers projects linearly. Train with --head linear"
        )
    if kind != "bert":
        raise UserError(
            f"text_encoder_model: a {kind} text tower cannot be exported, only one of BERT's architecture, "
            "as bert-mini, bert-base-uncased and MiniLM are"
        )


def to_dual_encoder(model: CLIPModel, features: torch.Tensor) -> VisionTextDualEncoderModel:
    """The model as transformers' VisionTextDualEncoderModel, on the CPU in fp32 and eval mode.

    `features` (N, D) are what the image tower gives for images like those it will see: the image head's bias
    is fitted to them. Raises UserError where the model is not expressible.
    """
    check_expressible(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.cfg.seed)  # the little that stays at random, see `_average`, is the same each time
        dual = _random_dual_encoder(model)
    with torch.no_grad():
        dual.vision_model.timm_model.load_state_dict(model.image_encoder.model.state_dict())
        n_layers = model.text_encoder.model.config.num_hidden_layers
        added = ("pooler.", f"encoder.layer.{n_layers}.")  # what `_text_pooling` sets
        missing, unexpected = dual.text_model.load_state_dict(model.text_encoder.model.state_dict(), strict=False)
        assert not unexpected and all(name.startswith(added) for name in missing), (missing, unexpected)
        dual.visual_projection.weight.copy_(_image_projection(model.image_projection[-1], features))
        pooling = _text_pooling(dual.text_model, model.text_projection[-1], model.cfg.text_pooling)
        dual.text_projection.weight.copy_(pooling)
    return dual.float().eval()


def _random_dual_encoder(model: CLIPModel) -> VisionTextDualEncoderModel:
    """The stock classes in the model's sizes; for mean pooling with one more text layer, which takes the mean."""
    from transformers import (
        BertConfig,
        TimmWrapperConfig,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
    )

    cfg, tower = model.cfg, model.image_encoder.model
    # As ImageEncoder builds it: some families, ViT among them, fix their size when they are built
    sized = {"img_size": cfg.size} if cfg.size and tower.default_cfg.get("fixed_input_size") else None
    vision = TimmWrapperConfig(
        architecture=cfg.model_name, model_args=sized, hidden_size=model.image_encoder.out_dim, num_labels=0
    )
    settings = model.text_encoder.model.config.to_dict()
    settings.pop("_name_or_path", None)  # a path of this machine
    settings["num_hidden_layers"] += cfg.text_pooling == "mean"
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision,
        BertConfig(**settings),
        projection_dim=cfg.projection_dim,
        logit_scale_init_value=model.logit_scale.log().item(),
    )
    return VisionTextDualEncoderModel(config)


def _image_projection(head: nn.Linear, features: torch.Tensor) -> torch.Tensor:
    """W + b vᵀ, (P, D): with v·f = 1 for the tower's features f it is the head without a bias, W f + b.

    No v fits every image, so it is the ridge regression of 1 on the features (N, D), with the penalty that
    predicts every fifth image best from the others.
    """
    features, weight, bias = features.double().cpu(), head.weight.double().cpu(), head.bias.double().cpu()
    held = torch.arange(len(features)) % 5 == 4
    fitted = _ridge(features[~held])
    errors = {size: (features[held] @ fitted(size) - 1).square().mean().item() for size in 10.0 ** torch.arange(-9, 0)}
    best = min(errors, key=errors.get)
    return weight + torch.outer(bias, _ridge(features)(best))


def _ridge(features: torch.Tensor):
    """Penalty, as a fraction of the largest eigenvalue -> the v (D,) that makes features (N, D) @ v nearly 1."""
    values, vectors = torch.linalg.eigh(features.T @ features)  # (D,), (D, D)
    target = vectors.T @ features.sum(0)
    return lambda penalty: vectors @ (target / (values.clamp(min=0) + penalty * values[-1]))


def _text_pooling(text: BertModel, head: nn.Linear, pooling: str) -> torch.Tensor:
    """Set BERT's pooler, and for mean pooling its last layer; the text projection (P, D) that goes with them.

    What has to be said without a bias is W h + b, for h a token's vector or the mean of all. A token's vector
    leaves a LayerNorm as gamma * n + beta, where n sums to 0. So h - beta has no part along 1 / gamma, and a
    reflection R that turns 1 / gamma into the direction q of all ones takes it to a vector without a part along q.

    First token: R (h - beta) leaves q free to carry a constant, and W Rᵀ with b' = W beta + b in that direction is
    the projection. It is exact but for tanh, which is nearly linear where it is used.

    Mean: the additional layer's queries and keys are 0, so each token attends equally to all that are not masked.
    Its LayerNorms, which take away what lies along q, here take nothing, but leave no direction free for
    the constant: the one that W Rᵀ sees least gives way, and where P < D - 1 it sees that one not at all.
    """
    final = text.encoder.layer[-2 if pooling == "mean" else -1].output.LayerNorm
    gamma, beta = final.weight.double(), final.bias.double()
    weight, bias = head.weight.double().cpu(), head.bias.double().cpu()  # (P, D), (P,)
    d = len(gamma)
    eye, ones = torch.eye(d, dtype=torch.double), torch.full((d,), d**-0.5, dtype=torch.double)
    normal = F.normalize(1 / torch.where(gamma.abs() > 1e-9, gamma, 1e-9), dim=0)
    across = F.normalize(normal - ones, dim=0)  # 0 where all gammas are equal: then nothing needs to be turned
    turn = eye - 2 * torch.outer(across, across)  # R, its own transpose
    turned = weight @ turn  # W Rᵀ
    constant = weight @ beta + bias  # b'
    # What the constant is: its column of the projection then is about as long as each of the others
    level = (constant.norm() * math.sqrt(d) / weight.norm()).clamp(min=1e-3 * gamma.norm())

    dense = text.pooler.dense
    if pooling == "cls":
        scale = _NEARLY_LINEAR * math.sqrt(d) / torch.hypot(gamma.norm(), level)
        dense.weight.copy_(scale * turn)
        dense.bias.copy_(scale * (level * ones - turn @ beta))
        free = ones
    else:
        flat = turned @ (eye - torch.outer(ones, ones))
        # The direction of the ones is of no use to `flat` either, but a LayerNorm takes it away
        free = torch.linalg.eigh(flat.T @ flat + flat.square().sum() * torch.outer(ones, ones))[1][:, 0]
        keep = eye - torch.outer(free, free)
        _average(text.encoder.layer[-1], keep @ turn, level * free - keep @ turn @ beta)
        dense.weight.copy_(0.1 * eye)  # not smaller: a learning rate of 1e-5 must not overrun it within an epoch
        dense.bias.zero_()
        text.encoder.layer[-1].output.LayerNorm.weight.fill_(10 * _NEARLY_LINEAR)
    return turned + torch.outer(constant / level - turned @ free, free)  # `free` carries the constant and no more


def _average(layer: nn.Module, matrix: torch.Tensor, bias: torch.Tensor) -> None:
    """Make a BERT layer give LayerNorm(matrix @ mean of the tokens + bias) for every token, (D, D) and (D,).

    The residual connection adds the token itself, which is drowned. The feed-forward part adds nothing, but its
    first half is at random, as BERT's starts, so that it could learn to.
    """
    attention, output = layer.attention.self, layer.attention.output
    for part in (attention.query, attention.key):
        part.weight.zero_()
        part.bias.zero_()
    attention.value.weight.copy_(math.sqrt(_LOUDNESS) * matrix)
    attention.value.bias.zero_()
    output.dense.weight.copy_(math.sqrt(_LOUDNESS) * torch.eye(len(bias)))
    output.dense.bias.copy_(_LOUDNESS * bias)
    layer.output.dense.weight.zero_()
    layer.output.dense.bias.zero_()


def image_processor(model: DualEncoder) -> BaseImageProcessor:
    """The transformers image processor that makes the pixels `model` evaluates, normalised.

    None knows an area filter: bilinear, which they apply with antialiasing, is the nearest to it.
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
    if cfg.backend == "hf_clip" and model.hf.config.model_type == "siglip2":  # takes patches, of images of any shape
        patch = model.hf.config.vision_config.patch_size
        return Siglip2ImageProcessor(patch_size=patch, max_num_patches=(cfg.size // patch) ** 2, **settings)
    if short := shorter_side(cfg):
        return CLIPImageProcessor(size={"shortest_edge": short}, crop_size=square, **settings)
    return ViTImageProcessor(size=square, **settings)


class ExportedModel(nn.Module):
    """A written folder as plain transformers reads it, behind what measures a model: batches -> embeddings.

    `mean` and `std` in 0 to 255 are those of the pixels.
    """

    def __init__(self, folder: Path, mean: torch.Tensor, std: torch.Tensor):
        super().__init__()
        from transformers import AutoModel, AutoTokenizer

        with no_loading_bar():
            self.hf = AutoModel.from_pretrained(folder, local_files_only=True).float().to(mean.device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """A loader's batch -> image embeddings (B, P) and text embeddings (C, P), L2-normalised."""
        images = self.hf.get_image_features(pixel_values=(batch["pixel_values"] - self.mean) / self.std)
        texts = self.hf.get_text_features(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return F.normalize(images.pooler_output, dim=-1), F.normalize(texts.pooler_output, dim=-1)
