"""The benchmarks: paired ratios, verdicts, the classical loader, and a quick run. No time is asserted."""

import json
import os
from functools import partial

import pytest
import torch

from benchmarks import classical, contenders, groups
from benchmarks.__main__ import Arguments, main
from benchmarks.rounds import Child, paired_ratio, take_turns
from benchmarks.rows import NO_BF16, TRICKS, Row, arithmetic, reached, verdict
from benchmarks.table import markdown
from benchmarks.tricks import Peak
from clip_scratch.errors import UserError
from clip_scratch.models.build import build_model


class Counting:
    """A contender whose round n takes n seconds."""

    def __init__(self, count):
        self.count, self.n = count, 0

    def round(self):
        self.n += 1
        return {"pairs": (self.count, self.n)}

    def facts(self):
        return {"rounds": self.n}


class Dying(Counting):
    def round(self):
        os._exit(9)


class Failing(Counting):
    def round(self):
        raise ValueError("no such thing")


ROUNDS = [  # the machine is twice as slow in the second round: the ratio does not see it
    {"ours": {"pairs": (40, 1.0)}, "classical": {"pairs": (10, 1.0)}},
    {"ours": {"pairs": (40, 2.0)}, "classical": {"pairs": (10, 2.0)}},
    {"ours": {"pairs": (50, 1.0)}, "classical": {"pairs": (10, 1.0)}},
]


def test_ratios_are_taken_within_rounds():
    spread = paired_ratio(ROUNDS, ("ours", "pairs"), ("classical", "pairs"))
    assert (spread.median, spread.least, spread.greatest) == (4, 4, 5)


def test_children_take_turns_and_return_facts():
    builds = {"a": partial(Counting, 8), "b": partial(Counting, 2)}
    rounds, facts = take_turns(builds, 3, lambda line: None)
    assert rounds[2] == {"a": {"pairs": (8, 3)}, "b": {"pairs": (2, 3)}}
    assert facts["a"]["rounds"] == 3 and facts["a"]["peak_memory"] > 2**20


@pytest.mark.parametrize(
    "contender, message", [(Dying, "died .exit status 9."), (Failing, "failed: ValueError: no such")]
)
def test_a_child_that_ends_is_one_clear_error(contender, message):
    child = Child("doomed", partial(contender, 1))
    try:
        child.ready()
        with pytest.raises(UserError, match=f"'doomed' {message}"):
            child.round()
    finally:
        child.close()
    assert not child.process.is_alive()


@pytest.mark.parametrize(
    "unit, value, expected",
    [
        ("x", 4.0, "target reached"), ("x", 3.9, "gate reached"), ("x", 2.4, "below the gate"),
        ("s", 0.05, "target reached"), ("s", 0.2, "gate reached"), ("s", 0.3, "below the gate"),
    ],
)  # fmt: skip
def test_verdicts(unit, value, expected):
    gate, target = (2.5, 4) if unit == "x" else (0.3, 0.1)
    assert verdict(Row("g", "n", ("ours", "pairs"), None, gate, target, unit), value) == expected


def test_table_names_gates_losses_and_what_was_left_out():
    rows = (
        Row("a", "pairs", ("ours", "pairs"), ("classical", "pairs"), 5, 8),
        Row("a", "slow", ("classical", "pairs"), ("ours", "pairs")),
        Row("b", "absent", ("ours", "pairs"), None, 1, 2, "/s"),
        Row("not asked for", "unseen", ("ours", "pairs")),
    )
    groups = {"a": {"rounds": ROUNDS, "facts": {}}, "b": {"left_out": "no GPU"}}
    lines = reached(rows, groups)
    machine = {"processor": "P", "processor_flags": [], "cores": 2, "threads": 2, "memory_bytes": None, "packages": {}}
    machine |= {"system": "S", "python": "3", "git_commit": None, "date": "today"}
    results = {"targets": [lines[0], lines[2]], "further": [lines[1]], "arithmetic": [], "groups": groups}
    text = markdown(results | {"environment": machine, "data": "made up", "seconds": 60})
    assert "| pairs | 5x | 8x | **4x** | 4x to 5x | below the gate |" in text
    assert "| absent | 1 | 2 | - |  | left out: no GPU |" in text
    assert "Where we lose (below 1x): slow (0.25x)." in text and "Gates missed: pairs." in text
    assert "unseen" not in text


def test_mfu_by_hand():
    rounds = [{"ours": {"pairs": (64, 2.0)}, "peak": {"fp32": (50.0, 1.0), "bf16": (400.0, 2.0)}}]
    facts = {"ours": {"flops_a_step": 100, "captions_a_step": 32}}
    line = arithmetic({"training": {"rounds": rounds, "facts": facts}})[0]
    assert line["flops_a_second"] == 100 and line["mfu"] == 0.5  # one step a second, of 200 at the peak


def test_mfu_without_bf16_is_a_share_of_the_fp32_peak():
    rounds = [{"ours": {"pairs": (64, 2.0)}, "peak": {"fp32": (400.0, 1.0)}}]
    facts = {"ours": {"flops_a_step": 100, "captions_a_step": 32}}
    assert arithmetic({"training": {"rounds": rounds, "facts": facts}})[0]["mfu"] == 0.25


@pytest.mark.parametrize("bf16", [True, False])
def test_bf16_is_measured_only_where_the_processor_has_it(bf16, monkeypatch):
    for module in (contenders, groups):
        monkeypatch.setattr(module, "computes_in_bf16", lambda device: bf16)
    setup = contenders.Setup("", "", "", matmul=8)
    assert list(Peak(setup).variants) == ["fp32", "bf16"][: 1 + bf16]
    builds = groups.contenders("tricks", setup, "")
    assert ("image tower, stock allocator" in builds) == bf16
    assert any(form.startswith("bf16") for form in builds["image tower"].args[-1]) == bf16
    assert (groups.why_left_out("compile") == NO_BF16) == (not bf16)


def test_rows_in_bf16_say_that_the_processor_has_none():
    text = dict.fromkeys(("padded", "trimmed", "torch's dropout", "many", "many in chunks"), (1, 1))
    image = {"fp32 channels_last": (3, 1), "fp32 contiguous": (2, 1)}
    small = dict.fromkeys(("fp32", "fixed", "folded", "folded, depthwise frozen", "frozen", "frozen, folded"), (1, 1))
    lines = reached(TRICKS, {"tricks": {"rounds": [{"image tower": image, "text tower": text, "efficientnet": small}]}})
    assert {line["name"]: line["left_out"] for line in lines if "left_out" in line} == dict.fromkeys(
        (
            "trick: allocator, image tower in bf16",
            "trick: bf16, image tower",
            "trick: channels_last, image tower in bf16",
            "trick: depthwise convolutions in fp32, EfficientNet-lite0 in bf16",
            "the same against fp32",
        ),
        NO_BF16,
    )
    assert [line["reached"] for line in lines if "in fp32" in line["name"] and "reached" in line] == [1.5]


def test_classical_loader_repeats_an_image_and_pads_to_the_longest(tiny_data, tiny_cfg):
    table = tiny_data.table
    model = build_model(tiny_cfg, table["caption"].tolist())
    rows = classical.build_loader(table, model, 0, 8).dataset
    assert len(rows) == len(table) > table["image"].nunique()
    of_one = [row for row in range(len(table)) if table["image"][row] == "04.png"]
    assert len(of_one) == 5
    first, *others = (rows[row] for row in of_one)
    assert all(torch.equal(first["pixel_values"], other["pixel_values"]) for other in others)
    longest = max(len(ids) for ids in model.tokenizer(table["caption"].tolist())["input_ids"])
    assert {len(item["input_ids"]) for item in (first, *others)} == {min(longest, tiny_cfg.max_length)}


class Here:
    """In the place of a child, whose imports would take longer than the benchmark."""

    def __init__(self, name, build):
        self.name, self.contender = name, build()
        self.round = self.contender.round

    def facts(self):
        return self.contender.facts() | {"peak_memory": 2**30}

    def ready(self, timeout=None):
        pass

    close = ready


@pytest.mark.slow
def test_quick_run_writes_everything(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.rounds.Child", Here)
    monkeypatch.setattr(contenders, "SETTLING", 1)
    folder = main(
        Arguments(
            output_dir=str(tmp_path / "results"), quick=True, only=["loader", "training", "compact", "heads", "peer"]
        )
    )
    results = json.loads((folder / "results.json").read_text())
    measured = [line for line in results["targets"] + results["further"] if "reached" in line]
    assert len(measured) >= 9
    assert all(0 < line["least"] <= line["reached"] <= line["greatest"] < float("inf") for line in measured)
    assert all(line["mfu"] > 0 and line["flops_a_step"] > 0 for line in results["arithmetic"])
    assert results["environment"]["packages"]["torch"] and results["groups"]["peer"]["left_out"]
    assert "| training pairs/s, one caption an image | 2.5x | 4x |" in (folder / "table.md").read_text()
    assert (folder / "ratios.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "settings, message", [({"only": ["trainin"]}, "Did you mean training"), ({"rounds": 0}, "--rounds")]
)
def test_mistakes(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main(Arguments(output_dir=str(tmp_path), **settings))
