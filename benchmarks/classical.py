"""The classical loop: a dual encoder trained as in the well-known tutorial.

A row is a caption. Its image is read with cv2.imread, resized and normalised by albumentations, so an image with five
captions is decoded and encoded five times per epoch. Captions are tokenised once and padded to the data set's longest.
fp32, contiguous tensors, AdamW with the tutorial's three learning rates, batches of 32, no allocator setting. The loss
is CLIP's; the tutorial's own loss learns less and would be a straw man.

    python -m benchmarks.classical --captions-path data/flickr8k --minutes 120
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from clip_scratch.data.captions import image_folder
from clip_scratch.data.tokenizer import tokenize
from clip_scratch.models.clip import CLIPModel

BATCH_SIZE = 32


class Rows(Dataset):
    """One item per caption: float32 pixels (3, S, S), ids and mask padded to the data set's longest caption."""

    def __init__(self, table: pd.DataFrame, model: CLIPModel):
        import albumentations as A

        folder = image_folder(model.cfg, table)
        self.paths = [str(folder / name) for name in table["image"]]
        tokens = tokenize(table["caption"].tolist(), model.tokenizer, model.cfg.max_length)
        self.input_ids, self.attention_mask = tokens.batch(np.arange(len(tokens)))
        mean, std = model.image_encoder.mean, model.image_encoder.std
        self.transform = A.Compose([A.Resize(model.cfg.size, model.cfg.size), A.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        image = cv2.cvtColor(cv2.imread(self.paths[row]), cv2.COLOR_BGR2RGB)
        pixels = torch.tensor(self.transform(image=image)["image"]).permute(2, 0, 1).float()
        return {"pixel_values": pixels, "input_ids": self.input_ids[row], "attention_mask": self.attention_mask[row]}


def build_loader(table: pd.DataFrame, model: CLIPModel, num_workers: int, batch_size: int = BATCH_SIZE) -> DataLoader:
    """Shuffled batches of caption rows."""
    rows = Rows(table, model)
    return DataLoader(rows, batch_size, shuffle=True, num_workers=num_workers, drop_last=True)


def build_optimizer(model: CLIPModel) -> torch.optim.AdamW:
    """AdamW with the tutorial's learning rates and weight decay."""
    heads = [*model.image_projection.parameters(), *model.text_projection.parameters(), model.log_scale]
    groups = [
        {"params": model.image_encoder.parameters(), "lr": 1e-4},
        {"params": model.text_encoder.parameters(), "lr": 1e-5},
        {"params": heads, "lr": 1e-3, "weight_decay": 1e-3},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def train_step(model: CLIPModel, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> float:
    """One step on B rows; the only positive of image i is caption i."""
    images = F.normalize(model.image_projection(model.image_encoder(batch["pixel_values"])), dim=-1)  # (B, P)
    features = model.text_encoder(batch["input_ids"], batch["attention_mask"])
    texts = F.normalize(model.text_projection(features), dim=-1)  # (B, P)
    logits = model.log_scale.exp() * images @ texts.T
    labels = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def train(
    model: CLIPModel, loader: DataLoader, seconds: float, validate: Callable[[float, int], bool], every: float
) -> None:
    """Train for `seconds` of steps; `validate(seconds, pairs)` is called every `every` seconds and may stop it."""
    optimizer = build_optimizer(model)
    spent, pairs, validated = 0.0, 0, 0.0
    began = time.perf_counter()
    while spent < seconds:
        model.train()
        for batch in loader:
            train_step(model, batch, optimizer)
            pairs += len(batch["pixel_values"])
            spent += time.perf_counter() - began
            if spent - validated >= every or spent >= seconds:
                validated = spent
                if validate(spent, pairs) or spent >= seconds:
                    return
                model.train()
            began = time.perf_counter()


@dataclass
class Arguments:
    """Train the compact encoders with the classical loop and report recall over time."""

    captions_path: str  # the captions file or folder, as `train` takes it
    minutes: float = 120  # of training steps, without validation
    every: float = 5  # minutes between validations
    target: float = 60  # text-to-image R@10 on the validation images, in percent, at which to stop
    num_workers: int = 2  # processes that decode
    json: str = ""  # file to which each validation appends a line


def main(arguments: Arguments) -> None:
    """Print the recall every `every` minutes, and append it to `json`."""
    from clip_scratch.data.captions import read_captions, split_of
    from clip_scratch.data.loaders import build_loaders
    from clip_scratch.presets import PRESETS
    from clip_scratch.training.engine import valid_epoch

    cfg = PRESETS["compact"](
        captions_path=arguments.captions_path, image_freeze="none", freeze_batch_norm=False, image_dropout=0.0,
        text_dropout=0.0, head="mlp", temperature=0.07, precision="fp32", channels_last=False, size=224,
        device="cpu",
    )  # fmt: skip
    torch.manual_seed(cfg.seed)
    table = read_captions(cfg)
    model = CLIPModel(cfg)
    valid = build_loaders(split_of(table, "valid", cfg.captions_path), model.tokenizer, "valid", cfg)

    def validate(seconds: float, pairs: int) -> bool:
        line = {"seconds": seconds, "pairs": pairs, **valid_epoch(model, valid, cfg)}
        recall = 100 * line["image_retrieval_recall@10"]
        print(f"{seconds / 60:6.1f} min  {pairs:>7,} pairs  {pairs / seconds:5.1f} pairs/s  t2i R@10 {recall:.1f}  "
              f"rsum {line['rsum']:.1f}", flush=True)  # fmt: skip
        if arguments.json:
            with Path(arguments.json).open("a") as file:
                print(json.dumps(line), file=file)
        return recall >= arguments.target

    loader = build_loader(split_of(table, "train", cfg.captions_path), model, arguments.num_workers)
    train(model, loader, 60 * arguments.minutes, validate, 60 * arguments.every)


if __name__ == "__main__":
    import tyro

    from clip_scratch.errors import run_command

    run_command(lambda: main(tyro.cli(Arguments, prog="python -m benchmarks.classical")))
