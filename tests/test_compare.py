"""The table of runs: bootstrap intervals against slow loops, what is compared with what, and how it is shown."""

import csv
import dataclasses
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_scratch import CFG
from clip_scratch.compare import Arguments, main
from clip_scratch.data.captions import fingerprint_of
from clip_scratch.errors import UserError, run_command
from clip_scratch.evaluate import evaluate
from clip_scratch.evaluation import bootstrap, comparison
from clip_scratch.evaluation.comparison import Comparison, Record, Row, compare, read_record
from clip_scratch.evaluation.measure import Measured, read_zero_shot, save_zero_shot
from clip_scratch.files import write_json

# ---- bootstrap


def test_the_interval_equals_a_slow_loop():
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 6, 40)
    hits = np.array([rng.integers(0, size + 1) for size in sizes])
    samples = bootstrap.resampled_recalls(hits[:, None], sizes[:, None], 1000, seed=3)
    slow = []
    for counts in np.random.default_rng(3).multinomial(40, np.full(40, 1 / 40), size=1000):
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


def test_chunks_do_not_matter(monkeypatch):
    hits, sizes = np.arange(20)[:, None] % 3, np.full((20, 1), 2)
    whole = bootstrap.resampled_recalls(hits, sizes, 7)
    monkeypatch.setattr(bootstrap, "_CELLS", 50)  # two resamples at a time
    assert whole.shape == (7, 1) and np.array_equal(bootstrap.resampled_recalls(hits, sizes, 7), whole)


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
    record = Record() if zero_shot else Record(**{"epochs": None} | settings)
    return Row(f"runs/{name}", cfg, found, record, name)


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
    return Comparison(rows, "valid", 3)


def test_hits_follow_the_names_of_the_images():
    one = measured([1, 2, 1], [1, 4], [0, 1, 0], ["a", "b"])
    other = measured([2, 1, 1], [4, 1], [0, 1, 1], ["b", "a"])
    for model in (one, other):
        hits, sizes = model.hits()
        assert hits.tolist() == [[1, 2], [0, 0]] and sizes.tolist() == [[1, 2], [1, 1]]


def differences(table, name):
    """R@1 minus that of zero-shot, both ways: value, low and high, (3, 2) in percentage points."""
    line = table.table.set_index("run").loc[name]
    columns = [[f"{way}_r@1_minus_zero_shot{end}" for way in ("i2t", "t2i")] for end in ("", "_low", "_high")]
    return np.array([line[names] for names in columns], dtype=float)


def test_differences_are_paired(table):
    value, low, high = differences(table, "full")
    assert value == pytest.approx([50, 50]) and (low > 0).all() and (high < 100).all()
    assert (differences(table, "same") == 0).all()
    # The same from the resamples themselves, image by image
    counts = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), size=bootstrap.RESAMPLES)
    hit = np.array([1 if int(name[:-4]) % 4 else -1 for name in sorted(f"{i}.png" for i in range(60))])
    slow = np.quantile(100 * counts @ hit / 60, [0.025, 0.975])
    assert [low[0], high[0]] == pytest.approx(slow.tolist(), abs=1e-4)


def test_each_run_against_its_own_model(table):
    rows = [
        row("zero-shot m", table.rows[0].measured, zero_shot=True),
        row("zero-shot n", table.rows[1].measured, zero_shot=True, model="n"),
        row("of n", table.rows[1].measured, model="n"),
        row("scratch", table.rows[1].measured, model="resnet50"),
    ]
    found = Comparison(rows, "valid", 0)
    assert found.table["compared_with"].tolist() == [None, None, "zero-shot n", "zero-shot m"]
    assert (differences(found, "of n")[0] == 0).all()
    assert "minus that of zero-shot" in found.text()
    assert "minus that of zero-shot" not in Comparison(rows[2:], "valid", 0).text()


def test_text(table):
    table.rows[1].name = "a|b"
    text = table.text()
    lines = text.splitlines()
    assert lines[0].startswith("valid: 60 images, 120 captions.")
    header, rule, zero_shot, full, same = lines[2:7]
    assert header.split()[:5] == ["|", "run", "|", "i2t", "R@1"] and set(rule) == set("|- ")
    assert len({len(line) for line in lines[2:7]}) == 1  # aligned
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines[2:7]} == {13}
    assert re.match(r"\| zero-shot m +\| 25\.0 \[\d+\.\d, \d+\.\d\] +\| \*\*100\.0\*\* ", zero_shot)
    assert re.match(r"\| a\\\|b +\| \*\*75\.0\*\* \[", full) and "nothing" in full
    assert "10 (best 7)" in full and "151,277,313" in full and "7384" in full
    assert "10 (best 0)" in same and "8,193" in same and " 61 " in same
    assert "- a|b - zero-shot m: i2t +50.0 [" in text
    assert "- same - zero-shot m: i2t +0.0 [+0.0, +0.0], t2i +0.0 [+0.0, +0.0]" in text
    assert text.endswith("3 of 120 captions are ambiguous: another image has the same caption, so no model can tell "
                         "the two apart.")  # fmt: skip


def test_an_average_is_not_called_an_epoch(table):
    """Of a run whose epochs were all worse than zero-shot the last one is averaged with it: it is not the best."""
    record = table.rows[2].record
    record.best_epoch, record.wise_ft_alpha = 10, 0.3
    assert "10 (WiSE-FT 0.3)" in table.text() and "(best 10)" not in table.text()


def test_a_note_says_what_has_no_zero_shot_row(table):
    assert "no zero-shot row" not in table.text()
    assert "There is no zero-shot row of m. To have one" in Comparison(table.rows[1:], "valid", 0).text()
    scratch = row("scratch", table.rows[1].measured)
    scratch.cfg = CFG()
    assert "There is no zero-shot row. To have one" in Comparison([scratch], "valid", 0).text()
    assert "no zero-shot row" not in Comparison([table.rows[0], scratch], "valid", 0).text()


def test_a_note_says_that_epochs_were_chosen_on_the_validation_split(table):
    sentence = "was chosen on the validation split"
    assert table.text().count(sentence) == 1
    rows = table.rows
    assert sentence not in Comparison(rows, "test", 0).text() and sentence not in Comparison(rows, "all", 0).text()
    assert sentence not in Comparison(rows[:1], "valid", 0).text()  # nothing was trained


def test_csv(table, tmp_path):
    table.write(csv=tmp_path / "t.csv")
    zero_shot, full, _ = csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text()))
    assert float(full["i2t_r@1"]) == 75 and float(full["t2i_r@10"]) == 100
    low, high = (float(full[f"i2t_r@1_{end}"]) for end in ("low", "high"))
    assert low < 75 < high
    assert float(full["t2i_r@1_minus_zero_shot"]) == 50 and float(full["t2i_r@1_minus_zero_shot_low"]) > 0
    assert full["trained_parameters"] == "151277313" and float(full["wall_seconds"]) == 7384
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
        ({}, "1e-05", "none"),
        ({"head_lr": 1e-3}, "image 1e-05, text 1e-05, heads 0.001", "none"),
        ({"image_freeze": "first:6"}, "1e-05", "image first:6, text none"),
        ({"image_freeze": "backbone", "text_freeze": "backbone", "head_lr": 2e-4}, "0.0002", "backbone"),
        ({"image_freeze": "lora", "text_freeze": "lora"}, "image 0.001, text 0.001, heads 1e-05", "lora"),
        ({"image_freeze": "all", "text_freeze": "all-but-last:2"}, "1e-05", "image all, text all-but-last:2"),
        ({"trainable": False}, "1e-05", "backbone"),
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
    assert record.learning_rates == "1e-05"
    # Where the log is there, it decides
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\n{"epoch": 3, "trained_parameters": 7}\n')
    write_json(best / "metrics.json", {"epoch": 0, "rsum": 300.0})
    record = read_record(tmp_path)
    assert (record.epochs, record.best_epoch, record.trained_parameters) == (3, 0, 7)


# ---- zero_shot.json


def test_zero_shot_is_recorded(tmp_path):
    path = tmp_path / "zero_shot.json"
    own, image_rank, text_rank = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2]), torch.tensor([1, 3])
    save_zero_shot(path, "openai/clip", Measured(["a.jpg", "b.jpg"], own, image_rank, text_rank, "1234"))
    saved = json.loads(path.read_text())
    assert saved["split"] == "valid" and saved["images"] == ["a.jpg", "b.jpg"] and saved["text_rank"] == [1, 3]
    assert saved["model_name"] == "openai/clip"
    read = read_zero_shot(path)
    assert torch.equal(read.image_rank, image_rank) and torch.equal(read.text_rank, text_rank)
    assert read.metrics["image_retrieval_recall@1"] == pytest.approx(1 / 3) and read.fingerprint == "1234"
    for damage in ({"images": None}, {"image_rank": ["x", 1, 1]}):
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
    assert found.table[["n_images", "n_captions", "split"]].iloc[0].tolist() == [24, 120, "valid"]
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
        recorded = Measured(names.images, names.image_of_caption, *worst, names.fingerprint)
        save_zero_shot(path, "org/clip", recorded)
    found = compare([tmp_path / "b", tmp_path / "a"])
    assert [row.name for row in found.rows] == ["zero-shot clip", "b", "a"]
    assert found.rows[0].measured.metrics["rsum"] == 0 and found.rows[0].record.epochs == 0
    assert found.rows[1].record.trained_parameters == 1234 and found.rows[1].record.wall_seconds == 150
    assert (differences(found, "a")[0] >= 0).all() and "no zero-shot row" not in found.text()
    # Of another split or file nothing was recorded
    test = compare([tmp_path / "a"], "test")
    assert [row.name for row in test.rows] == ["a"] and "no zero-shot row of org/clip" in test.text()

    # A run that trained no epoch is the zero-shot row, on any split, and what was recorded is not repeated
    like_a_fine_tuned_run(here, tmp_path / "untouched", epochs=0)
    for split in ("valid", "test"):
        found = compare([tmp_path / "a", tmp_path / "untouched"], split)
        assert [row.name for row in found.rows] == ["zero-shot clip", "a"]
        assert (differences(found, "a") == 0).all()

    # What was recorded on as many other captions of the same images is refused
    path = tmp_path / "a/zero_shot.json"
    save_zero_shot(path, "org/clip", recorded)
    assert compare([tmp_path / "a"]).rows[0].is_zero_shot
    save_zero_shot(path, "org/clip", dataclasses.replace(recorded, fingerprint="of other captions"))
    with pytest.raises(UserError, match=r"a and .*a/zero_shot.json .* different images or captions"):
        compare([tmp_path / "a"])

    # What was recorded on other images is refused
    one = torch.tensor([0]), torch.tensor([1]), torch.tensor([1])
    save_zero_shot(path, "org/clip", Measured(["x.png"], *one, "of one image"))
    with pytest.raises(UserError, match=r"a and .*a/zero_shot.json .* different images or captions.*--captions-path"):
        compare([tmp_path / "a"])


def test_runs_on_different_captions_are_refused(here, tiny_data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(here.folder, other)
    settings = json.loads((other / "best/config.json").read_text())
    data = {"captions_path": str(tiny_data.captions_path), "image_path": str(tiny_data.image_path)}
    write_json(other / "best/config.json", settings | data)
    with pytest.raises(UserError, match=rf"{here.folder} and {other} were measured .*--captions-path"):
        compare([here.folder, other])
    found = compare([here.folder, other], captions_path=str(tiny_data.captions_path))
    assert found.split == "all" and found.table["n_images"].tolist() == [26, 26]
    text = found.text()
    assert (
        f"{found.n_ambiguous} of {found.table['n_captions'][0]} captions are ambiguous" in text
        and found.n_ambiguous > 0
    )


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
    with pytest.raises(UserError, match="measured on different images or captions"):
        compare([tmp_path / "one", tmp_path / "two"])


def test_the_command(here, capsys, tmp_path):
    targets = {name: str(tmp_path / f"t.{name}") for name in ("markdown", "csv")}
    words = ["runs/scenes", "runs/scenes/best", "--split", "test", "--device", "cpu"]
    words += ["--chart", str(tmp_path / "t.png")]
    words += [word for name, target in targets.items() for word in (f"--{name}", target)]
    main(tyro.cli(Arguments, args=words))
    out = capsys.readouterr().out
    assert out.startswith("test: 24 images, 120 captions")
    assert (tmp_path / "t.markdown").read_text() == out and out.count("| scenes (runs/scenes") == 2
    assert (tmp_path / "t.csv").read_text().count("\n") == 3 and Image.open(tmp_path / "t.png").format == "PNG"


def test_devices(here):
    assert evaluate(here.folder, device="auto")["n_images"] == 24
    with pytest.raises(UserError, match="device 'nonsense' is not available"):
        evaluate(here.folder, device="nonsense")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no room")])
def test_out_of_memory_is_one_line(here, monkeypatch, capsys, error):
    def no_memory(*_):
        raise error

    monkeypatch.setattr("clip_scratch.evaluation.measure.embed_batches", no_memory)
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main(Arguments((str(here.folder),), device="cpu")))
    assert stop.value.code == 2
    assert "error: out of memory: free some memory, or use --device cpu\n" in capsys.readouterr().err


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
    assert "metrics.jsonl is damaged" in wrong(str(broken))
