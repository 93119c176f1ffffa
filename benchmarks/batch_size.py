"""What a large batch is worth: recall at equal epochs by the number of images in a batch.

    python -m benchmarks.batch_size --captions-path data/flickr8k

Trains linear heads on cached features of the frozen towers, as in the `speedrun` preset. For each batch size the
learning rate and the first temperature are chosen by rsum on a sixth of the training images, from a grid, and then used
on all of them. Recalls are of the last epoch on the validation split, the mean of the seeds; the intervals of the
differences to the first batch size are of a paired bootstrap over images, of the seeds' mean.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from clip_scratch.data.captions import read_captions, split_of
from clip_scratch.data.loaders import Loader, build_loaders
from clip_scratch.device import keep_freed_memory
from clip_scratch.evaluation.bootstrap import interval, resampled_recalls
from clip_scratch.evaluation.retrieval import ranks, recalls_of
from clip_scratch.models.build import build_model
from clip_scratch.presets import Speedrun
from clip_scratch.retrieval.embed import embed_batches
from clip_scratch.training.cached_features import cache_features
from clip_scratch.training.engine import train_epoch
from clip_scratch.training.state import TrainState

RATES = (1e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)
TEMPERATURES = (1 / 14, 1 / 30)


@dataclass
class Arguments:
    """Compare batch sizes at equal epochs."""

    captions_path: str  # the captions file or folder, as `train` takes it
    batch_sizes: tuple[int, ...] = (128, 512, 2048, 6000)
    epochs: int = 12
    seeds: int = 3
    cache_path: str = ""  # as `train` takes it


def trained(model, start: dict, data, valid: Loader, cfg) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Train the heads from `start`: ranks of images and of captions, and each caption's image."""
    model.load_state_dict(start)
    torch.manual_seed(cfg.seed)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.requires_grad:
            module.reset_parameters()
    model.cfg = cfg
    with torch.no_grad():
        model.log_scale.fill_(-np.log(cfg.temperature))
    loader = Loader(data, cfg.batch_size, 0)
    state = TrainState(model, cfg.epochs * len(loader))
    for epoch in range(cfg.epochs):
        train_epoch(
            model, loader.start(epoch), state.optimizer, cfg, step_scheduler=state.step_scheduler,
            average=state.average,
        )  # fmt: skip
    embedded = embed_batches(state.measured, valid)
    return *ranks(*embedded), embedded[2]


def loaders(model, cfg, train_df: pd.DataFrame, valid_df: pd.DataFrame):
    """The training data and the validation loader, with cached features."""
    train, valid = (
        cache_features(model, build_loaders(df, model.tokenizer, mode, cfg), cfg)
        for mode, df in (("train", train_df), ("valid", valid_df))
    )
    return train.dataset, valid


def hits(image_rank, text_rank, own, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hits and queries of each image at R@1, 5, 10 in both directions: (N, 6), (N, 6)."""
    captions = np.bincount(own, minlength=n)
    to_text = np.stack([(text_rank <= k).numpy() for k in (1, 5, 10)], 1)
    to_image = np.stack([np.bincount(own, (image_rank <= k).numpy(), n) for k in (1, 5, 10)], 1)
    return np.concatenate([to_text, to_image], 1), np.stack([np.ones(n)] * 3 + [captions] * 3, 1)


def main(arguments: Arguments) -> None:
    """Print the choice for each batch size, then the table."""
    keep_freed_memory()
    cfg = Speedrun(
        captions_path=arguments.captions_path, cache_path=arguments.cache_path, epochs=arguments.epochs, stop_at=0,
        device="cpu", precision="fp32", max_captions=0, projection_dim=256,
    )  # fmt: skip
    table = read_captions(cfg)
    train_df, valid_df = (split_of(table, split, cfg.captions_path) for split in ("train", "valid"))
    images = train_df["image_id"].unique()
    held_out = np.random.default_rng(0).permutation(images)[: len(images) // 6]
    is_held_out = train_df["image_id"].isin(held_out)
    model = build_model(cfg)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuning = loaders(
        model, cfg, train_df[~is_held_out].reset_index(drop=True), train_df[is_held_out].reset_index(drop=True)
    )
    final = loaders(model, cfg, train_df, valid_df)
    rows = []
    for size in arguments.batch_sizes:
        scores = {}
        for rate, temperature in itertools.product(RATES, TEMPERATURES):
            own = dataclasses.replace(cfg, batch_size=size, head_lr=rate, temperature=temperature)
            scores[rate, temperature] = recalls_of(*trained(model, start, *tuning, own)[:2])["rsum"]
        rate, temperature = max(scores, key=scores.get)
        print(f"batch {size}: " + ", ".join(f"{r:g}/{1 / t:.0f} {s:.1f}" for (r, t), s in scores.items()), flush=True)
        seeds = []
        for seed in range(arguments.seeds):
            own = dataclasses.replace(cfg, batch_size=size, head_lr=rate, temperature=temperature, seed=seed)
            image_rank, text_rank, owner = trained(model, start, *final, own)
            seeds.append(hits(image_rank, text_rank, owner.numpy(), len(text_rank)))
        rows.append((size, rate, temperature, np.mean([h for h, _ in seeds], 0), seeds[0][1]))
    print("\nbatch   rate  1/temperature   i2t R@1  t2i R@1    rsum   difference to the first (95 %)")
    base = 100 * resampled_recalls(*rows[0][3:])
    for size, rate, temperature, hit, sizes in rows:
        recalls = 100 * hit.sum(0) / sizes.sum(0)
        low, high = interval((100 * resampled_recalls(hit, sizes) - base).sum(1))
        print(
            f"{size:>5}  {rate:>5g}  {1 / temperature:>13.0f}  {recalls[0]:>8.1f} {recalls[3]:>8.1f}  "
            f"{recalls.sum():>6.1f}   {low:+.1f} to {high:+.1f}",
            flush=True,
        )


if __name__ == "__main__":
    import tyro

    from clip_scratch.errors import run_command

    run_command(lambda: main(tyro.cli(Arguments, prog="python -m benchmarks.batch_size")))
