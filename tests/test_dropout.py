"""Dropout from 16 random bits an element: its rate, its gradient, and where it leaves nn.Dropout alone."""

import pytest
import torch
from torch import nn

from clip_scratch.models.dropout import Dropout, speed_up_dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_drops_a_share_of_p_and_scales_the_rest(p, dtype):
    torch.manual_seed(0)
    dropped = Dropout(p)(torch.ones(100, 401, dtype=dtype))
    assert dropped.dtype == dtype
    assert set(dropped.unique().tolist()) == {0.0, (torch.ones((), dtype=dtype) / (1 - p)).item()}
    n = dropped.numel()
    assert abs((dropped == 0).sum().item() - p * n) < 5 * (n * p * (1 - p)) ** 0.5  # five standard deviations


def test_elements_are_dropped_independently():
    torch.manual_seed(0)
    zero = (Dropout(0.5)(torch.ones(2, 100_000)) == 0).double()
    for a, b in ((zero[0], zero[1]), (zero[0, 1:], zero[0, :-1]), (zero[0, 4:], zero[0, :-4])):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / 100_000**0.5


def test_the_gradient_passes_where_the_value_did():
    x = torch.randn(7, 13, requires_grad=True)  # 91 elements, no multiple of four
    y = Dropout(0.25)(x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(y != 0, torch.tensor(1 / 0.75), torch.tensor(0.0)))


def test_the_seed_decides():
    x, draws = torch.ones(50), []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append((Dropout(0.3)(x), Dropout(0.3)(x)))
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(*draws[0])


def test_in_evaluation_and_at_the_ends_it_is_nn_dropout():
    x = torch.randn(3, 4)
    assert torch.equal(Dropout(0.5).eval()(x), x) and torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros(3, 4))
    assert Dropout(0.5)(torch.ones(0, 4)).shape == (0, 4)


def test_every_dropout_of_a_model_is_turned():
    class Own(nn.Dropout):
        """Not touched: it may do something else."""

    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.2)), Own(0.1))
    before = repr(model)
    speed_up_dropout(model)
    assert type(model[1][0]) is Dropout and type(model[2]) is Own
    assert repr(model) == before and model[1][0].p == 0.2
