"""Train a dual encoder: `python -m clip_scratch.train [PRESET] [--SETTING VALUE ...]`.

Without a preset and without --captions-path: the built-in scenes, small encoders, five minutes on a CPU.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .cli import parse
from .config import CFG
from .errors import UserError, run_command

if TYPE_CHECKING:
    from .data.loaders import Loader
    from .training.engine import EpochStats
    from .training.report import Report
    from .training.run import Interrupt, Run
    from .training.state import TrainState


def main(cfg: CFG | type[CFG]) -> Path:
    """Train by `cfg`, and return the run folder. Raises UserError for mistakes that the user can fix."""
    began = time.perf_counter()
    cfg = cfg() if isinstance(cfg, type) else cfg
    _check(cfg)

    from .data.captions import fingerprint_of
    from .data.source import open_data
    from .device import training_on
    from .evaluation.retrieval import recall_at_k
    from .models.saved import save_best
    from .retrieval.embed import embed_batches
    from .training import start
    from .training.distributed import gather_embeddings, own_randomness, process_group, same_weights
    from .training.engine import EpochStats
    from .training.report import Report, epoch_line
    from .training.run import Interrupt, Run
    from .training.sharded import full_state_dict, unsharded
    from .training.wise_ft import average_with_start

    with process_group(cfg) as cfg, Run(cfg) as run, training_on(run.cfg, _less_memory(run.cfg)) as device:
        # Data, model, optimizer and schedule: new, or as the last checkpoint left them
        source = open_data(run.cfg)
        splits = {"train", "valid", *source.table["split"]}  # those two there must be
        run.data = {split: fingerprint_of(source.split(split)) for split in sorted(splits)}
        report = Report(run, source)
        starting = start.resume if run.is_resumed else start.begin
        state, train_loader, valid_loader = starting(run, source, device, report, began)
        progress, measured = state.progress, state.measured
        run.open_log(progress.epoch, progress.step)
        if report.is_pretrained and not run.lines:
            run.log_epoch(epoch_line(state, EpochStats(), progress.start))
        report.begin(state)

        # Train, measure, save the best
        with Interrupt(run.folder) as interrupt:
            while not state.is_done:
                stats = _train_epoch(run, state, train_loader, report, interrupt)
                with unsharded(measured):
                    same_weights(measured)
                    embeddings = gather_embeddings(embed_batches(measured, valid_loader))
                metrics = recall_at_k(*embeddings)
                is_best = state.end_epoch(metrics)
                line = epoch_line(state, stats, metrics)
                weights = full_state_dict(measured) if is_best else {}
                if is_best and run.writes:
                    save_best(run.best, measured, progress.epoch, metrics, weights)
                run.log_epoch(line)
                run.save_last(state)
                own_randomness(run.cfg.seed, progress.step)
                interrupt.stop_if_asked()
                with unsharded(measured):
                    if run.writes:
                        report.picture(measured, embeddings[0], progress.step, is_best)
                report.epoch(line, state, stats)
            if run.cfg.wise_ft:
                print(average_with_start(run.folder, measured, progress.epoch, valid_loader, run.cfg.wise_ft))
            interrupt.stop_if_asked()
            report.end(state)
    return run.folder


def _check(cfg: CFG) -> None:
    """Raise UserError for settings that contradict each other."""
    if cfg.micro_batch_size > cfg.batch_size:
        sizes = f"micro_batch_size ({cfg.micro_batch_size}) is larger than batch_size ({cfg.batch_size})"
        raise UserError(f"{sizes}: lower it")
    if cfg.wise_ft and cfg.backend != "hf_clip":
        raise UserError("wise_ft averages with zero-shot weights: use a pretrained CLIP, as the preset hf_clip does")
    if cfg.fully_shard and (cfg.compile or cfg.precision == "fp16"):
        raise UserError("fully_shard works with precision bf16 or fp32, and without compile: change one of them")


def _less_memory(cfg: CFG) -> str:
    other = f"or size ({cfg.size})" if cfg.backend == "from_scratch" else "and raise accumulation"
    return f"lower batch_size ({cfg.batch_size}) {other}"


def _train_epoch(run: Run, state: TrainState, loader: Loader, report: Report, interrupt: Interrupt) -> EpochStats:
    """Train the current epoch, or the rest of it, with checkpoints on the way; the statistics of the whole epoch."""
    from .training.distributed import own_randomness
    from .training.engine import train_epoch

    model, cfg, progress = state.model, state.model.cfg, state.progress

    def on_step(steps: EpochStats) -> None:
        checkpoints = progress.step // cfg.checkpoint_steps
        progress.add(steps)
        report.step(state, steps)
        if interrupt.asked() or progress.step // cfg.checkpoint_steps > checkpoints:
            run.save_last(state)
            own_randomness(cfg.seed, progress.step)
        interrupt.stop_if_asked()

    batches_left = cfg.accumulation * (state.total_steps - progress.step)
    loader.start(progress.epoch, progress.batch, progress.batch + batches_left)
    try:
        with report.progress_bar(state, len(loader)):
            train_epoch(
                model, loader, state.optimizer, cfg,
                step_scheduler=state.step_scheduler, scaler=state.scaler, average=state.average, on_step=on_step,
            )  # fmt: skip
    except UserError as error:
        raise UserError(f"epoch {progress.epoch + 1}: {error}. The last good checkpoint is in {run.folder}") from error
    return progress.stats


if __name__ == "__main__":
    run_command(lambda: main(parse(sys.argv[1:])))
