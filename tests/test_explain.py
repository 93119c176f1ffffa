"""explain: the heat against one computed by hand, where it lies, and a model that is left as it was."""

import numpy as np
import pytest
import torch
from torch import nn

from clip_scratch import CFG, encode_image, encode_text, explain, load
from clip_scratch.errors import UserError
from clip_scratch.models.build import build_model
from clip_scratch.retrieval import explain as module
from clip_scratch.retrieval.explain import _on_image, _rollout

QUERY = "a red circle"


class Convolution(nn.Module):
    """One convolution of 4 x 4 patches, a ReLU and the mean over space."""

    out_dim = 6

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 4, stride=4)

    def forward(self, pixel_values):
        return self.conv(pixel_values).relu().mean((2, 3))


class Flat(nn.Module):
    out_dim = 6

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 32 * 32, 6)

    def forward(self, pixel_values):
        return self.linear(pixel_values.flatten(1))


def convolution(cfg):
    return Convolution()


def flat(cfg):
    return Flat()


@pytest.fixture
def small(tiny_cfg, tiny_tokenizer, monkeypatch):
    """A model with an image tower of this file, and an image."""

    def make(name, **settings):
        monkeypatch.setattr(tiny_cfg, "model_name", f"{__name__}:{name}")
        for key, value in settings.items():
            setattr(tiny_cfg, key, value)
        tiny_cfg.precision = "fp32"
        torch.manual_seed(1)
        return build_model(tiny_cfg, ["a red circle", "a dog"]).eval()

    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return make, image


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_grad_cam_by_hand(small, head):
    """The heat of each cell is the derivative of the cosine by a common factor on that cell's activation."""
    make, image = small
    model = make("convolution", head=head)
    text = encode_text(model, QUERY)[0]
    pixels = model.normalize_pixels(model.image_transform(train=False)(image=image)["image"][None])
    activation = model.image_encoder.conv(pixels)
    factors = torch.ones(8, 8, requires_grad=True)
    embedding = model.image_projection((activation * factors).relu().mean((2, 3)))
    cosine = nn.functional.cosine_similarity(embedding, text[None]).sum()
    (wanted,) = torch.autograd.grad(cosine, factors)
    monitored = module._recorded(model.towers["image"])
    with monitored as (maps, attentions):
        value = (model.encode_image(pixels.requires_grad_()) * text).sum()
    assert not attentions and [tuple(m.shape) for m in maps] == [(1, 6, 8, 8)]
    assert torch.allclose(module._grad_cam(maps, value), wanted.clamp(min=0), atol=1e-6)
    found = explain(model, image, QUERY)
    assert found.cosine == pytest.approx(cosine.item(), abs=1e-5)


def test_the_heat_is_where_the_model_looks(small):
    """A tower that sees red alone, at a query that its embedding fits."""
    make, image = small
    model = make("convolution", head="linear")
    conv = model.image_encoder.conv
    with torch.no_grad():
        conv.weight.zero_()
        conv.bias.zero_()
        conv.weight[0, 0] = 1.0
    image = np.zeros((40, 80, 3), np.uint8)
    image[8:16, 60:72, 0] = 255
    red = encode_image(model, np.full((8, 8, 3), (255, 0, 0), np.uint8))[0]  # the cosine is far from its maximum
    neutral = nn.functional.normalize(torch.randn(len(red)), dim=0)
    model.encode_text = lambda *_: torch.stack([neutral, red])  # the shorter sentence comes first
    found = explain(model, image, QUERY)
    x, y = found.centre
    assert 54 <= x <= 76 and 4 <= y <= 20
    assert found.heat.shape == (40, 80) and found.heat.dtype == np.float32 and found.heat.max() == 1.0
    assert found.heat[:, :30].max() < 0.1


def test_rollout_by_hand():
    """Two layers of one head over a class token and four patches."""
    attention = torch.full((1, 1, 5, 5), 0.2)
    gradient = torch.zeros(1, 1, 5, 5)
    gradient[0, 0, 0, 2], gradient[0, 0, 0, 3] = 1.0, -1.0
    heat = _rollout([attention, attention], (gradient, gradient))
    assert heat.tolist() == pytest.approx(np.array([[0, 0.4], [0, 0]]))  # once by each layer; negative gradients cut
    passed_on = torch.zeros(1, 1, 5, 5)
    passed_on[0, 0, 2, 4] = 1.0  # the first layer moves patch 4's content to patch 2, which the second one attends to
    heat = _rollout([attention, attention], (passed_on, gradient)).flatten()
    assert heat.tolist() == pytest.approx([0, 0.2, 0, 0.04])


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2", "chinese", "dual", "dual_timm"])
def test_every_backend_is_left_as_it_was(hf_cfg, kind):
    model = build_model(hf_cfg(kind, image_freeze="backbone"), []).train()
    image = np.random.default_rng(1).integers(0, 255, (50, 40, 3), dtype=np.uint8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = explain(model, image, QUERY)
    assert found.heat.shape == (50, 40) and np.isfinite(found.heat).all() and 0 <= found.heat.min() <= found.heat.max()
    assert found.heat.max() == pytest.approx(1) and found.heat.std() > 0
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(getattr(m, "fused_attn", True) is False for m in model.modules())
    assert getattr(model.towers["image"].config, "_attn_implementation", "sdpa") == "sdpa"
    model.eval()
    assert found.cosine == pytest.approx((encode_image(model, image) @ encode_text(model, QUERY)[0]).item(), abs=0.02)


@pytest.mark.parametrize("timm_model", ["test_vit", "test_convnext", "test_efficientnet"])
def test_timm_towers(tiny_cfg, tiny_tokenizer, timm_model):
    tiny_cfg.model_name, tiny_cfg.size = timm_model, 160
    model = build_model(tiny_cfg, ["a dog"])
    image = np.random.default_rng(2).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    found = explain(model, image, QUERY)
    assert found.heat.shape == (60, 90) and found.heat.max() == pytest.approx(1)


@pytest.mark.parametrize("resize", ["stretch", "crop", "crop:48"])
def test_heat_on_the_image(resize):
    cfg = CFG(size=32, resize=resize)
    out = _on_image(torch.ones(4, 4), (60, 100), cfg)
    side = {"crop": 60, "crop:48": 40}.get(resize)
    assert out.shape == (60, 100) and out.max() == pytest.approx(1)
    assert int((out > 0.5).sum()) == (side * side if side else 6000)
    if side:
        assert out[30, 50] > 0.99 and out[30, 50 - side // 2 - 2] == 0


def test_it_draws_itself(scene_run, tmp_path):
    image = next((scene_run.cwd / "data/scenes-240-42/Images").iterdir())
    found = explain(load(scene_run.folder), image, QUERY)
    assert found._repr_png_()[:4] == b"\x89PNG" and found.save(tmp_path / "x.png").is_file()
    assert found.overlay().shape == found.image.shape and found.overlay().dtype == np.uint8


def test_a_tower_without_a_map(small):
    make, image = small
    with pytest.raises(UserError, match="Flat has neither feature maps nor attention"):
        explain(make("flat"), image, QUERY)
