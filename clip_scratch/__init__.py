"""clip_scratch: train, measure and search with a CLIP-style dual encoder. The public names, nothing else."""

import importlib
import sys
import types

# Names are looked up when they are first used, so that `import clip_scratch` loads no heavy library.
_HOME = {
    "CFG": "config",
    "PRESETS": "presets",
    "UserError": "errors",
    "CLIPModel": "models.clip",
    "ProjectionHead": "models.clip",
    "ImageEncoder": "models.encoders",
    "TextEncoder": "models.encoders",
    "make_train_valid_dfs": "data.captions",
    "read_captions": "data.captions",
    "build_loaders": "data.loaders",
    "contrastive_loss": "training.losses",
    "train_epoch": "training.engine",
    "valid_epoch": "training.engine",
    "load": "models.saved",
    "recall_at_k": "evaluation.retrieval",
    "classify": "evaluation.zero_shot",
    "compare": "evaluation.comparison",
    "encode_image": "retrieval.embed",
    "encode_text": "retrieval.embed",
    "get_image_embeddings": "retrieval.embed",
    "find_matches": "retrieval.matches",
    "find_captions": "retrieval.matches",
    "Index": "retrieval.index",
    "explain": "retrieval.explain",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


class _Package(types.ModuleType):
    """Keeps `classify` and `compare` the public functions: importing the verbs of these names would replace them."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOME or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
