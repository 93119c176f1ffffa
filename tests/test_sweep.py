"""The sweep over strategies of freezing: five runs, one table, and that it continues where it stopped."""

import csv
import dataclasses
import json

import pytest
from PIL import Image

import clip_scratch.training.engine as engine
import clip_scratch.training.start as start
from clip_scratch.errors import UserError
from clip_scratch.sweep import strategies, sweep
from clip_scratch.train import main

NAMES = ["zero-shot", *strategies(3, 1e-5)]


def test_a_sweep_from_its_first_stop_to_its_table(hf_cfg, plain, tmp_path, monkeypatch, capsys):
    """Interrupted in the middle of `full`, continued, and called again, with runs long enough to measure precision."""
    monkeypatch.setattr(start, "MIN_STEPS", 1)
    cfg = hf_cfg(epochs=1, lora_rank=2, run_dir=str(tmp_path / "sweep"))
    train_epoch, trained = engine.train_epoch, []

    def counted(model, *args, **options):
        trained.append(model.cfg.image_freeze)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train_epoch(model, *args, **options)

    monkeypatch.setattr(engine, "train_epoch", counted)
    with pytest.raises(KeyboardInterrupt, match=f"continue with the same command and --run-dir {tmp_path / 'sweep'}"):
        sweep(cfg)
    folder = sweep(cfg)
    assert trained == ["first:1", "backbone", "none", "none", "lora"]
    printed = capsys.readouterr().out
    assert all(f"== {name}" in printed for name in NAMES)

    assert {path.name for path in folder.iterdir()} == {*NAMES, *(f"comparison.{x}" for x in ("md", "csv", "png"))}
    rows = list(csv.reader((folder / "comparison.csv").read_text().splitlines()))
    assert len(rows) == 1 + len(NAMES) and "zero-shot" in rows[1][0]
    assert [row[0] for row in rows[2:]] == NAMES[1:]
    markdown = (folder / "comparison.md").read_text()
    assert markdown.count("|\n") >= 2 + len(NAMES) and "**" in markdown
    with Image.open(folder / "comparison.png") as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) > 100

    counts = {}
    for name in NAMES:
        *_, line = (json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines())
        assert line["epoch"] == (name != "zero-shot")
        counts[name] = line["trained_parameters"]
    assert counts["heads"] < counts["lora"] < counts["vision-first-1"] < counts["full"]
    table = (folder / "comparison.csv").read_text()
    sweep(cfg)
    assert len(trained) == 5 and (folder / "comparison.csv").read_text() == table


def test_a_deep_tower_has_its_first_six_blocks_frozen():
    assert strategies(12, 1e-5)["vision-first-6"]["image_freeze"] == "first:6"
    assert [next(iter(strategies(depth, 1e-5))) for depth in (7, 6, 1)] == [
        "vision-first-6",
        "vision-first-3",
        "vision-first-0",
    ]


def test_a_sweep_does_not_mix_runs_of_different_settings(hf_cfg, plain, tmp_path):
    cfg = hf_cfg(epochs=1, run_dir=str(tmp_path))
    main(dataclasses.replace(cfg, epochs=0, run_dir=str(tmp_path / "zero-shot")))
    with pytest.raises(UserError, match="zero-shot was trained with batch_size=4; a resume cannot change it to 5"):
        sweep(dataclasses.replace(cfg, batch_size=5))
    with pytest.raises(UserError, match="zero-shot is a run: choose another --run-dir"):
        sweep(dataclasses.replace(cfg, run_dir=str(tmp_path / "zero-shot")))
    with pytest.raises(UserError, match="sets image_freeze and text_freeze itself"):
        sweep(dataclasses.replace(cfg, text_freeze="lora"))


def test_a_sweep_needs_a_pretrained_clip(tiny_cfg, hf_cfg, tmp_path):
    with pytest.raises(UserError, match="it needs a pretrained CLIP"):
        sweep(dataclasses.replace(tiny_cfg, run_dir=str(tmp_path / "run")))
    with pytest.raises(UserError, match="a sweep continues with the same command and --run-dir somewhere"):
        sweep(hf_cfg(resume="somewhere"))
    assert not (tmp_path / "run").exists()
