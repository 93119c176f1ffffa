"""What tests/test_distributed.py runs in each of torchrun's processes: ten steps of several models, in float64."""

import dataclasses
import sys
from pathlib import Path

import torch
from torch import nn

from clip_scratch.data.loaders import build_loaders
from clip_scratch.models.clip import CLIPModel
from clip_scratch.retrieval.embed import embed_batches
from clip_scratch.training import distributed
from clip_scratch.training.cached_features import cache_features
from clip_scratch.training.engine import train_epoch
from clip_scratch.training.losses import LOSSES
from clip_scratch.training.optimizer import WeightAverage, build_optimizer

CASES = [(loss, micro, False) for loss in LOSSES for micro in (0, 2)] + [("infonce", 0, True)]


def ten_steps(cfg, table, tokenizer, loss, micro, cached):
    """The losses and the weights after ten steps, and the gathered embeddings; `cached`: of frozen towers."""
    cfg = dataclasses.replace(
        cfg, loss=loss, micro_batch_size=micro, batch_size=8, captions_per_image=0, freeze_batch_norm=True, ema=0.5,
        precision="fp32", cached_views=int(cached),
        **dict.fromkeys(("image_freeze", "text_freeze"), "backbone" if cached else "none"),
    )  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(cfg, tokenizer).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    normalize = model.normalize_pixels
    model.normalize_pixels = lambda pixels: normalize(pixels).double()
    model.to(memory_format=torch.contiguous_format)
    processes = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    loader = build_loaders(table[table["split"] == "train"], tokenizer, "train", cfg, **processes)
    valid = build_loaders(table[table["split"] == "valid"], tokenizer, "valid", cfg, **processes)
    loader, valid = (cache_features(model, one, cfg) for one in (loader, valid))
    optimizer, average, losses = build_optimizer(model, cfg), WeightAverage(model, 0.5), []
    for _ in range(5):  # two steps an epoch
        train_epoch(model, loader, optimizer, cfg, average=average, on_step=lambda steps: losses.append(steps.loss_sum))
    embeddings = distributed.gather_embeddings(embed_batches(model, valid))
    return losses, model.state_dict(), embeddings


def main(folder: Path) -> None:
    """Write losses, weights and embeddings of every case, from the first process."""
    inputs = torch.load(folder / "inputs.pt", weights_only=False)
    with distributed.process_group():
        results = [ten_steps(*inputs, *case) for case in CASES]
        if distributed.is_main():
            torch.save(results, folder / f"{distributed.world_size()}.pt")
    # A thread of the group that outlives it may abort the process as it ends, at random
    threads = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    assert not [name for name in threads if "gloo" in name], threads


if __name__ == "__main__":
    main(Path(sys.argv[1]))
