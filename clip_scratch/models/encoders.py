"""Image and text encoders by name, or from local weights. Each has `.out_dim`, so nothing is typed twice."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..errors import UserError, suggest
from ..hub import SMALL_BERTS, hub_access, hub_name, local_path, no_loading_bar

# Architectures that can be built from random weights without asking a hub for their configuration
_KNOWN_CONFIGS = {
    "distilbert-base-uncased": "distilbert",
    "distilbert/distilbert-base-uncased": "distilbert",
    "bert-base-uncased": "bert",
    "google-bert/bert-base-uncased": "bert",
    "roberta-base": "roberta",
    "FacebookAI/roberta-base": "roberta",
}


class Tower(nn.Module):
    """What both encoders share: a frozen one stays in eval mode, so its batch-norm statistics stay too."""

    out_dim: int

    def __init__(self, trainable: bool):
        super().__init__()
        self.trainable = trainable

    def _freeze_if_asked(self) -> None:
        self.requires_grad_(self.trainable)
        self.train(self.trainable)

    def train(self, mode: bool = True) -> Tower:
        return super().train(mode and self.trainable)


class ImageEncoder(Tower):
    """Any timm image model without its classifier: (B, 3, S, S) normalised pixels -> (B, D) pooled features.

    `size` S matters to the models that fix it when they are built, as ViT does; None leaves them their own.
    Raises UserError for an unknown name, weights that do not fit and a hub that cannot be reached.
    """

    def __init__(
        self,
        model_name: str = "resnet50",
        pretrained: bool = True,
        trainable: bool = True,
        weights: str = "",
        size: int | None = None,
    ):
        super().__init__(trainable)
        import timm

        if not timm.is_model(model_name):
            options = suggest(model_name, timm.list_models())
            raise UserError(f"model_name {model_name!r} is not a timm image model.{options}")
        try:
            default = timm.models.get_pretrained_cfg(model_name)
        except RuntimeError as error:  # a tag that timm does not know, as in resnet18.nosuch
            raise UserError(f"model_name {model_name!r}: {error}") from error
        sized = {"img_size": size} if size and default is not None and default.fixed_input_size else {}
        if pretrained and not weights:
            remedy = "Give image_weights a local .safetensors or .pth file, or --no-pretrained"
            if not timm.models.is_model_pretrained(model_name):
                raise UserError(f"timm has no pretrained weights for {model_name!r}. {remedy}")
            with hub_access(f"the weights of {model_name!r}", remedy):
                self.model = timm.create_model(model_name, pretrained=True, num_classes=0, **sized)
        else:
            self.model = timm.create_model(model_name, num_classes=0, **sized)
            if pretrained:
                load_weights(self.model, local_path(weights, "image_weights") or Path(weights))
        config = timm.data.resolve_model_data_config(self.model)
        self.mean, self.std = config["mean"], config["std"]
        self.size = size or config["input_size"][-1]
        self.out_dim = self.model.num_features
        if hasattr(self.model, "head_hidden_size"):  # a few families pool to another width than their last stage
            self.out_dim = self.model.head_hidden_size
        self._freeze_if_asked()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels)  # (B, 3, S, S) -> (B, D)


class TextEncoder(Tower):
    """Any transformers text encoder: (C, L) token ids and mask -> (C, D), the first token or the mean.

    `model_name` is a hub name, a local folder or `package:NAME/FOLDER`. Random weights of the common
    architectures need no hub; `vocab_size` then is the tokenizer's. Raises UserError as ImageEncoder does.
    """

    def __init__(
        self,
        model_name: str = "distilbert-base-uncased",
        pretrained: bool = True,
        trainable: bool = True,
        pooling: str = "cls",
        vocab_size: int | None = None,
        config: object = None,
    ):
        super().__init__(trainable)
        self.pooling = pooling
        if pretrained:
            self.model = _pretrained_text_model(model_name)
        else:
            self.model = _random_text_model(config or text_config(model_name), vocab_size)
        self.model.float()  # transformers keeps the precision of the file, which may be half
        if getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None  # its output is not used: it would be parameters that never learn
        self.out_dim = self.model.config.hidden_size
        self._freeze_if_asked()

    @property
    def max_length(self) -> int:
        """The longest caption that the position embeddings hold, in tokens."""
        positions = getattr(self.model.config, "max_position_embeddings", None) or 10**6
        return positions - 2 if self.model.config.model_type in {"roberta", "xlm-roberta", "camembert"} else positions

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        features = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (C, L, D)
        if self.pooling == "cls":
            return features[:, 0]  # (C, L, D) -> (C, D)
        weight = attention_mask.unsqueeze(-1).to(features.dtype)  # (C, L, 1)
        return (features * weight).sum(1) / weight.sum(1).clamp(min=1)


def text_config(model_name: str):
    """The transformers configuration of a text encoder: built in, from a local folder, or from the hub."""
    from transformers import AutoConfig

    if model_name in SMALL_BERTS:
        layers, hidden = SMALL_BERTS[model_name]
        heads = hidden // 64
        sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
        return AutoConfig.for_model("bert", **sizes, intermediate_size=4 * hidden)
    if model_name in _KNOWN_CONFIGS:
        return AutoConfig.for_model(_KNOWN_CONFIGS[model_name])
    return _load(model_name, AutoConfig, "Give text_encoder_model a local folder, or one of the built-in names")


def _load(model_name: str, auto_class, remedy: str):
    """`auto_class.from_pretrained` of a local folder or a hub name; what goes wrong is a UserError."""
    path = local_path(model_name, "text_encoder_model")
    if path is not None:
        try:
            with no_loading_bar():
                return auto_class.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"text_encoder_model: {path} holds no transformers model that fits: {reason}") from error
    known = [*SMALL_BERTS, *_KNOWN_CONFIGS]
    near = "" if model_name in known else suggest(model_name, known)
    with hub_access(f"the text encoder {hub_name(model_name)!r}", f"{remedy}.{near}"):
        return auto_class.from_pretrained(hub_name(model_name))


def _auto_model(config):
    """The transformers class to load: of an encoder-decoder such as T5, the encoder alone."""
    from transformers import AutoModel, AutoModelForTextEncoding

    # The configuration of a T5 encoder that was saved says that it has no decoder, but knows of its layers
    has_decoder = getattr(config, "is_encoder_decoder", False) or hasattr(config, "num_decoder_layers")
    return AutoModelForTextEncoding if has_decoder else AutoModel


def _pretrained_text_model(model_name: str) -> nn.Module:
    from transformers import AutoConfig

    remedy = "Give text_encoder_model a local folder, or --no-pretrained"
    return _load(model_name, _auto_model(_load(model_name, AutoConfig, remedy)), remedy)


def _random_text_model(config, vocab_size: int | None) -> nn.Module:
    if vocab_size is not None:
        config.vocab_size = vocab_size
        if (getattr(config, "pad_token_id", None) or 0) >= vocab_size:
            config.pad_token_id = 0  # of a larger vocabulary
    return _auto_model(config).from_config(config)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a .safetensors or .pth file: by name, or, where no name agrees, tensor by tensor in order.

    A classifier in the file is left out. Raises UserError that names the first tensor that does not fit.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors each have their own
        # Of a file that is no pickle torch says in many lines that it may be a dangerous one
        known = isinstance(error, OSError) or path.suffix == ".safetensors"
        reason = str(error).splitlines()[0] if known and str(error) else type(error).__name__
        raise UserError(f"image_weights: {path} cannot be read as weights ({reason})") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise UserError(f"image_weights: {path} holds no weights by name, but a {type(state).__name__}")
    state = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    wanted = model.state_dict()
    if not state.keys() & wanted.keys():
        # Another code base's names for the same network: the order of the layers is what agrees.
        state = dict(zip(wanted, state.values(), strict=False))
    for name, tensor in wanted.items():
        found = state.get(name)
        if found is None or found.shape != tensor.shape:
            shape = "is missing" if found is None else f"has shape {tuple(found.shape)}"
            raise UserError(f"image_weights: {path} does not fit: {name} {shape}, wanted {tuple(tensor.shape)}")
    model.load_state_dict({name: state[name] for name in wanted})
