"""Image and text encoders by name, from local weights, or from a function of the user's own. Each has `.out_dim`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from ..config import CFG
from ..errors import UserError, suggest
from ..hub import SMALL_BERTS, hub_access, import_function, is_function, load_pretrained, local_path

# Architectures that can be built from random weights without asking a hub for their configuration
_KNOWN_CONFIGS = {
    "distilbert-base-uncased": "distilbert", "distilbert/distilbert-base-uncased": "distilbert",
    "bert-base-uncased": "bert", "google-bert/bert-base-uncased": "bert",
    "roberta-base": "roberta", "FacebookAI/roberta-base": "roberta",
}  # fmt: skip


def build_image_encoder(cfg: CFG) -> nn.Module:
    """The image encoder of `cfg.model_name`: a timm model, several as in `resnet18+resnet50`, or `module:function`.

    What such a function returns for `cfg` maps (B, 3, S, S) normalised pixels to (B, D) and has `out_dim`, D. Optional
    are `mean` and `std` of the pixels (three numbers each in 0 to 1; ImageNet's otherwise) and `size`, S where cfg.size
    is 0. The function is called again, with cfg.pretrained False, when a saved model is loaded.
    """
    if not is_function(cfg.model_name):
        names = cfg.model_name.split("+")
        several = len(names) > 1 and cfg.image_weights
        weights = cfg.image_weights.split("+") if several else [cfg.image_weights] * len(names)
        if len(weights) != len(names):
            raise UserError(f"image_weights: {len(weights)} given for the {len(names)} models of model_name")
        encoders = []
        for name, file in zip(names, weights, strict=True):
            encoders.append(ImageEncoder(name, cfg.pretrained, cfg.trainable, file, cfg.size))
            if 0 < cfg.train_size < cfg.size and encoders[-1].model.default_cfg.get("fixed_input_size"):
                raise UserError(f"train_size: {name} takes images of one size. Leave it out")
        return encoders[0] if len(encoders) == 1 else ImageEncoders(encoders)
    encoder = _own_encoder(cfg, "model_name")
    if cfg.pretrained and cfg.image_weights:
        load_weights(encoder, cfg.image_weights)
    return encoder


def build_text_encoder(cfg: CFG, vocab_size: int, config: object = None) -> nn.Module:
    """The text encoder of `cfg.text_encoder_model`: a transformers model, or what `module:function` returns for `cfg`.

    Such a module maps `input_ids` and `attention_mask` (C, L) to (C, D) and has `out_dim`, D.
    """
    if is_function(cfg.text_encoder_model):
        return _own_encoder(cfg, "text_encoder_model")
    return TextEncoder(cfg.text_encoder_model, cfg.pretrained, cfg.trainable, cfg.text_pooling, vocab_size, config)


def _own_encoder(cfg: CFG, setting: str) -> nn.Module:
    name = getattr(cfg, setting)
    encoder = import_function(name, setting)(cfg)
    if not isinstance(encoder, nn.Module) or not isinstance(getattr(encoder, "out_dim", None), int):
        raise UserError(f"{setting} {name!r} must return a torch module whose out_dim is the number of its features")
    return encoder


class Tower(nn.Module):
    """A network as `model` with `out_dim` features; frozen, and always in eval mode, where it is not `trainable`."""

    def __init__(self, model: nn.Module, out_dim: int, trainable: bool):
        super().__init__()
        self.model, self.out_dim, self.trainable = model, out_dim, trainable
        self.requires_grad_(trainable)
        self.train(trainable)

    def train(self, mode: bool = True) -> Tower:
        return super().train(mode and self.trainable)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.model(*inputs)


class ImageEncoder(Tower):
    """Any timm image model without its classifier: (B, 3, S, S) normalised pixels -> (B, D) pooled features.

    `size` S matters to the models that fix it when they are built, as ViT does; None leaves them their own.
    Raises UserError for an unknown name, weights that do not fit and a hub that cannot be reached.
    """

    def __init__(
        self, model_name: str = "resnet50", pretrained: bool = True, trainable: bool = True, weights: str = "",
        size: int | None = None,
    ):  # fmt: skip
        import timm

        if not timm.is_model(model_name):
            near = suggest(model_name, timm.list_models())
            raise UserError(f"model_name {model_name!r} is not a timm image model.{near}")
        try:
            default = timm.models.get_pretrained_cfg(model_name)
        except RuntimeError as error:  # a tag that timm does not know, as in resnet18.nosuch
            raise UserError(f"model_name {model_name!r}: {error}") from error
        options = {"num_classes": 0}
        if size and default and default.fixed_input_size:
            options["img_size"] = size
        if pretrained and not weights:
            remedy = "Give image_weights a local .safetensors or .pth file, or --no-pretrained"
            if not timm.models.is_model_pretrained(model_name):
                raise UserError(f"timm has no pretrained weights for {model_name!r}. {remedy}")
            with hub_access(f"the weights of {model_name!r}", remedy):
                model = timm.create_model(model_name, pretrained=True, **options)
        else:
            model = timm.create_model(model_name, **options)
            if pretrained:
                load_weights(model, weights)
        # A few families pool to another width than that of their last stage
        super().__init__(model, getattr(model, "head_hidden_size", model.num_features), trainable)
        config = timm.data.resolve_model_data_config(model)
        self.mean, self.std = config["mean"], config["std"]
        self.size = size or config["input_size"][-1]


class Concatenated(nn.Module):
    """Networks that see the same pixels, their features side by side: (B, 3, S, S) -> (B, D1 + D2 + ...)."""

    def __init__(self, networks: Iterable[nn.Module]):
        super().__init__()
        for number, network in enumerate(networks):
            self.add_module(str(number), network)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.cat([network(pixel_values) for network in self.children()], 1)


class ImageEncoders(Tower):
    """Several image encoders as one. Raises UserError where they expect pixels of different mean, deviation or size."""

    def __init__(self, encoders: Sequence[ImageEncoder]):
        networks = Concatenated(encoder.model for encoder in encoders)
        super().__init__(networks, sum(encoder.out_dim for encoder in encoders), encoders[0].trainable)
        for name, fix in (("mean", "Choose others"), ("std", "Choose others"), ("size", "Set size")):
            values = [getattr(encoder, name) for encoder in encoders]
            if len(set(values)) > 1:
                listed = " and ".join(map(str, values))
                raise UserError(f"model_name: the models expect images of different {name}, {listed}. {fix}")
            setattr(self, name, values[0])


class TextEncoder(Tower):
    """Any transformers text encoder: (C, L) token ids and mask -> (C, D), the first token or the mean.

    `model_name` is a hub name, a local folder or `package:NAME/FOLDER`. Random weights of the common architectures need
    no hub; `vocab_size` then is the tokenizer's. Raises UserError as ImageEncoder does.
    """

    def __init__(
        self, model_name: str = "distilbert-base-uncased", pretrained: bool = True, trainable: bool = True,
        pooling: str = "cls", vocab_size: int | None = None, config: object = None,
    ):  # fmt: skip
        from transformers import AutoConfig

        if pretrained:
            model = _load(_auto_model(_load(AutoConfig, model_name)), model_name)
        else:
            config = config or text_config(model_name)
            if vocab_size is not None:
                config.vocab_size = vocab_size
                if (getattr(config, "pad_token_id", None) or 0) >= vocab_size:
                    config.pad_token_id = 0  # of a larger vocabulary
            model = _auto_model(config).from_config(config)
        model.float()  # transformers loads the precision of the file, which may be half
        if hasattr(model, "pooler"):
            model.pooler = None  # its output is not used: it would be parameters that never learn
        super().__init__(model, model.config.hidden_size, trainable)
        self.pooling = pooling
        self.max_length = max_positions(model.config) or 10**6  # of a caption, in tokens

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        features = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (C, L, D)
        if self.pooling == "cls":
            return features[:, 0]  # (C, L, D) -> (C, D)
        weight = attention_mask.unsqueeze(-1).to(features.dtype)  # (C, L, 1)
        return (features * weight).sum(1) / weight.sum(1).clamp(min=1)


def max_positions(config) -> int | None:
    """The tokens that the position embeddings of a transformers text configuration hold; None where any number fits."""
    positions = getattr(config, "max_position_embeddings", None)
    # RoBERTa's positions count from that of the padding
    return positions - 2 if positions and config.model_type in {"roberta", "xlm-roberta", "camembert"} else positions


def text_config(model_name: str):
    """The transformers configuration of a text encoder: built in, from a local folder, or from the hub."""
    from transformers import AutoConfig

    if model_name in SMALL_BERTS:
        layers, hidden = SMALL_BERTS[model_name]
        sizes = {"hidden_size": hidden, "num_attention_heads": hidden // 64, "intermediate_size": 4 * hidden}
        return AutoConfig.for_model("bert", num_hidden_layers=layers, **sizes)
    if model_name in _KNOWN_CONFIGS:
        return AutoConfig.for_model(_KNOWN_CONFIGS[model_name])
    return _load(AutoConfig, model_name, "one of the built-in names")


def _load(auto_class, model_name: str, alternative: str = "--no-pretrained"):
    known = [*SMALL_BERTS, *_KNOWN_CONFIGS]
    near = "" if model_name in known else suggest(model_name, known)
    remedy = f"Give text_encoder_model a local folder, or {alternative}.{near}"
    return load_pretrained(auto_class, model_name, "text_encoder_model", "the text encoder", remedy)


def _auto_model(config):
    """The transformers class to load: of an encoder-decoder such as T5, the encoder alone."""
    from transformers import AutoModel, AutoModelForTextEncoding

    # The saved configuration of a T5 encoder says that there is no decoder, but has its number of layers
    has_decoder = getattr(config, "is_encoder_decoder", False) or hasattr(config, "num_decoder_layers")
    return AutoModelForTextEncoding if has_decoder else AutoModel


def load_weights(model: nn.Module, weights: str) -> None:
    """Load the .safetensors or .pth file `weights`: by name, or, where no name agrees, tensor by tensor in order.

    A classifier in the file is left out. Raises UserError that names the first tensor that does not fit.
    """
    from timm.models import load_state_dict

    path = local_path(weights, "image_weights") or Path(weights)
    if not path.is_file():
        raise UserError(f"image_weights: {path} is not a file of weights")
    try:
        state = load_state_dict(path, use_ema=False, weights_only=True)
    except Exception as error:  # pickle, zip and safetensors each have their own, some with misleading advice
        raise UserError(f"image_weights: {path} cannot be read as weights ({type(error).__name__})") from error
    state = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    expected = model.state_dict()
    if not state.keys() & expected.keys():
        state = dict(zip(expected, state.values(), strict=False))  # another code base's names, the same order of layers
    for name, tensor in expected.items():
        if name not in state or state[name].shape != tensor.shape:
            shape = f"has shape {tuple(state[name].shape)}" if name in state else "is missing"
            raise UserError(f"image_weights: {path} does not fit: {name} {shape}, expected {tuple(tensor.shape)}")
    model.load_state_dict({name: state[name] for name in expected})
