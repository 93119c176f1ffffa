"""The model that the settings ask for, whichever backend builds it."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import CFG
from ..data.tokenizer import build_tokenizer
from .clip import CLIPModel, DualEncoder


def model_class(cfg: CFG) -> type[DualEncoder]:
    """The class of model of the backend."""
    if cfg.backend == "hf_clip":
        from .hf_clip import HFCLIPModel

        return HFCLIPModel
    return CLIPModel


def build_model(cfg: CFG, captions: Sequence[str] = ()) -> DualEncoder:
    """A model to train. Its `cfg` has what its pretrained parts decide: image size, loss ...

    From scratch, where no tokenizer is available, one is learned from the training `captions`.
    """
    if cfg.backend == "hf_clip":
        return model_class(cfg)(cfg)
    return CLIPModel(cfg, build_tokenizer(cfg, captions))
