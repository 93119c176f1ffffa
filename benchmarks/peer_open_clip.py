"""The peer: open_clip's own training function on the same images and captions, in the same precision.

Its models, CSV data set and `train_one_epoch`, set up as in `python -m open_clip_train.main`, without checkpoints and
logs. A row is a caption.

open_clip cannot build DistilBERT (its adapter does not know that configuration), so the text tower is a BERT of the
same size: 6 layers of 768 dimensions, 12 heads. Captions are padded to the data set's longest, which is faster than
open_clip's 77 tokens.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import time
from pathlib import Path

import torch

from clip_scratch.data.captions import image_folder
from clip_scratch.data.tokenizer import build_tokenizer, tokenize
from clip_scratch.device import keep_freed_memory

from .contenders import Setup, train_table
from .rounds import Figures

MISSING = "not installed: pip install 'open_clip_torch[training]'"
_NAME = "clip_scratch_peer"


def is_installed() -> bool:
    """Whether open_clip and the packages that its training needs are installed."""
    return all(importlib.util.find_spec(name) for name in ("open_clip", "open_clip_train", "webdataset"))


def _write_config(setup: Setup, folder: Path) -> tuple[str, Path]:
    """Write text tower, tokenizer, model configuration and CSV; return open_clip's precision and the CSV's path."""
    from transformers import AutoConfig

    cfg = setup.cfg()
    table = train_table(cfg)
    tokenizer = build_tokenizer(cfg, table["caption"].tolist())
    longest = int(tokenize(table["caption"].tolist(), tokenizer, cfg.max_length).lengths().max())
    text = AutoConfig.for_model("bert", vocab_size=len(tokenizer), num_hidden_layers=6)
    text.save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    text_cfg = {"hf_model_name": str(folder / "text"), "hf_tokenizer_name": str(folder / "text")}
    text_cfg |= {"hf_pooler_type": "cls_last_hidden_state_pooler", "hf_proj_type": "linear", "context_length": longest}
    vision_cfg = {"timm_model_name": setup.model_name, "timm_model_pretrained": False}
    vision_cfg |= {"timm_proj": "linear", "image_size": setup.size}
    model = {"embed_dim": cfg.projection_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    (folder / "models").mkdir(parents=True)
    (folder / "models" / f"{_NAME}.json").write_text(json.dumps(model))
    images = image_folder(cfg, table)
    rows = table.assign(filepath=[str(images / name) for name in table["image"]], title=table["caption"])
    rows.sample(frac=1, random_state=cfg.seed)[["filepath", "title"]].to_csv(
        folder / "train.csv", sep="\t", index=False
    )
    return "amp_bf16" if setup.precision == "bf16" else "fp32", folder / "train.csv"


class OpenClip:
    """open_clip on the same towers, with the faster of 0 and 2 workers."""

    def __init__(self, setup: Setup, folder: str, keep_memory: bool = False):
        import open_clip
        from open_clip_train.distributed import init_distributed_device
        from open_clip_train.params import parse_args

        if keep_memory:
            keep_freed_memory()
        logging.disable(logging.INFO)
        precision, self.csv = _write_config(setup, Path(folder))
        open_clip.add_model_config(Path(folder) / "models")
        arguments = ["--model", _NAME, "--precision", precision, "--device", "cpu", "--dataset-type", "csv"]
        arguments += ["--train-data", str(self.csv), "--batch-size", str(setup.batch_size), "--skip-scheduler"]
        self.args = parse_args(arguments)
        init_distributed_device(self.args)  # sets rank and world size
        self.args.distill = self.args.wandb = False  # as in its `main`
        self.model, self.preprocess, _ = open_clip.create_model_and_transforms(
            _NAME, precision=precision, device="cpu", pretrained_text=False, pretrained_image=False, output_dict=True
        )
        self.tokenizer = open_clip.get_tokenizer(_NAME)
        self.loss = open_clip.create_loss(self.args)
        self.optimizer = _optimizer(self.model, self.args)
        self._epoch(0, 1)
        seconds = {workers: self._epoch(workers, 3)[1] / 3 for workers in (0, 2)}
        self.workers = min(seconds, key=seconds.get)
        self.steps = max(3, math.ceil(setup.seconds / seconds[self.workers]))

    def _epoch(self, workers: int, steps: int) -> tuple[float, float]:
        import pandas as pd
        from open_clip_train.data import get_data
        from open_clip_train.train import train_one_epoch

        # A round is an epoch, so its CSV has as many rows as the round has pairs
        pairs = steps * self.args.batch_size
        part = self.csv.with_name("round.csv")
        pd.read_csv(self.csv, sep="\t").sample(pairs).to_csv(part, sep="\t", index=False)
        self.args.workers, self.args.train_data = workers, str(part)
        data = get_data(self.args, (self.preprocess, self.preprocess), epoch=0, tokenizer=self.tokenizer)
        began = time.perf_counter()
        train_one_epoch(self.model, data, self.loss, 0, self.optimizer, None, None, None, self.args)
        return pairs, time.perf_counter() - began

    def round(self) -> Figures:
        return {"pairs": self._epoch(self.workers, self.steps)}

    def facts(self) -> dict[str, object]:
        import open_clip

        return {"workers": self.workers, "steps_a_round": self.steps, "version": open_clip.__version__}


def _optimizer(model: torch.nn.Module, args) -> torch.optim.AdamW:
    """AdamW as in its `main`: no weight decay for norms, biases and the temperature."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": args.wd}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), eps=args.eps)
