"""The loop itself: one step by hand, what trains and what does not, rates and schedules, precision, warnings."""

import copy
import dataclasses
import math
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from clip_scratch.data.loaders import build_loaders, on_device
from clip_scratch.errors import UserError
from clip_scratch.models.clip import CLIPModel
from clip_scratch.models.precision import autocast, tower_dtype
from clip_scratch.retrieval.embed import embed_batches
from clip_scratch.training.engine import EpochStats, compute_loss, loss_function, spread, train_epoch, valid_epoch
from clip_scratch.training.losses import LOSSES, contrastive_loss
from clip_scratch.training.optimizer import WeightAverage, build_optimizer, build_scheduler, learning_rates
from clip_scratch.training.report import chance_loss, epoch_warnings
from clip_scratch.training.state import Progress

RATES = {"image_encoder_lr": 2e-3, "text_encoder_lr": 3e-3, "head_lr": 4e-3}


@pytest.fixture
def setup(tiny_cfg, tiny_data, tiny_tokenizer):
    """Make (model, training loader, validation loader, cfg) of settings; 2 steps an epoch."""

    def make(**settings):
        cfg = dataclasses.replace(tiny_cfg, **RATES | settings)
        torch.manual_seed(0)
        model = CLIPModel(cfg, tiny_tokenizer)
        train, valid = (tiny_data.table[tiny_data.table["split"] == name] for name in ("train", "valid"))
        loaders = (
            build_loaders(train, model.tokenizer, "train", cfg),
            build_loaders(valid, model.tokenizer, "valid", cfg),
        )
        return model, *loaders, cfg

    return make


def state_of(module):
    return copy.deepcopy(module.state_dict())


def moved(module, before):
    """The names in the module's state that differ from before."""
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


# ---- a step


def test_an_epoch_reports_each_step(setup):
    model, loader, _, cfg = setup(captions_per_image=2)
    steps = []
    train_epoch(model, loader, build_optimizer(model, cfg), cfg, on_step=steps.append)
    assert [(step.steps, step.batches) for step in steps] == [(1, 1), (1, 1)]
    assert all(step.images == 8 and 8 <= step.captions <= 16 and step.seconds > 0 for step in steps)
    assert all(math.isfinite(step.loss) and -1 <= step.spread <= 1 for step in steps)
    assert model.training
    rest = []
    train_epoch(model, loader.start(0, 1), build_optimizer(model, cfg), cfg, on_step=rest.append)
    assert len(rest) == 1


def test_an_epoch_returns_the_sums_of_its_steps(setup):
    model, loader, _, cfg = setup(captions_per_image=2, accumulation=2, batch_size=4)
    steps = []
    stats = train_epoch(model, loader, build_optimizer(model, cfg), cfg, on_step=steps.append)
    assert (stats.steps, stats.batches, stats.images) == (3, 5, 20)  # the last step has one batch
    assert stats.captions == sum(step.captions for step in steps)
    assert stats.loss == pytest.approx(sum(step.loss_sum for step in steps) / 5)
    assert stats.seconds == pytest.approx(sum(step.seconds for step in steps))


def test_a_step_is_adamw_on_the_clipped_gradient(setup):
    """The slow way: the same batch, the gradient, its norm, PyTorch's own AdamW one group at a time."""
    model, loader, _, cfg = setup(dropout=0.0, grad_clip=0.1, weight_decay=0.1, precision="fp32")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    twin = copy.deepcopy(model).train()
    loader.start(0, 0, 1)
    train_epoch(model, loader, build_optimizer(model, cfg), cfg)
    loss, _ = compute_loss(twin, next(iter(loader.start(0, 0, 1))), contrastive_loss)
    loss.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in twin.parameters()))
    assert norm > cfg.grad_clip
    for name, parameter in twin.named_parameters():
        parameter.grad *= cfg.grad_clip / (norm + 1e-6)
        part = name.partition(".")[0]
        rate = RATES.get(f"{part}_lr", RATES["head_lr"])
        torch.optim.AdamW([parameter], lr=rate, weight_decay=0.1 if parameter.ndim >= 2 else 0.0).step()
    wanted = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("clip", [0.0, 1e-6])
def test_clipping_bounds_the_gradient(setup, clip):
    model, loader, _, cfg = setup(grad_clip=clip)
    seen = []
    optimizer = build_optimizer(model, cfg)
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.sqrt(sum((p.grad**2).sum() for p in model.parameters())).item())
    )
    train_epoch(model, loader, optimizer, cfg)
    assert all(norm <= 1.01e-6 for norm in seen) if clip else all(norm > 1e-3 for norm in seen)


def test_the_average_is_the_one_by_hand(setup):
    model, loader, _, cfg = setup(ema=0.75)
    average = WeightAverage(model, cfg.ema)
    wanted = []

    def by_hand(_):
        now = {name: tensor.double() for name, tensor in state_of(model).items()}
        before, n = wanted[-1] if wanted else now, len(wanted)
        decay = min(0.75, (1 + n) / (10 + n))
        of_buffers = {name for name, _ in model.named_buffers()}
        wanted.append({k: v if k in of_buffers else decay * before[k] + (1 - decay) * v for k, v in now.items()})

    optimizer = build_optimizer(model, cfg)
    for epoch in range(2):
        train_epoch(model, loader.start(epoch), optimizer, cfg, average=average, on_step=by_hand)
    assert len(wanted) == 4
    for name, tensor in average.module.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), wanted[-1][name], atol=1e-5, rtol=1e-4)
    assert moved(average.module, model.state_dict())


@pytest.mark.parametrize("loss", ["infonce", "sigmoid", "soft_target"])
@pytest.mark.parametrize("captions", [0, 1, 2])
def test_every_loss_trains(setup, loss, captions):
    model, loader, _, cfg = setup(loss=loss, captions_per_image=captions, dropout=0.0)
    before, optimizer, losses = state_of(model), build_optimizer(model, cfg), []
    for epoch in range(4):
        train_epoch(model, loader.start(epoch), optimizer, cfg, on_step=lambda step: losses.append(step.loss))
    assert sum(losses[-3:]) < sum(losses[:3])
    names = moved(model, before)
    assert ("log_scale" in names) == (loss != "soft_target")
    assert ("logit_bias" in names) == (loss == "sigmoid")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_never_reaches_the_weights(setup, monkeypatch, what):
    model, loader, _, cfg = setup(grad_clip=0.0)
    real = LOSSES["infonce"]

    def broken(images, *rest):
        if what == "loss":
            return real(images, *rest) / 0.0
        return real(images, *rest) + (images.sum() * 0).sqrt()  # 0, with an infinite slope times 0

    monkeypatch.setitem(LOSSES, "infonce", broken)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = next(iter(loader))["names"]
    says = "the loss is inf at batch 1" if what == "loss" else "the gradient norm is nan at batch 1"
    with pytest.raises(UserError, match=says) as stop:
        train_epoch(model, loader, build_optimizer(model, cfg), cfg)
    assert all(name in str(stop.value) for name in names)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---- what trains


@pytest.mark.parametrize(
    ("settings", "frozen"),
    [
        ({"image_freeze": "backbone"}, ["image_encoder"]),
        ({"text_freeze": "backbone"}, ["text_encoder"]),
        ({"trainable": False}, ["image_encoder", "text_encoder"]),
    ],
)
def test_a_frozen_tower_does_not_move(setup, settings, frozen):
    model, loader, _, cfg = setup(**settings)
    before = state_of(model)
    optimizer = build_optimizer(model, cfg)
    train_epoch(model, loader, optimizer, cfg)
    names = moved(model, before)
    assert not [name for name in names if name.split(".")[0] in frozen]  # batch-norm statistics are in it too
    parts = {name.split(".")[0] for name in names}
    assert parts == {"image_encoder", "text_encoder", "image_projection", "text_projection", "log_scale"} - {*frozen}
    rates = learning_rates(optimizer)
    assert rates == {name: 0.0 if name.removesuffix("_lr") in frozen else rate for name, rate in RATES.items()}


def test_frozen_blocks_and_batch_norms(setup):
    model, loader, _, cfg = setup(image_freeze="first:1", freeze_batch_norm=True)
    before = state_of(model.image_encoder)
    trained = {name for name, p in model.image_encoder.named_parameters() if p.requires_grad}
    train_epoch(model, loader, build_optimizer(model, cfg), cfg)
    names = moved(model.image_encoder, before)
    assert names and names <= trained and len(trained) < len(list(model.image_encoder.parameters()))


def test_three_rates_and_no_decay_on_norms_biases_and_temperature(setup):
    model, _, _, cfg = setup(weight_decay=0.1, loss="sigmoid")
    group_of = {p: group for group in build_optimizer(model, cfg).param_groups for p in group["params"]}
    assert len(group_of) == len(list(model.parameters()))
    norms = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)
    in_norms = {p for module in model.modules() if isinstance(module, norms) for p in module.parameters()}
    assert in_norms
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        assert group_of[parameter]["lr"] == RATES.get(f"{part}_lr", RATES["head_lr"]), name
        plain = parameter in in_norms or name.endswith("bias") or part in {"log_scale", "logit_bias"}
        assert group_of[parameter]["weight_decay"] == (0.0 if plain else 0.1), name


def test_nothing_to_train_is_refused(setup):
    model, _, _, cfg = setup()
    with pytest.raises(UserError, match="nothing to train"):
        build_optimizer(model.requires_grad_(False), cfg)


# ---- schedules


def optimizer_of(rate=1.0):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate, "part": "head"}])


def test_cosine_by_hand(tiny_cfg):
    cfg = dataclasses.replace(tiny_cfg, scheduler="cosine", warmup_steps=4)
    optimizer = optimizer_of(2.0)
    scheduler = build_scheduler(optimizer, cfg, total_steps=20)
    rates = []
    for _ in range(22):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    half = 2 * 0.5
    falling = [half * (1 + math.cos(math.pi * k / 16)) for k in range(16)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, *falling, 0.0, 0.0])
    assert rates[12] == pytest.approx(1.0)  # half way down


@pytest.mark.parametrize(("warmup", "total"), [(0, 0), (5, 3), (0, 1)])
def test_cosine_of_a_short_run(tiny_cfg, warmup, total):
    cfg = dataclasses.replace(tiny_cfg, scheduler="cosine", warmup_steps=warmup)
    optimizer = optimizer_of()
    scheduler = build_scheduler(optimizer, cfg, total)
    for _ in range(total + 1):
        assert 0 <= optimizer.param_groups[0]["lr"] <= 1
        optimizer.step()
        scheduler.step()


def test_plateau_by_hand(tiny_cfg):
    cfg = dataclasses.replace(tiny_cfg, scheduler="plateau", patience=2, factor=0.1)
    optimizer = optimizer_of()
    scheduler = build_scheduler(optimizer, cfg, total_steps=0)
    rates = []
    for rsum in [10, 20, 20, 19, 18, 21, 5, 5, 5]:
        scheduler.step(rsum)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01])


# ---- precision


@pytest.mark.parametrize("low", ["bf16", "fp32/bf16"])
def test_bf16_is_near_fp32(setup, monkeypatch, low):
    monkeypatch.setenv("CLIP_SCRATCH_BF16", "1")
    losses = {}
    for precision in ("fp32", low):
        model, loader, _, cfg = setup(precision=precision, dropout=0.0)
        batch = next(iter(loader))
        model.eval()
        with torch.no_grad():
            loss, embeddings = compute_loss(model, batch, loss_function(model, cfg))
        losses[precision] = loss.item()
        assert loss.dtype == embeddings.dtype == torch.float32
        train_epoch(model, loader, build_optimizer(model, cfg), cfg)  # and it trains
    assert losses[low] == pytest.approx(losses["fp32"], abs=0.05)
    assert losses[low] != losses["fp32"]


@pytest.mark.parametrize(
    ("precision", "has_bf16", "image", "text"),
    [
        ("fp32", True, torch.float32, torch.float32),
        ("bf16", True, torch.bfloat16, torch.bfloat16),
        ("auto", True, torch.bfloat16, torch.bfloat16),
        ("fp32/bf16", True, torch.float32, torch.bfloat16),
        ("bf16", False, torch.float32, torch.float32),
        ("auto", False, torch.float32, torch.float32),
        ("fp16", True, torch.float32, torch.float32),  # a model that was trained on a GPU
    ],
)
def test_the_precision_of_each_tower_on_a_cpu(tiny_cfg, monkeypatch, precision, has_bf16, image, text):
    monkeypatch.setenv("CLIP_SCRATCH_BF16", str(int(has_bf16)))
    cfg, cpu = dataclasses.replace(tiny_cfg, precision=precision), torch.device("cpu")
    assert (tower_dtype(cfg, "image", cpu), tower_dtype(cfg, "text", cpu)) == (image, text)
    with autocast(cfg, "text", cpu):
        assert torch.is_autocast_enabled("cpu") == (text != torch.float32)


# ---- validation


def test_embeddings_line_up_with_images_and_captions(setup, tiny_data):
    model, _, loader, cfg = setup()
    images, texts, own = embed_batches(model, loader)
    table = tiny_data.table[tiny_data.table["split"] == "valid"]
    assert (len(images), len(texts)) == (6, len(table)) and not model.training
    names = table["image"].unique().tolist()
    assert [names[i] for i in own] == table["image"].tolist()
    again = valid_epoch(model, loader, cfg)
    assert again == valid_epoch(model, loader, cfg) and 0 <= again["rsum"] <= 600


def test_batches_of_validation_do_not_matter(setup):
    a, b = (valid_epoch(*setup(batch_size=size)[::2], setup(batch_size=size)[3]) for size in (2, 5))
    assert a == pytest.approx(b)


def test_spread_by_hand():
    rows = nn.functional.normalize(torch.randn(5, 7), dim=1)
    cosines = [torch.dot(rows[i], rows[j]).item() for i in range(5) for j in range(5) if i != j]
    assert spread(rows) == pytest.approx(sum(cosines) / 20, abs=1e-5)
    assert spread(rows[:1].expand(4, 7)) == pytest.approx(1, abs=1e-5)


# ---- warnings

HEALTHY = {
    "train_loss": 2.0, "spread": 0.3, "logit_scale": 20.0, "start_logit_scale": 14.3, "rsum": 120.0, "start_rsum": 20.0,
}  # fmt: skip


def warnings_of(loss="infonce", **numbers):
    """The warnings of an epoch of 10 batches with 32 images and captions each: chance is ln 32."""
    numbers = HEALTHY | numbers
    stats = EpochStats(
        batches=10, images=320, captions=320, loss_sum=10 * numbers["train_loss"], spread=numbers["spread"]
    )
    progress = Progress(start={"rsum": numbers["start_rsum"]}, start_logit_scale=numbers["start_logit_scale"])
    line = {"rsum": numbers["rsum"], "logit_scale": numbers["logit_scale"]}
    return epoch_warnings(line, SimpleNamespace(progress=progress), stats, loss)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train_loss": math.log(32) - 0.01, "rsum": 21.0}, "at chance"),
        ({"train_loss": math.log(32) + 3, "rsum": 21.0}, "at chance"),
        ({"spread": 0.99}, "collapsed"),
        ({"logit_scale": 100.0}, "clamp"),
        ({"rsum": 19.9}, "below where training started"),
    ],
)
def test_each_warning_alone(change, says):
    warnings = warnings_of(**change)
    assert len(warnings) == 1 and says in warnings[0] and "\n" not in warnings[0]


def test_no_warning_without_a_reason():
    assert warnings_of() == []
    assert warnings_of(rsum=20.0) == []
    assert warnings_of(loss="sigmoid", train_loss=9.0) == []  # its loss at chance is another one
    assert len(warnings_of(train_loss=4.0, spread=1.0, logit_scale=100.0, rsum=0.0)) == 4


def test_chance_is_the_loss_of_equal_embeddings():
    ids = torch.arange(6)
    same = torch.ones(6, 4) / 2
    loss = LOSSES["infonce"](same, same.repeat_interleave(2, 0), 14.0, ids, ids.repeat_interleave(2))
    assert chance_loss(6, 12) == pytest.approx(loss.item(), abs=1e-5)


def test_the_progress_adds_up():
    progress = Progress(start={"rsum": 5.0})
    for _ in range(2):
        progress.add(EpochStats(steps=1, batches=2, images=4, captions=8, loss_sum=4.0, seconds=0.5, spread=0.1))
    assert (progress.step, progress.batch, progress.stats.loss, progress.stats.captions) == (2, 4, 2.0, 16)
    metrics = {"rsum": 50.0, "image_retrieval_recall@10": 0.4}
    assert progress.end_epoch(metrics, stop_at=0)
    assert (progress.epoch, progress.batch, progress.best_epoch, progress.stale) == (1, 0, 1, 0)
    assert progress.stats == EpochStats() and not progress.reached
    assert not progress.end_epoch(metrics, stop_at=40.0)  # an equal epoch is not a better one
    assert (progress.best_epoch, progress.stale, progress.reached) == (1, 1, True)


# ---- the loop is open


def test_the_tutorial_s_loop_sees_other_batches_in_every_epoch(setup):
    """`for epoch in range(n): train_epoch(...)`, with nothing else said to the loader."""
    model, loader, _, cfg = setup()
    optimizer, seen = build_optimizer(model, cfg), []

    class Watched:
        def __iter__(self):
            for batch in loader:
                seen.append((tuple(batch["names"]), batch["pixel_values"].float().mean().item()))
                yield batch

    for _ in range(3):
        train_epoch(model, Watched(), optimizer, cfg)
    assert len(seen) == len(set(seen)) == 6
    ahead = [tuple(batch["names"]) for epoch in range(3) for batch in loader.start(epoch)]
    assert [names for names, _ in seen] == ahead  # the same as a run's


def test_a_plain_data_loader_and_a_loss_of_one_s_own(setup):
    """Any iterable of batches with the documented keys, and any callable with the arguments of contrastive_loss."""
    model, loader, _, cfg = setup()
    keys = ("pixel_values", "input_ids", "attention_mask", "image_ids", "caption_image_ids")
    batches = [{key: batch[key] for key in keys} for batch in loader]
    plain = torch.utils.data.DataLoader(batches, batch_size=None)
    calls = []

    def loss(image_embeddings, text_embeddings, logit_scale, image_ids, caption_image_ids, caption_ids=None):
        calls.append(caption_ids)
        row = (caption_image_ids[:, None] == image_ids[None, :]).int().argmax(1)
        return (1 - (image_embeddings[row] * text_embeddings).sum(1)).mean()

    optimizer = build_optimizer(model, cfg)
    stats = [train_epoch(model, plain, optimizer, cfg, loss=loss) for _ in range(4)]
    assert calls == [None] * 8
    assert stats[-1].loss < stats[0].loss < 2 and stats[0].steps == 2


def test_a_sampler_of_one_s_own(setup, tiny_data):
    """Batches of one colour, so that negatives are hard: a sampler gives lists of (epoch, image number)."""
    model, loader, _, cfg = setup()
    data, epochs = loader.dataset, iter(range(9))
    colour_of = tiny_data.table.drop_duplicates("image").set_index("image")["caption"].str.split().str[1]

    class OneColour(torch.utils.data.Sampler):
        def __iter__(self):
            epoch = next(epochs)
            for colour in sorted(set(colour_of)):
                yield [(epoch, number) for number, name in enumerate(data.names) if colour_of[name] == colour]

    own = torch.utils.data.DataLoader(data, sampler=OneColour(), batch_size=None)
    seen = [{colour_of[name] for name in batch["names"]} for batch in own]
    assert seen == [{"blue"}, {"green"}, {"red"}, {"yellow"}]
    stats = train_epoch(model, own, build_optimizer(model, cfg), cfg)
    assert (stats.batches, stats.images) == (4, 20)


def test_a_gpu_s_losses_are_read_together(setup, monkeypatch):
    """Reading a loss waits for the GPU: every 16 steps are enough. Here the CPU plays the GPU, with 3 steps."""
    monkeypatch.setattr("clip_scratch.training.engine._READ_EVERY", {"cpu": 3})
    model, loader, _, cfg = setup(batch_size=4)
    steps = []
    stats = train_epoch(model, loader, build_optimizer(model, cfg), cfg, on_step=steps.append)
    assert [(step.steps, step.images) for step in steps] == [(3, 12), (2, 8)] and stats.steps == 5
    with pytest.raises(UserError, match="the loss is nan within 3 batches up to batch 3 of this pass"):
        train_epoch(
            model, loader, build_optimizer(model, cfg), cfg, loss=lambda images, *_: images.sum() * float("nan")
        )  # fmt: skip


def test_frozen_weights_are_not_averaged_but_shared(setup):
    model, loader, _, cfg = setup(image_freeze="backbone", ema=0.5)
    average = WeightAverage(model, cfg.ema)
    frozen = [(a, p) for a, p in zip(average.module.parameters(), model.parameters(), strict=True)]
    assert {a.data_ptr() == p.data_ptr() for a, p in frozen if not p.requires_grad} == {True}
    assert {a.data_ptr() == p.data_ptr() for a, p in frozen if p.requires_grad} == {False}
    train_epoch(model, loader, build_optimizer(model, cfg), cfg, average=average)
    again = WeightAverage(model, cfg.ema)
    again.load_state_dict(average.state_dict())
    assert again.n_updates == average.n_updates == 2


# ---- accumulation


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_accumulated_gradients_are_the_average_of_the_batches_own(setup):
    """5 batches in groups of 2: the last group is of one, and is not divided by two. With rates of 0, nothing moves."""
    still = dict.fromkeys(RATES, 0.0)
    model, loader, _, cfg = setup(batch_size=4, accumulation=2, dropout=0.0, grad_clip=0.0, precision="fp32", **still)
    twin = copy.deepcopy(without_dropout(model)).train()
    own, losses = [], []
    for batch in loader.start(0):
        twin.zero_grad()
        loss, _ = compute_loss(twin, batch, contrastive_loss)
        loss.backward()
        own.append({name: p.grad.clone() for name, p in twin.named_parameters()})
        losses.append(loss.item())
    assert len(own) == 5
    seen, steps = [], []
    optimizer = build_optimizer(model, cfg)
    optimizer.register_step_pre_hook(lambda *_: seen.append({n: p.grad.clone() for n, p in model.named_parameters()}))
    train_epoch(model, loader.start(0), optimizer, cfg, on_step=steps.append)
    assert [(s.batches, s.images) for s in steps] == [(2, 8), (2, 8), (1, 4)]
    for step, grads, group in zip(steps, seen, ([0, 1], [2, 3], [4]), strict=True):
        assert step.loss == pytest.approx(sum(losses[i] for i in group) / len(group), rel=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, sum(own[i][name] for i in group) / len(group), atol=1e-6, rtol=1e-4)


def test_a_resumed_epoch_keeps_its_groups(setup):
    steps = []
    model, loader, _, cfg = setup(batch_size=4, accumulation=3)
    train_epoch(model, loader.start(0, 3), build_optimizer(model, cfg), cfg, on_step=steps.append)
    assert [s.batches for s in steps] == [2]


def test_accumulated_gradients_are_clipped_together(setup):
    model, loader, _, cfg = setup(batch_size=4, accumulation=5, grad_clip=1e-6)
    norms = []
    optimizer = build_optimizer(model, cfg)
    optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.sqrt(sum((p.grad**2).sum() for p in model.parameters())).item())
    )
    train_epoch(model, loader, optimizer, cfg)
    assert norms == [pytest.approx(1e-6, rel=0.01)]


def test_max_steps_and_the_schedule_count_optimizer_steps(tiny_cfg, tmp_path, plain):
    """5 batches an epoch in groups of 2 are 3 steps: 4 steps end after the first group of the second epoch."""
    import json

    from clip_scratch.train import main

    settings = {"batch_size": 4, "accumulation": 2, "max_steps": 4, "epochs": 9, "scheduler": "cosine"}
    run = main(dataclasses.replace(tiny_cfg, **settings, run_dir=str(tmp_path / "run")))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 3), (2, 4)]
    assert lines[-1]["head_lr"] == pytest.approx(0, abs=1e-12)
    assert lines[-1]["train_loss"] == pytest.approx(2, abs=2) and lines[0]["head_lr"] > 0


# ---- batches made ahead

GPU = torch.device("meta")  # plays the part of a GPU


def test_batches_come_in_order_and_one_ahead():
    made = []

    def batches():
        for i in range(4):
            made.append(i)
            yield {"number": i}

    taken = []
    for batch in on_device(batches(), GPU):
        taken.append(batch["number"])
        assert len(made) <= len(taken) + 1
    assert taken == [0, 1, 2, 3]


def test_an_error_in_the_thread_reaches_the_loop():
    def batches():
        yield {"number": 1}
        raise UserError("image 7 cannot be read")

    with pytest.raises(UserError, match="image 7"):
        list(on_device(batches(), GPU))


def test_a_loop_that_stops_early_leaves_no_thread():
    before = threading.active_count()
    batches = on_device(({"number": i} for i in range(100)), GPU)
    assert next(batches) == {"number": 0}
    batches.close()
    assert threading.active_count() == before


def test_parameters_without_gradients_on_several_processes(setup, monkeypatch):
    """What DistributedDataParallel says of them, as a mistake that the user can fix."""

    def waits(*_):
        raise RuntimeError("Expected to have finished reduction in the prior iteration before starting a new one. ...")

    monkeypatch.setattr("clip_scratch.training.engine.backward", waits)
    model, loader, *_ = setup()
    with pytest.raises(UserError, match="trained parameters take no part in the loss"):
        train_epoch(model, loader, build_optimizer(model, model.cfg), model.cfg)
