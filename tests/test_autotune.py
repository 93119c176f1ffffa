"""precision="auto": what is measured, what is chosen, and that nothing else changes."""

import dataclasses

import pytest
import torch

from clip_scratch.data.loaders import build_loaders
from clip_scratch.models.clip import CLIPModel
from clip_scratch.training import autotune
from clip_scratch.training.autotune import tune
from clip_scratch.training.engine import autocast, loss_of


@pytest.fixture
def ready(tiny_data, tiny_cfg, tiny_tokenizer):
    torch.manual_seed(0)
    model = CLIPModel(tiny_cfg, tiny_tokenizer)
    loader = build_loaders(tiny_data.table, model.tokenizer, "train", tiny_cfg)
    return model, next(iter(loader))


def set_times(monkeypatch, seconds):
    """In the place of a stopwatch: `seconds(cfg, part)`."""
    made = []

    def step(model, part, batch, cfg):
        made.append((part, cfg))
        return lambda: None

    monkeypatch.setattr(autotune, "_step", step)
    monkeypatch.setattr(autotune, "_seconds", lambda step, hopeless: seconds(made[-1][1], made[-1][0]))
    return made


def test_the_model_and_the_random_state_are_left_as_they_are(ready, bf16):
    model, batch = ready
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layout = model.image_encoder.model.conv1[0].weight.stride()
    state = torch.get_rng_state()
    cfg, why = tune(model, batch, model.cfg)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.image_encoder.model.conv1[0].weight.stride() == layout and model.cfg.precision == "auto"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert cfg.precision == ("bf16" if bf16 else "fp32")
    assert "image tower" in why and "text tower" in why and why.count("ms a step") == 2


@pytest.mark.parametrize("image", ["same", "fp32"])
@pytest.mark.parametrize("text", ["same", "fp32"])
@pytest.mark.parametrize("layout", [True, False])
def test_each_tower_gets_its_fastest(ready, monkeypatch, image, text, layout):
    monkeypatch.setenv("CLIP_SCRATCH_BF16", "1")  # without bf16 there is only the layout to choose
    model, batch = ready

    def seconds(cfg, part):
        if part == "text":
            return 1.0 if cfg.text_precision == text else 2.0
        return 1.0 if (cfg.image_precision, cfg.channels_last) == (image, layout) else 2.0

    made = set_times(monkeypatch, seconds)
    cfg, _ = tune(model, batch, model.cfg)
    assert (cfg.image_precision, cfg.text_precision, cfg.channels_last) == (image, text, layout)
    assert [part for part, _ in made] == ["image"] * 4 + ["text"] * 2


def test_noise_does_not_change_the_choice(ready, monkeypatch):
    monkeypatch.setenv("CLIP_SCRATCH_BF16", "1")
    model, batch = ready
    times = iter([1.0, 0.95, 0.92, 0.97, 1.0, 0.91])
    set_times(monkeypatch, lambda cfg, part: next(times))
    cfg, _ = tune(model, batch, model.cfg)
    assert (cfg.image_precision, cfg.text_precision, cfg.channels_last) == ("same", "same", True)


def test_a_precision_that_was_asked_for_stays(ready, monkeypatch, bf16):
    model, batch = ready
    made = set_times(monkeypatch, lambda cfg, part: 1.0)
    cfg, _ = tune(model, batch, dataclasses.replace(model.cfg, image_precision="fp32"))
    assert cfg.image_precision == "fp32" and {c.image_precision for part, c in made if part == "image"} == {"fp32"}


def test_without_bf16_only_the_layout_is_measured(ready, monkeypatch):
    model, batch = ready
    monkeypatch.setenv("CLIP_SCRATCH_BF16", "0")
    made = set_times(monkeypatch, lambda cfg, part: 2.0 if cfg.channels_last else 1.0)
    cfg, why = tune(model, batch, model.cfg)
    assert cfg.precision == "fp32" and not cfg.channels_last and "bf16" not in why
    assert [part for part, _ in made] == ["image", "image", "text"]


def test_a_hopeless_candidate_costs_one_timed_step():
    calls = []
    autotune._seconds(lambda: calls.append(0), hopeless=-1.0)
    assert len(calls) == 2


def test_bf16_agrees_with_fp32_to_two_decimals(ready, bf16):
    model, batch = ready
    model.eval()
    embeddings = {}
    for precision in ("fp32", "bf16"):
        with torch.inference_mode(), autocast(dataclasses.replace(model.cfg, precision=precision), model.device):
            embeddings[precision] = model(batch)
    for exact, fast in zip(embeddings["fp32"], embeddings["bf16"], strict=True):
        assert ((exact * fast).sum(-1) > 0.999).all() and torch.equal(exact, fast) != bf16


@pytest.mark.parametrize("part", ["image", "text"])
def test_a_tower_set_to_fp32_computes_in_fp32_and_can_be_set_back(ready, part, bf16):
    model, batch = ready
    model.eval()

    def loss(**settings):
        model.cfg = dataclasses.replace(model.cfg, precision="bf16", **settings)
        model.apply_precision()
        seen = []
        tower = model.towers[part]
        layer = next(m for m in tower.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear))
        hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        value = loss_of(model, batch, model.cfg)[0].item()
        hook.remove()
        return value, seen[0]

    before = loss()
    assert loss(**{f"{part}_precision": "fp32"})[1] == torch.float32
    assert loss(**{f"{part}_precision": "same"}) == before
    assert before[1] == (torch.bfloat16 if bf16 else torch.float32)
