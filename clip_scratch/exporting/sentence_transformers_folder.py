"""A dual encoder as a sentence-transformers folder, which SentenceTransformer loads with its own modules alone.

A pretrained CLIP is one Transformer module. A model from scratch is a Router with two routes: a transformers text tower
and its pooling, a timm image tower, and each head in Dense and LayerNorm modules. The heads are exact, the mlp too: see
`_mlp_head`.

Shapes: N images or captions, D features of a tower, P projected dimensions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import nn

from ..errors import UserError
from ..models.clip import CLIPModel, DualEncoder, ProjectionHead
from ..models.hf_clip import HFCLIPModel
from .dual_encoder import timm_config
from .transformers_folder import foreign_encoders, image_processor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PIXELS = {"backend": "pil"}  # the resize of clip_scratch; torchvision's differs by a level here and there


def check_sentence_transformers(model: DualEncoder) -> None:
    """Raise UserError where sentence-transformers is missing or has no module for a part of the model."""
    for name, value in foreign_encoders(model).items():
        near = "one timm model" if name == "model_name" else "a transformers text encoder"
        raise UserError(f"{name} {value!r}: sentence-transformers has no class for it. Train with {near} instead")
    try:
        import sentence_transformers  # noqa: F401
    except ImportError as error:
        missing = "the sentence-transformers format needs another library"
        raise UserError(f"{missing}: pip install 'clip_scratch[sentence-transformers]'") from error


def write_sentence_transformers_folder(model: DualEncoder, folder: Path) -> None:
    """Write a folder for `SentenceTransformer(folder).encode`, of sentences and of PIL images, L2-normalised."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Router
    from transformers import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else a report about the pooler that BERT's class adds, which nothing uses
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(model.cfg.seed)  # of that pooler
            module = _pretrained(model) if isinstance(model, HFCLIPModel) else Router(_routes(model))
        SentenceTransformer(modules=[module, Normalize()], device="cpu").save(str(folder), create_model_card=False)
    finally:
        logging.set_verbosity(verbosity)


def embed_with_sentence_transformers(
    folder: Path, images: Sequence[Path], captions: Sequence[str], device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings that sentence-transformers gives image files (N, P) and captions (C, P), in fp32 on the CPU."""
    from sentence_transformers import SentenceTransformer

    written, embedded = SentenceTransformer(str(folder), device=device, local_files_only=True), []
    for start in range(0, len(images), 64):
        batch = [Image.open(path) for path in images[start : start + 64]]
        embedded.append(written.encode(batch, convert_to_tensor=True).cpu())
    return torch.cat(embedded), written.encode(list(captions), convert_to_tensor=True).cpu()


def _pretrained(model: HFCLIPModel) -> nn.Module:
    processor, processing = image_processor(model), {}
    if model.padded_length:  # SigLIP
        processing["text"] = {"padding": "max_length", "return_attention_mask": False}
    if hasattr(processor, "max_num_patches"):  # which SigLIP 2's processor would replace by its defaults
        processing["image"] = {name: getattr(processor, name) for name in ("patch_size", "max_num_patches")}
    return _transformer(model.hf, [model.tokenizer, processor], processing_kwargs=processing)


def _routes(model: CLIPModel) -> dict[str, list[nn.Module]]:
    """By modality the modules from its input to its embedding."""
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import TimmWrapperModel

    image_tower = TimmWrapperModel(timm_config(model))
    image_tower.timm_model.load_state_dict(model.image_encoder.model.state_dict())
    processor = image_processor(model)
    if model.cfg.interpolation == "area":
        processor.resample = Image.Resampling.HAMMING  # PIL's nearest to OpenCV's area filter
    pooled = {"image": {"method": "forward", "method_output_name": "pooler_output"}}
    image = _transformer(image_tower, [processor], modality_config=pooled, module_output_name="sentence_embedding")
    text = _transformer(model.text_encoder.model, [model.tokenizer])
    pooling = Pooling(model.text_encoder.out_dim, model.cfg.text_pooling)
    return {"text": [text, pooling, *_head(model.text_projection)], "image": [image, *_head(model.image_projection)]}


def _transformer(tower: PreTrainedModel, processors: Sequence, **settings: object) -> nn.Module:
    """A Transformer module, which is made from a folder."""
    from sentence_transformers.base.modules import Transformer

    takes_images = any(hasattr(processor, "image_mean") for processor in processors)
    with tempfile.TemporaryDirectory() as folder:
        for part in (tower, *processors):
            part.save_pretrained(folder)
        module = Transformer(folder, processor_kwargs=dict(_PIXELS) if takes_images else {}, **settings)
    if takes_images:  # saved with the module's settings, which its loader reads
        module.config_keys, module.processor_kwargs = [*module.config_keys, "processor_kwargs"], _PIXELS
    return module


def _head(head: nn.Sequential) -> list[nn.Module]:
    layer = head[-1]
    return _mlp_head(layer) if isinstance(layer, ProjectionHead) else [_dense(layer.weight, layer.bias)]


def _mlp_head(head: ProjectionHead) -> list[nn.Module]:
    """LayerNorm(p + fc(GELU(p))) of p = projection(x), in modules without a residual connection.

    GELU(p) - GELU(-p) = p. So the first layer gives GELU of both p and -p, and the second fc(GELU(p)) + p.
    """
    from sentence_transformers.sentence_transformer.modules import LayerNorm

    weight, bias = head.projection.weight, head.projection.bias
    eye = torch.eye(len(bias), device=bias.device)
    norm = LayerNorm(len(eye))
    norm.norm.load_state_dict(head.layer_norm.state_dict())
    both = _dense(torch.cat([weight, -weight]), torch.cat([bias, -bias]), nn.GELU())
    return [both, _dense(torch.cat([head.fc.weight + eye, -eye], 1), head.fc.bias), norm]


def _dense(weight: torch.Tensor, bias: torch.Tensor, activation: nn.Module | None = None) -> nn.Module:
    from sentence_transformers.base.modules import Dense

    weight, bias = weight.detach().cpu().clone(), bias.detach().cpu().clone()
    return Dense(*reversed(weight.shape), activation_function=activation, init_weight=weight, init_bias=bias)
