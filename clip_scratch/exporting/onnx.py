"""The towers of a model as ONNX files, which onnxruntime runs without torch, in fp32 or int8.

Shapes: B images, C captions, L tokens, S pixels a side, P projected dimensions.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import logging
import shutil
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..data.images import shorter_side
from ..data.loaders import Batch
from ..data.tokenizer import tokenize
from ..errors import UserError
from ..models.clip import DualEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPSET = 20
_CALIBRATION_IMAGES = 256


class _TextTower(nn.Module):
    def __init__(self, model: DualEncoder):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model.encode_text(input_ids, attention_mask)


class _ImageTower(nn.Module):
    def __init__(self, model: DualEncoder):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(pixel_values)


class OnnxTowers:
    """A written folder, as `embed_batches` needs it."""

    device = torch.device("cpu")

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase):
        import onnxruntime

        self.tokenizer = tokenizer
        self.image, self.text = (onnxruntime.InferenceSession(folder / f"{tower}.onnx") for tower in ("image", "text"))

    def eval(self) -> None:
        """There is no other mode."""

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of a batch's images (B, P) and captions (C, P)."""
        tokens = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
        images = self.image.run(None, {"pixel_values": batch["pixel_values"].numpy()})[0]
        return torch.from_numpy(images), torch.from_numpy(self.text.run(None, tokens)[0])


def write_onnx_folder(model: DualEncoder, folder: Path, batches: Iterable[Batch], int8: bool = False) -> None:
    """Write both towers, tokenizer.json, config.json and run.py, which needs numpy, pillow, onnxruntime and tokenizers.

    `image.onnx` takes `pixel_values`, uint8 (B, 3, S, S), and gives `image_embeddings`, L2-normalised float32 (B, P);
    `text.onnx` as in `write_text_tower`. With `int8` the image tower is quantised with the ranges that the images of
    `batches` have in it, the text tower's weights alone. Raises UserError as `write_text_tower` does.
    """
    write_text_tower(model, folder)
    cfg, path = model.cfg, folder / "image.onnx"
    pixels = torch.zeros(2, 3, cfg.size, cfg.size, dtype=torch.uint8)
    sizes = {0: torch.export.Dim("images")}
    _export(_ImageTower(_in_fp32(model)), (pixels,), ["pixel_values"], "image_embeddings", sizes, path)
    # "area" averages as BOX does where an image is made smaller, which is the rule
    resample = {"bilinear": "BILINEAR", "bicubic": "BICUBIC", "area": "BOX"}[cfg.interpolation]
    facts = {"size": cfg.size, "shorter_side": shorter_side(cfg), "resample": resample, "dim": cfg.projection_dim}
    bias = None if model.logit_bias is None else model.logit_bias.item()
    facts |= {"logit_scale": model.logit_scale.item(), "logit_bias": bias, "int8": int8}
    facts |= {"image_tower": cfg.model_name, "text_tower": cfg.text_encoder_model}
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    shutil.copy(Path(__file__).with_name("run_onnx.py"), folder / "run.py")
    if int8:
        _quantize(folder, batches)


def _quantize(folder: Path, batches: Iterable[Batch]) -> None:
    """Put int8 files in the places of the fp32 ones."""
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(q.CalibrationDataReader):
        def __init__(self) -> None:
            images = torch.cat([batch["pixel_values"] for batch in islice(batches, 16)])[:_CALIBRATION_IMAGES]
            size = min(16, len(images))
            self.batches = iter(images[: len(images) // size * size].split(size))  # all of one size

        def get_next(self) -> dict | None:
            pixels = next(self.batches, None)
            return None if pixels is None else {"pixel_values": pixels.numpy()}

    ready, done = folder / "ready.onnx", folder / "int8.onnx"
    with _quiet():
        for tower in ("image", "text"):
            quant_pre_process(folder / f"{tower}.onnx", ready, skip_symbolic_shape=True)
            if tower == "image":
                # Of EfficientNet-lite0 the mean cosine to fp32 is 0.998; with Clip and Add left in fp32 0.987
                q.quantize_static(ready, done, Images(), per_channel=True, activation_type=q.QuantType.QUInt8)
            else:
                q.quantize_dynamic(ready, done, per_channel=True)
            done.replace(folder / f"{tower}.onnx")
            ready.unlink()


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
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
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
