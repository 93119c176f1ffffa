"""Augmentation of batches: crops of the right shape, colours by one matrix, the same on every device."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clip_scratch.config import CFG
from clip_scratch.data import augment as module
from clip_scratch.data.augment import augment, augment_on_device, augments, changes, random_numbers

PLAIN = {"crop_scale": 1.0, "horizontal_flip": 0.0, "color_jitter": 0.0, "hue_jitter": 0.0}


def smooth_squares(n, side, seed=0):
    """Squares with soft colours and an edge, away from 0 and 255."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    waves = np.sin(2 * np.pi * (rng.uniform(0, 2, (n, 1, 1, 3)) * x[..., None] + rng.uniform(0, 2, (n, 1, 1, 3)) *
                                y[..., None] + rng.random((n, 1, 1, 3))))  # fmt: skip
    return (128 + 50 * waves + 20 * (x > 0.5)[..., None]).astype(np.uint8)


@pytest.mark.parametrize("name", ["crop_scale", "horizontal_flip", "color_jitter", "hue_jitter"])
def test_each_setting_alone_is_augmentation(name):
    assert not augments(CFG(**PLAIN)) and augments(CFG(**PLAIN | {name: 0.4}))


def test_random_numbers_belong_to_image_view_and_seed():
    assert np.array_equal(random_numbers(1, 2, 50), random_numbers(1, 2, 50))
    assert np.array_equal(random_numbers(1, 2, 50)[:20], random_numbers(1, 2, 20))
    drawn = [random_numbers(1, 2, 50), random_numbers(1, 3, 50), random_numbers(2, 2, 50)]
    assert len(np.unique(np.concatenate(drawn))) > 0.99 * 3 * drawn[0].size
    assert drawn[0].min() >= 0 and drawn[0].max() < 1 and abs(drawn[0].mean() - 0.5) < 0.03


def test_an_image_s_changes_do_not_depend_on_the_batch():
    cfg, uniform, ratios = CFG(hue_jitter=0.1), random_numbers(0, 0, 40), np.linspace(0.3, 3, 40, dtype=np.float32)
    whole, part = changes(cfg, uniform, ratios), changes(cfg, uniform[[7, 3]], ratios[[7, 3]])
    for field in dataclasses.fields(whole):
        np.testing.assert_array_equal(getattr(whole, field.name)[[7, 3]], getattr(part, field.name))
    squares = smooth_squares(40, 30)
    assert np.array_equal(augment(squares, whole, 24, False)[[7, 3]], augment(squares[[7, 3]], part, 24, False))


@given(st.floats(0.05, 0.99), st.floats(0.1, 10), st.integers(0, 10**6), st.integers(8, 300))
def test_crops_lie_inside_and_have_the_area_and_shape_asked_for(scale, ratio, seed, side):
    uniform = random_numbers(seed, 0, 50)
    boxes = changes(CFG(**PLAIN | {"crop_scale": scale}), uniform, np.full(50, ratio, np.float32)).boxes
    left, top, width, height = boxes.T
    assert boxes.min() >= 0 and (left + width).max() <= 1 + 1e-6 and (top + height).max() <= 1 + 1e-6
    shape = width * ratio / height  # in pixels of the original
    assert shape.min() > 3 / 4 - 1e-4 and shape.max() < 4 / 3 + 1e-4
    possible = min(1, 4 / 3 / ratio, ratio * 4 / 3)  # the largest share of so long an image that a crop can be
    assert (width * height).min() > min(scale, possible) - 1e-4
    pixels = module._whole_pixels(boxes, side)
    assert pixels.min() >= 0 and pixels[:, 2:].min() >= 1 and (pixels[:, :2] + pixels[:, 2:]).max() <= side


@pytest.mark.parametrize("ratio", [1.0, 1.5, 0.4])
def test_crops_are_distributed_as_torchvision_s(ratio):
    from torchvision.transforms import RandomResizedCrop

    boxes = changes(
        CFG(**PLAIN | {"crop_scale": 0.2}), random_numbers(0, 0, 4000), np.full(4000, ratio, np.float32)
    ).boxes
    torch.manual_seed(0)
    canvas = torch.empty(1, 1, 1).expand(1, 1000, round(1000 * ratio))  # no memory
    found = [RandomResizedCrop.get_params(canvas, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    top, left, height, width = np.array(found).T / [[1000], [1000 * ratio], [1000], [1000 * ratio]]
    for ours, theirs in zip(boxes.T, (left, top, width, height), strict=True):
        at = np.linspace(0.05, 0.95, 10)
        np.testing.assert_allclose(np.quantile(ours, at), np.quantile(theirs, at), atol=0.03)


def test_what_changes_nothing_is_the_resized_square():
    squares = smooth_squares(6, 32)
    nothing = changes(CFG(**PLAIN), random_numbers(0, 0, 6), np.ones(6, np.float32))
    assert np.array_equal(augment(squares, nothing, 32, False), squares)
    assert torch.equal(augment_on_device(torch.from_numpy(squares), nothing, 32, False), torch.from_numpy(squares))
    import cv2

    smaller = np.stack([cv2.resize(square, (28, 28), interpolation=cv2.INTER_LINEAR) for square in squares])
    assert np.array_equal(augment(squares, nothing, 28, False), smaller)


def test_a_crop_and_a_flip_by_hand():
    ramp = np.arange(0, 160, 10, dtype=np.uint8)
    square = np.repeat(np.broadcast_to(ramp[None, :, None], (16, 16, 1)), 3, 2)[None]
    todo = changes(CFG(**PLAIN), random_numbers(0, 0, 1), np.ones(1, np.float32))
    todo.boxes[:] = [0.25, 0.5, 0.5, 0.25]  # columns 4 to 11, rows 8 to 11
    assert augment(square, todo, 8, False)[0, 3, :, 1].tolist() == ramp[4:12].tolist()
    todo.flips[:] = True
    for found in (augment(square, todo, 8, False), augment_on_device(torch.from_numpy(square), todo, 8, False)):
        assert found[0, 3, :, 1].tolist() == ramp[11:3:-1].tolist()


def test_flips_come_as_often_as_asked():
    for share in (0.0, 0.3, 1.0):
        flips = changes(CFG(horizontal_flip=share), random_numbers(5, 0, 5000), np.ones(5000, np.float32)).flips
        assert abs(flips.mean() - share) < 0.02 and (share not in (0, 1) or flips.mean() == share)


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("settings", [{"crop_scale": 0.3}, {"color_jitter": 0.5, "hue_jitter": 0.2}, {}])
def test_both_paths_agree(settings, bicubic):
    squares = smooth_squares(24, 64)
    todo = changes(CFG(**settings), random_numbers(3, 1, 24), np.linspace(0.5, 2, 24, dtype=np.float32))
    one = augment(squares, todo, 56, bicubic).astype(int)
    other = augment_on_device(torch.from_numpy(squares), todo, 56, bicubic).numpy().astype(int)
    assert np.abs(one - other).mean() < 0.7 and np.quantile(np.abs(one - other), 0.999) <= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_the_pixels(dtype):
    squares = torch.from_numpy(smooth_squares(8, 40))
    todo = changes(CFG(hue_jitter=0.2), random_numbers(3, 1, 8), np.ones(8, np.float32))
    expected = augment_on_device(squares, todo, 32, False)
    with torch.autocast("cpu", dtype):
        assert torch.equal(augment_on_device(squares, todo, 32, False), expected)
        assert (squares[0, :, :, 0].float() @ squares[0, :, :, 0].float()).dtype == dtype  # autocast is on again


# ---- colours


def sequential(pixels, brightness, contrast, saturation, hue):
    """The four changes one after the other in float64, nothing clipped: (H, W, 3)."""
    grey = np.array([0.299, 0.587, 0.114])
    pixels = pixels * brightness
    mean = (pixels @ grey).mean()
    pixels = mean + contrast * (pixels - mean)
    own = (pixels @ grey)[..., None]
    pixels = own + saturation * (pixels - own)
    yiq = np.array([grey, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    y, i, q = np.moveaxis(pixels @ yiq.T, -1, 0)
    turned = (i + 1j * q) * np.exp(2j * np.pi * hue)
    return np.stack([y, turned.real, turned.imag], -1) @ np.linalg.inv(yiq).T


@given(*[st.floats(0.0, 2.0)] * 3, st.floats(-0.5, 0.5))
def test_one_matrix_is_the_four_changes(brightness, contrast, saturation, hue):
    pixels = np.random.default_rng(0).uniform(0, 255, (7, 5, 3))
    matrices, greys = module._colour_changes(*(np.array([v]) for v in (brightness, contrast, saturation, hue)))
    found = pixels @ matrices[0].astype(float).T + greys[0] * (pixels @ [0.299, 0.587, 0.114]).mean()
    np.testing.assert_allclose(found, sequential(pixels, brightness, contrast, saturation, hue), atol=2e-3)


def test_grey_stays_grey_and_brightness_is_by_hand():
    grey = np.full((1, 8, 8, 3), 100, np.uint8)
    todo = changes(CFG(**PLAIN), random_numbers(0, 0, 1), np.ones(1, np.float32))
    todo.matrices, todo.greys = module._colour_changes(
        np.array([1.2]), np.array([0.5]), np.array([1.7]), np.array([0.3])
    )
    assert (np.abs(augment(grey, todo, 8, False).astype(int) - 120) <= 1).all()


def test_the_colours_are_jittered_in_four_of_five_images():
    todo = changes(CFG(**PLAIN | {"color_jitter": 0.4}), random_numbers(1, 0, 5000), np.ones(5000, np.float32))
    untouched = (todo.matrices == np.eye(3)).all((1, 2)) & (todo.greys == 0)
    assert abs(untouched.mean() - 0.2) < 0.02
    assert 0.5 < np.abs(todo.greys).max() <= 0.4 * 1.4


@pytest.mark.parametrize("settings", [{"color_jitter": 1.0, "hue_jitter": 0.5}])
def test_what_leaves_the_range_is_clipped(settings):
    squares = np.random.default_rng(0).integers(0, 256, (16, 20, 20, 3), dtype=np.uint8)
    todo = changes(CFG(**PLAIN | settings), random_numbers(1, 0, 16), np.ones(16, np.float32))
    one = augment(squares, todo, 20, False).astype(int)
    other = augment_on_device(torch.from_numpy(squares), todo, 20, False).numpy().astype(int)
    assert np.abs(one - other).max() <= 2 and {0, 255} <= set(np.unique(one).tolist())
