"""precision="auto": what is measured, what is chosen, what is remembered, and that nothing else changes."""

import dataclasses
import json

import pytest
import torch

from clip_scratch.data.loaders import build_loaders
from clip_scratch.models.clip import CLIPModel
from clip_scratch.training import autotune
from clip_scratch.training.autotune import choose_precision, measure_precision


@pytest.fixture
def ready(tiny_data, tiny_cfg, tiny_tokenizer):
    torch.manual_seed(0)
    model = CLIPModel(tiny_cfg, tiny_tokenizer)
    loader = build_loaders(tiny_data.table, model.tokenizer, "train", tiny_cfg)
    return model, next(iter(loader))


def set_times(monkeypatch, seconds):
    """In place of a stopwatch: `seconds(cfg, tower)`. Returns the (tower, cfg) that were timed."""
    made = []

    def step(model, tower, batch, cfg):
        made.append((tower, cfg))
        return lambda: None

    monkeypatch.setattr(autotune, "_step", step)
    monkeypatch.setattr(autotune, "_seconds", lambda step, hopeless: seconds(made[-1][1], made[-1][0]))
    return made


def test_the_model_and_the_random_state_are_left_as_they_are(ready, bf16):
    model, batch = ready
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layout = model.image_encoder.model.conv1[0].weight.stride()
    state = torch.get_rng_state()
    cfg, message = measure_precision(model, batch, model.cfg)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.image_encoder.model.conv1[0].weight.stride() == layout and model.cfg.precision == "auto"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert cfg.precision in ({"bf16", "fp32", "bf16/fp32", "fp32/bf16"} if bf16 else {"fp32"})
    assert "image tower" in message and "text tower" in message and message.count("ms a step") == 2


@pytest.mark.parametrize(
    ("image", "text", "precision"),
    [("bf16", "bf16", "bf16"), ("fp32", "fp32", "fp32"), ("fp32", "bf16", "fp32/bf16"), ("bf16", "fp32", "bf16/fp32")],
)
@pytest.mark.parametrize("layout", [True, False])
def test_each_tower_gets_its_fastest(ready, monkeypatch, image, text, precision, layout):
    monkeypatch.setenv("CLIP_SCRATCH_BF16", "1")  # without bf16 there is only the layout to choose
    model, batch = ready

    def seconds(cfg, tower):
        fastest = cfg.precision == text if tower == "text" else (cfg.precision, cfg.channels_last) == (image, layout)
        return 1.0 if fastest else 2.0

    made = set_times(monkeypatch, seconds)
    cfg, _ = measure_precision(model, batch, model.cfg)
    assert (cfg.precision, cfg.channels_last) == (precision, layout)
    assert [tower for tower, _ in made] == ["image"] * 4 + ["text"] * 2


def test_noise_does_not_change_the_choice(ready, monkeypatch):
    monkeypatch.setenv("CLIP_SCRATCH_BF16", "1")
    model, batch = ready
    times = iter([1.0, 0.95, 0.92, 0.97, 1.0, 0.91])
    set_times(monkeypatch, lambda cfg, tower: next(times))
    cfg, _ = measure_precision(model, batch, model.cfg)
    assert (cfg.precision, cfg.channels_last) == ("bf16", True)


def test_without_bf16_only_the_layout_is_measured(ready, monkeypatch):
    model, batch = ready
    monkeypatch.setenv("CLIP_SCRATCH_BF16", "0")
    made = set_times(monkeypatch, lambda cfg, tower: 2.0 if cfg.channels_last else 1.0)
    cfg, message = measure_precision(model, batch, model.cfg)
    assert cfg.precision == "fp32" and not cfg.channels_last and "bf16" not in message
    assert [tower for tower, _ in made] == ["image", "image", "text"]


def test_the_choice_is_remembered_for_this_machine_and_these_towers(ready, monkeypatch, tmp_path, bf16):
    model, batch = ready
    model.cfg = cfg = dataclasses.replace(model.cfg, cache_path=str(tmp_path))
    made = set_times(monkeypatch, lambda cfg, tower: 1.0 if cfg.precision == "fp32" else 2.0)
    first, _ = choose_precision(model, batch, cfg)
    timed = len(made)
    again, message = choose_precision(model, batch, dataclasses.replace(cfg, epochs=7))
    assert len(made) == timed and "measured before" in message
    assert (again.precision, again.channels_last) == (first.precision, first.channels_last) == ("fp32", True)
    assert again.epochs == 7
    (file,) = tmp_path.glob("precision-*.json")
    monkeypatch.setenv("CLIP_SCRATCH_BF16", str(int(not bf16)))  # another machine
    choose_precision(model, batch, cfg)
    model.image_encoder.requires_grad_(False)  # another tower
    choose_precision(model, batch, cfg)
    assert len(list(tmp_path.glob("precision-*.json"))) == 3
    file.write_text("{")  # damaged
    model.image_encoder.requires_grad_(True)
    monkeypatch.setenv("CLIP_SCRATCH_BF16", str(int(bf16)))
    choose_precision(model, batch, cfg)
    assert json.loads(file.read_text())["precision"] == "fp32"


def test_without_a_cache_folder_it_is_measured_each_time(ready, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    model, batch = ready
    made = set_times(monkeypatch, lambda cfg, tower: 1.0)
    cfg = dataclasses.replace(model.cfg, cache_path=str(tmp_path / "file" / "cache"))
    counts = [len(made) for _ in range(2) if choose_precision(model, batch, cfg)]
    assert counts[1] == 2 * counts[0]


def test_a_hopeless_candidate_costs_one_timed_step():
    calls = []
    autotune._seconds(lambda: calls.append(0), hopeless=-1.0)
    assert len(calls) == 2


def test_bf16_agrees_with_fp32_to_two_decimals(ready, bf16):
    model, batch = ready
    model.eval()
    embeddings = {}
    for precision in ("fp32", "bf16"):
        model.cfg = dataclasses.replace(model.cfg, precision=precision)
        with torch.no_grad():
            embeddings[precision] = model(batch)
    for exact, fast in zip(embeddings["fp32"], embeddings["bf16"], strict=True):
        assert ((exact * fast).sum(-1) > 0.999).all() and torch.equal(exact, fast) != bf16


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower_in_fp32_beside_the_other_in_bf16(ready, tower, bf16):
    model, batch = ready
    model.eval()

    def dtype_of_a_layer(precision):
        model.cfg = dataclasses.replace(model.cfg, precision=precision)
        seen = []
        layer = next(
            m for m in model.towers[tower].modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)
        )  # fmt: skip
        hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        with torch.no_grad():
            model(batch)
        hook.remove()
        return seen[0]

    low = torch.bfloat16 if bf16 else torch.float32
    assert dtype_of_a_layer("bf16") == low
    assert dtype_of_a_layer("fp32/bf16") == (torch.float32 if tower == "image" else low)
    assert dtype_of_a_layer("bf16/fp32") == (torch.float32 if tower == "text" else low)
