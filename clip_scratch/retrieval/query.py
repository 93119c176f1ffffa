"""Queries -> embeddings: sentences, images, and their sums and differences, by the model that an index carries.

An index has the text tower alone, as ONNX or TorchScript: onnxruntime and tokenizers start in a third of a second,
torch in one and a half, all that a model needs in five.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.images import IMAGE_SUFFIXES
from ..errors import UserError

if TYPE_CHECKING:
    from ..models.clip import DualEncoder
    from .embed import ImageLike

MODEL, QUICK = "model", "query"  # folders of an index: a copy of the run's best/, and the text tower alone
_TERM = re.compile(r"(?:^|\s)([+-])\s+")
_WEIGHT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*\*\s*(.+)", re.DOTALL)


class QueryEncoder:
    """What embeds queries as the images of an index were embedded; the model is loaded when it is first needed."""

    def __init__(self, folder: Path, device: str = "cpu"):
        self.folder, self.device = folder, device

    @cached_property
    def model(self) -> DualEncoder:
        """The whole model, for images and where there is no text tower alone."""
        from ..models.saved import load

        return load(self.folder / MODEL, self.device)

    @cached_property
    def _quick(self) -> tuple | None:
        """The text tower alone, (ids, mask) -> embeddings, and its tokenizer; None where there is none that runs."""
        path = self.folder / QUICK
        try:
            from tokenizers import Tokenizer

            run = _onnx(path / "text.onnx") if (path / "text.onnx").is_file() else _torchscript(path / "text.pt")
            return run, Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception:  # no library, no file, or a damaged one: each library has errors of its own
            return None

    def text(self, sentences: Sequence[str]) -> np.ndarray:
        """Sentences -> (N, P) float32, L2-normalised. Raises UserError for one without text."""
        if not all(sentence.strip() for sentence in sentences):
            raise UserError("a query has no text")
        if self._quick is None or "model" in self.__dict__:
            from .embed import encode_text

            return encode_text(self.model, sentences).numpy()
        run, tokenizer = self._quick
        encoded = tokenizer.encode_batch(list(sentences))
        return run(*(np.array([getattr(e, name) for e in encoded], np.int64) for name in ("ids", "attention_mask")))

    def image(self, images: Sequence[ImageLike]) -> np.ndarray:
        """Image files, PIL images or arrays -> (N, P) float32, L2-normalised. Raises UserError for a corrupt one."""
        from .embed import encode_image

        return encode_image(self.model, images).numpy()

    def composed(self, query: str) -> tuple[np.ndarray, bool]:
        """A query as typed -> its embedding (P,), and whether it is of words alone.

        `+` and `-` between spaces add and subtract sentences or image files, `0.5*` before one weighs it: "photo.jpg +
        at night - 0.5*people". Raises UserError where a term is empty or everything cancels out.
        """
        terms = [(weight, name, _image_file(name)) for weight, name in parse(query)]
        total = sum(weight * (self.image([file]) if file else self.text([name]))[0] for weight, name, file in terms)
        length = np.linalg.norm(total)
        if length < 1e-6:
            raise UserError(f"the parts of the query {query!r} cancel out")
        return total / length, not any(file for *_, file in terms)


def _onnx(path: Path) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})[0]


def _torchscript(path: Path) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        network = torch.jit.load(path)
    return torch.inference_mode()(lambda ids, mask: network(torch.from_numpy(ids), torch.from_numpy(mask)).numpy())


def parse(query: str) -> list[tuple[float, str]]:
    """The weighted terms of a query: "a + 0.5*b - c" -> [(1, "a"), (0.5, "b"), (-1, "c")]."""
    parts = _TERM.split(query.strip())
    parts = ["+", *parts] if parts[0].strip() or len(parts) == 1 else parts[1:]
    terms = []
    for sign, term in zip(parts[::2], parts[1::2], strict=True):
        weight, term = 1.0, term.strip()
        if found := _WEIGHT.fullmatch(term):
            weight, term = float(found[1]), found[2].strip()
        if not term:
            raise UserError(f"a part of the query {query!r} has no text" if query.strip() else "the query has no text")
        terms.append((weight if sign == "+" else -weight, term))
    return terms


def _image_file(name: str) -> str:
    """The image file that a term names, "" for a sentence. Raises UserError where there is no such file."""
    path = os.path.expanduser(name)
    if Path(path).suffix.lower() not in IMAGE_SUFFIXES:
        return ""
    if not os.path.isfile(path):
        raise UserError(f"there is no image {name}")
    return path
