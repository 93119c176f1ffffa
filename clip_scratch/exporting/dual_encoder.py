"""A from-scratch model in transformers' stock classes: TimmWrapperModel + BertModel in a VisionTextDualEncoderModel.

Their projections have no bias, and their text tower pools the first token, through tanh. The weights are set so that
the embeddings are nearly the same up to a scale, which the normalisation removes. The construction is our own.

It is not exact. The image head's bias becomes a ridge fit; with mean pooling and P >= D - 1 one direction of the text
features is lost; tanh is only nearly linear. Measured on Flickr8k's dev split: rsum 360.0 -> 359.8, lowest cosine
between an embedding and the exported one 0.99988 for images, 0.999999 for captions.

Shapes: N images, D features of a tower, P projected dimensions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ..models.clip import CLIPModel

if TYPE_CHECKING:
    from transformers import BertModel, TimmWrapperConfig, VisionTextDualEncoderModel

_MEAN_SCALE = 1000.0  # of the mean of the tokens relative to the token that BERT's residual connection adds to it
_NEARLY_LINEAR = 0.02  # RMS of the input of the pooler's tanh, whose relative error is a third of its square


def to_dual_encoder(model: CLIPModel, features: torch.Tensor) -> VisionTextDualEncoderModel:
    """The model as transformers' VisionTextDualEncoderModel, on the CPU in fp32 and eval mode.

    The image head's bias is fitted to `features` (N, D), those of typical images by the image tower.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.cfg.seed)  # of the weights that stay random, see `_average`
        dual = _random_dual_encoder(model)
    with torch.no_grad():
        dual.vision_model.timm_model.load_state_dict(model.image_encoder.model.state_dict())
        n_layers = model.text_encoder.model.config.num_hidden_layers
        added = ("pooler.", f"encoder.layer.{n_layers}.")  # set by `_text_pooling`
        missing, unexpected = dual.text_model.load_state_dict(model.text_encoder.model.state_dict(), strict=False)
        assert not unexpected and all(name.startswith(added) for name in missing), (missing, unexpected)
        dual.visual_projection.weight.copy_(_image_projection(model.image_projection[-1], features))
        pooling = _text_pooling(dual.text_model, model.text_projection[-1], model.cfg.text_pooling)
        dual.text_projection.weight.copy_(pooling)
    return dual.float().eval()


def timm_config(model: CLIPModel) -> TimmWrapperConfig:
    """The image tower as transformers describes it."""
    from transformers import TimmWrapperConfig

    cfg, tower, width = model.cfg, model.image_encoder.model, model.image_encoder.out_dim
    # As ImageEncoder builds it: some families, ViT among them, fix their size when they are built
    sized = {"img_size": cfg.size} if cfg.size and tower.default_cfg.get("fixed_input_size") else None
    # sentence-transformers reads num_features
    return TimmWrapperConfig(
        architecture=cfg.model_name, model_args=sized, hidden_size=width, num_features=width, num_labels=0
    )


def _random_dual_encoder(model: CLIPModel) -> VisionTextDualEncoderModel:
    """The stock classes in the model's sizes; for mean pooling with another text layer, which takes the mean."""
    from transformers import BertConfig, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    cfg, vision = model.cfg, timm_config(model)
    settings = model.text_encoder.model.config.to_dict()
    settings.pop("_name_or_path", None)  # a path of this machine
    settings["num_hidden_layers"] += cfg.text_pooling == "mean"
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, BertConfig(**settings))
    config.projection_dim, config.logit_scale_init_value = cfg.projection_dim, model.logit_scale.log().item()
    return VisionTextDualEncoderModel(config)


def _image_projection(head: nn.Linear, features: torch.Tensor) -> torch.Tensor:
    """W + b vᵀ, (P, D): where v·f = 1 for the tower's features f, it maps them to W f + b without a bias.

    No v fits every image, so v is the ridge regression of 1 on the features (N, D).
    """
    from sklearn.linear_model import RidgeCV

    features, weight, bias = features.double().cpu(), head.weight.double().cpu(), head.bias.double().cpu()
    penalties = [10**n * torch.linalg.matrix_norm(features, 2).item() ** 2 for n in range(-9, 0)]
    ridge = RidgeCV(penalties, fit_intercept=False).fit(features.numpy(), [1.0] * len(features))
    return weight + torch.outer(bias, torch.from_numpy(ridge.coef_))


def _text_pooling(text: BertModel, head: nn.Linear, pooling: str) -> torch.Tensor:
    """Set BERT's pooler, and for mean pooling its last layer; returns the text projection (P, D) that fits them.

    The goal is W h + b without a bias, where h is a token's vector or the mean of all. A token's vector leaves a
    LayerNorm as gamma * n + beta, where n sums to 0. So h - beta has no component along 1 / gamma, and none along the
    direction q of all ones after the reflection R that turns 1 / gamma into q.

    First token: R (h - beta) leaves q free for a constant, and the projection is W Rᵀ with b' = W beta + b in that
    direction. It is exact but for tanh, which is nearly linear in the range that is used.

    Mean: the additional layer's queries and keys are 0, so each token attends equally to all that are not masked.
    Its LayerNorms remove the component along q, which is 0 here, so q cannot carry the constant. The direction of
    least effect on W Rᵀ is used instead; where P < D - 1 it has none.
    """
    final = text.encoder.layer[-2 if pooling == "mean" else -1].output.LayerNorm
    gamma, beta = final.weight.double(), final.bias.double()
    weight, bias = head.weight.double().cpu(), head.bias.double().cpu()  # (P, D), (P,)
    d = len(gamma)
    eye, ones = torch.eye(d, dtype=torch.double), torch.full((d,), d**-0.5, dtype=torch.double)
    normal = F.normalize(1 / torch.where(gamma.abs() > 1e-9, gamma, 1e-9), dim=0)
    across = F.normalize(normal - ones, dim=0)  # 0 where all gammas are equal: R is then the identity
    turn = eye - 2 * torch.outer(across, across)  # R, its own transpose
    turned = weight @ turn  # W Rᵀ
    constant = weight @ beta + bias  # b'
    # The value of the constant, such that its column of the projection is about as long as the others
    level = (constant.norm() * math.sqrt(d) / weight.norm()).clamp(min=1e-3 * gamma.norm())

    dense = text.pooler.dense
    if pooling == "cls":
        scale = _NEARLY_LINEAR * math.sqrt(d) / torch.hypot(gamma.norm(), level)
        dense.weight.copy_(scale * turn)
        dense.bias.copy_(scale * (level * ones - turn @ beta))
        free = ones
    else:
        flat = turned @ (eye - torch.outer(ones, ones))
        # `flat` has no component along the ones either, but there a LayerNorm would remove the constant
        free = torch.linalg.eigh(flat.T @ flat + flat.square().sum() * torch.outer(ones, ones))[1][:, 0]
        keep = eye - torch.outer(free, free)
        _average(text.encoder.layer[-1], keep @ turn, level * free - keep @ turn @ beta)
        dense.weight.copy_(0.1 * eye)  # not smaller, or fine-tuning at a rate of 1e-5 would change it within an epoch
        dense.bias.zero_()
        text.encoder.layer[-1].output.LayerNorm.weight.fill_(10 * _NEARLY_LINEAR)
    return turned + torch.outer(constant / level - turned @ free, free)  # `free` carries the constant alone


def _average(layer: nn.Module, matrix: torch.Tensor, bias: torch.Tensor) -> None:
    """Make a BERT layer give LayerNorm(matrix @ mean of the tokens + bias) for every token, (D, D) and (D,).

    The residual connection's token is negligible at this scale. The feed-forward part adds nothing, but its first half
    is random, as in a new BERT, so that it can learn.
    """
    attention, output = layer.attention.self, layer.attention.output
    zeros = [attention.query, attention.key, layer.output.dense]
    for parameter in (attention.value.bias, *(p for part in zeros for p in part.parameters())):
        parameter.zero_()
    attention.value.weight.copy_(math.sqrt(_MEAN_SCALE) * matrix)
    output.dense.weight.copy_(math.sqrt(_MEAN_SCALE) * torch.eye(len(bias)))
    output.dense.bias.copy_(_MEAN_SCALE * bias)
