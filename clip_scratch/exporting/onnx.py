"""The towers of a model as ONNX files, which onnxruntime runs without torch.

Shapes: B images, C captions, L tokens, S pixels a side, P projected dimensions.
"""

import contextlib
import copy
import dataclasses
import io
import logging
import os
import runpy
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from ..data.images import shorter_side
from ..data.loaders import Batch
from ..data.tokenizer import tokenize
from ..errors import UserError, first_line
from ..files import write_atomically, write_json
from ..models.clip import DualEncoder

_OPSET = 20


class _ImageTower(nn.Module):
    def __init__(self, model: DualEncoder):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image((pixel_values.float() - self.model.mean) / self.model.std)


class _TextTower(nn.Module):
    def __init__(self, model: DualEncoder):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model.encode_text(input_ids, attention_mask)


def write_onnx_folder(model: DualEncoder, folder: Path) -> None:
    """Fill a folder that needs no torch: both towers, `tokenizer.json`, `config.json`, and `run.py`, which uses them.

    `image.onnx` takes `pixel_values`, uint8 (B, 3, S, S), and gives `image_embeddings`, L2-normalised float32 (B, P).
    For the rest, and what is raised, see `write_text_tower`.
    """
    cfg = model.cfg
    example = torch.zeros(2, 3, cfg.size, cfg.size, dtype=torch.uint8)
    path, sizes = folder / "image.onnx", {0: torch.export.Dim("images")}
    _export(_ImageTower(_in_fp32(model)), (example,), ["pixel_values"], "image_embeddings", sizes, path)
    write_text_tower(model, folder)
    names = [cfg.model_name] if cfg.backend == "hf_clip" else [cfg.model_name, cfg.text_encoder_model]
    settings = {
        "names": [os.path.basename(name) if os.path.isabs(name) else name for name in names],  # no path of this machine
        "size": cfg.size,
        "shorter_side": shorter_side(cfg),  # in pixels, before the centre is cropped; 0: stretched to the square
        "interpolation": cfg.interpolation,
        "max_length": min(cfg.max_length, model.tokenizer.model_max_length),
        "logit_scale": model.logit_scale.item(),
        "logit_bias": None if model.logit_bias is None else model.logit_bias.item(),
    }
    write_json(folder / "config.json", settings)
    shutil.copyfile(Path(__file__).with_name("onnx_run.py"), folder / "run.py")


def quantize_onnx_folder(folder: Path, batches: Iterable[Batch]) -> None:
    """Replace both networks of a folder by int8 ones, by onnxruntime.

    The image tower has the ranges of activations that the images of `batches` reach, averaged over batches: outliers
    then cost the others less. The text tower chooses the ranges of its activations as it runs.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static

    pixels = ({"pixel_values": batch["pixel_values"].contiguous().numpy()} for batch in batches)
    reader = SimpleNamespace(get_next=lambda: next(pixels, None))
    image, text = folder / "image.onnx", folder / "text.onnx"
    with _quiet():
        quantize_static(
            image, image, reader, per_channel=True, activation_type=QuantType.QUInt8,
            extra_options={"CalibMovingAverage": True},
        )  # fmt: skip
        quantize_dynamic(text, text, per_channel=True)


def embed_with_onnx_folder(
    folder: Path, images: Sequence[Path], captions: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of image files (N, P) and captions (C, P) by the folder's own run.py."""
    script = runpy.run_path(str(folder / "run.py"))
    return torch.from_numpy(script["embed_images"](images)), torch.from_numpy(script["embed_texts"](captions))


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


def trace_text_tower(model: DualEncoder, folder: Path) -> None:
    """Write `text.pt` and `tokenizer.json`: the text tower as TorchScript, which runs with torch alone.

    It takes and gives what `text.onnx` does. TorchScript is deprecated, but a program of torch.export takes longer to
    load than transformers. Raises UserError where the trace of one batch does not hold for another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(model, folder / "tokenizer.json")
    tower = _TextTower(_in_fp32(model))
    tokens = tokenize(["a dog", "two dogs run over the grass", "snow"], model.tokenizer, model.cfg.max_length)
    try:
        with _quiet(), torch.no_grad():
            network = torch.jit.trace(tower, tokens.batch([0, 1]), check_trace=False)
            torch.testing.assert_close(network(*tokens.batch([2])), tower(*tokens.batch([2])), atol=1e-5, rtol=0)
    except Exception as error:  # of the tracer, and of a network that looks at sizes
        raise UserError(f"the text tower cannot be traced: {first_line(error)}") from error
    content = network.save_to_buffer()  # its own writer aborts the process on a full disk
    write_atomically(folder / "text.pt", lambda temporary: temporary.write_bytes(content))


def _in_fp32(model: DualEncoder) -> DualEncoder:
    """A copy of a model on the CPU that computes in fp32."""
    model = copy.deepcopy(model).float().cpu().eval()
    model.cfg = dataclasses.replace(model.cfg, precision="fp32", channels_last=False)
    return model


def check_onnx(_: DualEncoder | None = None) -> None:
    """Raise UserError where the onnx extra is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("ONNX files need other libraries: pip install 'clip_scratch[onnx]'") from error


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
    check_onnx()
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                tower, example, dynamo=True, opset_version=_OPSET, input_names=inputs, output_names=[output],
                dynamic_shapes=tuple(dict(sizes) for _ in inputs), verbose=False,
            )  # fmt: skip
            program.save(path, external_data=False)
    except Exception as error:  # the exporter's own classes; the first cause says what it could not trace
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(f"{path.stem} tower cannot be exported to ONNX: {first_line(cause)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress of exporter and quantizer, and their warnings about code that is not ours."""
    before, sink = logging.root.manager.disable, io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)
