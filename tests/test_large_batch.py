"""Large batches by parts: the gradients of the whole batch, to the last digits, whatever the loss and the parts."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from clip_scratch.data.loaders import build_loaders
from clip_scratch.errors import UserError
from clip_scratch.models.build import build_model
from clip_scratch.models.clip import CLIPModel
from clip_scratch.training.engine import backward, loss_function, train_epoch
from clip_scratch.training.large_batch import backward_in_parts, largest_that_fits, split
from clip_scratch.training.losses import LOSSES
from clip_scratch.training.optimizer import WeightAverage, build_optimizer

FP32 = {"precision": "fp32", "batch_size": 10, "captions_per_image": 0}


@pytest.fixture
def setup(tiny_cfg, tiny_data, tiny_tokenizer):
    """Make (model, batch) of settings: 10 images with one to five captions each, some of which repeat."""

    def make(dtype=torch.float64, **settings):
        cfg = dataclasses.replace(tiny_cfg, **FP32 | settings)
        torch.manual_seed(0)
        model = CLIPModel(cfg, tiny_tokenizer)
        loader = build_loaders(tiny_data.table[:50], model.tokenizer, "train", cfg)
        batch = next(iter(loader))
        batch["pixel_values"] = model.normalize_pixels(batch["pixel_values"]).to(dtype)
        return model.to(dtype).train(), batch

    return make


def no_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def check_equal(ours, wanted, tolerance):
    """Relative error of each parameter's gradient in float64; in float32, where some are all rounding, of all."""
    assert ours.keys() == wanted.keys()
    errors = {name: (ours[name] - gradient).norm() for name, gradient in wanted.items()}
    norms = {name: gradient.norm() for name, gradient in wanted.items()}
    total = torch.stack(list(norms.values())).norm()
    if next(iter(wanted.values())).dtype == torch.float32:
        assert torch.stack(list(errors.values())).norm() <= tolerance * total
    else:  # the gradient of a bias before a norm is zero but for rounding
        assert all(error <= tolerance * max(norms[name], 1e-6 * total) for name, error in errors.items())


def in_one_graph(model, batch, loss, size):
    """The gradients of a batch whose parts are computed one after the other, all with their graph: random numbers and
    batch norms as by parts."""
    images, texts = (torch.cat(e) for e in zip(*[model(part) for part in split(batch, size)], strict=True))
    ids = batch["image_ids"], batch["caption_image_ids"], batch["caption_ids"]
    value = loss(images, texts, model.logit_scale, *ids)
    value.backward()
    return value.item(), gradients(model)


def check_by_parts(model, batch, loss, tolerance):
    plain, _ = backward(model, batch, loss, None, 1.0)
    wanted = gradients(model)
    for size in (1, 3, 5, 10):
        value, _ = backward_in_parts(model, batch, loss, None, 1.0, size)
        check_equal(gradients(model), wanted, tolerance)
        assert value.item() == pytest.approx(plain.item(), rel=tolerance)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_equal_those_of_the_whole_batch(setup, loss):
    """Frozen batch norms and no dropout: the plain step."""
    model, batch = setup(loss=loss, freeze_batch_norm=True, dropout=0.0)
    no_dropout(model)
    assert len(batch["caption_image_ids"]) > len(batch["image_ids"])
    check_by_parts(model, batch, loss_function(model, model.cfg), 1e-10)


def test_gradients_equal_those_of_the_whole_batch_in_single_precision(setup):
    """Of a model that has learned something: random weights embed all alike, and where gradients cancel rounding is
    left."""
    model, batch = setup(loss="sigmoid", freeze_batch_norm=True, dropout=0.0)
    no_dropout(model)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        backward(model, batch, LOSSES["infonce"], None, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model, batch["pixel_values"] = model.float(), batch["pixel_values"].float()
    for loss in LOSSES:
        check_by_parts(model, batch, loss_function(model, dataclasses.replace(model.cfg, loss=loss)), 1e-5)


@pytest.mark.parametrize("size", [4, 5])
def test_dropout_and_batch_norm_are_replayed(setup, size):
    """The second pass draws the first one's random numbers; running statistics are updated once."""
    model, batch = setup(image_dropout=0.3, text_dropout=0.3, dropout=0.3)
    other, loss = copy.deepcopy(model), loss_function(model, model.cfg)
    torch.manual_seed(5)
    wanted_value, wanted = in_one_graph(other, batch, loss, size)
    after = torch.rand(1)
    torch.manual_seed(5)
    value, _ = backward_in_parts(model, batch, loss, None, 1.0, size)
    assert torch.rand(1) == after  # a run goes on as the plain one would
    assert value.item() == pytest.approx(wanted_value, rel=1e-12)
    check_equal(gradients(model), wanted, 1e-10)
    for (name, ours), theirs in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=0), name


@pytest.mark.parametrize("kind", ["clip", "siglip", "dual"])
@pytest.mark.parametrize("freeze", ["none", "first:1", "lora", "backbone"])
def test_pretrained_backends(hf_cfg, tiny_data, kind, freeze):
    pytest.importorskip("peft")
    cfg = hf_cfg(kind, image_freeze=freeze, text_freeze=freeze, batch_size=6, captions_per_image=2, precision="fp32")
    model = build_model(cfg, tiny_data.table["caption"].tolist()).double().train()
    batch = next(iter(build_loaders(tiny_data.table[:40], model.tokenizer, "train", model.cfg)))
    batch["pixel_values"] = model.normalize_pixels(batch["pixel_values"].float()).double()
    loss = loss_function(model, model.cfg)
    torch.manual_seed(1)
    _, wanted = in_one_graph(model, batch, loss, 2)
    torch.manual_seed(1)
    backward_in_parts(model, batch, loss, None, 1.0, 2)
    check_equal(gradients(model), wanted, 1e-10)


def test_cached_features_of_a_frozen_tower(setup):
    model, batch = setup(image_freeze="backbone")
    no_dropout(model)
    batch["image_features"] = model.towers["image"](batch.pop("pixel_values")).detach()
    loss = loss_function(model, model.cfg)
    backward(model, batch, loss, None, 1.0)
    wanted = gradients(model)
    backward_in_parts(model, batch, loss, None, 1.0, 3)
    check_equal(gradients(model), wanted, 1e-10)


def test_training_with_all_that_goes_with_it(tiny_cfg, tiny_data, tiny_tokenizer):
    """Accumulation, clipping, the moving average and a custom loss: the same weights as with the whole batch."""
    settings = FP32 | {"accumulation": 2, "ema": 0.5, "grad_clip": 0.1, "freeze_batch_norm": True, "dropout": 0.0}
    states = []
    for size in (0, 4):
        cfg = dataclasses.replace(tiny_cfg, **settings | {"batch_size": 5, "micro_batch_size": size and 2})
        torch.manual_seed(0)
        model = CLIPModel(cfg, tiny_tokenizer)
        no_dropout(model)
        average = WeightAverage(model, 0.5)
        loader = build_loaders(tiny_data.table[:50], model.tokenizer, "train", cfg)
        for _ in range(2):
            stats = train_epoch(model, loader, build_optimizer(model, cfg), cfg, average=average)
        states.append((model.state_dict(), average.state_dict(), stats.loss))
    for ours, wanted in zip(states[1][:2], states[0][:2], strict=True):
        for name, tensor in ((name, tensor) for name, tensor in wanted.items() if isinstance(tensor, torch.Tensor)):
            assert torch.allclose(ours[name].double(), tensor.double(), atol=2e-4), name
    assert states[1][2] == pytest.approx(states[0][2], rel=1e-4)


def test_split(setup):
    _, batch = setup()
    parts = split(batch, 4)
    assert [len(part["pixel_values"]) for part in parts] == [4, 3, 3]
    for name in ("pixel_values", "input_ids", "attention_mask"):
        assert torch.equal(torch.cat([part[name] for part in parts]), batch[name])
    assert all(len(part["input_ids"]) for part in parts)


def test_out_of_memory_names_a_size_that_fits(setup, monkeypatch):
    """A tower that has room for no more than three images; memory of the failed step is given back first."""
    model, batch = setup(torch.float32)
    encode = model.encode_image

    def bounded(pixel_values):
        if len(pixel_values) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(pixel_values)

    model.encode_image = bounded
    assert largest_that_fits(model, batch) == 2
    with pytest.raises(UserError, match="with 10 images at once: --micro-batch-size 2 fits"):
        train_epoch(model, [batch], build_optimizer(model, model.cfg), model.cfg)
    assert all(p.grad is None for p in model.parameters())
    cfg = dataclasses.replace(model.cfg, micro_batch_size=2)
    train_epoch(model, [batch], build_optimizer(model, cfg), cfg)
    model.encode_image = lambda _: (_ for _ in ()).throw(MemoryError())
    with pytest.raises(UserError, match="use smaller images or towers"):
        train_epoch(model, [batch], build_optimizer(model, cfg), cfg)


def test_a_micro_batch_larger_than_the_batch(tiny_cfg):
    from clip_scratch.train import main

    with pytest.raises(UserError, match=r"micro_batch_size \(9\) is larger than batch_size \(8\)"):
        main(dataclasses.replace(tiny_cfg, micro_batch_size=9))


def test_no_graph_in_the_first_pass(setup, monkeypatch):
    """What the memory is saved by: at no time do two parts have a graph."""
    model, batch = setup()
    alive = []
    forward = CLIPModel.forward

    def watched(self, part):
        outputs = forward(self, part)
        alive.append((torch.is_grad_enabled(), len(outputs[0])))
        return outputs

    monkeypatch.setattr(CLIPModel, "forward", watched)
    backward_in_parts(model, batch, loss_function(model, model.cfg), None, 1.0, 5)
    assert alive == [(False, 5), (False, 5), (True, 5), (True, 5)]
