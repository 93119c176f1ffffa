"""What tests/test_distributed.py runs in each of torchrun's processes: ten steps of several models, in float64."""

import dataclasses
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves

from clip_scratch.data.loaders import build_loaders
from clip_scratch.models.clip import CLIPModel
from clip_scratch.retrieval.embed import embed_batches
from clip_scratch.training import distributed
from clip_scratch.training.cached_features import cache_features
from clip_scratch.training.engine import train_epoch
from clip_scratch.training.sharded import full_state_dict, unsharded
from clip_scratch.training.state import TrainState

CASES = [(loss, micro, "") for loss in ("infonce", "sigmoid") for micro in (0, 2)]
CASES += [("soft_target", 2, ""), ("infonce", 0, "cached_views")]
SHARDED = [("infonce", 0, "fully_shard"), ("sigmoid", 2, "fully_shard")]


def start(cfg, table, tokenizer, loss, micro, setting):
    """The loaders of both splits and the state of a run; with "cached_views" frozen towers, with "fully_shard" sharded
    ones, which on a CPU need as many captions in every process."""
    freeze, is_sharded = "backbone" if setting == "cached_views" else "none", setting == "fully_shard"
    cfg = dataclasses.replace(
        cfg, loss=loss, micro_batch_size=micro, batch_size=8, captions_per_image=2 * is_sharded, ema=0.5,
        freeze_batch_norm=True, precision="fp32", cached_views=int(setting == "cached_views"), image_freeze=freeze,
        text_freeze=freeze, fully_shard=is_sharded,
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
    loaders = (build_loaders(table[table["split"] == s], tokenizer, s, cfg, **processes) for s in ("train", "valid"))
    return *(cache_features(model, loader, cfg) for loader in loaders), TrainState(model, 10)


def ten_steps(loader, valid, state):
    """The losses of ten steps, the weights after them, and the gathered embeddings."""
    model, losses = state.model, []
    for _ in range(5):  # two steps an epoch
        train_epoch(
            model, loader, state.optimizer, model.cfg, average=state.average,
            on_step=lambda steps: losses.append(steps.loss_sum),
        )  # fmt: skip
    with unsharded(model):
        embeddings = distributed.gather_embeddings(embed_batches(model, valid))
    return losses, full_state_dict(model), embeddings


def check_resume(inputs, case, state, file):
    """A checkpoint holds everything whole, and is sharded again by who resumes it."""
    saved = state.state_dict()
    if distributed.is_main():
        torch.save(saved, file)
    dist.barrier()
    *_, other = start(*inputs, *case)
    other.load_state_dict(torch.load(file, weights_only=False))
    again = other.state_dict()
    if distributed.is_main():
        for name in ("model", "optimizer", "average"):
            for ours, theirs in zip(tree_leaves(again[name]), tree_leaves(saved[name]), strict=True):
                assert torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs, name


def main(folder: Path, *, is_sharded: bool) -> None:
    """Write losses, weights and embeddings of every case, from the first process."""
    inputs, results = torch.load(folder / "inputs.pt", weights_only=False), []
    with distributed.process_group():
        for case in SHARDED if is_sharded else CASES:
            *loaders, state = start(*inputs, *case)
            results.append(ten_steps(*loaders, state))
            if is_sharded:
                check_resume(inputs, case, state, folder / "state.pt")
        if distributed.is_main():
            torch.save(results, folder / f"{distributed.world_size()}.pt")
    # A thread of the group that outlives it may abort the process as it ends, at random
    if is_sharded:
        os._exit(0)  # DTensor's caches keep the group
    threads = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    assert not [name for name in threads if "gloo" in name], threads


if __name__ == "__main__":
    main(Path(sys.argv[1]), is_sharded="sharded" in sys.argv)
