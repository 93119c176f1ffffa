"""Where in a picture a sentence lies: Grad-CAM for convolutional image towers, attention rollout for ViT."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..data.images import load_image, shorter_side
from ..errors import UserError
from ..files import write_figure
from .embed import encode_text

if TYPE_CHECKING:
    from ..config import CFG
    from ..models.clip import DualEncoder
    from .embed import ImageLike

_NEUTRAL = "a picture"
_FINEST = 8  # feature maps of fewer cells a side say too little of where


@dataclass
class Explanation:
    """Where a query lies in an image; draws itself in Jupyter."""

    query: str
    image: np.ndarray  # RGB uint8, (H, W, 3)
    heat: np.ndarray  # float32 in 0 to 1, (H, W)
    cosine: float

    @property
    def centre(self) -> tuple[float, float]:
        """The centre of mass of the heat: x and y in pixels."""
        y, x = np.indices(self.heat.shape)
        total = max(float(self.heat.sum()), 1e-12)
        return float((x * self.heat).sum() / total), float((y * self.heat).sum() / total)

    def overlay(self) -> np.ndarray:
        """The heat over the image: RGB uint8, (H, W, 3)."""
        from matplotlib import colormaps

        alpha = 0.7 * self.heat[..., None]
        colours = 255 * colormaps["turbo"](self.heat)[..., :3]
        return ((1 - alpha) * self.image + alpha * colours).astype(np.uint8)

    def figure(self):
        """A matplotlib figure of the overlay, with the query and its cosine above."""
        from matplotlib.figure import Figure

        height, width = self.heat.shape
        figure = Figure(figsize=(3.2, 3.2 * height / width + 0.6), dpi=100, layout="constrained")
        axis = figure.subplots()
        axis.imshow(self.overlay())
        axis.set_axis_off()
        axis.set_title(f"{self.query}  {self.cosine:.3f}", fontsize=10, parse_math=False, wrap=True)
        return figure

    def save(self, path: str | Path) -> Path:
        """Write the figure in the format of the path's suffix."""
        return write_figure(self.figure(), path)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure().savefig(buffer, format="png")
        return buffer.getvalue()


def explain(model: DualEncoder, image: ImageLike, query: str) -> Explanation:
    """Where in `image`, a path, PIL image or RGB array, the sentence `query` lies for the model.

    Convolutional towers: the gradient of the cosine times the activation at the last feature map of at least 8 x 8
    cells, summed over channels (HiResCAM, Draelos and Carin 2020; at the last map of a network with average pooling it
    is Grad-CAM, Selvaraju et al. 2017). ViT: attention rolled out over the layers, weighted by its gradient (Chefer et
    al. 2021). What is explained is the sentence less its part in the direction of "a picture", as in CLIP Surgery (Li
    et al. 2023): else the heat shows whatever there is. In fp32, whatever the model's precision; the model is left as
    it was. Raises UserError for a tower that has neither feature maps nor attention.
    """
    pixels = load_image(image)
    network, cfg, was_training = model.towers["image"], model.cfg, model.training
    model.cfg = dataclasses.replace(cfg, precision="fp32")
    model.eval()
    try:
        text, neutral = encode_text(model, [query, _NEUTRAL]).to(model.device)
        with torch.enable_grad(), _recorded(network) as (maps, attentions):
            square = model.image_transform(train=False)(image=pixels)["image"][None].to(model.device)
            inputs = model.normalize_pixels(square).requires_grad_()  # the weights may be frozen
            embedding = model.encode_image(inputs)[0]
            cosine = (embedding @ text).item()
            beyond = embedding @ (text - (text @ neutral) * neutral)
            if len({attention.shape for attention in attentions}) == 1:
                heat = _rollout(attentions, torch.autograd.grad(beyond, attentions))
            elif maps:
                heat = _grad_cam(maps, beyond)
            else:
                raise UserError(f"{type(network).__name__} has neither feature maps nor attention to explain by")
    finally:
        model.cfg = cfg
        model.train(was_training)
    return Explanation(query, pixels, _on_image(heat, pixels.shape[:2], cfg), cosine)


def _grad_cam(maps: list[torch.Tensor], cosine: torch.Tensor) -> torch.Tensor:
    """(h, w) heat from the last feature map (1, C, h, w) that is fine enough, else the finest."""
    side = min(_FINEST, max(min(m.shape[2:]) for m in maps))
    chosen = [m for m in maps if min(m.shape[2:]) >= side][-1]
    (gradient,) = torch.autograd.grad(cosine, chosen)
    return (gradient * chosen).sum(1)[0].clamp(min=0).detach()


def _rollout(attentions: list[torch.Tensor], gradients: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """(h, w) heat from each layer's attention (1, heads, N, N) and its gradient."""
    n = attentions[0].shape[-1]
    relevance = torch.eye(n, device=attentions[0].device)
    for attention, gradient in zip(attentions, gradients, strict=True):
        relevance = relevance + (attention * gradient).clamp(min=0).mean(1)[0] @ relevance
    side = int(n**0.5)
    prefix = n - side * side  # the class token, and registers
    rows = relevance[:1] if prefix else relevance
    return (rows - torch.eye(n, device=rows.device)[: len(rows)]).mean(0)[prefix:].view(side, side).detach()


@contextlib.contextmanager
def _recorded(network: nn.Module) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Record the feature maps (1, C, h, w) and the attention (1, heads, N, N) of a forward pass inside."""
    maps: list[torch.Tensor] = []
    attentions: list[torch.Tensor] = []

    def recorder(name: str):
        def record(module: nn.Module, args: tuple, output: object) -> None:
            # transformers' attention modules return (features, weights); timm's apply a module to the weights
            of_attention = isinstance(output, tuple) or name.endswith("attn_drop")
            for tensor in output if isinstance(output, tuple) else (output,):
                if not isinstance(tensor, torch.Tensor) or tensor.ndim != 4 or not tensor.requires_grad:
                    continue
                if of_attention and len(tensor) == 1 and tensor.shape[2] == tensor.shape[3]:
                    attentions.append(tensor)
                elif not of_attention and min(tensor.shape[2:]) > 1:
                    maps.append(tensor)

        return record

    # Fused kernels do not show their weights: these are the switches of timm and of transformers
    switches = [(m, "fused_attn", False) for m in network.modules() if getattr(m, "fused_attn", False)]
    configs = {id(m.config): m.config for m in network.modules() if hasattr(m, "config")}
    switches += [(c, "_attn_implementation", "eager") for c in configs.values() if hasattr(c, "_attn_implementation")]
    before = [getattr(owner, name) for owner, name, _ in switches]
    hooks = [module.register_forward_hook(recorder(name)) for name, module in network.named_modules()]
    try:
        for owner, name, value in switches:
            setattr(owner, name, value)
        yield maps, attentions
    finally:
        for hook in hooks:
            hook.remove()
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


def _on_image(heat: torch.Tensor, size: tuple[int, int], cfg: CFG) -> np.ndarray:
    """Heat of the model's square input (h, w) -> (H, W) of the image in 0 to 1; 0 where the image was cropped away."""
    import cv2

    height, width = size
    if short := shorter_side(cfg):
        side = max(1, round(min(size) * cfg.size / short))
        top, left, tall, wide = (height - side) // 2, (width - side) // 2, side, side
    else:
        top, left, tall, wide = 0, 0, height, width
    values = heat.float().cpu().numpy()
    values = np.clip(cv2.resize(values, (wide, tall), interpolation=cv2.INTER_CUBIC), 0, None)
    out = np.zeros(size, np.float32)
    out[top : top + tall, left : left + wide] = values / max(float(values.max()), 1e-12)
    return out
