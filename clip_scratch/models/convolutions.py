"""How the convolutions of an image tower compute: fixed batch norms folded into them, depthwise ones in fp32.

Only `forward` of the modules is replaced, on the instance: names, parameters and state dicts stay as they were.
"""

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import nn

from ..config import CFG


def conv_norm_pairs(network: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """The convolutions of a network that are followed by a batch norm, going by the order of a module's children."""
    for parent in network.modules():
        for conv, norm in itertools.pairwise(parent.children()):
            is_pair = isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats
            if is_pair and norm.affine and norm.num_features == conv.out_channels:
                yield conv, norm


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def prepare_convolutions(network: nn.Module, cfg: CFG, fold: bool = True) -> None:
    """Fold fixed batch norms, and have depthwise convolutions train in fp32 on a CPU, in place."""
    # SyncBatchNorm replaces the norms later on, and a shard may hold a convolution without its norm
    if fold and not (cfg.sync_batch_norm or cfg.fully_shard):
        fold_batch_norms(network, cfg.size)
    train_depthwise_in_fp32(network)


@torch.no_grad()
def fold_batch_norms(network: nn.Module, size: int) -> None:
    """On a CPU, fold each batch norm into the convolution before it while its statistics are fixed, in place.

    Weights are folded again in every pass, so that gradients reach both modules. Modules need not run in the order in
    which they are defined: nothing is folded where that changes the network's output for an image of `size` pixels.
    """
    pairs = list(conv_norm_pairs(network))
    if not pairs:
        return
    random = torch.Generator().manual_seed(0)
    modes = {module: module.training for module in network.modules()}
    tensors = [t for _, norm in pairs for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
    kept = [tensor.clone() for tensor in tensors]
    pixels = torch.randn(1, 3, size, size, generator=random)
    network.eval()
    try:
        for _, norm in pairs:  # a new network's 0 and 1 would hide that a norm is in another place
            mean, variance, weight, bias = (0.7 + 0.6 * torch.rand(4, norm.num_features, generator=random)).unbind()
            norm.running_var *= variance
            norm.running_mean += 0.1 * mean * norm.running_var.sqrt()
            norm.weight.mul_(weight).masked_fill_(norm.weight == 0, 0.1)
            norm.bias += 0.1 * bias
        before = network(pixels)
        for conv, norm in pairs:  # partial, since it can be copied and pickled
            conv.forward = functools.partial(_folded_forward, conv, norm)
            norm.forward = functools.partial(_forward_after_folding, norm)
        if not (network(pixels) - before).norm() < 1e-3 * before.norm():
            for module in itertools.chain.from_iterable(pairs):
                vars(module).pop("forward", None)
    finally:
        for tensor, own in zip(tensors, kept, strict=True):
            tensor.copy_(own)
        for module, mode in modes.items():
            module.training = mode


def train_depthwise_in_fp32(network: nn.Module) -> None:
    """Have the depthwise convolutions of a network compute in fp32 where it trains in a CPU's bf16.

    oneDNN's backward pass of one is three times as slow in bf16 as in fp32: in EfficientNet-lite0 two thirds of a step.
    """
    for module in network.modules():
        if is_depthwise(module) and "forward" not in vars(module):  # folded ones do so anyway
            module.forward = functools.partial(_convolve, module, module)


def _is_folded(norm: nn.BatchNorm2d) -> bool:
    # A GPU would wait for the many small kernels; what runs an exported graph folds it
    return not norm.training and norm.weight.device.type == "cpu" and not torch.compiler.is_exporting()


def _folded_forward(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    return _convolve(conv, _Folded(conv, norm) if _is_folded(norm) else conv, x)


def _forward_after_folding(norm: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    if not _is_folded(norm):
        return type(norm).forward(norm, x)
    for name in ("drop", "act"):  # timm's norms have their activation in them
        x = getattr(norm, name)(x) if hasattr(norm, name) else x
    return x


class _Folded:
    """What the forward method of a convolution takes for the module: the norm is in its weight and bias."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d):
        self.conv = conv
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        self.weight = conv.weight * scale.view(-1, 1, 1, 1)
        self.bias = norm.bias + scale * ((0 if conv.bias is None else conv.bias) - norm.running_mean)

    def __getattr__(self, name: str) -> object:
        return getattr(self.conv, name)


def _convolve(conv: nn.Conv2d, weights: nn.Conv2d | _Folded, x: torch.Tensor) -> torch.Tensor:
    """What `conv` gives with the weight and bias of `weights`."""
    own, trains = type(conv).forward, torch.is_grad_enabled() and (x.requires_grad or weights.weight.requires_grad)
    if not (is_depthwise(conv) and trains and x.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
        return own(weights, x)
    with torch.autocast("cpu", enabled=False):
        return own(weights, x.float()).to(x.dtype)


def freeze_depthwise(network: nn.Module) -> None:
    """Freeze the depthwise convolutions of a network and the batch norms that follow them."""
    for module in filter(is_depthwise, network.modules()):
        module.requires_grad_(False)
    for conv, norm in conv_norm_pairs(network):
        if is_depthwise(conv):
            norm.requires_grad_(False)
