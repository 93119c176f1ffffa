"""Random crop, flip and colour jitter of a batch of uint8 squares, by OpenCV on a CPU and by torch elsewhere.

How an image is changed depends on (seed, view, image number) alone, never on its batch: the random numbers of all
images are drawn at once for a view (an epoch), and a batch takes its rows. The squares are whole images, stretched; in
the original image crops have the areas and shapes of torchvision's RandomResizedCrop (Szegedy et al. 2014).

Shapes: `B` images, `M` pixels a side of the squares, `S` of the result, `N` images of the data set.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from ..config import CFG

_STREAM = 0x617567  # different random numbers from those that shuffle, which have the same seed and epoch
_TRIES = 10  # to find an area and shape that fit, before the largest possible crop is taken
_COLUMNS = 2 * _TRIES + 8  # place (2), flip, whether to jitter, brightness, contrast, saturation, hue
_JITTERED = 0.8  # fraction of the images
_SHAPES = np.log(4 / 3)  # largest log of a crop's width / height
_GREY = 0.299, 0.587, 0.114  # luma of red, green and blue (ITU-R BT.601)
# RGB -> YIQ: luma and two colour axes, whose rows sum to 0, so that grey has no colour
_YIQ = np.array([_GREY, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


@dataclass
class Changes:
    """The augmentation of B images."""

    boxes: np.ndarray  # (B, 4) left, top, width and height of the crop, as fractions of the square
    flips: np.ndarray  # (B,) bool
    matrices: np.ndarray  # (B, 3, 3) on RGB
    greys: np.ndarray  # (B,) factor of the crop's mean grey, which is then added to all three colours


def augments(cfg: CFG) -> bool:
    """Whether these settings augment training images at all."""
    return cfg.crop_scale < 1 or any((cfg.horizontal_flip, cfg.color_jitter, cfg.hue_jitter))


def random_numbers(seed: int, view: int, n: int) -> np.ndarray:
    """Uniform random numbers in [0, 1) for `n` images of a view: (N, K)."""
    return np.random.default_rng((seed, view, _STREAM)).random((n, _COLUMNS), dtype=np.float32)


def changes(cfg: CFG, uniform: np.ndarray, ratios: np.ndarray) -> Changes:
    """The changes from random numbers (B, K), for images whose width / height is `ratios` (B,)."""
    areas, shapes, left, top, flip, jitter, *colour = np.split(uniform, [_TRIES, *range(2 * _TRIES, _COLUMNS)], axis=1)
    boxes = _boxes(cfg.crop_scale, areas, shapes, np.hstack([left, top]), ratios)
    around = (1 + cfg.color_jitter * (2 * u - 1)[:, 0] for u in colour[:3])
    brightness, contrast, saturation = (np.where(jitter[:, 0] < _JITTERED, factor, 1) for factor in around)
    hue = np.where(jitter[:, 0] < _JITTERED, cfg.hue_jitter * (2 * colour[3] - 1)[:, 0], 0)
    matrices, greys = _colour_changes(brightness, contrast, saturation, hue)
    return Changes(boxes, flip[:, 0] < cfg.horizontal_flip, matrices, greys)


def augment(squares: Sequence[np.ndarray], todo: Changes, size: int, bicubic: bool) -> np.ndarray:
    """B uint8 squares (M, M, 3) -> (B, S, S, 3), by OpenCV."""
    out = np.empty((len(squares), size, size, 3), np.uint8)
    boxes = _whole_pixels(todo.boxes, len(squares[0]))
    colours = np.concatenate([todo.matrices, np.zeros_like(todo.matrices[..., :1])], axis=2)  # (B, 3, 4)
    recolours = (todo.matrices != np.eye(3, dtype=np.float32)).any((1, 2)) | (todo.greys != 0)
    threads = _threads()
    parts = [range(k, len(squares), threads) for k in range(threads)]

    def work(part: range) -> None:
        import cv2

        interpolation = cv2.INTER_CUBIC if bicubic else cv2.INTER_LINEAR
        for i in part:
            left, top, width, height = boxes[i]
            crop = squares[i][top : top + height, left : left + width]
            cv2.resize(crop, (size, size), dst=out[i], interpolation=interpolation)
            if todo.flips[i]:
                cv2.flip(out[i], 1, dst=out[i])
            if recolours[i]:
                colours[i, :, 3] = todo.greys[i] * np.dot(_GREY, cv2.mean(out[i])[:3])
                cv2.transform(out[i], colours[i], dst=out[i])

    list(_pool(os.getpid()).map(work, parts))
    return out


def augment_on_device(squares: torch.Tensor, todo: Changes, size: int, bicubic: bool) -> torch.Tensor:
    """uint8 (B, M, M, 3) -> (B, S, S, 3) on the device of `squares`; the same as `augment` within rounding.

    Computed in fp32, also under autocast: bf16 would be up to 3 grey levels off.
    """
    side, device = squares.shape[1], squares.device
    boxes = torch.from_numpy(_whole_pixels(todo.boxes, side)).to(device)  # (B, 4)
    flips, matrices, greys = (torch.from_numpy(a).to(device) for a in (todo.flips, todo.matrices, todo.greys))
    centres = (torch.arange(size, device=device) + 0.5) / size  # (S,) in the crop
    x, y = (
        # Clamped to the centres of the crop's outer pixels, so that nothing beside the crop is sampled
        (first + (extent * at - 0.5).clamp_min(0).minimum(extent - 1) + 0.5) * 2 / side - 1  # (B, S)
        for first, extent, at in (
            (boxes[:, :1], boxes[:, 2:3], torch.where(flips[:, None], centres.flip(0), centres)),
            (boxes[:, 1:2], boxes[:, 3:], centres.expand(len(squares), size)),
        )
    )
    grid = torch.stack([x[:, None].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=3)  # (B, S, S, 2)
    mode = "bicubic" if bicubic else "bilinear"
    with torch.autocast(device.type, enabled=False):
        pixels = squares.permute(0, 3, 1, 2).float()
        pixels = torch.nn.functional.grid_sample(pixels, grid, mode, "border", align_corners=False)
        pixels = pixels.permute(0, 2, 3, 1).clamp(0, 255)  # (B, S, S, 3)
        offsets = greys * (pixels.mean((1, 2)) @ torch.tensor(_GREY, device=device))  # (B,)
        pixels = torch.einsum("bhwc,bdc->bhwd", pixels, matrices) + offsets[:, None, None, None]
    return pixels.round_().clamp_(0, 255).byte()


def _boxes(scale: float, areas: np.ndarray, shapes: np.ndarray, place: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """Crops (B, 4) as fractions, from random numbers: areas and shapes (B, tries), place (B, 2).

    Each image takes its first try that fits; where none does, the largest crop of an allowed shape, centred.
    """
    if scale == 1:
        return np.tile(np.array([0, 0, 1, 1], np.float32), (len(ratios), 1))
    area = scale + (1 - scale) * areas  # (B, tries)
    shape = np.exp(_SHAPES * (2 * shapes - 1)) / ratios[:, None]  # width / height in the stretched square
    tries = np.stack([np.sqrt(area * shape), np.sqrt(area / shape)], axis=2)  # (B, tries, 2)
    fits = (tries <= 1).all(2)
    first = tries[np.arange(len(tries)), fits.argmax(1)]  # (B, 2)
    limit = np.exp(np.clip(np.log(ratios), -_SHAPES, _SHAPES)) / ratios  # (B,)
    largest = np.minimum(1, np.stack([limit, 1 / limit], axis=1))
    found = fits.any(1)[:, None]
    extent = np.where(found, first, largest)
    return np.hstack([(1 - extent) * np.where(found, place, 0.5), extent])


def _whole_pixels(boxes: np.ndarray, side: int) -> np.ndarray:
    """Boxes (B, 4) in whole pixels of a square, at least one wide and high and all inside."""
    extent = np.clip(np.rint(boxes[:, 2:] * side), 1, side)
    corner = np.clip(np.rint(boxes[:, :2] * side), 0, side - extent)
    return np.hstack([corner, extent]).astype(np.int64)


def _colour_changes(
    brightness: np.ndarray, contrast: np.ndarray, saturation: np.ndarray, hue: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The four changes (B,), in this order, as one matrix (B, 3, 3) and the factor of the mean grey to add (B,).

    Contrast is around the mean grey, saturation around each pixel's own; hue, in turns, rotates about the grey axis
    of YIQ. The last two do not change grey, so the offset of the contrast passes through them unchanged.
    """
    cos, sin = np.cos(2 * np.pi * hue), np.sin(2 * np.pi * hue)
    rotation = np.zeros((len(hue), 3, 3))
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1], rotation[:, 1, 2], rotation[:, 2, 1], rotation[:, 2, 2] = cos, -sin, sin, cos
    rotation[:, 1:, 1:] *= saturation[:, None, None]
    matrices = (brightness * contrast)[:, None, None] * (np.linalg.inv(_YIQ) @ rotation @ _YIQ)
    unchanged = (brightness == 1) & (contrast == 1) & (saturation == 1) & (hue == 0)
    matrices[unchanged] = np.eye(3)  # exactly
    return matrices.astype(np.float32), ((1 - contrast) * brightness).astype(np.float32)


def _threads() -> int:
    return min(os.cpu_count() or 1, torch.get_num_threads())


@cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """Threads for OpenCV, which releases the GIL. One pool per process: a fork does not inherit threads."""
    import cv2

    cv2.setNumThreads(1)  # its own threads would split a single image, which is too little work
    return ThreadPoolExecutor(_threads())
