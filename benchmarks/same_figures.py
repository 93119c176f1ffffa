"""Losses and recalls of two short runs, one per backend, to the last digit: a refactoring must not change them.

    python -m benchmarks.same_figures > after.json
    git worktree add ../before COMMIT && cp benchmarks/same_figures.py ../before/benchmarks/
    cd ../before && python -m benchmarks.same_figures > before.json && diff before.json after.json

Both runs train on the built-in scenes in fp32 with a fixed seed. The fine-tuned CLIP is a small one with random
weights, built here, so no network is needed. The digits depend on the processor and on the number of threads:
compare two commits on one machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

KEYS = ("train_loss", "logit_scale", "image_retrieval_recall@1", "text_retrieval_recall@1", "rsum")


def figures(run: Path) -> list[dict[str, float]]:
    """The figures of each epoch in a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in KEYS} for line in lines]


def small_clip(folder: Path, captions: list[str]) -> Path:
    """Write a transformers CLIP with random weights, its tokenizer and its image processor to `folder`."""
    import torch
    import transformers as hf

    from clip_scratch.data.tokenizer import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(captions)
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    bert = hf.BertConfig(**tower, vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0)
    vision = hf.ViTConfig(**tower, image_size=32, patch_size=8)
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, bert, projection_dim=32)
    hf.VisionTextDualEncoderModel(config).save_pretrained(folder)
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    """Print the figures of both runs as JSON."""
    from clip_scratch import CFG, PRESETS, make_train_valid_dfs
    from clip_scratch.train import main as train

    common = {"n_scenes": 600, "seed": 1, "precision": "fp32", "device": "cpu", "epochs": 3, "ema": 0.9}
    if "minutes" in {field.name for field in dataclasses.fields(CFG)}:
        common["minutes"] = 0.0
    from_scratch = {
        "text_encoder_model": "bert-mini",
        "size": 48,
        "batch_size": 32,
        "image_encoder_lr": 1e-3,
        "text_encoder_lr": 5e-4,
    }
    fine_tuned = {"batch_size": 16, "accumulation": 2, "image_encoder_lr": 3e-4, "text_encoder_lr": 3e-4}
    result = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        os.chdir(folder)
        run = train(PRESETS["scenes"](**common, **from_scratch, run_dir="runs/scratch", warmup_steps=8))
        result["from_scratch"] = figures(run)
        captions = make_train_valid_dfs(CFG(n_scenes=600, seed=1))[0]["caption"].tolist()
        clip = small_clip(Path("clip"), captions)
        run = train(PRESETS["hf_clip"](**common, **fine_tuned, model_name=str(clip), run_dir="runs/fine_tuned"))
        result["hf_clip"] = figures(run)
        os.chdir("/")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
