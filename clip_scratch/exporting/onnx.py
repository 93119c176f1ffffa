"""The towers of a model as ONNX files, which onnxruntime runs without torch.

Shapes: B images, C captions, L tokens, S pixels a side, P projected dimensions.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from ..data.tokenizer import tokenize
from ..errors import UserError
from ..models.clip import DualEncoder

_OPSET = 20


class _TextTower(nn.Module):
    def __init__(self, model: DualEncoder):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model.encode_text(input_ids, attention_mask)


def write_text_tower(model: DualEncoder, folder: Path) -> None:
    """Write `text.onnx` and `tokenizer.json` into `folder`, which is made.

    The network takes `input_ids` and `attention_mask`, int64 (C, L), and gives `text_embeddings`, L2-normalised float32
    (C, P), whatever the model's precision. The tokenizer truncates and pads as the model expects. Raises UserError
    where the onnx extra is missing, or a tower cannot be exported.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(model, folder / "tokenizer.json")
    tower = _TextTower(_in_fp32(model))
    tokens = tokenize(["a dog", "two dogs run over the grass"], model.tokenizer, model.cfg.max_length)
    sizes = {0: torch.export.Dim("captions"), 1: torch.export.Dim("tokens", max=model.tokenizer.model_max_length)}
    _export(
        tower, tokens.batch([0, 1]), ["input_ids", "attention_mask"], "text_embeddings", sizes, folder / "text.onnx"
    )


def _in_fp32(model: DualEncoder) -> DualEncoder:
    """A copy of a model on the CPU that computes in fp32."""
    model = copy.deepcopy(model).float().cpu().eval()
    model.cfg = dataclasses.replace(model.cfg, precision="fp32")
    return model


def _write_tokenizer(model: DualEncoder, path: Path) -> None:
    tokenizer = getattr(model.tokenizer, "backend_tokenizer", None)
    if tokenizer is None:
        name = type(model.tokenizer).__name__
        raise UserError(f"{name} has no fast version, which a tokenizer.json needs: this text tower stays in PyTorch")
    tokenizer = copy.deepcopy(tokenizer)
    limit = min(model.cfg.max_length, model.tokenizer.model_max_length)
    tokenizer.enable_truncation(limit)
    pad_id = model.tokenizer.pad_token_id or 0
    tokenizer.enable_padding(pad_id=pad_id, pad_token=model.tokenizer.pad_token or "", length=model.padded_length)
    tokenizer.save(str(path))


def _export(tower: nn.Module, example: tuple, inputs: list[str], output: str, sizes: dict, path: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("ONNX files need other libraries: pip install 'clip_scratch[onnx]'") from error
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                tower, example, dynamo=True, opset_version=_OPSET, input_names=inputs, output_names=[output],
                dynamic_shapes=tuple(dict(sizes) for _ in inputs), verbose=False,
            )  # fmt: skip
            program.save(path, external_data=False)
    except Exception as error:  # the exporter's own classes; their first lines say what it could not trace
        raise UserError(f"{path.stem} tower cannot be exported to ONNX: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress and its warnings about torch's own code."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
