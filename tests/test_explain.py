"""explain: heat against what is computed by hand, on towers whose truth is known, and a model left as it was."""

import copy
import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import benchmarks.explain as benchmark
from clip_scratch import CLIPModel, encode_image, encode_text, explain, find_matches, load
from clip_scratch.data.scenes.draw import SIZE, draw_scene
from clip_scratch.data.scenes.scene import sample_scenes
from clip_scratch.errors import UserError
from clip_scratch.models.hf_clip import HFCLIPModel
from clip_scratch.retrieval.explain import NEUTRAL

QUERY = "a red square"
KINDS = ["clip", "siglip", "siglip2", "chinese", "dual", "dual_timm"]


class Convolution(nn.Module):
    """Patches of 4 x 4 pixels -> 6 channels, and their mean over the image."""

    out_dim = 6

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, self.out_dim, 4, 4)

    def map(self, pixels):
        return self.conv(pixels).relu()

    def forward(self, pixels):
        return self.map(pixels).mean((2, 3))


class Brightness(Convolution):
    """Sees nothing but how bright each patch is."""

    out_dim = 1

    def __init__(self):
        super().__init__()
        nn.init.constant_(self.conv.weight, 1 / 48)
        nn.init.constant_(self.conv.bias, 3)  # the darkest pixels are near -2


class Detached(Convolution):
    """Maps without a gradient."""

    def forward(self, pixels):
        return super().forward(pixels).detach()


class Flat(nn.Module):
    """No maps: one linear layer."""

    out_dim = 6

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 32 * 32, 6)

    def forward(self, pixels):
        return self.linear(pixels.flatten(1))


@pytest.fixture
def make(tiny_cfg, tiny_tokenizer):
    """A random model with a timm tower, or one of the towers above under a linear head."""

    def model(tower="test_resnet", **settings):
        torch.manual_seed(0)
        name = tower if isinstance(tower, str) else "test_resnet"
        model = CLIPModel(dataclasses.replace(tiny_cfg, model_name=name, **settings), tiny_tokenizer)
        if not isinstance(tower, str):
            model.image_encoder, model.image_projection = tower(), nn.Linear(tower.out_dim, 32)
        return model.eval()

    return model


@pytest.fixture
def make_hf(hf_cfg):
    return lambda kind, **settings: HFCLIPModel(hf_cfg(kind, **settings)).eval()


def noise(height=40, width=60):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels_of(model, image):
    return model.normalize_pixels(model.image_transform()(image=image)["image"][None])


def direction_of(model, query=QUERY):
    sentence, neutral = encode_text(model, [query, NEUTRAL])
    return sentence - (sentence @ neutral) * neutral


def enlarged(heat, image):
    """A map (h, w) at the size of an image that was stretched, its greatest value 1."""
    heat = F.interpolate(heat[None, None].detach(), image.shape[:2], mode="bilinear")[0, 0]
    return (heat / heat.max()).numpy()


# ---- the heat


def test_grad_cam_by_hand(make):
    model, image = make(Convolution, precision="fp32"), noise()
    maps = model.image_encoder.map(pixels_of(model, image))[0]  # (6, 8, 8)
    projected = model.image_projection(maps.mean((1, 2)))
    length, direction = projected.norm(), direction_of(model)
    embedding = projected / length
    # derivative of z/|z| . d by z, by the pooled features through the linear head, by each of the 64 positions
    by_projected = (direction - (embedding @ direction) * embedding) / length
    by_maps = model.image_projection.weight.T @ by_projected / 64  # (6,), the same at each position: its own mean
    heat = (by_maps[:, None, None] * maps).sum(0).clamp(min=0)
    assert 0 < (heat > 0).float().mean() < 1
    explanation = explain(model, image, QUERY)
    np.testing.assert_allclose(explanation.heat, enlarged(heat, image), atol=1e-4)
    assert explanation.cosine == pytest.approx((embedding @ encode_text(model, QUERY)[0]).item(), abs=1e-5)


def test_several_towers_are_explained_each_by_its_own_maps(make):
    """By torch alone: the sum of Grad-CAM at the last stage of each."""
    names = "test_resnet+tf_efficientnet_lite0"
    model, image, found = make(names, size=160, precision="fp32", head="linear"), noise(), {}
    for parameter in model.image_encoder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    for name, stage in (("first", "0.layer4"), ("second", "1.bn2")):
        module = model.image_encoder.model.get_submodule(stage)
        module.register_forward_hook(lambda _, __, output, name=name: found.update({name: output}))
    score = F.normalize(model.forward_image(pixels_of(model, image)), dim=-1)[0] @ direction_of(model)
    heats = []
    for maps, gradient in zip(found.values(), torch.autograd.grad(score, list(found.values())), strict=True):
        heats.append((gradient.mean((2, 3), keepdim=True) * maps).sum(1)[0].clamp(min=0).detach())
    assert len({heat.shape for heat in heats}) == 1 and all(heat.any() for heat in heats)
    np.testing.assert_allclose(explain(model, image, QUERY).heat, enlarged(sum(heats), image), atol=1e-3)


@pytest.mark.parametrize(
    ("tower", "size", "stage"),
    [("test_resnet", 160, "layer4"), ("test_resnet", 128, "layer3"), ("test_resnet", 64, "layer2"),
     ("test_mambaout", 160, "stages.3")],
)  # fmt: skip
def test_grad_cam_at_the_last_stage_that_is_large_enough(make, tower, size, stage):
    """By torch alone, at the last stage of 5 x 5 positions or more; test_mambaout has its channels last.

    At 64 pixels the bottleneck block of layer3 has maps of 8 x 8 too, but its shortcut goes past them.
    """
    model, image, found = make(tower, size=size, precision="fp32", head="linear"), noise(), {}
    places = (1, 2) if tower == "test_mambaout" else (2, 3)
    for parameter in model.image_encoder.parameters():  # as built, the blocks hardly change what passes through them
        parameter.data += 0.1 * torch.randn_like(parameter)
    module = model.image_encoder.model.get_submodule(stage)
    module.register_forward_hook(lambda _, __, output: found.update(map=output))

    def grad_cam():
        score = F.normalize(model.forward_image(pixels_of(model, image)), dim=-1)[0] @ direction_of(model)
        (gradient,) = torch.autograd.grad(score, found["map"])
        return (gradient.mean(places, keepdim=True) * found["map"]).sum(6 - sum(places))[0].clamp(min=0)

    if not grad_cam().any():  # of a random tower, all may speak against the query
        for parameter in model.image_projection.parameters():
            parameter.data.neg_()
    np.testing.assert_allclose(explain(model, image, QUERY).heat, enlarged(grad_cam(), image), atol=1e-4)


@pytest.mark.parametrize("resize", ["stretch", "crop", "crop:40"])
@pytest.mark.parametrize(("height", "width"), [(40, 80), (90, 60)])
def test_heat_lies_on_what_the_model_sees(make, resize, height, width):
    """A bright spot on black, for a tower that sees brightness and a query that means it."""
    model = make(Brightness, resize=resize, precision="fp32")
    with torch.no_grad():
        direction = direction_of(model)
        model.image_projection.weight.copy_(direction[:, None])
        model.image_projection.bias.copy_(encode_text(model, NEUTRAL)[0])
    image = np.zeros((height, width, 3), np.uint8)
    left, top = width // 2 + 2, height // 2 - 12
    image[top : top + 10, left : left + 10] = 255
    explanation = explain(model, image, QUERY)
    assert explanation.heat.shape == (height, width) and explanation.heat.dtype == np.float32
    assert explanation.heat.min() >= 0 and explanation.heat.max() == 1
    y, x = np.unravel_index(explanation.heat.argmax(), explanation.heat.shape)
    assert top <= y < top + 10 and left <= x < left + 10
    cropped = np.ones((height, width), bool)
    side = {"stretch": max(height, width), "crop": min(height, width), "crop:40": min(height, width) * 32 // 40}[resize]
    rows, columns = ((n - min(side, n)) // 2 for n in (height, width))
    cropped[rows : height - rows, columns : width - columns] = False
    assert not explanation.heat[cropped].any()
    assert (explanation.heat[~cropped] > 0).all()  # black is less bright, but nowhere dark enough to speak against it


@pytest.mark.parametrize("kind", ["clip", "siglip", "chinese", "dual"])
def test_rollout_by_transformers_own_attention(make_hf, kind):
    model, image = make_hf(kind, precision="fp32"), noise(48, 48)
    reference = copy.deepcopy(model)
    reference.hf.set_attn_implementation("eager")
    pixels = pixels_of(model, image).requires_grad_()
    output = reference.hf.get_image_features(pixel_values=pixels, output_attentions=True)
    score = F.normalize(output.pooler_output, dim=-1)[0] @ direction_of(model)
    layers = list(zip(output.attentions, torch.autograd.grad(score, output.attentions), strict=True))
    assert len(layers) == 3
    n = layers[0][0].shape[-1]
    relevance = np.eye(n)
    for attention, gradient in layers:
        relevant = (attention * gradient)[0].detach().double().clamp(min=0).mean(0).numpy()
        relevance = relevance + relevant @ relevance
    relevance -= np.eye(n)
    rows = relevance[0] if n == 17 else relevance.mean(0)  # the class token is pooled, or, where there is none, all
    heat = torch.tensor(rows[-16:]).float().view(4, 4)
    np.testing.assert_allclose(explain(model, image, QUERY).heat, enlarged(heat, image), atol=1e-3)
    np.testing.assert_allclose(explain(reference, image, QUERY).heat, enlarged(heat, image), atol=1e-3)  # not fused


def test_rollout_of_timm_needs_no_switch(make):
    """The same heat whether timm's attention is fused or not, and no other than a rollout."""
    model, image = make("test_vit", size=160, precision="fp32"), noise()
    fused = explain(model, image, QUERY).heat
    assert (fused > 0).all()  # Grad-CAM clamps some of it
    modules = [module for module in model.modules() if hasattr(module, "fused_attn")]
    assert modules and all(module.fused_attn for module in modules)
    for module in modules:
        module.fused_attn = False
    np.testing.assert_allclose(explain(model, image, QUERY).heat, fused, atol=1e-4)


@pytest.mark.parametrize("name", ["test_coatnet", "test_vit_relpos", "test_vit3"])
def test_other_towers(make, name):
    """Attention between maps; no class token; attention pooling."""
    explanation = explain(make(name, size=160), noise(), QUERY)
    assert explanation.heat.shape == (40, 60) and explanation.heat.min() >= 0 and explanation.heat.max() in (0, 1)


# ---- the model


@pytest.mark.parametrize("kind", [*KINDS, "test_resnet", "test_vit"])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(make, make_hf, kind, training):
    model = make_hf(kind) if kind in KINDS else make(kind, size=160, image_freeze="backbone")
    model.requires_grad_(training)
    model.train(training)
    model.heads["text"].train(not training)

    def state():
        modules = model.named_modules()
        flags = {n: (m.training, len(m._forward_hooks), getattr(m, "fused_attn", None)) for n, m in modules}
        parameters = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
        attention = model.hf.vision_model.config._attn_implementation if kind in KINDS else None
        return flags, parameters, dataclasses.asdict(model.cfg), attention

    before, tensors = state(), copy.deepcopy(model.state_dict())
    explanation = explain(model, noise(), QUERY)
    assert state() == before
    assert all(tensor.equal(tensors[name]) for name, tensor in model.state_dict().items())
    assert explanation.heat.shape == (40, 60) and explanation.heat.min() >= 0
    assert explanation.heat.max() == 1 or "res" in kind or kind == "dual_timm"  # Grad-CAM of a random tower may be 0
    with torch.inference_mode():
        again = explain(model, noise(), QUERY)
    np.testing.assert_allclose(again.heat, explanation.heat, atol=1e-5)


@pytest.mark.parametrize("tower", ["test_resnet", "test_vit"])
def test_precision(make, bf16, tower):
    """That of the image tower does not change the heat; the cosine is the one that find_matches gives."""
    for precisions in (("fp32", "bf16/fp32"), ("bf16", "fp32/bf16")):
        heats = []
        for precision in precisions:
            model = make(tower, size=160, precision=precision)
            explanation = explain(model, noise(), QUERY)
            heats.append(explanation.heat)
            matches = find_matches(model, encode_image(model, noise()), QUERY, ["x.png"])
            assert explanation.cosine == pytest.approx(matches[0][1], abs=1e-5)
        np.testing.assert_allclose(*heats, atol=1e-4)


def test_threads_do_not_see_each_other(make):
    model, images = make("test_vit", size=160, precision="fp32"), [noise(40, 50 + i) for i in range(6)]
    alone = [explain(model, image, QUERY).heat for image in images]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda image: explain(model, image, QUERY).heat, images))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


# ---- what a person does with it


def test_paths_pil_images_and_arrays(make, tmp_path):
    model = make()
    Image.fromarray(noise()).save(tmp_path / "x.png")
    heats = [explain(model, x, QUERY).heat for x in (noise(), Image.fromarray(noise()), tmp_path / "x.png")]
    assert np.array_equal(heats[0], heats[1]) and np.array_equal(heats[0], heats[2])


def test_drawing(make, tmp_path):
    explanation = explain(make(resize="crop"), noise(), "a red square for $5 and $6, " * 9)
    x, y = explanation.centre
    ys, xs = np.indices(explanation.heat.shape) + 0.5
    assert (x, y) == pytest.approx([(n * explanation.heat).sum() / explanation.heat.sum() for n in (xs, ys)], rel=1e-4)
    overlay = explanation.overlay()
    assert overlay.shape == (40, 60, 3) and overlay.dtype == np.uint8
    same = (overlay == explanation.image).all(-1)
    assert same[explanation.heat == 0].all() and not same[explanation.heat > 0.5].all()
    assert explanation._repr_png_().startswith(b"\x89PNG")
    assert Image.open(explanation.save(tmp_path / "heat.jpg")).format == "JPEG"
    with pytest.raises(UserError, match="must end in"):
        explanation.save(tmp_path / "heat.txt")


def test_no_heat(make):
    """A query that says nothing beyond any picture: no heat, the centre in the middle, and still a picture."""
    explanation = explain(make(precision="fp32"), noise(), NEUTRAL)
    explanation.heat[explanation.heat < 2] = 0  # rounding may leave some
    assert explanation.centre == pytest.approx((30, 20))
    assert np.array_equal(explanation.overlay(), explanation.image)


@pytest.mark.parametrize("query", ["", "  \n"])
def test_a_query_without_text(make, query):
    with pytest.raises(UserError, match="no text in the query"):
        explain(make(), noise(), query)


def test_images_that_cannot_be_read(make, tmp_path):
    model = make().train()
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8 no more")
    for path, fault in ((tmp_path / "bad.jpg", "cannot be decoded"), (tmp_path / "none.jpg", "no such file")):
        with pytest.raises(UserError, match=f"{path.name} cannot be read as an image: {fault}"):
            explain(model, path, QUERY)
    assert model.training


@pytest.mark.parametrize("tower", [Flat, Detached])
def test_a_tower_without_places(make, tower):
    model = make(tower).requires_grad_(False)
    with pytest.raises(UserError, match="cannot be explained: its image tower has neither feature maps nor attention"):
        explain(model, noise(32, 32), QUERY)


# ---- the benchmark


def test_boxes_are_those_of_the_drawing():
    """Inside the boxes lies all that differs from the scene's background."""
    for _, scene in sample_scenes(40, 1):
        picture, boxes = draw_scene(scene).astype(int), benchmark.boxes(scene)
        assert len(boxes) == len(scene.things)
        outside = np.ones((SIZE, SIZE), bool)
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE
            outside[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)] = False
            inside = picture[round(top) : round(bottom), round(left) : round(right)]
            assert np.ptp(inside.reshape(-1, 3), 0).max() > 40  # something is drawn there
        background = np.median(picture[outside], 0)
        assert np.abs(picture[outside] - background).max() < 35  # the lines and specks of the background differ by less


def test_benchmark_runs(scene_run, capsys):
    benchmark.main(benchmark.Arguments(str(scene_run.folder), n=6))
    table = capsys.readouterr().out
    assert table.startswith("6 objects") and all(word in table for word in ("peak", "centre", "random point"))
    assert load(scene_run.folder).cfg.n_scenes == 240
