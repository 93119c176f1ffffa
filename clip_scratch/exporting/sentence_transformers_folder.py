"""A model as a sentence-transformers folder: its own modules for the towers, Dense layers for linear heads.

A model from scratch becomes a Router with two routes, Transformer (a timm or a text tower), Pooling, Dense, Normalize;
a fine-tuned CLIP a Transformer with transformers' own class, and Normalize.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..data.loaders import Batch
from ..errors import UserError
from ..hub import is_function
from ..models.clip import CLIPModel, DualEncoder
from ..models.hf_clip import HFCLIPModel
from .dual_encoder import timm_config
from .transformers_folder import image_processor, write_transformers_folder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_FEATURES = {
    kind: {"method": f"get_{kind}_features", "method_output_name": "pooler_output"} for kind in ("text", "image")
}
_POOLED = {"image": {"method": "forward", "method_output_name": "pooler_output"}}


class SentenceTransformerTowers:
    """A written folder, as `embed_batches` needs it."""

    device = torch.device("cpu")

    def __init__(self, folder: Path, model: DualEncoder):
        from sentence_transformers import SentenceTransformer

        self.tokenizer = model.tokenizer
        with _quiet():
            self.model = SentenceTransformer(str(folder), device="cpu")

    def eval(self) -> None:
        """There is no other mode."""

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of a batch's images (B, P) and captions (C, P)."""
        pixels = batch["pixel_values"].permute(0, 2, 3, 1).numpy()
        images = self.model.encode([Image.fromarray(np.ascontiguousarray(image)) for image in pixels])
        tokens = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "modality": "text"}
        return torch.from_numpy(images), self.model(tokens)["sentence_embedding"]


def write_sentence_transformers_folder(model: DualEncoder, folder: Path) -> None:
    """Write a folder that `SentenceTransformer(folder).encode` takes images (PIL) and sentences with.

    Embeddings are those of the model, where images are resized by bilinear or bicubic interpolation ("area" becomes
    bilinear). Raises UserError where sentence-transformers is missing, and for a part that it has no module for.
    """
    try:
        import sentence_transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            "this format needs another library: pip install 'clip_scratch[sentence-transformers]'"
        ) from error
    make = _fine_tuned if isinstance(model, HFCLIPModel) else _from_scratch
    with tempfile.TemporaryDirectory() as work, torch.no_grad(), _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.cfg.seed)  # of BERT's pooler, which plays no part
        make(model, Path(work)).save(str(folder), create_model_card=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars, and its warning that the text tower has no pooler."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def _fine_tuned(model: HFCLIPModel, work: Path) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer

    write_transformers_folder(model, work, ())
    tower = Transformer(str(work), modality_config=_FEATURES, module_output_name="sentence_embedding")
    return SentenceTransformer(modules=[tower, Normalize()], device="cpu")


def _from_scratch(model: CLIPModel, work: Path) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import TimmWrapperModel

    cfg = model.cfg
    for name in ("model_name", "text_encoder_model"):
        if is_function(value := getattr(cfg, name)):
            raise UserError(
                f"{name} {value!r}: sentence-transformers has no module for an encoder of your own: use --format onnx"
            )
    if cfg.head != "linear":
        raise UserError(
            "head 'mlp' has no module in sentence-transformers. Train with --head linear, or use --format onnx"
        )

    image = TimmWrapperModel(timm_config(model))
    image.timm_model.load_state_dict(model.image_encoder.model.state_dict())
    image.save_pretrained(work / "image")
    image_processor(model).save_pretrained(work / "image")
    model.text_encoder.model.save_pretrained(work / "text")
    model.tokenizer.save_pretrained(work / "text")

    def head(linear: nn.Linear) -> Dense:
        dense = Dense(linear.in_features, linear.out_features, activation_function=nn.Identity())
        dense.linear.load_state_dict(linear.state_dict())
        return dense

    pictures = Transformer(str(work / "image"), modality_config=_POOLED, module_output_name="sentence_embedding")
    words = Transformer(str(work / "text"), max_seq_length=min(cfg.max_length, model.tokenizer.model_max_length))
    pooling = Pooling(words.get_embedding_dimension(), pooling_mode=cfg.text_pooling)
    routes = {
        "image": [pictures, head(model.image_projection[-1]), Normalize()],
        "text": [words, pooling, head(model.text_projection[-1]), Normalize()],
    }
    router = Router(routes, default_route="text", route_mappings={(None, kind): kind for kind in routes})
    return SentenceTransformer(modules=[router], device="cpu")
