"""Compare an image with sentences: `python run.py photo.jpg "a dog" "a cat"`."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

FOLDER = Path(__file__).parent
CONFIG = json.loads((FOLDER / "config.json").read_text())
TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))  # cuts and pads as the model expects


def square(image):
    """An image as the model sees it: uint8 (3, S, S)."""
    size, short = CONFIG["size"], CONFIG["shorter_side"]
    image = ImageOps.exif_transpose(image).convert("RGB")
    scale = short / min(image.size) if short else None  # without a shorter side the image is stretched
    wide, high = (round(side * scale) for side in image.size) if scale else (size, size)
    image = image.resize((wide, high), Image.Resampling[CONFIG["resample"]])
    left, top = (wide - size) // 2, (high - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def embed_images(images):
    """Normalised embeddings of PIL images: float32 (N, P)."""
    session = onnxruntime.InferenceSession(FOLDER / "image.onnx")
    return session.run(None, {"pixel_values": np.stack([square(image) for image in images])})[0]


def embed_texts(texts):
    """Normalised embeddings of sentences: float32 (N, P)."""
    session = onnxruntime.InferenceSession(FOLDER / "text.onnx")
    encoded = TOKENIZER.encode_batch(list(texts))
    ids = np.array([one.ids for one in encoded], np.int64)
    mask = np.array([one.attention_mask for one in encoded], np.int64)
    return session.run(None, {"input_ids": ids, "attention_mask": mask})[0]


if __name__ == "__main__":
    cosines = embed_images([Image.open(sys.argv[1])]) @ embed_texts(sys.argv[2:]).T
    for text, cosine in sorted(zip(sys.argv[2:], cosines[0].tolist(), strict=True), key=lambda pair: -pair[1]):
        print(f"{cosine:.3f}  {text}")
