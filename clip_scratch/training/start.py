"""How a run starts: a model that is built, measured and saved as epoch 0, or one that is picked up from last/."""

import dataclasses
import time

import torch

from ..config import CFG
from ..data.loaders import Loader, build_loaders
from ..data.source import DataSource
from ..evaluation.measure import ZERO_SHOT, Measured, save_zero_shot
from ..evaluation.retrieval import ranks, recalls_of
from ..files import write_json
from ..models.build import build_model
from ..models.clip import DualEncoder
from ..models.precision import default_precision
from ..models.saved import SETTINGS, save_best
from ..retrieval.embed import embed_batches
from .autotune import MIN_STEPS, choose_precision
from .budget import EPOCH_OVERHEAD, measure_pace, planned_steps, steps_per_epoch, steps_within
from .cached_features import cache_features
from .distributed import from_main, gather_embeddings, own_randomness, rank, same_weights, sync_batch_norm, world_size
from .report import Report
from .run import Run
from .state import TrainState, seed_everything
from .wise_ft import save_start

Started = tuple[TrainState, Loader, Loader]  # with the loaders of the training and the validation split


def begin(run: Run, source: DataSource, device: torch.device, report: Report, began: float) -> Started:
    """A new run: its state and its two loaders. The folder is made when everything that can be refused has been."""
    seed_everything(run.cfg.seed)
    model = build_model(source.cfg, source.split("train")["caption"].tolist()).to(device)
    if source.cfg.sync_batch_norm:
        sync_batch_norm(model)
    train_loader, valid_loader = _loaders(model, source, report)
    model.cfg = cfg = from_main(_settle_precision(model, train_loader))
    model.apply_memory_format()
    same_weights(model)
    if cfg.compile:
        model.compile_towers()
    train_loader, valid_loader = (cache_features(model, loader, cfg) for loader in (train_loader, valid_loader))
    measuring = time.perf_counter()
    embeddings = gather_embeddings(embed_batches(model, valid_loader))
    if cfg.minutes and not cfg.max_steps:
        model.cfg = cfg = from_main(_settle_steps(model, train_loader, time.perf_counter() - measuring, began))
    image_rank, text_rank = ranks(*embeddings)
    recalls = recalls_of(image_rank, text_rank)
    run.begin(model)
    if report.is_pretrained and run.writes:  # epoch 0: the best one until a better one comes
        save_best(run.best, model, 0, recalls)
        measured = Measured(valid_loader.dataset.names, embeddings[2], image_rank, text_rank, run.data["valid"])
        save_zero_shot(run.folder / ZERO_SHOT, cfg.model_name, measured)
        report.picture(model, embeddings[0], 0, is_best=True)
    state = TrainState(model, planned_steps(train_loader, cfg), began)
    progress = state.progress
    progress.start, progress.start_logit_scale = recalls, model.logit_scale.item()
    if report.is_pretrained:
        progress.best_rsum = recalls["rsum"]
    if cfg.wise_ft:
        save_start(run.folder)
    run.save_last(state)
    if run.writes:
        write_json(run.folder / SETTINGS, dataclasses.asdict(run.cfg))  # last: now it is a run, to be resumed
    own_randomness(cfg.seed, progress.step)
    return state, train_loader, valid_loader


def resume(run: Run, source: DataSource, device: torch.device, report: Report, began: float) -> Started:
    """An interrupted run where it was: its state and its two loaders."""
    model = run.resumed_model().to(device)
    if model.cfg.sync_batch_norm:
        sync_batch_norm(model)
    train_loader, valid_loader = _loaders(model, source, report)
    if model.cfg.compile:
        model.compile_towers()
    state = TrainState(model, planned_steps(train_loader, model.cfg), began)
    run.resume(state)
    own_randomness(model.cfg.seed, state.progress.step)
    # Only now a frozen tower has its weights
    train_loader, valid_loader = (cache_features(model, loader, model.cfg) for loader in (train_loader, valid_loader))
    return state, train_loader, valid_loader


def _loaders(model: DualEncoder, source: DataSource, report: Report) -> tuple[Loader, Loader]:
    """The loaders of the training and the validation split; the model's parameters are reported on the way."""
    place = {"device": model.device, "rank": rank(), "world_size": world_size()}
    train, valid = (
        build_loaders(source.split(split), model.tokenizer, split, model.cfg, **place) for split in ("train", "valid")
    )
    report.parameters(model, train.dataset.tokens.truncated + valid.dataset.tokens.truncated)
    return train, valid


def _settle_precision(model: DualEncoder, loader: Loader) -> CFG:
    """The settings with "auto" replaced by a precision: measured in a long run, else the device's default."""
    cfg, device = model.cfg, model.device
    if cfg.precision != "auto":
        return cfg
    if planned_steps(loader, cfg) >= MIN_STEPS and device.type in ("cpu", "cuda") and not cfg.deterministic:
        cfg, message = choose_precision(model, next(iter(loader)), cfg)
        loader.start(0)
    else:
        cfg = dataclasses.replace(cfg, precision=default_precision(device))
        message = "precision fp16: this GPU has no bf16" if cfg.precision == "fp16" else ""
    model.cfg = cfg
    model.apply_memory_format()
    print(message, end="\n" if message else "")
    return cfg


def _settle_steps(model: DualEncoder, loader: Loader, validation: float, began: float) -> CFG:
    """The settings with `max_steps` set to what fits into `minutes`, given the seconds of a validation."""
    cfg, per_epoch, most = model.cfg, steps_per_epoch(loader, model.cfg), planned_steps(loader, model.cfg)
    pace = measure_pace(model, loader, cfg)
    left = 60 * cfg.minutes - (time.perf_counter() - began)
    steps = steps_within(left, pace, validation + EPOCH_OVERHEAD, per_epoch, most)
    print(
        f"{cfg.minutes:g} minutes: {pace:.2f} s a step and {validation:.1f} s a validation leave room for "
        f"{steps:,} of {most:,} steps ({steps / per_epoch:.1f} of {cfg.epochs} epochs)"
    )  # fmt: skip
    return dataclasses.replace(cfg, max_steps=steps)
