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

_QUERIES = 3


def _check_run_folder(cfg: CFG) -> Path:
    """The run's folder, not yet made: refused where it holds a run already or cannot be written."""
    folder = Path(cfg.run_dir)
    if cfg.resume:
        return folder
    try:
        # A run that was killed while its folder was made has no settings in it yet, and begins anew
        names = {entry.name for entry in folder.iterdir() if entry.suffix != ".tmp"} if folder.is_dir() else set()
        if names - {"best", "last"}:
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
    start_rsum: float = 0.0  # of the model before the first step
    best_rsum: float = -1.0
    best_epoch: int = 0
    stale: int = 0  # epochs since the best
    loss_sum: float = 0.0  # of the present epoch, as are the next four
    images: int = 0
    captions: int = 0
    seconds: float = 0.0
    spread: float = 0.0

    def add(self, step) -> None:
        """Count one optimiser step."""
        self.batch, self.step = step.number, self.step + 1
        self.loss_sum += step.loss
        self.images += step.images
        self.captions += step.captions
        self.seconds += step.seconds
        self.spread = step.spread

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
    cfg = cfg() if isinstance(cfg, type) else cfg
    if cfg.resume:
        cfg = resumed(cfg)
    if not cfg.run_dir:
        cfg = dataclasses.replace(cfg, run_dir=f"runs/run-{time.strftime('%Y%m%d-%H%M%S')}")
    folder = _check_run_folder(cfg)

    import random

    import numpy as np
    import torch

    from .data.captions import check_images, image_folder, read_captions, split_of
    from .data.loaders import build_loaders
    from .data.tokenizer import build_tokenizer
    from .evaluation.retrieval import recall_at_k
    from .models.clip import CLIPModel
    from .training import checkpoint
    from .training.device import keep_freed_memory, pick_device
    from .training.engine import embed, train_epoch, valid_epoch
    from .training.log import RunLog, chance_loss
    from .training.optimizer import build_average, build_optimizer, build_scheduler

    device = pick_device(cfg)
    keep_freed_memory()

    # 1. Captions and images, checked before anything is computed
    table = read_captions(cfg)
    table = check_images(table, image_folder(cfg, table), cfg.on_bad_image)
    train_df = split_of(table, "train", cfg.captions_path)
    valid_df = split_of(table, "valid", cfg.captions_path)
    print(f"train: {train_df['image_id'].nunique():,} images, {len(train_df):,} captions; "
          f"valid: {valid_df['image_id'].nunique():,} images, {len(valid_df):,} captions")  # fmt: skip

    # 2. Model, optimiser, schedule
    random.seed(cfg.seed), np.random.seed(cfg.seed), torch.manual_seed(cfg.seed)
    if cfg.resume:
        model = checkpoint.bare_model(folder / "best")
    else:
        model = CLIPModel(cfg, build_tokenizer(cfg, train_df["caption"].tolist()))
    model.to(device)
    train_loader = build_loaders(train_df, model.tokenizer, "train", cfg)
    valid_loader = build_loaders(valid_df, model.tokenizer, "valid", cfg)
    steps_per_epoch = len(train_loader.batches)
    total_steps = min(cfg.epochs * steps_per_epoch, cfg.max_steps or sys.maxsize)
    optimizer = build_optimizer(model, cfg)
    scheduler = build_scheduler(optimizer, cfg, total_steps)
    step_scheduler = scheduler if cfg.scheduler == "cosine" else None
    scaler = torch.amp.GradScaler(device.type) if cfg.precision == "fp16" else None
    average = build_average(model, cfg)
    measured = average.module if average else model  # the model that is validated and kept
    progress = Progress()
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "average": average}
    parts = {name: part for name, part in parts.items() if part is not None}

    def save_last() -> None:
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
        except (KeyError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder / 'last'} does not fit the settings of {folder}: {reason}") from error
        progress = Progress(**state["progress"])
        checkpoint.restore_random_states(state["random"])
        print(f"resuming {folder} at epoch {progress.epoch + 1}, step {progress.step}")
    else:
        progress.start_rsum = valid_epoch(measured, valid_loader, cfg)["rsum"]
        try:
            checkpoint.prepare_best(folder / "best", model, cfg)
            save_last()
            checkpoint.write_json(folder / checkpoint.SETTINGS, dataclasses.asdict(cfg))  # last: now it is a run
        except OSError as error:
            raise UserError(f"the run folder {folder} cannot be written: {error}") from error
    log = RunLog(folder, progress.epoch, progress.step)
    print(f"run folder: {folder}\nrsum before training: {progress.start_rsum:.1f}")

    # 4. Train, measure, keep the best
    with _Interrupt(folder) as interrupt:
        # An epoch that stopped after its last step is still to be measured
        while progress.epoch < cfg.epochs and (progress.step < total_steps or progress.batch):
            if cfg.early_stopping and progress.stale >= cfg.early_stopping:
                print(f"no better rsum in {progress.stale} epochs: stopped early")
                break
            bar = _bar(progress, cfg, steps_per_epoch)

            def after_step(step, bar=bar) -> None:
                progress.add(step)
                _show(bar, progress, step, model)
                if interrupt.asked or progress.step % cfg.checkpoint_steps == 0:
                    save_last()
                interrupt.stop_if_asked()

            train_loader.start(progress.epoch, progress.batch, progress.batch + total_steps - progress.step)
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
                raise UserError(f"out of memory: lower batch_size ({cfg.batch_size}) or size ({cfg.size})") from error
            finally:
                bar.close()
            embeddings = embed(measured, valid_loader, cfg)
            metrics = recall_at_k(*embeddings)
            if cfg.scheduler == "plateau":
                scheduler.step(metrics["rsum"])
            line = _epoch_line(progress, metrics, model, optimizer)
            chance = chance_loss(progress.images / progress.batch, progress.captions / progress.batch)
            progress.next_epoch(metrics["rsum"])
            if progress.best_epoch == progress.epoch:
                checkpoint.save_best(folder / "best", measured, progress.epoch, metrics)
            log.epoch(line, progress.step)
            save_last()
            interrupt.stop_if_asked()
            _draw_epoch(log, measured, valid_df, embeddings[0], progress.step)
            _report_epoch(line, progress, cfg, chance)
    log.close()
    _report_run(folder, progress, valid_df)
    return folder


def _bar(progress: Progress, cfg: CFG, steps_per_epoch: int):
    from tqdm import tqdm

    name = f"epoch {progress.epoch + 1}/{cfg.epochs}"
    return tqdm(total=steps_per_epoch, initial=progress.batch, desc=name, unit="step", dynamic_ncols=True, leave=False)


def _show(bar, progress: Progress, step, model) -> None:
    """Move the bar: mean loss of the epoch, pairs (captions seen with their image) per second, temperature."""
    rate = progress.captions / max(progress.seconds, 1e-9)
    temperature = 1 / model.logit_scale.item()
    bar.set_postfix_str(
        f"loss {progress.loss_sum / step.number:.3f}, {rate:.0f} pairs/s, temperature {temperature:.4f}", refresh=False
    )
    bar.update()


def _epoch_line(progress: Progress, metrics: dict[str, float], model, optimizer) -> dict[str, object]:
    """The line of metrics.jsonl for the epoch that has just been measured."""
    from .training.optimizer import learning_rates

    seconds = max(progress.seconds, 1e-9)
    return {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "train_loss": progress.loss_sum / max(1, progress.batch),
        "pairs_per_second": progress.captions / seconds,
        "images_per_second": progress.images / seconds,
        "seconds": progress.seconds,
        "logit_scale": model.logit_scale.item(),
        **learning_rates(optimizer),
        **metrics,
    }


def _report_epoch(line: dict, progress: Progress, cfg: CFG, chance: float) -> None:
    """One line an epoch, and what is wrong with it, if anything."""
    from .training.log import warnings_for

    best = "  best so far" if progress.best_epoch == progress.epoch else ""
    print(
        f"epoch {line['epoch']:>3}  loss {line['train_loss']:.3f}  "
        f"image to text R@1 {100 * line['text_retrieval_recall@1']:.1f}  "
        f"text to image R@1 {100 * line['image_retrieval_recall@1']:.1f}  rsum {line['rsum']:.1f}  "
        f"{line['pairs_per_second']:.0f} pairs/s  {line['seconds']:.0f} s{best}"
    )
    for warning in warnings_for(
        loss=cfg.loss, train_loss=line["train_loss"], chance=chance, spread=progress.spread,
        logit_scale=line["logit_scale"], rsum=line["rsum"], start_rsum=progress.start_rsum,
    ):  # fmt: skip
        print(f"warning: {warning}", file=sys.stderr)


def _sample_matches(model, valid_df, image_embeddings, n: int = 5) -> list:
    """The matches of three validation captions, spread over the split, for the retrieval picture.

    `image_embeddings` are those of the distinct images, in the order of `valid_df`.
    """
    from .data.captions import image_folder
    from .retrieval.matches import find_matches

    names = valid_df["image"].drop_duplicates().tolist()
    queries = valid_df["caption"].iloc[[(2 * i + 1) * len(valid_df) // (2 * _QUERIES) for i in range(_QUERIES)]]
    folder = image_folder(model.cfg, valid_df)
    return find_matches(model, image_embeddings, queries.tolist(), names, n=n, image_path=folder)


def _draw_epoch(log, model, valid_df, image_embeddings, step: int) -> None:
    """The retrieval picture of this epoch, for TensorBoard."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from .retrieval.matches import draw

    canvas = FigureCanvasAgg(draw(_sample_matches(model, valid_df, image_embeddings), columns=5))
    canvas.draw()
    log.board.add_image("retrieval", np.asarray(canvas.buffer_rgba())[..., :3], step, dataformats="HWC")


def _report_run(folder: Path, progress: Progress, valid_df) -> None:
    """The recall table of the best epoch, the picture of three queries, and what to type next."""
    import json
    import shlex

    from .evaluation.retrieval import format_table
    from .retrieval.embed import get_image_embeddings
    from .retrieval.matches import save_grid

    if not progress.best_epoch:
        print("no epoch was finished: nothing was measured")
        return
    metrics = json.loads((folder / "best" / "metrics.json").read_text())
    print(f"\nbest epoch: {progress.best_epoch}")
    print(format_table(metrics, "valid", valid_df["image_id"].nunique(), len(valid_df)))
    firsts = valid_df.drop_duplicates("image")
    model, image_embeddings = get_image_embeddings(firsts, folder)
    results = _sample_matches(model, valid_df, image_embeddings)
    picture = save_grid(results, folder / "retrieval.png", columns=5)
    print(f"""
three queries and the images found: {picture}
search with the model:              python -m clip_scratch.search {folder} {shlex.quote(results[0].query)}
measure it again:                   python -m clip_scratch.evaluate {folder}
train on Flickr8k:                  python -m clip_scratch.prepare flickr8k && python -m clip_scratch.train flickr8k""")


if __name__ == "__main__":
    run_command(lambda: main(parse(sys.argv[1:])))
