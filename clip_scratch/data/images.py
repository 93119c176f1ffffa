"""Image files -> RGB arrays -> uint8 squares, by albumentations. The model itself normalises, on its own device.

Training splits the way in two: what is the same in every epoch is done once by `image_prefix`, and augment.py draws
crop, flip and colours on its squares. `image_transform` is both in one pipeline, for one image at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError

if TYPE_CHECKING:
    from ..config import CFG

# albumentations asks the network for a newer release when it is imported
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def load_image(image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """An image file, PIL image or array as RGB uint8, (H, W, 3).

    EXIF orientation is applied; greyscale, palette, CMYK and 16-bit images become RGB; what is transparent
    lies on white. A truncated or corrupt file raises OSError (or ValueError or SyntaxError, as PIL does).
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    elif not isinstance(image, Image.Image):
        with Image.open(image) as file:
            file.load()
            image = file
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit greyscale: PIL would clip it to white
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def images_below(folder: Path) -> list[str]:
    """The image files below a folder, as sorted paths relative to it. Raises UserError where there are none.

    Hidden files are skipped, and with them macOS's AppleDouble files (`._x.jpg`), which are not images.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    names = sorted(str(path.relative_to(folder)) for path in found if not path.name.startswith("."))
    if not names:
        raise UserError(f"there are no images below {folder}")
    return names


def image_transform(cfg: CFG, train: bool):
    """The albumentations pipeline: `transform(image=array)["image"]` is a uint8 tensor (3, size, size).

    Training: random resized crop, flip and colour jitter, each a setting. Evaluation, and training without a
    random crop: the whole image resized to the square, so that nothing a caption mentions is cut off, or with
    cfg.resize "crop" its shorter side resized and the centre kept, as CLIP does (Radford et al. 2021).
    """
    import albumentations as A
    import cv2

    if not train:
        return A.Compose([*_evaluation_geometry(cfg), A.ToTensorV2()])
    if cfg.crop_scale < 1:
        interpolation = cv2.INTER_CUBIC if cfg.interpolation == "bicubic" else cv2.INTER_LINEAR
        steps = [
            A.RandomResizedCrop(
                (cfg.size, cfg.size), (cfg.crop_scale, 1.0), interpolation=interpolation, area_for_downscale="image"
            )
        ]
    else:
        steps = _evaluation_geometry(cfg)
    if cfg.horizontal_flip:
        steps.append(A.HorizontalFlip(p=cfg.horizontal_flip))
    if cfg.color_jitter or cfg.hue_jitter:
        around = (1 - cfg.color_jitter, 1 + cfg.color_jitter)
        hue = (-cfg.hue_jitter, cfg.hue_jitter)
        steps.append(A.ColorJitter(brightness=around, contrast=around, saturation=around, hue=hue, p=0.8))
    return A.Compose([*steps, A.ToTensorV2()])


def image_prefix(cfg: CFG, train: bool, side: int):
    """What is the same in every epoch: `prefix(image=array)["image"]` is a uint8 square (side, side, 3).

    `side` is that of `prefix_side`. Evaluation, and training without a random crop: the square that the model sees.
    Training with one: the whole image stretched, since a crop of the stretched square is a crop of the image.
    """
    import albumentations as A

    if train and cfg.crop_scale < 1:
        cfg = dataclasses.replace(cfg, size=side, resize="stretch")
    return A.Compose(_evaluation_geometry(cfg))


def prefix_side(cfg: CFG, train: bool, paths: Sequence[str | Path]) -> int:
    """Pixels a side of `image_prefix`'s squares of these image files.

    With a random crop 8/7 of the size, but no more than the shorter side of most images: larger squares would hold
    no more of the picture. The headers of a sample of the files tell.
    """
    if not train or cfg.crop_scale == 1:
        return cfg.size
    shorter = []
    for path in paths[:: -(-len(paths) // 100)]:
        with reading(path), Image.open(path) as file:
            shorter.append(min(file.size))
    return max(cfg.size, min(round(cfg.size * 8 / 7), int(np.median(shorter))))


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn whatever a decoder raises inside into a UserError that names the file."""
    try:
        yield
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError and classes of their own
        fix = "Mend it, or leave it out with --on-bad-image skip."
        raise UserError(f"{path}: {fault_of(path, error)}. {fix}") from error


def fault_of(path: str | Path, error: Exception) -> str:
    """Why an image cannot be used, after a decoder has raised `error`."""
    if not os.path.isfile(path):
        return "no such file"
    return f"cannot be decoded ({str(error).splitlines()[0] if str(error) else type(error).__name__})"


def _evaluation_geometry(cfg: CFG) -> list:
    """What makes the square that evaluation sees.

    Bilinear and bicubic are PIL's, which a pretrained CLIP was fed with: they average where they reduce. OpenCV's
    of the same name do not, and its area filter is the only one there that does.
    """
    import albumentations as A

    short = shorter_side(cfg)
    if cfg.interpolation != "area":
        sides = {"size": cfg.size, "short": short}
        return [A.Lambda(image=partial(_resize_as_pil, interpolation=cfg.interpolation, **sides))]
    if short:
        return [A.SmallestMaxSize(short, area_for_downscale="image"), A.CenterCrop(cfg.size, cfg.size)]
    return [A.Resize(cfg.size, cfg.size, area_for_downscale="image")]


def shorter_side(cfg: CFG) -> int:
    """What the shorter side of an evaluation image is resized to before the center is cropped; 0 without a crop."""
    word, _, pixels = cfg.resize.partition(":")
    return int(pixels or cfg.size) if word == "crop" else 0


def _resize_as_pil(image: np.ndarray, size: int, short: int, interpolation: str, **_: object) -> np.ndarray:
    """RGB uint8 (H, W, 3) -> (size, size, 3), by the arithmetic of transformers' image processors.

    The shorter side becomes `short` pixels and the centre is cut out; 0 stretches the whole image.
    """
    height, width = image.shape[:2]
    least = min(height, width)
    wide, high = (short * width // least, short * height // least) if short else (size, size)
    resized = Image.fromarray(image).resize((wide, high), Image.Resampling[interpolation.upper()])
    left, top = (wide - size) // 2, (high - size) // 2
    return np.array(resized.crop((left, top, left + size, top + size)))
