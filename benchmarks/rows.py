"""The rows of the table: what is compared, the gate, the target, and the result."""

from __future__ import annotations

from dataclasses import dataclass

from .rounds import Spread, paired_ratio, rates

NO_BF16 = "this processor has no bf16 arithmetic"
# bf16 dense FLOP/s of the data sheets, by a word in the GPU's name
DATASHEET = {"H100": 989e12, "H200": 989e12}


@dataclass(frozen=True)
class Row:
    """One figure: a ratio of two contenders' rates, a rate, or seconds or a share of the time (less is better)."""

    group: str
    name: str
    ours: tuple[str, str]  # contender, measure
    other: tuple[str, str] | None = None
    gate: float | None = None
    target: float | None = None
    unit: str = "x"  # x: ratio; s: seconds; /s: rate; %: share of the time

    def left_out(self, group: dict) -> str:
        """Why the row has no figure; "" where it has one."""
        if "left_out" in group:
            return group["left_out"]
        for contender, measure in filter(None, (self.ours, self.other)):
            if measure.startswith("bf16") and not any(measure in r.get(contender, {}) for r in group["rounds"]):
                return NO_BF16
        return ""

    def values(self, rounds: list) -> Spread:
        """The figure over the rounds."""
        if self.other is not None:
            return paired_ratio(rounds, self.ours, self.other)
        found = rates([r for r in rounds if self.ours[1] in r[self.ours[0]]], *self.ours)
        if self.unit == "s":
            found = [1 / rate for rate in found]
        return Spread.of([100 * share for share in found] if self.unit == "%" else found)


CLASSICAL = ("classical", "pairs")
TARGETS = (
    Row("training", "training pairs/s, one caption an image", ("ours", "pairs"), CLASSICAL, 2.5, 4),
    Row("training", "training pairs/s, all captions of an image", ("ours, all captions", "pairs"), CLASSICAL, 5, 8),
    Row("compact", "training pairs/s, preset compact, the classical loop with its towers", ("compact", "pairs"),
        CLASSICAL, 5, 8),
    Row("loader", "loader images/s, uint8 as handed over", ("ours", "images"), ("classical", "images"), 8, 15),
    Row("loader", "the same, with normalisation", ("ours", "normalised images"), ("classical", "images"), 8, 15),
    Row("heads", "head-only epoch, cached features", ("ours", "cached"), ("ours", "recomputed"), 100, 250),
    Row("imports", "import clip_scratch, beyond torch's", ("import", "clip_scratch"), None, 0.3, 0.1, "s"),
    Row("gpu", "GPU, full fine-tuning, pairs/s", ("ours", "pairs"), None, 3500, 5000, "/s"),
    Row("gpu", "GPU, share of the time waiting for data", ("ours", "stall"), None, 2, 2, "%"),
)  # fmt: skip
TRICKS = (
    Row("training", "the classical loop with our allocator setting", ("classical, our allocator", "pairs"), CLASSICAL),
    Row("training", "ours, against the classical loop with our allocator setting", ("ours", "pairs"),
        ("classical, our allocator", "pairs")),
    Row("loader", "loader, augmented as by default, normalised", ("ours, augmented", "normalised images"),
        ("classical", "images")),
    Row("training", "trick: image-centred batches, pairs/s", ("ours, all captions", "pairs"), ("ours", "pairs")),
    Row("loader", "trick: image cache, loader alone", ("ours", "normalised images"),
        ("ours, no cache", "normalised images")),
    Row("tricks", "trick: allocator, image tower in bf16", ("image tower", "bf16 channels_last"),
        ("image tower, stock allocator", "bf16 channels_last")),
    Row("tricks", "trick: bf16, image tower", ("image tower", "bf16 channels_last"),
        ("image tower", "fp32 channels_last")),
    Row("tricks", "trick: channels_last, image tower in bf16", ("image tower", "bf16 channels_last"),
        ("image tower", "bf16 contiguous")),
    Row("tricks", "trick: channels_last, image tower in fp32", ("image tower", "fp32 channels_last"),
        ("image tower", "fp32 contiguous")),
    Row("tricks", "trick: depthwise convolutions in fp32, EfficientNet-lite0 in bf16",
        ("efficientnet", "bf16, depthwise in fp32"), ("efficientnet", "bf16")),
    Row("tricks", "the same against fp32", ("efficientnet", "bf16, depthwise in fp32"), ("efficientnet", "fp32")),
    Row("tricks", "trick: fixed batch norms folded, EfficientNet-lite0", ("efficientnet", "folded"),
        ("efficientnet", "fixed")),
    Row("tricks", "trick: depthwise convolutions frozen, EfficientNet-lite0",
        ("efficientnet", "folded, depthwise frozen"), ("efficientnet", "folded")),
    Row("compact", "trick: depthwise convolutions frozen, preset compact", ("compact, depthwise frozen", "pairs"),
        ("compact", "pairs")),
    Row("tricks", "trick: batch norms folded, frozen EfficientNet-lite0", ("efficientnet", "frozen, folded"),
        ("efficientnet", "frozen")),
    Row("tricks", "trick: captions trimmed to the batch's longest, text tower", ("text tower", "trimmed"),
        ("text tower", "padded")),
    Row("tricks", "trick: dropout from 16 random bits, text tower", ("text tower", "trimmed"),
        ("text tower", "torch's dropout")),
    Row("tricks", "trick: captions of similar length together, text tower", ("text tower", "many in chunks"),
        ("text tower", "many")),
    Row("compile", "trick: torch.compile, image tower", ("image tower", "bf16 channels_last compiled"),
        ("image tower", "bf16 channels_last")),
    Row("peer", "against open_clip, pairs/s, one caption an image, both augmenting", ("ours, augmented", "pairs"),
        ("open_clip", "pairs")),
    Row("peer", "the same, open_clip with our allocator setting", ("ours, augmented", "pairs"),
        ("open_clip, our allocator", "pairs")),
    Row("imports", "import of all public names, beyond torch's", ("import", "all public names"), None, unit="s"),
)  # fmt: skip


def verdict(row: Row, reached: float) -> str:
    """Whether a figure reaches the target, the gate, or neither; "" for a row without a gate."""
    if row.gate is None or row.target is None:
        return ""
    less_is_better = row.unit in ("s", "%")
    if (reached < row.target) if less_is_better else (reached >= row.target):
        return "target reached"
    if (reached < row.gate) if less_is_better else (reached >= row.gate):
        return "gate reached"
    return "below the gate"


def reached(rows: tuple[Row, ...], groups: dict[str, dict]) -> list[dict[str, object]]:
    """A line for each row of the measured groups: its figures, or why it was left out."""
    lines = []
    for row in rows:
        if row.group not in groups:
            continue
        group = groups[row.group]
        line = {"group": row.group, "name": row.name, "unit": row.unit, "gate": row.gate, "target": row.target}
        if reason := row.left_out(group):
            line["left_out"] = reason
        else:
            spread = row.values(group["rounds"])
            line |= {"reached": spread.median, "least": spread.least, "greatest": spread.greatest}
            line["verdict"] = verdict(row, spread.median)
        lines.append(line)
    return lines


def arithmetic(groups: dict[str, dict]) -> list[dict[str, object]]:
    """FLOP/s and MFU of our training contenders.

    MFU is the share of the peak measured in the same rounds, and on a known GPU also of the data sheet's.
    """
    lines = []
    for name in ("training", "gpu"):
        group = groups.get(name, {})
        for contender, facts in group.get("facts", {}).items():
            if "flops_a_step" not in facts:
                continue
            steps = Spread.of(rates(group["rounds"], contender, "pairs")).median / facts["captions_a_step"]
            line = {"contender": contender if name == "training" else f"GPU: {contender}"}
            line |= {"flops_a_step": facts["flops_a_step"], "flops_a_second": steps * facts["flops_a_step"]}
            if name == "training":
                precisions = group["rounds"][0]["peak"]
                peak = max(Spread.of(rates(group["rounds"], "peak", precision)).median for precision in precisions)
            else:
                peak = facts["peak_flops_a_second"]
                sheet = next((flops for word, flops in DATASHEET.items() if word in facts["gpu"]), None)
                if sheet is not None:
                    line["mfu_of_data_sheet"] = line["flops_a_second"] / sheet
            lines.append(line | {"peak_flops_a_second": peak, "mfu": line["flops_a_second"] / peak})
    return lines
