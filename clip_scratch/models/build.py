"""The model that the settings ask for, of either backend."""

from collections.abc import Sequence

from ..config import CFG
from ..data.tokenizer import build_tokenizer
from .clip import CLIPModel, DualEncoder


def model_class(cfg: CFG) -> type[DualEncoder]:
    if cfg.backend == "hf_clip":
        from .hf_clip import HFCLIPModel

        return HFCLIPModel
    return CLIPModel


def build_model(cfg: CFG, captions: Sequence[str] = ()) -> DualEncoder:
    """A model to train, whose tokenizer may be learned from the training `captions`.

    Its `cfg` has what its pretrained parts decide: image size, loss ...
    """
    return model_class(cfg)(cfg, None if cfg.backend == "hf_clip" else build_tokenizer(cfg, captions))
