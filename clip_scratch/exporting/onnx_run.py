"""Embed images and sentences with the ONNX files beside this script: python run.py photo.jpg "a dog" "a cat"

Needs numpy, pillow, onnxruntime and tokenizers. An exported folder has it as run.py.
"""

import json
import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image, ImageOps
from tokenizers import Tokenizer

HERE, CPU = Path(__file__).parent, ["CPUExecutionProvider"]
CONFIG = json.loads((HERE / "config.json").read_text())
IMAGE, TEXT = (InferenceSession(str(HERE / name), providers=CPU) for name in ("image.onnx", "text.onnx"))
TOKENIZER = Tokenizer.from_file(str(HERE / "tokenizer.json"))


def embed_images(paths, batch_size=32):
    """Image files -> (N, P) float32, L2-normalised."""
    batches = [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)]
    return np.concatenate([IMAGE.run(None, {"pixel_values": np.stack([square(p) for p in b])})[0] for b in batches])


def embed_texts(sentences, batch_size=64):
    """Sentences -> (N, P) float32, L2-normalised."""
    embeddings = []
    for i in range(0, len(sentences), batch_size):
        encoded = TOKENIZER.encode_batch(sentences[i : i + batch_size])
        inputs = {"input_ids": [e.ids for e in encoded], "attention_mask": [e.attention_mask for e in encoded]}
        embeddings += TEXT.run(None, {name: np.array(rows, np.int64) for name, rows in inputs.items()})
    return np.concatenate(embeddings)


def square(path):
    """An image file as the network takes it: uint8 (3, S, S), stretched, or the centre of `shorter_side` pixels."""
    size, short, filter = CONFIG["size"], CONFIG["shorter_side"], CONFIG["interpolation"]
    image = Image.open(path)
    image.draft(None, (2 * max(size, short),) * 2)  # a large JPEG is decoded at 1/2, 1/4 or 1/8, as in training
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    (width, height), wide, high = image.size, size, size
    if short:
        scaled = [side * short / min(image.size) for side in image.size]
        wide, high = (round(side) if filter == "area" else int(side) for side in scaled)
    if filter == "area" and (wide < width or high < height):
        pixels = np.asarray(image.convert("RGB"), np.float32).reshape(height, -1)
        rows = (overlap(height, high) @ pixels).reshape(high, width, 3)
        pixels = (overlap(width, wide) @ rows + 0.5).astype(np.uint8)  # (high, wide, 3)
    else:
        filter = Image.Resampling.BICUBIC if filter == "bicubic" else Image.Resampling.BILINEAR
        pixels = np.asarray(image.convert("RGB").resize((wide, high), filter))
    left, top = (wide - size) // 2, (high - size) // 2
    return pixels[top : top + size, left : left + size].transpose(2, 0, 1)


def overlap(before, after):
    """The share of each of `after` output pixels that each of `before` input pixels covers: (after, before)."""
    edges, starts = np.linspace(0, before, after + 1)[:, None], np.arange(before)
    covered = np.minimum(edges[1:], starts + 1) - np.maximum(edges[:-1], starts)
    return (covered.clip(0) * (after / before)).astype(np.float32)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    photo, *sentences = sys.argv[1:]
    for sentence, cosine in zip(sentences, embed_texts(sentences) @ embed_images([photo])[0], strict=True):
        print(f"{cosine:.4f}  {sentence}")
