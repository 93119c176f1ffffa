"""Train a dual encoder: `python -m clip_scratch.train [PRESET] [--SETTING VALUE ...]`.

Without a preset and without --captions-path: the built-in scenes, small encoders, a few minutes on a CPU.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

from .cli import parse, resumed
from .config import CFG
from .errors import UserError, run_command

# What a run folder may hold before its settings make it a run
_UNFINISHED = {"best", "last", "zero_shot.json", "zero_shot.safetensors"}


def _check_run_folder(cfg: CFG) -> Path:
    """The run's folder, not yet made: refused where it holds a run already or cannot be written."""
    folder = Path(cfg.run_dir)
    if cfg.resume:
        return folder
    try:
        # A run that was killed while its folder was made has no settings in it yet, and begins anew
        names = {entry.name for entry in folder.iterdir() if entry.suffix != ".tmp"} if folder.is_dir() else set()
        if names - _UNFINISHED:
            raise UserError(f"{folder} is not empty: go on with --resume {folder}, or choose another --run-dir")
        parent = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    except OSError as error:  # a folder above it is closed, or the name is too long
        raise UserError(f"the run folder {folder} cannot be made: {error.strerror}") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"the run folder {folder} cannot be made: {parent} cannot be written to")
    return folder


@dataclasses.dataclass
class Progress:
    """Where a run is; saved with every checkpoint."""

    epoch: int = 0  # epochs done
    batch: int = 0  # batches of the present epoch done
    step: int = 0  # optimiser steps done
    start: dict[str, float] = dataclasses.field(default_factory=dict)  # metrics of the model before the first step
    start_logit_scale: float = 0.0
    best_rsum: float = -1.0
    wall_seconds: float = 0.0  # of the whole run, validation and resumed parts included
    best_epoch: int = 0
    stale: int = 0  # epochs since the best
    reached: bool = False  # the recall that is asked for by `stop_at`
    loss_sum: float = 0.0  # of the present epoch, as are the next four
    images: int = 0
    captions: int = 0
    seconds: float = 0.0
    spread: float = 0.0

    def add(self, step) -> None:
        """Count one optimiser step."""
        self.batch, self.step = step.number, self.step + 1
        self.loss_sum += step.loss * step.batches
        self.images += step.images
        self.captions += step.captions
        self.seconds += step.seconds
        self.spread = step.spread

    @property
    def start_rsum(self) -> float:
        return self.start["rsum"]

    def next_epoch(self, rsum: float) -> None:
        """Close the epoch: start the sums anew, and note whether it was the best."""
        self.epoch, self.batch = self.epoch + 1, 0
        self.loss_sum = self.seconds = 0.0
        self.images = self.captions = 0
        self.stale += 1
        if rsum > self.best_rsum:
            self.best_rsum, self.best_epoch, self.stale = rsum, self.epoch, 0


class _Interrupt:
    """Ctrl-C and SIGTERM ask to stop at the next step; a second one stops at once."""

    def __init__(self, folder: Path) -> None:
        self.asked = False
        self.before = {}
        self.advice = f"go on with: python -m clip_scratch.train --resume {folder}"

    def __enter__(self) -> _Interrupt:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._ask)
        except ValueError:  # not the main thread, as in some notebooks: an interrupt then stops at once
            pass
        return self

    def _ask(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt(self.advice)
        self.asked = True

    def stop_if_asked(self) -> None:
        """Stop here, where the last checkpoint is whole and up to date."""
        if self.asked:
            raise KeyboardInterrupt(self.advice)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def main(cfg: CFG | type[CFG]) -> Path:
    """Train by `cfg`, and return the run folder. Raises UserError for what the user can mend."""
    began = time.perf_counter()
    cfg = cfg() if isinstance(cfg, type) else cfg
    if cfg.sweep:
        from .sweep import sweep

        return sweep(cfg)
    if cfg.resume:
        cfg = resumed(cfg)
    if not cfg.run_dir:
        cfg = dataclasses.replace(cfg, run_dir=f"runs/run-{time.strftime('%Y%m%d-%H%M%S')}")
    folder = _check_run_folder(cfg)

    import random

    import numpy as np
    import torch

    from . import report
    from .data.captions import check_images, image_folder, read_captions, split_of
    from .data.image_cache import decoded_before
    from .data.loaders import build_loaders
    from .evaluation.comparison import fingerprint_of, save_zero_shot
    from .evaluation.retrieval import ranks, recall_at_k
    from .models.build import build_model
    from .training import checkpoint, wise_ft
    from .training.autotune import WORTH_MEASURING, tune
    from .training.device import keep_freed_memory, pick_device
    from .training.engine import embed, train_epoch
    from .training.frozen_cache import freeze_features
    from .training.log import RunLog, chance_loss
    from .training.optimizer import build_average, build_optimizer, build_scheduler

    if cfg.wise_ft and cfg.backend != "hf_clip":
        raise UserError("wise_ft mixes with zero-shot weights: it needs a pretrained CLIP, as the preset hf_clip has")
    if cfg.compile and cfg.frozen_views:
        raise UserError("compile and frozen_views do not go together: a compiled tower cannot be entered half-way")
    device = pick_device(cfg)
    keep_freed_memory()

    # 1. Captions and images, checked before anything is computed
    table = read_captions(cfg)
    images = image_folder(cfg, table)
    known = decoded_before(images, cfg) if cfg.image_cache else ()
    table = check_images(table, images, cfg.on_bad_image, known=known)
    train_df = split_of(table, "train", cfg.captions_path)
    valid_df = split_of(table, "valid", cfg.captions_path)
    print(f"train: {train_df['image_id'].nunique():,} images, {len(train_df):,} captions; "
          f"valid: {valid_df['image_id'].nunique():,} images, {len(valid_df):,} captions")  # fmt: skip

    # 2. Model, optimiser, schedule
    random.seed(cfg.seed), np.random.seed(cfg.seed), torch.manual_seed(cfg.seed)
    if cfg.resume:
        model = checkpoint.bare_model(folder / "best", training=True)
    else:
        model = build_model(cfg, train_df["caption"].tolist())
        cfg = model.cfg
    is_pretrained = cfg.backend == "hf_clip"  # what it can do before the first step is worth a figure
    model.to(device)
    print(report.describe_parameters(model, cfg))
    train_loader = build_loaders(train_df, model.tokenizer, "train", cfg, device=device)
    valid_loader = build_loaders(valid_df, model.tokenizer, "valid", cfg, device=device)
    if cut := train_loader.dataset.tokens.truncated + valid_loader.dataset.tokens.truncated:
        print(f"{cut:,} captions are longer than {model.tokenizer.model_max_length} tokens and are cut there")
    batches_per_epoch = len(train_loader.batches)
    total_steps = min(cfg.epochs * -(-batches_per_epoch // cfg.accumulation), cfg.max_steps or sys.maxsize)
    if cfg.precision == "auto" and total_steps >= WORTH_MEASURING and not cfg.resume and device.type in ("cpu", "cuda"):
        cfg, why = tune(model, next(iter(train_loader)), cfg)
        model.cfg = cfg  # and with it best/ and a resume compute alike
        model.apply_precision()
        print(why)
    if cfg.compile:
        model.compile_towers()
    optimizer = build_optimizer(model, cfg)
    scheduler = build_scheduler(optimizer, cfg, total_steps)
    step_scheduler = scheduler if cfg.scheduler == "cosine" else None
    scaler = torch.amp.GradScaler(device.type) if cfg.precision == "fp16" else None
    average = build_average(model, cfg)
    measured = average.module if average else model  # the model that is validated and kept
    progress, wall_before = Progress(), 0.0  # seconds that the run took before it was resumed
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "average": average}
    parts = {name: part for name, part in parts.items() if part is not None}

    def save_last() -> None:
        progress.wall_seconds = wall_before + time.perf_counter() - began
        states = {name: part.state_dict() for name, part in parts.items()}
        extra = {"progress": dataclasses.asdict(progress), "random": checkpoint.random_states()}
        checkpoint.save_last(folder / "last", states | extra)

    # 3. The run folder: made when all that can be refused has been, or picked up where it was left
    checkpoint.remove_unfinished(folder)
    if cfg.resume:
        state = checkpoint.load_last(folder / "last")
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            progress = Progress(**state["progress"])
        except (KeyError, ValueError, RuntimeError, TypeError) as error:  # TypeError: of an older release
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder / 'last'} does not fit the settings of {folder}: {reason}") from error
        wall_before = progress.wall_seconds
        checkpoint.restore_random_states(state["random"])
        print(f"resuming {folder} at epoch {progress.epoch + 1}, step {progress.step}")
    # What is frozen has its weights only now
    train_loader, valid_loader = (freeze_features(model, loader, cfg) for loader in (train_loader, valid_loader))
    if not cfg.resume:
        embeddings = embed(measured, valid_loader, cfg)
        progress.start, progress.start_logit_scale = recall_at_k(*embeddings), model.logit_scale.item()
        try:
            checkpoint.prepare_best(folder / "best", model, cfg)
            if is_pretrained:  # epoch 0: the best until a better one comes
                progress.best_rsum = progress.start_rsum
                checkpoint.save_best(folder / "best", measured, 0, progress.start)
                names = valid_loader.dataset.names
                found = ranks(*embeddings)
                captions = fingerprint_of(valid_df)
                save_zero_shot(folder / "zero_shot.json", cfg.model_name, names, embeddings[2], *found, captions)
            if cfg.wise_ft:
                wise_ft.keep_start(folder)
            save_last()
            checkpoint.write_json(folder / checkpoint.SETTINGS, dataclasses.asdict(cfg))  # last: now it is a run
        except OSError as error:
            raise UserError(f"the run folder {folder} cannot be written: {error}") from error
    log = RunLog(folder, progress.epoch, progress.step)
    if is_pretrained and not log.lines:
        log.epoch(report.epoch_line(Progress(), progress.start, model, optimizer), 0)
    print(f"run folder: {folder}\n{report.start_line(progress.start, is_pretrained)}")

    # 4. Train, measure, keep the best
    with _Interrupt(folder) as interrupt:
        # An epoch that stopped after its last step is still to be measured
        while progress.epoch < cfg.epochs and (progress.step < total_steps or progress.batch) and not progress.reached:
            if cfg.early_stopping and progress.stale >= cfg.early_stopping:
                print(f"no better rsum in {progress.stale} epochs: stopped early")
                break
            bar = report.progress_bar(progress, cfg, batches_per_epoch)

            def after_step(step, bar=bar) -> None:
                progress.add(step)
                report.show_step(bar, progress, step, model)
                if interrupt.asked or progress.step % cfg.checkpoint_steps == 0:
                    save_last()
                interrupt.stop_if_asked()

            left = cfg.accumulation * (total_steps - progress.step)
            train_loader.start(progress.epoch, progress.batch, progress.batch + left)
            try:
                train_epoch(
                    model, train_loader, optimizer, cfg,
                    step_scheduler=step_scheduler, scaler=scaler, average=average, on_step=after_step,
                )  # fmt: skip
            except UserError as error:
                raise UserError(f"epoch {progress.epoch + 1}: {error}. Last good checkpoint: {folder}/last") from error
            except (RuntimeError, MemoryError) as error:  # torch's errors for a GPU and for a CPU are RuntimeErrors
                if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
                    raise
                smaller = "with more accumulation" if is_pretrained else f"or size ({cfg.size})"
                raise UserError(f"out of memory: lower batch_size ({cfg.batch_size}) {smaller}") from error
            finally:
                bar.close()
            embeddings = embed(measured, valid_loader, cfg)
            metrics = recall_at_k(*embeddings)
            if cfg.scheduler == "plateau":
                scheduler.step(metrics["rsum"])
            progress.wall_seconds = wall_before + time.perf_counter() - began
            line = report.epoch_line(progress, metrics, model, optimizer)
            chance = chance_loss(progress.images / progress.batch, progress.captions / progress.batch)
            progress.next_epoch(metrics["rsum"])
            progress.reached = bool(cfg.stop_at) and 100 * metrics["image_retrieval_recall@10"] >= cfg.stop_at
            if progress.best_epoch == progress.epoch:
                checkpoint.save_best(folder / "best", measured, progress.epoch, metrics)
            log.epoch(line, progress.step)
            save_last()
            interrupt.stop_if_asked()
            report.draw_epoch(log, measured, valid_df, embeddings[0], progress.step)
            report.report_epoch(line, progress, cfg, chance)
            if progress.reached:
                print(f"text to image R@10 has reached {cfg.stop_at:g}: stopped after {line['wall_seconds']:.1f} s")
        log.close()
        if cfg.wise_ft:
            print(wise_ft.mix(folder, measured, progress.epoch, valid_loader, device))
        interrupt.stop_if_asked()
        report.report_run(folder, progress, valid_df, device, is_pretrained)
        interrupt.stop_if_asked()  # of a sweep the next run is not begun
    return folder


if __name__ == "__main__":
    run_command(lambda: main(parse(sys.argv[1:])))
