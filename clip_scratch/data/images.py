"""Image files -> RGB arrays -> uint8 squares, by albumentations. The model normalises them, on its own device.

Training has two stages: `image_prefix` does once what is the same in every epoch, and augment.py changes its squares.
`image_transform` is both in one pipeline, for one image at a time.
"""

import contextlib
import dataclasses
import io
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..config import CFG
from ..errors import UserError, first_line
from .image_files import image_source, stamp

IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif",
}  # fmt: skip
# albumentations asks the network for a newer release when it is imported
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")


def images_below(folder: Path) -> list[str]:
    """The image files below a folder, as sorted paths relative to it, with forward slashes.

    Hidden files and folders are left out (`._x.jpg` is what macOS writes beside x.jpg on other disks). Raises
    UserError where there are no images.
    """
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}")
    images = (path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    paths = (path.relative_to(folder) for path in images)
    names = sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
    if not names:
        raise UserError(f"there are no images below {folder}")
    return names


def load_image(image: str | Path | io.BytesIO | Image.Image | np.ndarray, side: int = 0) -> np.ndarray:
    """An image file, its bytes, a PIL image or an array as RGB uint8, (H, W, 3).

    Where only a square of `side` pixels is wanted, a large file may be decoded smaller (`draft`).
    EXIF orientation is applied; greyscale, palette and CMYK images become RGB; transparent pixels become white.
    Greyscale values of more than 8 bits are scaled as in `_to_8_bits`. A corrupt file raises OSError (or ValueError or
    SyntaxError, as PIL does); a HEIC file without its library raises UserError.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    elif not isinstance(image, Image.Image):
        with open_image(image) as file:
            draft(file, side)
            file.load()
            image = file
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def draft(file: Image.Image, side: int) -> None:
    """Have a JPEG decoded at the 1/2, 1/4 or 1/8 of its size that leaves at least twice `side`, if `side` is not 0.

    Its inverse cosine transform then has fewer points; what is left is for the filter that resizes to average.
    """
    if side:
        file.draft(None, (2 * side, 2 * side))


def open_image(path: str | Path | io.BytesIO) -> Image.Image:
    """Image.open, and for HEIC files, whatever their suffix, the decoder of the `heif` extra; not yet decoded."""
    source = image_source(path)
    try:
        return Image.open(source)
    except UnidentifiedImageError:
        raw = source.getvalue() if isinstance(source, io.BytesIO) else Path(path).read_bytes()
        if raw[4:8] != b"ftyp":  # HEIF (ISO/IEC 23008-12)
            raise
    try:
        import pillow_heif
    except ImportError as error:
        raise UserError("HEIC images need another library: pip install 'clip_scratch[heif]'") from error
    pillow_heif.register_heif_opener()
    return Image.open(io.BytesIO(raw))


def _to_8_bits(image: Image.Image) -> Image.Image:
    """A 16-bit, 32-bit or float greyscale image as 8-bit greyscale.

    Files do not tell which value is white (12-bit data is often stored in 16-bit files), but the largest value shows
    it: white is the first of 255, 4095 and 65535 that it does not exceed, or 1 for floats up to 1, or else itself.
    """
    values = np.nan_to_num(np.asarray(image, np.float32), nan=0, posinf=0, neginf=0)
    largest = values.max()
    whites = (1, 255, 4095, 65535) if image.mode[0] == "F" else (255, 4095, 65535)
    white = next((white for white in whites if largest <= white), largest)
    return Image.fromarray(np.rint(values * (255 / white)).clip(0, 255).astype(np.uint8))


def image_transform(cfg: CFG, train: bool):
    """The albumentations pipeline: `transform(image=array)["image"]` is a uint8 tensor (3, size, size).

    Training: random resized crop, flip and colour jitter, each a setting. Evaluation, and training without a
    random crop: the whole image resized to the square, so that nothing a caption mentions is cut off; with
    cfg.resize "crop" its shorter side is resized and the centre cropped, as in CLIP (Radford et al. 2021).
    """
    import albumentations as A
    import cv2

    cfg = of_split(cfg, train)
    steps = [A.Lambda(image=image_prefix(cfg, False)[1])]
    if train and cfg.crop_scale < 1:
        interpolation = cv2.INTER_CUBIC if cfg.interpolation == "bicubic" else cv2.INTER_LINEAR
        area = (cfg.crop_scale, 1.0)
        steps = [A.RandomResizedCrop((cfg.size,) * 2, area, interpolation=interpolation, area_for_downscale="image")]
    if train and cfg.horizontal_flip:
        steps.append(A.HorizontalFlip(p=cfg.horizontal_flip))
    if train and (cfg.color_jitter or cfg.hue_jitter):
        around = (1 - cfg.color_jitter, 1 + cfg.color_jitter)
        hue = (-cfg.hue_jitter, cfg.hue_jitter)
        steps.append(A.ColorJitter(brightness=around, contrast=around, saturation=around, hue=hue, p=0.8))
    return A.Compose([*steps, A.ToTensorV2()])


def of_split(cfg: CFG, train: bool) -> CFG:
    """The settings with the size of training images, or of all others."""
    return dataclasses.replace(cfg, size=cfg.train_size) if train and 0 < cfg.train_size < cfg.size else cfg


def image_prefix(cfg: CFG, train: bool, paths: Sequence[str] = ()) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
    """What is the same in every epoch: a side M, and a function from RGB uint8 (H, W, 3) to a square (M, M, 3).

    Evaluation, and training without a random crop: the square that the model sees. Training with one: the whole image
    stretched, since a crop of the stretched square is a crop of the image. M is then 8/7 of the size, but no more than
    the median shorter side of a sample of the image files `paths`: larger squares would hold no more detail.
    """
    side, short = cfg.size, shorter_side(cfg)
    if train and cfg.crop_scale < 1:
        shorter, short = [], 0
        for path in paths[:: -(-len(paths) // 100)]:
            with reading(path), open_image(path) as file:
                shorter.append(min(file.size))
        side = max(cfg.size, min(round(cfg.size * 8 / 7), int(np.median(shorter))))
    return side, partial(_square, size=side, short=short, interpolation=cfg.interpolation)


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn whatever a decoder raises inside into a UserError that names the file."""
    try:
        yield
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError and classes of their own
        fix = "Repair it, or leave it out with --on-bad-image skip."
        raise UserError(f"{path}: {fault_of(path, error)}. {fix}") from error


def fault_of(path: str | Path, error: Exception) -> str:
    """Why an image cannot be used, after a decoder has raised `error`."""
    return "no such file" if stamp(path) is None else f"cannot be decoded ({first_line(error)})"


def shorter_side(cfg: CFG) -> int:
    """The size of an evaluation image's shorter side before the centre is cropped; 0 without a crop."""
    word, _, pixels = cfg.resize.partition(":")
    return int(pixels or cfg.size) if word == "crop" else 0


def wanted_side(cfg: CFG) -> int:
    """The shorter side that an image is resized to for evaluation."""
    return max(cfg.size, shorter_side(cfg))


def _square(image: np.ndarray, size: int, short: int, interpolation: str, **_: object) -> np.ndarray:
    """RGB uint8 (H, W, 3) -> (size, size, 3): the shorter side becomes `short` pixels and the centre is cropped.

    With `short` 0 the whole image is stretched. Bilinear and bicubic are PIL's, by the arithmetic of transformers'
    image processors: they average when they downscale. OpenCV's filters of these names do not; only its "area" does.
    """
    import cv2

    height, width = image.shape[:2]
    least, wide, high = min(height, width), size, size
    if interpolation == "area":
        if short:
            wide, high = round(width * (short / least)), round(height * (short / least))
        method = cv2.INTER_AREA if wide < width or high < height else cv2.INTER_LINEAR
        resized = cv2.resize(image, (wide, high), interpolation=method)
    else:
        if short:
            wide, high = short * width // least, short * height // least
        resized = np.array(Image.fromarray(image).resize((wide, high), Image.Resampling[interpolation.upper()]))
    left, top = (wide - size) // 2, (high - size) // 2
    return resized[top : top + size, left : left + size]
