"""The table of runs: bootstrap intervals against slow loops, what is compared with what, and how it is shown."""

import csv
import dataclasses
import io
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_scratch import CFG
from clip_scratch.cli import parse
from clip_scratch.compare import Arguments, main
from clip_scratch.data.captions import fingerprint_of
from clip_scratch.errors import UserError
from clip_scratch.evaluate import evaluate
from clip_scratch.evaluation import bootstrap, comparison
from clip_scratch.evaluation.comparison import Comparison, Row, compare
from clip_scratch.evaluation.measure import Measured, read_zero_shot, save_zero_shot
from clip_scratch.evaluation.run_record import UNTRAINED, RunRecord, read_record
from clip_scratch.files import write_json

# ---- bootstrap


def test_the_interval_equals_a_slow_loop():
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 6, 40)
    hits = np.array([rng.integers(0, size + 1) for size in sizes])
    samples = bootstrap.resampled_recalls(hits[:, None], sizes[:, None], 1000, seed=3)
    slow = []
    for counts in np.concatenate(list(bootstrap.resample_counts(40, 1000, seed=3))):
        drawn = [image for image, n in enumerate(counts) for _ in range(n)]
        assert len(drawn) == 40
        slow.append(sum(hits[i] for i in drawn) / sum(sizes[i] for i in drawn))
    assert samples[:, 0] == pytest.approx(slow, abs=1e-12)
    ordered = sorted(slow)  # the 2.5th and 97.5th percentiles of 1000 values, between two of them
    low, high = bootstrap.interval(samples)[:, 0]
    assert low == pytest.approx(ordered[24] + 0.975 * (ordered[25] - ordered[24]), abs=1e-12)
    assert high == pytest.approx(ordered[974] + 0.025 * (ordered[975] - ordered[974]), abs=1e-12)


def test_the_interval_of_one_query_an_image_is_the_binomial_one():
    """400 images, half of them found: the normal interval is 0.5 +- 1.96 * sqrt(0.25 / 400)."""
    hits = (np.arange(400) % 2)[:, None]
    low, high = bootstrap.interval(bootstrap.resampled_recalls(hits, np.ones_like(hits)))[:, 0]
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.006)


def test_chunks_do_not_matter_to_memory_or_form(monkeypatch):
    monkeypatch.setattr(bootstrap, "_CELLS", 50)
    parts = list(bootstrap.resample_counts(20, 7))
    assert [part.shape for part in parts] == [(2, 20), (2, 20), (2, 20), (1, 20)]
    assert all((part.sum(1) == 20).all() for part in parts)


def test_intervals_of_any_shape():
    samples = np.random.default_rng(0).random((100, 3, 2))
    found = bootstrap.interval(samples)
    assert found.shape == (2, 3, 2)
    assert found[:, 1, 0].tolist() == bootstrap.interval(samples[:, 1, 0]).tolist()


@given(data=st.data(), n=st.integers(1, 8))
@settings(max_examples=40)
def test_bootstrap_properties(data, n):
    sizes = np.array(data.draw(st.lists(st.integers(1, 5), min_size=n, max_size=n)))
    hits = np.array([data.draw(st.integers(0, size)) for size in sizes])
    columns = np.stack([hits, sizes, 0 * hits, hits], 1)
    samples = bootstrap.resampled_recalls(columns, np.repeat(sizes[:, None], 4, 1), 50)
    assert ((samples >= 0) & (samples <= 1)).all()
    assert (samples[:, 1] == 1).all() and (samples[:, 2] == 0).all()
    assert (samples[:, 0] == samples[:, 3]).all()  # paired: the same hits differ in no resample


# ---- rows made by hand


def measured(image_rank, text_rank, own, names=None):
    names = names or [f"{i}.png" for i in range(len(text_rank))]
    return Measured(names, torch.tensor(own), torch.tensor(image_rank), torch.tensor(text_rank), "")


def row(name, found, zero_shot=False, model="m", **settings):
    cfg = CFG(backend="hf_clip", model_name=model)
    record = dataclasses.replace(UNTRAINED) if zero_shot else RunRecord(**settings)
    return Row(name, f"runs/{name}", cfg, found, record, zero_shot)


@pytest.fixture
def table():
    """60 images, two captions each: zero-shot finds every 4th, "full" the others, "same" what zero-shot does."""
    own = [i // 2 for i in range(120)]
    poor = measured([1 if c // 2 % 4 == 0 else 7 for c in range(120)], [1 if i % 4 == 0 else 3 for i in range(60)], own)
    good = measured([1 if c // 2 % 4 else 7 for c in range(120)], [1 if i % 4 else 3 for i in range(60)], own)
    done = {"epochs": 10, "best_epoch": 7, "learning_rates": "1e-5", "frozen": "nothing"}
    rows = [
        row("zero-shot m", poor, zero_shot=True),
        row("full", good, **done, trained_parameters=151_277_313, wall_seconds=7384.0),
        row("same", poor, **done | {"best_epoch": 0}, trained_parameters=8193, wall_seconds=61.0),
    ]
    return Comparison(rows, "valid", 3, ["A note."])


def test_hits_follow_the_names_of_the_images():
    one = measured([1, 2, 1], [1, 4], [0, 1, 0], ["a", "b"])
    other = measured([2, 1, 1], [4, 1], [0, 1, 1], ["b", "a"])
    for model in (one, other):
        hits, sizes = model.hits()
        assert hits.tolist() == [[1, 2], [0, 0]] and sizes.tolist() == [[1, 2], [1, 1]]


def test_differences_are_paired(table):
    full, same = table.differences
    assert full.value == pytest.approx([0.5, 0.5]) and (full.low > 0).all() and (full.high < 1).all()
    assert same.value.tolist() == same.low.tolist() == same.high.tolist() == [0, 0]
    # The same from the resamples themselves, image by image
    counts = np.concatenate(list(bootstrap.resample_counts(60)))
    hit = np.argsort(np.argsort([f"{i}.png" for i in range(60)])) * 0
    for position, name in enumerate(sorted(f"{i}.png" for i in range(60))):
        hit[position] = 1 if int(name[:-4]) % 4 else -1
    slow = np.quantile(counts @ hit / 60, [0.025, 0.975])
    assert [full.low[0], full.high[0]] == pytest.approx(slow.tolist())


def test_each_run_against_its_own_model(table):
    rows = [
        row("zero-shot m", table.rows[0].measured, zero_shot=True),
        row("zero-shot n", table.rows[1].measured, zero_shot=True, model="n"),
        row("of n", table.rows[1].measured, model="n"),
        row("scratch", table.rows[1].measured, model="resnet50"),
    ]
    found = Comparison(rows, "valid", 0).differences
    assert [(d.name, d.zero_shot) for d in found] == [("of n", "zero-shot n"), ("scratch", "zero-shot m")]
    assert found[0].value.tolist() == [0, 0]
    assert Comparison(rows[2:], "valid", 0).differences == []


def test_text(table):
    lines = table.text().splitlines()
    assert lines[0].startswith("valid: 60 images, 120 captions.")
    header, zero_shot, full, same = lines[2:6]
    assert header.split()[:3] == ["run", "i2t", "R@1"]
    assert re.match(r"zero-shot m +25\.0 \[\d+\.\d, \d+\.\d\] +100\.0\* ", zero_shot) and zero_shot.endswith(" all")
    assert re.match(r"full +75\.0\* \[", full) and full.endswith("nothing")
    assert "10 (best 7)" in full and "151.3 M" in full and "123 min" in full
    assert "8,193" in same and "61 s" in same
    text = table.text()
    assert "full - zero-shot m: i2t +50.0 [" in text and "both exclude 0" in text
    assert "same - zero-shot m: i2t +0.0 [+0.0, +0.0], t2i +0.0 [+0.0, +0.0]: neither interval excludes 0" in text
    assert "same: no epoch was better than the untouched model" in text and "WiSE-FT)." not in text
    assert "3 of 120 captions are ambiguous" in text and text.endswith("A note.")


def test_a_mixture_is_not_called_an_epoch(table):
    """Of a run whose epochs were all worse than zero-shot the last one is mixed in: it is not the best."""
    record = table.rows[2].record
    record.best_epoch, record.wise_ft_alpha = 10, 0.3
    text = table.text()
    assert "same: 0.3 of the fine-tuned weights of epoch 10, the rest zero-shot (WiSE-FT)." in text
    assert "10 (averaged)" in text and "no epoch was better" not in text
    record.best_epoch, record.wise_ft_alpha = 0, 0.0
    assert "same: 0 of the fine-tuned weights, the rest zero-shot (WiSE-FT)." in table.text()


def test_a_note_says_that_epochs_were_chosen_on_the_validation_split(table):
    sentence = "was chosen on the validation split"
    assert table.text().count(sentence) == table.markdown().count(sentence) == 1
    rows = table.rows
    assert sentence not in Comparison(rows, "test", 0).text() and sentence not in Comparison(rows, "all", 0).text()
    assert sentence not in Comparison(rows[:1], "valid", 0).text()  # nothing was trained


def test_markdown(table):
    table.rows[1].name = "a|b"
    lines = table.markdown().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 5 and "| **75.0** [" in rows[3] and r"a\|b" in rows[3]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {13}


def test_csv(table):
    zero_shot, full, _ = csv.DictReader(io.StringIO(table.csv()))
    assert float(full["i2t_r@1"]) == 75 and float(full["t2i_r@10"]) == 100
    low, high = (float(full[f"i2t_r@1_{end}"]) for end in ("low", "high"))
    assert (low, high) == pytest.approx(tuple(100 * table.intervals[:, 1, 0]), abs=1e-3) and low < 75 < high
    assert float(full["t2i_r@1_minus_zero_shot"]) == 50 and float(full["t2i_r@1_minus_zero_shot_low"]) > 0
    assert full["trained_parameters"] == "151277313" and full["wall_seconds"] == "7384"
    assert zero_shot["zero_shot"] == "1" and zero_shot["i2t_r@1_minus_zero_shot"] == ""


def test_chart(table, tmp_path):
    table.rows[0].name = "zero-shot a $5 name, so long that it has to be broken into several lines to fit"
    path = table.chart(tmp_path / "chart.png")
    assert Image.open(path).size[0] > 900 and not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match="must end in one of"):
        table.chart(tmp_path / "chart.xyz")


# ---- the record of a run


@pytest.mark.parametrize(
    ("setting", "rates", "frozen"),
    [
        ({}, "1e-5", "none"),
        ({"head_lr": 1e-3}, "1e-5 image + text, 1e-3 heads", "none"),
        ({"image_freeze": "first:6"}, "1e-5", "image first:6, text none"),
        ({"image_freeze": "backbone", "text_freeze": "backbone", "head_lr": 2e-4}, "2e-4", "backbone"),
        ({"image_freeze": "lora", "text_freeze": "lora"}, "1e-3 image LoRA + text LoRA, 1e-5 heads", "lora"),
        ({"image_freeze": "all", "text_freeze": "all-but-last:2"}, "1e-5", "image all, text all-but-last:2"),
        ({"trainable": False}, "1e-5", "backbone"),
    ],
)  # fmt: skip
def test_what_trained_and_how_fast(tmp_path, setting, rates, frozen):
    cfg = CFG(**{"head_lr": 1e-5, "image_encoder_lr": 1e-5, "text_encoder_lr": 1e-5} | setting)
    write_json(tmp_path / "config.json", dataclasses.asdict(cfg))
    record = read_record(tmp_path)
    assert (record.learning_rates, record.frozen) == (rates, frozen)
    assert record.epochs is record.wall_seconds is record.trained_parameters is None


@pytest.mark.parametrize("with_run", [True, False])
def test_a_zero_shot_run_of_which_only_best_is_left(tmp_path, with_run):
    best = tmp_path / "best" if with_run else tmp_path
    best.mkdir(exist_ok=True)
    cfg = {"backend": "hf_clip", "head_lr": 1e-5, "image_encoder_lr": 1e-5, "text_encoder_lr": 1e-5}
    write_json(best / "config.json", dataclasses.asdict(CFG(**cfg)))
    write_json(best / "metrics.json", {"epoch": 0, "rsum": 300.0})
    record = read_record(tmp_path)
    assert (record.epochs, record.best_epoch, record.frozen, record.learning_rates) == (0, 0, "all", "none")
    write_json(best / "metrics.json", {"epoch": 10, "rsum": 300.0, "wise_ft_alpha": 0.2})
    record = read_record(tmp_path)
    assert (record.epochs, record.best_epoch, record.wise_ft_alpha) == (None, 10, 0.2)
    assert record.learning_rates == "1e-5"
    # Where the log is there, it decides
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\n{"epoch": 3, "trained_parameters": 7}\n')
    write_json(best / "metrics.json", {"epoch": 0, "rsum": 300.0})
    record = read_record(tmp_path)
    assert (record.epochs, record.best_epoch, record.trained_parameters) == (3, 0, 7)


# ---- zero_shot.json


def test_zero_shot_is_recorded(tmp_path):
    path = tmp_path / "zero_shot.json"
    own, image_rank, text_rank = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2]), torch.tensor([1, 3])
    save_zero_shot(path, "openai/clip", ["a.jpg", "b.jpg"], own, image_rank, text_rank, "1234")
    saved = json.loads(path.read_text())
    assert saved["split"] == "valid" and saved["images"] == ["a.jpg", "b.jpg"] and saved["text_rank"] == [1, 3]
    assert saved["model_name"] == "openai/clip"
    read = read_zero_shot(path)
    assert torch.equal(read.image_rank, image_rank) and torch.equal(read.text_rank, text_rank)
    assert read.metrics["image_retrieval_recall@1"] == pytest.approx(1 / 3) and read.fingerprint == "1234"
    nothing = {"images": [], "image_of_caption": [], "image_rank": [], "text_rank": []}
    for damage in (
        {"text_rank": [1]}, {"image_of_caption": [0, 0, 7]}, {"image_of_caption": [0, 0, 0]}, {"image_rank": [1, 1]},
        {"images": None}, {"image_rank": ["x", 1, 1]}, nothing,
    ):  # fmt: skip
        path.write_text(json.dumps(saved | damage))
        with pytest.raises(UserError, match="zero_shot.json is damaged"):
            read_zero_shot(path)
    for text in ("{", json.dumps({name: value for name, value in saved.items() if name != "fingerprint"})):
        path.write_text(text)
        with pytest.raises(UserError, match="zero_shot.json is damaged"):
            read_zero_shot(path)


def test_fingerprints(tiny_data):
    table = tiny_data.table
    other = table.assign(caption=[*table["caption"][:-1], "other words"])
    assert fingerprint_of(table) == fingerprint_of(table.sample(frac=1, random_state=0)) != fingerprint_of(other)


# ---- real runs


@pytest.fixture
def here(scene_run, monkeypatch):
    monkeypatch.chdir(scene_run.cwd)
    return scene_run


@pytest.fixture
def as_hf_clip(monkeypatch):
    """Have every run called one of a pretrained CLIP "org/clip", whatever its weights are."""
    load = comparison.load

    def and_rename(run, device):
        model = load(run, device)
        model.cfg = dataclasses.replace(model.cfg, backend="hf_clip", model_name="org/clip")
        return model

    monkeypatch.setattr(comparison, "load", and_rename)


def like_a_fine_tuned_run(scene_run, folder, epochs=5):
    """A copy of the scenes run with the files of a fine-tuned one: zero_shot.json, epoch 0, its parameters and time."""
    shutil.copytree(scene_run.folder, folder, ignore=shutil.ignore_patterns("events*", "last"))
    best = json.loads((folder / "best/config.json").read_text())
    write_json(folder / "best/config.json", best | {"backend": "hf_clip"})
    lines = [{"epoch": e, "wall_seconds": 30.0 * e, "trained_parameters": 1234} for e in range(epochs + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def loads_scenes(monkeypatch, here):
    """Load the weights of the scenes run for any copy of it."""
    load = comparison.load
    monkeypatch.setattr(comparison, "load", lambda run, device: load(here.folder, device))


def test_a_run_measured_twice_is_the_run(here, capsys):
    found = compare([here.folder, here.folder / "best"])
    one, other = found.rows
    assert one.measured.metrics == other.measured.metrics and one.record == other.record
    best = json.loads((here.folder / "best/metrics.json").read_text())
    assert one.measured.metrics["rsum"] == pytest.approx(best["rsum"], abs=1e-6)
    assert (found.n_images, found.n_captions, found.split) == (24, 120, "valid")
    assert [one.name, other.name] == [f"scenes ({here.folder})", f"scenes ({here.folder}/best)"]
    assert one.record.epochs == 5 and not one.is_zero_shot
    assert "train hf_clip --epochs 0" in found.text()
    assert "(2 of 2)" in capsys.readouterr().err


def test_zero_shot_comes_first_and_once(here, loads_scenes, as_hf_clip, tmp_path):
    for name in ("a", "b"):
        like_a_fine_tuned_run(here, tmp_path / name)
    names = compare([tmp_path / "a"]).rows[0].measured
    worst = torch.full_like(names.image_rank, 24), torch.full_like(names.text_rank, 100)
    for name in ("a", "b"):
        path = tmp_path / name / "zero_shot.json"
        save_zero_shot(path, "org/clip", names.images, names.image_of_caption, *worst, names.fingerprint)
    found = compare([tmp_path / "b", tmp_path / "a"])
    assert [row.name for row in found.rows] == ["zero-shot clip", "b", "a"]
    assert found.rows[0].measured.metrics["rsum"] == 0 and found.rows[0].record.epochs == 0
    assert found.rows[1].record.trained_parameters == 1234 and found.rows[1].record.wall_seconds == 150
    assert len(found.differences) == 2 and (found.differences[0].value >= 0).all() and not found.notes
    # Of another split or file nothing was recorded
    test = compare([tmp_path / "a"], "test")
    assert [row.name for row in test.rows] == ["a"] and "no zero-shot row of org/clip" in test.text()

    # A run that trained no epoch is the zero-shot row, on any split, and what was recorded is not repeated
    like_a_fine_tuned_run(here, tmp_path / "untouched", epochs=0)
    for split in ("valid", "test"):
        found = compare([tmp_path / "a", tmp_path / "untouched"], split)
        assert [row.name for row in found.rows] == ["zero-shot clip", "a"]
        [note] = found.notes  # its settings ask for epochs
        assert "untouched has not finished an epoch" in note
        assert found.differences[0].value.tolist() == [0, 0]

    # What was recorded on as many other captions of the same images is refused
    path, ranked = tmp_path / "a/zero_shot.json", (names.images, names.image_of_caption, *worst)
    save_zero_shot(path, "org/clip", *ranked, names.fingerprint)
    assert compare([tmp_path / "a"]).rows[0].is_zero_shot
    save_zero_shot(path, "org/clip", *ranked, "of other captions")
    with pytest.raises(UserError, match=r"a/zero_shot.json and .* each, but not the same ones"):
        compare([tmp_path / "a"])

    # What was recorded on other images is refused
    save_zero_shot(tmp_path / "a/zero_shot.json", "org/clip", ["x.png"], [0], [1], [1], "of one image")
    with pytest.raises(UserError, match=r"a/zero_shot.json and .* different images or captions .*--captions-path"):
        compare([tmp_path / "a"])


def advised(note):
    """The settings of the command in a note."""
    words = shlex.split(note.split("`")[1])
    assert words[:3] == ["python", "-m", "clip_scratch.train"]
    return parse(words[3:])


def test_the_advised_zero_shot_run_is_of_the_same_captions(here, loads_scenes, as_hf_clip, tiny_data, tmp_path):
    """Its settings are those of the run: it could be compared."""
    like_a_fine_tuned_run(here, tmp_path / "a")
    (note,) = compare([tmp_path / "a"]).notes
    cfg = advised(note)
    assert (cfg.model_name, cfg.epochs, cfg.backend, cfg.n_scenes) == ("org/clip", 0, "hf_clip", 240)
    assert cfg.captions_path == cfg.image_path == "" and "--captions-path" not in note

    captions = tmp_path / "my captions.csv"
    tiny_data.table.to_csv(captions, index=False)
    found = compare([tmp_path / "a"], "valid", str(captions), str(tiny_data.image_path))
    cfg = advised(found.notes[0])
    assert (cfg.captions_path, cfg.image_path) == (str(captions), str(tiny_data.image_path))
    assert f"--captions-path '{captions}'" in found.notes[0] and "--n-scenes" not in found.notes[0]


def test_the_advised_command_holds_all_that_chooses_the_captions(table):
    own = {"captions_path": "it's/c.csv", "image_path": "a b", "valid_fraction": 0.3, "seed": 7, "image_column": "file"}
    for run in table.rows:
        run.cfg = dataclasses.replace(run.cfg, backend="from_scratch", **own)
    (note,) = comparison._notes(table.rows[1:], [], "", "")
    cfg = advised(note)
    assert {name: getattr(cfg, name) for name in own} == own and cfg.model_name == "openai/clip-vit-base-patch32"
    (note,) = comparison._notes(table.rows[1:], [], "", "moved")
    assert advised(note).image_path == "moved" and advised(note).captions_path == "it's/c.csv"


def test_runs_on_different_captions_are_refused(here, tiny_data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(here.folder, other)
    settings = json.loads((other / "best/config.json").read_text())
    data = {"captions_path": str(tiny_data.captions_path), "image_path": str(tiny_data.image_path)}
    write_json(other / "best/config.json", settings | data)
    with pytest.raises(UserError, match=rf"{here.folder} and {other} were measured .*24 images .*--captions-path"):
        compare([here.folder, other])
    found = compare([here.folder, other], captions_path=str(tiny_data.captions_path))
    assert found.split == "all" and found.n_images == 26
    text = found.text()
    assert f"{found.n_ambiguous} of {found.n_captions} captions are ambiguous" in text and found.n_ambiguous > 0


def test_the_same_images_with_other_words_are_other_captions(here, tiny_data, tmp_path):
    paths = []
    for name in ("one", "two"):
        table = tiny_data.table.assign(caption=f"{name} " + tiny_data.table["caption"])
        paths.append(tmp_path / f"{name}.csv")
        table.to_csv(paths[-1], index=False)
        shutil.copytree(here.folder, tmp_path / name)
        config = tmp_path / name / "best/config.json"
        moved = {"captions_path": str(paths[-1]), "image_path": str(tiny_data.image_path)}
        write_json(config, json.loads(config.read_text()) | moved)
    with pytest.raises(UserError, match="each, but not the same ones"):
        compare([tmp_path / "one", tmp_path / "two"])


def test_the_command(here, capsys, tmp_path):
    targets = {name: str(tmp_path / f"t.{name}") for name in ("markdown", "csv")}
    words = [
        "runs/scenes",
        "runs/scenes/best",
        "--split",
        "test",
        "--device",
        "cpu",
        "--chart",
        str(tmp_path / "t.png"),
    ]
    words += [word for name, target in targets.items() for word in (f"--{name}", target)]
    main(tyro.cli(Arguments, args=words))
    out = capsys.readouterr().out
    assert out.startswith("test: 24 images, 120 captions") and "* the best of its column" in out
    assert (tmp_path / "t.markdown").read_text().count("| scenes (runs/scenes") == 2
    assert (tmp_path / "t.csv").read_text().count("\n") == 3 and Image.open(tmp_path / "t.png").format == "PNG"


def test_devices(here):
    assert evaluate(here.folder, device="auto")["n_images"] == 24
    with pytest.raises(UserError, match="device 'nonsense' is not available"):
        evaluate(here.folder, device="nonsense")


def test_out_of_memory_is_one_line(here, monkeypatch):
    import clip_scratch.evaluation.measure as noun

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(noun, "embed_batches", no_memory)
    with pytest.raises(UserError, match="out of memory: free some memory, or use --device cpu"):
        evaluate(here.folder, device="cpu")
    with pytest.raises(UserError, match="out of memory"):
        main(Arguments((str(here.folder),), device="cpu"))


def test_mistakes(here, tmp_path):
    def wrong(*runs, **settings):
        with pytest.raises(UserError) as error:
            main(Arguments(runs, device="cpu", **settings))
        assert "\n" not in str(error.value)
        return str(error.value)

    run = str(here.folder)
    assert "name at least one run" in wrong()
    assert "is not a run folder" in wrong(run, str(tmp_path / "nowhere"))
    assert "there is no folder" in wrong(run, csv=str(tmp_path / "none/x.csv"))
    assert "must end in .png" in wrong(run, chart=str(tmp_path / "x.docx"))
    broken = tmp_path / "broken"
    shutil.copytree(here.folder, broken)
    (broken / "metrics.jsonl").write_text("{")
    assert "broken is damaged" in wrong(str(broken))
