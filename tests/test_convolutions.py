import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from clip_scratch.models.convolutions import fold_batch_norms, freeze_depthwise, train_depthwise_in_fp32


class TwoBranches(nn.Module):
    """A convolution, and beside it, not after it, a batch norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.conv(x) + self.norm(x)


class ReadTwice(TwoBranches):
    """A batch norm after a convolution that something else takes, too."""

    def forward(self, x):
        x = self.conv(x)
        return x + self.norm(x)


def with_statistics(network):
    """The network as if it had been trained: its batch norms do something."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return network


def folded_norms(network):
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d) and "forward" in vars(m)]


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "tf_efficientnet_lite0"])
def test_folded_batch_norms_change_neither_features_nor_gradients(name):
    torch.manual_seed(0)
    plain = with_statistics(timm.create_model(name, num_classes=0)).eval()
    network, pixels = copy.deepcopy(plain), torch.randn(2, 3, 64, 64)
    fold_batch_norms(network, 64)
    assert folded_norms(network)
    own, state = plain.state_dict(), network.state_dict()
    assert list(state) == list(own) and all(torch.equal(state[name], own[name]) for name in own)
    plain, network, pixels = plain.double(), network.double(), pixels.double()
    for net in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        features, wanted = net(pixels), plain(pixels)
        assert (features - wanted).norm() < 1e-9 * wanted.norm()
        got = torch.autograd.grad(features.square().mean(), list(net.parameters()))
        exact = torch.autograd.grad(wanted.square().mean(), list(plain.parameters()))
        assert all((a - b).norm() <= 1e-7 * b.norm() + 1e-12 for a, b in zip(got, exact, strict=True))


def test_a_copy_folds_its_own_weights():
    """Its modules, not those that it was copied from."""
    torch.manual_seed(0)
    network = with_statistics(timm.create_model("test_efficientnet", num_classes=0)).eval()
    fold_batch_norms(network, 32)
    other, pixels = copy.deepcopy(network), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = network(pixels)
        for parameter in network.parameters():
            parameter.zero_()
        assert torch.equal(other(pixels), before) and not torch.equal(network(pixels), before)


def test_statistics_that_move_are_not_folded():
    torch.manual_seed(0)
    plain = timm.create_model("test_efficientnet", num_classes=0).train()
    network, pixels = copy.deepcopy(plain), torch.randn(8, 3, 32, 32)
    fold_batch_norms(network, 32)
    assert network.training and all(module.training for module in network.modules())
    assert torch.allclose(network(pixels), plain(pixels), atol=1e-5)
    for own, other in zip(network.buffers(), plain.buffers(), strict=True):
        assert torch.allclose(own.float(), other.float(), atol=1e-5)


@pytest.mark.parametrize("build", [TwoBranches, ReadTwice])
def test_a_norm_that_does_not_follow_its_neighbour_alone_is_left(build):
    """Even where new statistics, mean 0 and variance 1, would hide it."""
    network = build()
    before, drawn = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    fold_batch_norms(network, 8)
    assert not folded_norms(network) and "forward" not in vars(network.conv)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), drawn)  # a run's weights do not depend on the check


@pytest.mark.parametrize("folded", [False, True])
def test_depthwise_convolutions_train_in_fp32(folded):
    """And compute in bf16 where nothing trains; others always do. A copy and a pickled network keep it."""
    torch.manual_seed(0)
    norm = [nn.BatchNorm2d(4)] if folded else []
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), *norm).eval()
    if folded:
        fold_batch_norms(with_statistics(network), 8)
        assert folded_norms(network)
    train_depthwise_in_fp32(network)
    pixels = torch.randn(2, 3, 8, 8)
    for net in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        with torch.autocast("cpu", torch.bfloat16):
            wide, out = net[0](pixels), net(pixels)
            with torch.no_grad():
                fast = net[1](wide)
        exact = F.conv2d(wide.float(), net[1].weight, net[1].bias, groups=4)
        if folded:
            exact = F.batch_norm(exact, net[2].running_mean, net[2].running_var, net[2].weight, net[2].bias)
        assert wide.dtype == out.dtype == fast.dtype == torch.bfloat16
        assert torch.allclose(out.float(), exact, rtol=2**-7, atol=1e-3)
        assert folded or torch.equal(out, exact.bfloat16())
        out.float().square().sum().backward()
        wanted = torch.autograd.grad(exact.square().sum(), net[1].weight)[0]
        assert net[1].weight.grad.dtype == torch.float32
        assert F.cosine_similarity(net[1].weight.grad.flatten(), wanted.flatten(), dim=0) > 0.9999
    assert torch.equal(network(pixels), net(pixels)) and net(pixels).dtype == torch.float32


def test_frozen_depthwise_convolutions_and_their_norms():
    network = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    network.blocks[0].requires_grad_(False)
    freeze_depthwise(network)
    frozen = {name for name, p in network.blocks[1:].named_parameters() if not p.requires_grad}
    assert frozen and {name.split(".")[-2] for name in frozen} == {"conv_dw", "bn2"}
    assert not any(p.requires_grad for p in network.blocks[0].parameters())  # what was frozen stays so
    assert all(p.requires_grad for p in network.conv_stem.parameters())
