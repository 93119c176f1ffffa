"""Photographs of 2 to 12 megapixels to squares of 224 pixels, a second, on one core.

    python -m benchmarks.photos --images data/flickr8k/Images

The photographs are the folder's, enlarged and with sensor noise, as JPEG of quality 92. cv2: decoded whole and resized
with INTER_AREA, as many loaders do. ours, whole: PIL, decoded whole. ours: what training and indexing do, decoded at a
half or a quarter. Rounds in turn, medians; and how far ours is from ours, whole, in grey levels: mean and largest.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from clip_scratch import CFG
from clip_scratch.data.images import image_prefix, images_below, load_image

SIDE = 224
SIZES = (1600, 1200), (2048, 1536), (4000, 3000)


def enlarged(source: Path, target: Path, size: tuple[int, int], noise: np.random.Generator) -> Path:
    """A photograph as a camera with so many pixels might have taken it."""
    pixels = np.asarray(Image.open(source).convert("RGB").resize(size, Image.Resampling.BICUBIC), np.float32)
    pixels = (pixels + noise.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(target, quality=92)
    return target


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--n", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    _, square = image_prefix(CFG(size=SIDE), train=False)
    contenders = {
        "cv2": lambda path: cv2.resize(cv2.imread(path)[:, :, ::-1], (SIDE, SIDE), interpolation=cv2.INTER_AREA),
        "ours, whole": lambda path: square(load_image(path)),
        "ours": lambda path: square(load_image(path, SIDE)),
    }
    print(f"{'megapixels':>10}" + "".join(f"{name:>15}" for name in contenders) + f"{'ours / cv2':>12}  difference")
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            noise, names = np.random.default_rng(0), images_below(options.images)[: options.n]
            paths = [
                enlarged(options.images / name, Path(folder, f"{i}.jpg"), size, noise) for i, name in enumerate(names)
            ]
            seconds, squares = {name: [] for name in contenders}, {}
            for _ in range(options.rounds):
                for name, contender in contenders.items():
                    began = time.perf_counter()
                    squares[name] = [contender(path) for path in paths]
                    seconds[name].append(time.perf_counter() - began)
        rates = {name: len(paths) / np.median(values) for name, values in seconds.items()}
        off = np.abs(np.stack(squares["ours"]).astype(int) - np.stack(squares["ours, whole"]))
        row = "".join(f"{rate:>13.1f}/s" for rate in rates.values())
        ratio, megapixels = rates["ours"] / rates["cv2"], size[0] * size[1] / 1e6
        print(f"{megapixels:>10.1f}{row}{ratio:>12.2f}  {off.mean():.2f} ({off.max()})")


if __name__ == "__main__":
    main()
