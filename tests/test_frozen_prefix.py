"""Where the frozen part of a tower ends, and that what goes on from there gives what the whole tower gives."""

import copy
import dataclasses

import pytest
import torch
import transformers as hf
from torch import nn

from clip_scratch.models.clip import CLIPModel
from clip_scratch.models.frozen_prefix import activations, goes_on_exactly, unit_that_trains
from clip_scratch.models.hf_clip import HFCLIPModel

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.fixture
def build(tiny_cfg, tiny_tokenizer, hf_cfg):
    """Make a model of a timm tower ("resnet"), of a transformers text tower ("text:bert") or a CLIP ("hf:clip")."""

    def make(kind, **settings):
        torch.manual_seed(0)
        kind, _, name = kind.partition(":")
        if kind == "hf":
            return HFCLIPModel(hf_cfg(name, **settings)).eval()
        config = None
        if kind == "text":
            config = text_config(name, len(tiny_tokenizer))
            settings = {"text_pooling": "mean"} | settings
        else:
            settings["model_name"] = f"test_{kind}"
        size = 160 if kind == "vit" else 32
        cfg = dataclasses.replace(tiny_cfg, size=size, **settings)
        return CLIPModel(cfg, copy.deepcopy(tiny_tokenizer), config).eval()

    return make


def text_config(name, vocab_size):
    sizes = {**SMALL, "vocab_size": vocab_size}
    if name == "distilbert":
        return hf.DistilBertConfig(vocab_size=vocab_size, dim=32, hidden_dim=64, n_layers=3, n_heads=2)
    if name == "t5":
        return hf.T5Config(vocab_size=vocab_size, d_model=32, d_kv=16, d_ff=64, num_layers=3, num_heads=2)
    if name == "clip":
        return hf.CLIPTextConfig(**sizes, eos_token_id=3, pad_token_id=0)
    return hf.AutoConfig.for_model(name, **sizes, **({"pad_token_id": 0} if name == "roberta" else {}))


def batch_of(model, n=5):
    texts = ["a red square" + " , number one" * i for i in range(n)]
    encoded = model.tokenizer(texts, padding=True, return_tensors="pt")
    pixels = torch.randint(0, 256, (n, 3, model.cfg.size, model.cfg.size), dtype=torch.uint8)
    return {"pixels": pixels, "input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}


def unit_of(model, part):
    return unit_that_trains(model, part, batch_of(model))


# ---- where it ends


@pytest.mark.parametrize(
    ("kind", "policy", "unit"),
    [
        ("resnet", "heads", "image_projection"),
        ("resnet", "frozen", "image_projection"),
        ("resnet", "last:1", "image_encoder.model.layer4"),
        ("resnet", "first:1", "image_encoder.model.layer2"),
        ("resnet", "first:0", "image_encoder.model.layer1"),
        ("convnext", "last:1", "image_encoder.model.stages.3"),
        ("vit", "first:1", "image_encoder.model.blocks.1"),
        ("hf:clip", "heads", "hf.visual_projection"),
        ("hf:clip", "last:1", "hf.vision_model.encoder.layers.2"),
        ("hf:siglip", "heads", "hf.vision_model.head"),
        ("hf:dual_timm", "last:1", "hf.vision_model.timm_model.layer4"),
        ("resnet", "full", None),
        ("resnet", "lora", None),
        ("hf:clip", "lora", None),
    ],
)
def test_image_unit(build, kind, policy, unit):
    if policy == "lora":
        pytest.importorskip("peft")
    assert unit_of(build(kind, image_freezing=policy), "image") == unit


@pytest.mark.parametrize(
    ("kind", "policy", "unit"),
    [
        ("text:bert", "heads", "text_projection"),
        ("text:bert", "last:1", "text_encoder.model.encoder.layer.2"),
        ("text:distilbert", "first:1", "text_encoder.model.transformer.layer.1"),
        ("hf:clip", "first:2", "hf.text_model.encoder.layers.2"),
        ("hf:siglip", "heads", "hf.text_model.head"),
        ("text:bert", "last:3", None),  # the embeddings alone are no gain
        ("text:bert", "full", None),
        ("hf:clip", "full", None),
    ],
)
def test_text_unit(build, kind, policy, unit):
    assert unit_of(build(kind, text_freezing=policy), "text") == unit


def test_a_stem_that_trains_leaves_no_prefix(build):
    model = build("vit", image_freezing="last:1")
    model.image_encoder.model.pos_embed.requires_grad_(True)
    assert unit_of(model, "image") is None


# ---- and what goes on from there


IMAGES = ["resnet", "efficientnet", "convnext", "vit", "hf:clip", "hf:siglip", "hf:siglip2", "hf:dual", "hf:dual_timm"]
TEXTS = ["text:bert", "text:roberta", "text:distilbert", "text:clip", "hf:clip", "hf:siglip", "hf:chinese", "hf:dual"]


@pytest.mark.parametrize("policy", ["heads", "last:1"])
@pytest.mark.parametrize(("part", "kind"), [*(("image", k) for k in IMAGES), *(("text", k) for k in TEXTS)])
def test_goes_on_exactly(build, part, kind, policy):
    model = build(kind, **{f"{part}_freezing": policy})
    batch = batch_of(model)
    unit = unit_of(model, part)
    assert goes_on_exactly(model, part, unit, batch)
    kept = activations(model, part, unit, batch)
    assert not any(module._forward_pre_hooks for module in model.modules())
    # Activations of other inputs give other embeddings: what is put in is what counts
    embed = model.embed_images if part == "image" else model.embed_texts
    other = embed({**batch, f"{part}_activations": 10 * torch.randn_like(kept), f"{part}_unit": unit})
    assert not torch.allclose(other, embed(batch), atol=1e-3)


class Bypassed(nn.Module):
    """Two blocks, and the first one's input added to what comes out of the second, as a DenseNet does."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))

    def forward(self, pixels):
        return (self.blocks[1](self.blocks[0](pixels)) + pixels).mean((2, 3))


def test_a_bypass_is_noticed(build):
    model = build("resnet")
    model.image_encoder = Bypassed()
    model.image_projection = nn.Linear(3, 8)
    model.image_encoder.blocks[0].requires_grad_(False)
    unit = unit_of(model, "image")
    assert unit == "image_encoder.blocks.1"
    assert not goes_on_exactly(model, "image", unit, batch_of(model))


def test_layers_that_need_what_the_first_one_makes_are_noticed(build):
    """T5's position bias."""
    model = build("text:t5", text_freezing="last:1")
    unit = unit_of(model, "text")
    assert unit is not None and not goes_on_exactly(model, "text", unit, batch_of(model))
    layers = model.get_submodule(unit.rpartition(".")[0])
    assert len(layers) == 3  # put back


def test_a_deep_copy_goes_on_with_its_own_weights(build):
    model = build("resnet", image_freezing="last:1", text_freezing="last:1")
    batch = batch_of(model)
    for part in ("image", "text"):
        unit = unit_of(model, part)
        batch |= {f"{part}_activations": activations(model, part, unit, batch).detach(), f"{part}_unit": unit}
    twin = copy.deepcopy(model)
    before = [x.detach() for x in twin(batch)]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p)) if p.requires_grad else None
    assert all(torch.equal(a, b) for a, b in zip(before, twin(batch), strict=True))
    assert not torch.allclose(model(batch)[0], before[0], atol=1e-3)
