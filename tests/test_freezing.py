"""Which parameters train: blocks by number, each policy on towers of both backends, LoRA, layer decay, the counts."""

import copy
import dataclasses
import json
import os
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn
from transformers import AutoModel

from clip_scratch import CFG, load
from clip_scratch.errors import UserError
from clip_scratch.evaluate import evaluate
from clip_scratch.models.clip import CLIPModel
from clip_scratch.models.encoders import TextEncoder, build_image_encoder
from clip_scratch.models.freezing import blocks, count_parameters, freeze, frozen_parts, merged_state, places
from clip_scratch.models.hf_clip import HFCLIPModel
from clip_scratch.models.saved import run_config
from clip_scratch.train import main
from clip_scratch.training.optimizer import build_optimizer, learning_rates
from clip_scratch.training.report import Report

POLICIES = ["all", "backbone", "first:1", "all-but-last:1", "lora", "none"]
TOWERS = {  # backend, and the image model or the kind of pretrained CLIP
    "resnet+bert": ("scratch", "test_resnet"),
    "convnext+bert": ("scratch", "test_convnext"),
    "vit+bert": ("scratch", "test_vit"),
    "clip": ("hf", "clip"),
    "siglip": ("hf", "siglip"),
    "dual": ("hf", "dual"),
    "dual_timm": ("hf", "dual_timm"),
}


@pytest.fixture
def build(tiny_cfg, tiny_tokenizer, hf_cfg):
    """A model of TOWERS, its dropout on."""

    def make(kind, **settings):
        backend, name = TOWERS[kind]
        torch.manual_seed(0)
        settings = {"precision": "fp32"} | settings
        if backend == "hf":
            return HFCLIPModel(hf_cfg(name, **settings))
        size = 160 if name == "test_vit" else 32
        cfg = dataclasses.replace(tiny_cfg, **{"model_name": name, "size": size, "image_dropout": 0.3} | settings)
        return CLIPModel(cfg, copy.deepcopy(tiny_tokenizer))

    return make


def batch_of(model, n=4):
    encoded = model.tokenizer([f"a red square , number {i}" for i in range(n)], padding=True, return_tensors="pt")
    pixels = torch.randint(0, 256, (n, 3, model.cfg.size, model.cfg.size), dtype=torch.uint8)
    return {"pixel_values": pixels, "input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}


def step(model):
    """One optimiser step in training mode on a loss that reaches every parameter; the names that moved."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # a ResNet's residual branches begin with a factor of 0
            nn.init.ones_(module.weight)
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, dataclasses.replace(model.cfg, weight_decay=0.0))
    model.train()
    images, texts = model(batch_of(model))
    ((images @ texts.T) * model.logit_scale).square().mean().backward()
    optimizer.step()
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


# ---- blocks


def numbers(tower, *starts):
    number, depth = blocks(tower)
    assert number.keys() == {name for name, _ in tower.named_parameters()}
    return [{n for name, n in number.items() if name.startswith(start)} for start in starts], depth


@pytest.mark.parametrize(
    ("name", "stem", "block", "after", "depth"),
    [
        ("resnet50", ("conv1", "bn1"), "layer{}.", (), 4),
        ("convnext_atto", ("stem",), "stages.{}.", ("head",), 4),
        ("tf_efficientnet_lite0", ("conv_stem", "bn1"), "blocks.{}.", (), 7),
        ("mobilenetv3_small_050", ("conv_stem", "bn1"), "blocks.{}.", ("conv_head",), 6),
        ("swin_tiny_patch4_window7_224", ("patch_embed",), "layers.{}.", ("norm",), 4),
        ("vit_tiny_patch16_224", ("cls_token", "pos_embed", "patch_embed"), "blocks.{}.", (), 12),
        ("vit_base_patch16_siglip_224", ("pos_embed", "patch_embed"), "blocks.{}.", ("attn_pool",), 12),
    ],
)
def test_blocks_of_timm(name, stem, block, after, depth):
    with torch.device("meta"):
        tower = timm.create_model(name, num_classes=0)
    first = 1 if name.startswith("resnet") else 0
    (*stems, one, last, top), found = numbers(tower, *stem, block.format(first), block.format(first + depth - 1), after)
    assert found == depth and all(n == {0} for n in stems)
    assert (one, last, top) == ({1}, {depth}, {depth + 1} if after else set())


def test_the_norm_after_timm_s_blocks_trains_with_the_last(build):
    number, depth = blocks(build("vit+bert").towers["image"])
    assert number["norm.weight"] >= depth


@pytest.mark.parametrize(
    ("kind", "part", "stem", "block", "after", "depth"),
    [
        ("clip", "image", ("embeddings", "pre_layrnorm"), "encoder.layers.{}.", ("post_layernorm",), 3),
        ("clip", "text", ("embeddings",), "encoder.layers.{}.", ("final_layer_norm",), 3),
        ("siglip", "image", ("embeddings",), "encoder.layers.{}.", ("post_layernorm", "head"), 3),
        ("siglip", "text", ("embeddings",), "encoder.layers.{}.", ("final_layer_norm", "head"), 3),
        ("dual", "text", ("embeddings",), "encoder.layer.{}.", ("pooler",), 3),
        ("dual_timm", "image", ("timm_model.conv1",), "timm_model.layer{}.", (), 4),
        ("resnet+bert", "text", ("embeddings",), "encoder.layer.{}.", (), 2),
    ],
)
def test_blocks_of_transformers(build, kind, part, stem, block, after, depth):
    tower = build(kind).towers[part]
    first = int(kind == "dual_timm")
    (*stems, one, last), found = numbers(tower, *stem, block.format(first), block.format(first + depth - 1))
    assert found == depth and all(n == {0} for n in stems) and (one, last) == ({1}, {depth})
    tops, _ = numbers(tower, *after)
    assert all(n == {depth + 1} for n in tops)


def test_blocks_of_several_networks_are_counted_from_their_tops():
    with torch.device("meta"):
        encoder = build_image_encoder(CFG(model_name="resnet18+mobilenetv3_small_050", pretrained=False))
    four, six = ("0.conv1", "0.layer1.", "0.layer4."), ("1.conv_stem", "1.blocks.0.", "1.blocks.5.", "1.conv_head")
    found, depth = numbers(encoder.model, *four, *six)
    assert depth == 6 and found == [{0}, {3}, {6}, {0}, {1}, {6}, {7}]


def test_blocks_of_a_network_without_any():
    assert blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == ({"0.weight": 1, "0.bias": 1}, 1)


def test_blocks_of_t5():
    from transformers import T5Config

    config = T5Config(d_model=32, num_layers=2, num_decoder_layers=2, d_ff=64, num_heads=2, d_kv=16, vocab_size=50)
    (stem, last, top), depth = numbers(
        TextEncoder("t5", pretrained=False, config=config, vocab_size=50).model,
        "shared", "encoder.block.1.", "encoder.final_layer_norm",
    )  # fmt: skip
    assert (stem, last, top, depth) == ({0}, {2}, {3}, 2)


# ---- policies


def wanted(model, part, policy):
    """The names of the tower's and of its head's parameters that the policy's description lets train."""
    tower, head = model.towers[part], model.heads[part]
    names = {id(p): name for name, p in model.named_parameters()}
    heads = {id(p) for p in head.parameters()}
    number, depth = blocks(tower)
    rule = {
        "all": lambda n, lora: False,
        "backbone": lambda n, lora: False,
        "first:1": lambda n, lora: n > 1,
        "all-but-last:1": lambda n, lora: n >= depth,
        "lora": lambda n, lora: lora,
        "none": lambda n, lora: True,
    }[policy]
    inside = {
        names[id(p)]
        for name, p in tower.named_parameters()
        if id(p) not in heads and rule(number[name], "lora_" in name)
    }
    return inside | ({names[i] for i in heads} if policy != "all" else set())


# never in the loss: the SigLIP bias; never in the features: a pooler
IDLE = {"hf.logit_bias"}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", TOWERS)
def test_what_moves_is_what_the_policy_says(build, kind, policy):
    """The image tower by its policy, the text tower by another; batch statistics move with their weights alone."""
    other = "first:1" if policy == "all" else "all"
    settings = {"image_freeze": policy, "text_freeze": other, "freeze_batch_norm": False}
    model = build(kind, **settings)
    expected = wanted(model, "image", policy) | wanted(model, "text", other)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    scale = {name for name, p in model.named_parameters() if p is model.log_scale}
    assert trains - IDLE == expected | scale
    moved = step(model)
    statistics = {name for name in moved if "running_" in name or "num_batches" in name}
    assert moved - statistics <= trains
    still = trains - moved - IDLE
    # At the start LoRA's A has no gradient since B is 0, a key's bias has none ever, and dead units happen
    assert all("lora_A" in n or "k_proj.bias" in n or "key.bias" in n or "relative" in n for n in still), still
    owners = {name.rpartition(".")[0] for name in trains}
    assert all(name.rpartition(".")[0] in owners for name in statistics)
    if policy in ("first:1", "none") and kind in ("resnet+bert", "dual_timm"):
        assert statistics


@pytest.mark.parametrize("kind", ["clip", "dual", "vit+bert"])
@pytest.mark.parametrize("policy", ["backbone", "all-but-last:1", "lora"])
def test_the_text_tower_too(build, kind, policy):
    model = build(kind, image_freeze="backbone", text_freeze=policy)
    expected = wanted(model, "text", policy) | wanted(model, "image", "backbone")
    scale = {name for name, p in model.named_parameters() if p is model.log_scale}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected | scale
    moved = step(model)
    assert moved <= expected | scale and moved & wanted(model, "text", policy)


def test_frozen_dropout_is_off_and_what_trains_keeps_its_own(build):
    model = build("dual", text_freeze="first:1", image_freeze="all").train()
    text = model.towers["text"]
    assert not text.embeddings.dropout.training and not text.encoder.layer[0].output.dropout.training
    assert text.encoder.layer[1].output.dropout.training
    assert not any(module.training for module in model.towers["image"].modules())
    model.eval()
    assert not any(module.training for module in model.modules())


def test_a_frozen_head_drops_nothing(build):
    model = build("resnet+bert", image_freeze="all", dropout=0.5, image_dropout=0.5).train()
    pixels = batch_of(model)["pixel_values"]
    assert torch.equal(model.encode_image(pixels), model.encode_image(pixels))
    assert any(module.training for module in model.text_projection.modules())


def test_batch_norms_keep_their_statistics_where_asked(build):
    for kind in ("resnet+bert", "dual_timm"):
        assert not {name for name in step(build(kind, freeze_batch_norm=True)) if "running_" in name}


def test_the_tutorial_s_trainable_freezes_the_backbone():
    assert frozen_parts(CFG(trainable=False)) == {"image": "backbone", "text": "backbone"}
    assert frozen_parts(CFG(trainable=False, image_freeze="all"))["image"] == "all"
    assert frozen_parts(CFG(trainable=False, text_freeze="lora"))["text"] == "backbone"
    assert frozen_parts(CFG(image_freeze="all-but-last:2")) == {"image": "all-but-last:2", "text": "none"}


@pytest.mark.parametrize("kind", ["clip", "vit+bert"])
def test_more_blocks_than_there_are(build, kind):
    depth = 3 if kind == "clip" else 6
    with pytest.raises(UserError, match=f"image_freeze first:40: the tower has {depth} blocks"):
        build(kind, image_freeze="first:40")
    with pytest.raises(UserError, match=f"image_freeze first:{depth}: the tower has {depth} blocks"):
        build(kind, image_freeze=f"first:{depth}")
    with pytest.raises(UserError, match=f"image_freeze all-but-last:{depth + 1}: the tower has {depth} blocks"):
        build(kind, image_freeze=f"all-but-last:{depth + 1}")
    with pytest.raises(UserError, match="text_freeze first:40: the tower has"):
        build(kind, text_freeze="first:40")
    build(kind, image_freeze=f"all-but-last:{depth}")


@pytest.mark.parametrize("kind", ["clip", "resnet+bert"])
def test_nothing_to_train(build, kind):
    with pytest.raises(UserError, match="nothing to train: image_freeze and text_freeze are both all"):
        build(kind, image_freeze="all", text_freeze="all")


def test_freezing_again_gives_the_new_policy(build):
    """As a notebook does that trains the heads first and then the towers."""
    model = build("clip", image_freeze="all", text_freeze="backbone")
    freeze(model, dataclasses.replace(model.cfg, image_freeze="none", text_freeze="none"))
    assert all(p.requires_grad for p in model.parameters())


# ---- LoRA

LORA = {"image_freeze": "lora", "text_freeze": "lora", "lora_rank": 3}


def embeddings(model, batch):
    with torch.inference_mode():
        return torch.cat(model.eval()(batch))


@pytest.mark.parametrize("kind", TOWERS)
def test_lora_starts_untouched_and_merges_to_its_own_outputs(build, kind):
    plain, model = build(kind), build(kind, **LORA)
    batch = batch_of(model)
    state = merged_state(model)
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    torch.testing.assert_close(embeddings(model, batch), embeddings(plain, batch), atol=1e-6, rtol=0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B" in name:
                p.normal_(std=0.2)
    ours = embeddings(model, batch)
    assert (ours - embeddings(plain, batch)).abs().max() > 1e-3
    before = copy.deepcopy(model.state_dict())
    plain.load_state_dict(merged_state(model))
    torch.testing.assert_close(embeddings(plain, batch), ours, atol=2e-5, rtol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_lora_is_of_the_rank_that_was_asked_for_and_in_blocks_alone(build):
    model = build("siglip", **LORA)
    lora = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    assert {p.shape[0] for name, p in lora.items() if "lora_A" in name} == {3}
    assert all(".layers." in name for name in lora)
    per_block = [name for name in lora if "vision_model.encoder.layers.0." in name and "lora_A" in name]
    assert len(per_block) == 6  # q, k, v, out and the two of the MLP
    assert all(place.is_lora == (".lora_" in name) for (place, _), name in zip(
        places(model), [name for name, _ in model.named_parameters()], strict=True))  # fmt: skip


def test_lora_of_one_tower_merges_beside_the_other(build):
    model, plain = build("clip", text_freeze="lora"), build("clip")
    step(model), step(model)
    plain.load_state_dict(merged_state(model))
    batch = batch_of(model)
    torch.testing.assert_close(embeddings(plain, batch), embeddings(model, batch), atol=2e-5, rtol=0)


def test_lora_without_peft_names_the_extra(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"text_freeze lora needs another library: pip install 'clip_scratch\[lora\]'"):
        build("clip", text_freeze="lora")
    assert merged_state(build("clip")).keys() == build("clip").state_dict().keys()  # and nothing else asks for it


# ---- rates and counts


@pytest.mark.parametrize("kind", ["clip", "vit+bert", "siglip"])
def test_layer_decay_by_hand(build, kind):
    rates = {"image_encoder_lr": 8.0, "text_encoder_lr": 4.0, "head_lr": 2.0}
    model = build(kind, layer_decay=0.5, **rates)
    optimizer = build_optimizer(model, model.cfg)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rate) == len(list(model.parameters()))
    heads = {id(p) for head in model.heads.values() for p in head.parameters()}
    for part, top in (("image", 8.0), ("text", 4.0)):
        number, depth = blocks(model.towers[part])
        for name, p in model.towers[part].named_parameters():
            own = top * 0.5 ** max(0, depth - number[name])  # the stem is as far below the first block as that is
            assert rate[id(p)] == (2.0 if id(p) in heads else own), name
    assert all(rate[i] == 2.0 for i in heads) and rate[id(model.log_scale)] == 2.0
    assert learning_rates(optimizer) == {"image_encoder_lr": 8.0, "text_encoder_lr": 4.0, "head_lr": 2.0}


def test_the_rates_that_are_reported(build):
    rates = {"image_encoder_lr": 1e-5, "text_encoder_lr": 2e-5, "head_lr": 3e-5, "lora_lr": 4e-3}

    def reported(**settings):
        model = build("clip", **rates, **settings)
        return list(learning_rates(build_optimizer(model, model.cfg)).values())

    assert reported() == [1e-5, 2e-5, 3e-5]
    assert reported(image_freeze="all", text_freeze="backbone") == [0, 0, 3e-5]
    assert reported(image_freeze="lora") == [4e-3, 2e-5, 3e-5]


def test_decay_is_of_weights_alone(build):
    model = build("clip", weight_decay=0.3, **LORA)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in build_optimizer(model, model.cfg).param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.3 if p.ndim >= 2 else 0), names[id(p)]


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("policy", ["backbone", "none", "lora"])
def test_the_counts_add_up(build, kind, policy, capsys):
    model = build(kind, image_freeze=policy, text_freeze=policy)
    counts = count_parameters(model)
    assert sum(total for _, total in counts.values()) == sum(p.numel() for p in model.parameters())
    assert sum(n for n, _ in counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    if policy == "backbone":
        assert counts["image"][0] == counts["text"][0] == 0 < counts["head"][0]
    if policy == "none":
        assert all(trained == total for trained, total in counts.values())
    Report.parameters(SimpleNamespace(cfg=model.cfg), model, truncated=0)
    out = capsys.readouterr().out
    assert out.count(f"(freeze: {policy})") == 2 and f"{counts['image'][1]:,} parameters train" in out


def test_a_whole_clip_by_its_published_figures():
    """openai/clip-vit-base-patch32 from its configuration: 151,277,313 parameters."""
    from transformers import CLIPConfig

    with torch.device("meta"):
        hf = AutoModel.from_config(CLIPConfig())
    assert sum(p.numel() for p in hf.parameters()) == 151_277_313
    assert [blocks(tower)[1] for tower in (hf.vision_model, hf.text_model)] == [12, 12]


# ---- from-scratch runs


def test_a_from_scratch_run_with_lora(tiny_cfg, tmp_path, monkeypatch, plain):
    """size=0 is timm's own, loss="auto" is InfoNCE; best/ is merged, and a resume ends as an uninterrupted run."""
    settings = {"size": 0, "loss": "auto", "model_name": "test_vit", "image_freeze": "lora", "lora_lr": 0.01}
    settings |= {"text_freeze": "all-but-last:1", "ema": 0.5, "accumulation": 2, "batch_size": 4}
    settings |= {"precision": "fp32"}  # in bf16 merged updates are rounded otherwise than unmerged ones
    cfg = dataclasses.replace(tiny_cfg, **settings, run_dir=str(tmp_path / "whole"))
    whole = main(cfg)
    saved = run_config(whole / "best")
    assert (saved.size, saved.loss) == (160, "infonce")
    assert saved.size == timm.create_model("test_vit").default_cfg["input_size"][-1]
    model = load(whole)
    assert not any("lora" in name for name in model.state_dict())
    best = json.loads((whole / "best/metrics.json").read_text())
    assert evaluate(whole)["rsum"] == pytest.approx(best["rsum"], abs=1e-6)
    torch.manual_seed(cfg.seed)
    start = CLIPModel(dataclasses.replace(cfg, image_freeze="none"), copy.deepcopy(model.tokenizer)).state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert any(name.startswith("image_encoder.model.blocks.0.") for name in moved)
    assert not any(name.startswith(("image_encoder.model.patch_embed", "text_encoder.model.embed")) for name in moved)

    with monkeypatch.context() as patch:
        show = Report.step

        def interrupted(self, state, steps):
            show(self, state, steps)
            if state.progress.step == 4:
                os.kill(os.getpid(), 2)

        patch.setattr(Report, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(dataclasses.replace(cfg, run_dir=str(tmp_path / "run")))
    run = main(CFG(resume=str(tmp_path / "run")))
    ours, theirs = load(run).state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_lora_of_a_tower_without_linear_layers():
    from transformers import GPT2Config

    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50)
    tower = TextEncoder("gpt2", pretrained=False, config=config, vocab_size=50).model
    with pytest.raises(UserError, match="text_freeze lora: the tower's blocks have no linear layers"):
        freeze(
            SimpleNamespace(
                towers={"image": nn.Identity(), "text": tower}, heads={"image": nn.Linear(1, 1), "text": None}
            ),
            CFG(text_freeze="lora", image_freeze="backbone"),
        )
