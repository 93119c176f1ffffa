"""explain: where in an image a sentence lies, as heat over the image that draws itself in Jupyter.

Explained is the cosine with what the sentence says beyond `NEUTRAL`, whose direction is taken out of its embedding, as
CLIP Surgery does with the empty text (Li et al. 2023, arXiv:2304.05653): else the heat shows whatever is in the image.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..config import CFG
from ..data.images import load_image, shorter_side
from ..errors import UserError
from ..files import write_figure
from ..models.clip import CLIPModel, DualEncoder
from ..models.encoders import Concatenated
from .embed import ImageLike, encode_image, encode_text

NEUTRAL = "a picture"
LEAST_SIDE = 5  # of a feature map: where the last are smaller, as those of small images, an earlier one shows the place


@dataclass(eq=False)
class Explanation:
    """The RGB `image` (H, W, 3), the `heat` over it (H, W), float32 from 0 to 1, and the `cosine` with the `query`."""

    query: str
    image: np.ndarray = field(repr=False)
    heat: np.ndarray = field(repr=False)
    cosine: float

    @property
    def centre(self) -> tuple[float, float]:
        """The centre of mass of the heat, (x, y) in pixels from the top left corner; without heat, of the image."""
        heat = self.heat if self.heat.any() else np.ones_like(self.heat)
        x, y = (heat.sum(axis) @ (np.arange(heat.shape[1 - axis]) + 0.5) / heat.sum() for axis in (0, 1))
        return float(x), float(y)

    def overlay(self) -> np.ndarray:
        """The image with the heat in colour over it, RGB uint8 (H, W, 3)."""
        from matplotlib import colormaps

        opacity = 0.7 * self.heat[..., None]
        return np.uint8((1 - opacity) * self.image + opacity * 255 * colormaps["turbo"](self.heat)[..., :3])

    def figure(self):
        """A matplotlib figure: the overlay under the query."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.5, 4.5), dpi=100, layout="constrained")
        figure.suptitle(f"{self.query}\n{self.cosine:.3f}", fontsize=11, wrap=True, parse_math=False)
        axis = figure.subplots()
        axis.set_axis_off()
        axis.imshow(self.overlay())
        return figure

    def save(self, path: str | Path) -> Path:
        """Write the figure as a picture in the format of the path's suffix."""
        return write_figure(self.figure(), path)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure().savefig(buffer, format="png")
        return buffer.getvalue()


def explain(model: CLIPModel, image: ImageLike, query: str) -> Explanation:
    """Where in an image (path, PIL image or RGB uint8 array) a sentence lies, as heat at the image's own size.

    By Grad-CAM for a convolutional tower, by attention rollout for a transformer; in fp32, whatever the precision. No
    heat where nothing speaks for the query. Raises UserError for an image that cannot be read, a query without text
    and an image tower that has neither feature maps nor attention.
    """
    if not query.strip():
        raise UserError("there is no text in the query")
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.inference_mode(False), torch.enable_grad():
            sentence, neutral = encode_text(model, [query, NEUTRAL])
            cosine = (encode_image(model, image)[0] @ sentence).item()
            pixels = load_image(image)
            square = model.image_transform()(image=pixels)["image"][None].to(model.device)  # (1, 3, S, S)
            direction = (sentence - (sentence @ neutral) * neutral).to(model.device)  # (P,)
            heat = _heat(model, model.normalize_pixels(square), direction)
    finally:
        for module, mode in modes.items():
            module.training = mode
    heat = _at_image_size(heat, model.cfg, *pixels.shape[:2])
    return Explanation(query, pixels, (heat / heat.max().clamp(min=1e-30)).cpu().numpy(), cosine)


class _Recorder(TorchFunctionMode):
    """Keeps feature maps and attention weights of what its thread computes inside; no module is changed."""

    def __init__(self):
        super().__init__()
        self.features: list[torch.Tensor] = []  # maps (1, D, h, w) or (1, h, w, D), tokens (1, N, D)
        self.attention: list[torch.Tensor] = []  # (1, heads, N, N)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:  # fused, it has no weights
            output, weights = torch.ops.aten._scaled_dot_product_attention_math(*args, **(kwargs or {}))
            self.attention.append(weights)
            return output
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.requires_grad and output.ndim in (3, 4):
            is_attention = output.ndim == 4 and func in (F.softmax, torch.softmax, torch.Tensor.softmax)
            (self.attention if is_attention else self.features).append(output)
        return output


def _heat(model: DualEncoder, pixel_values: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """(1, 3, S, S) normalised pixels -> (h, w), not negative: what turns the embedding towards `direction`, (P,)."""
    tower, seen = model.towers["image"], []
    several = isinstance(tower, Concatenated)
    for network in tower.children() if several else [tower]:
        pixels = pixel_values.clone().requires_grad_()  # the parameters may be frozen
        with _Recorder() as recorder:
            output = network(pixels) if several else model.forward_image(pixels)  # (1, D) or (1, P)
        seen.append((network, pixels, recorder, output))
    embedding = model.image_projection(torch.cat([row[-1] for row in seen], 1)) if several else seen[0][-1]
    score = F.normalize(embedding.float(), dim=-1)[0] @ direction
    heats = [_heat_of(model, *row[:3], score) for row in seen]
    if not several:
        return heats[0]
    size = max(heat.shape for heat in heats)
    return sum(F.interpolate(heat[None, None], size, mode="bilinear")[0, 0] for heat in heats)


def _heat_of(
    model: DualEncoder, network: nn.Module, pixel_values: torch.Tensor, recorder: _Recorder, score: torch.Tensor
) -> torch.Tensor:
    """The part of the heat, (h, w), of an image network that has computed from `pixel_values`."""
    features = recorder.features if score.requires_grad else []  # not behind a tower that detaches its output
    optional = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    tokens = {feature.shape[1] for feature in features if feature.ndim == 3}
    attention = [weights for weights in recorder.attention if weights.shape[-2] == weights.shape[-1] in tokens]
    attention = [weights for weights in attention if weights.shape == attention[-1].shape]
    if len(attention) > 1 and features[-1].ndim == 3:  # a single one may pool the maps of a convolutional tower
        return _rollout(attention, torch.autograd.grad(score, attention, **optional))
    y, x = (1, 2) if getattr(getattr(network, "timm_model", network), "output_fmt", "") == "NHWC" else (2, 3)
    maps = [f for f in features if f.ndim == 4 and len(f) == 1 and 1 < f.shape[y] == f.shape[x]]  # no computed weights
    if not maps:
        fault = "its image tower has neither feature maps nor attention, which show places in the image"
        raise UserError(f"model_name {model.cfg.model_name!r} cannot be explained: {fault}")
    side = min(LEAST_SIDE, max(feature.shape[y] for feature in maps))
    maps = [feature for feature in reversed(maps) if feature.shape[y] >= side]
    last = next((feature for feature in maps if not _is_bypassed(feature, score, pixel_values)), maps[0])
    # Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391)
    (gradient,) = torch.autograd.grad(score, last, **optional)
    return (gradient.mean((y, x), keepdim=True) * last.detach()).sum(6 - y - x)[0].clamp(min=0)


def _is_bypassed(feature: torch.Tensor, score: torch.Tensor, pixel_values: torch.Tensor) -> bool:
    """Whether the score depends on the pixels by another path too: the map is within a residual branch, say."""
    nodes, seen = [score.grad_fn], {None, feature.grad_fn}
    while nodes:
        node = nodes.pop()
        if getattr(node, "variable", None) is pixel_values:
            return True
        if node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    return False


@torch.no_grad()
def _rollout(attention: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Gradient-weighted attention rollout (Chefer et al. 2021, arXiv:2103.15679): layers (1, heads, N, N) -> (h, w).

    Of the tokens that the tower pools, the class token or all patches: in the last layer, no others have a gradient.
    """
    n = attention[0].shape[-1]
    relevance = torch.zeros(n, n, device=attention[0].device)  # that of a token for itself is left out
    for weights, gradient in zip(attention, gradients, strict=True):
        update = (weights * gradient).clamp(min=0).mean(1)[0]  # (N, N)
        relevance = relevance + update + update @ relevance
    pooled = gradient[0].any(0).any(-1)  # (N,)
    side = math.isqrt(n)  # class and register tokens come before the patches
    return relevance[pooled].sum(0)[-side * side :].view(side, side)


def _at_image_size(heat: torch.Tensor, cfg: CFG, height: int, width: int) -> torch.Tensor:
    """The heat of the square that the model saw, (h, w), at its place in the image, (height, width)."""
    high, wide = height, width
    if short := shorter_side(cfg):  # the rest was cropped off
        high = wide = round(min(height, width) * cfg.size / short)
    top, left = (height - high) // 2, (width - wide) // 2
    square = F.interpolate(heat[None, None], (high, wide), mode="bilinear")[0, 0]
    return F.pad(square, (left, width - wide - left, top, height - high - top))
