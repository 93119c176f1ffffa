"""The results as Markdown and as a chart."""

from __future__ import annotations

from pathlib import Path


def _figure(value: float, unit: str) -> str:
    if unit == "x":
        return f"{value:.3g}x" if value < 100 else f"{value:,.0f}x"
    if unit == "%":
        return f"{value:.2g} %"
    return f"{value:.2g} s" if unit == "s" else f"{value:,.0f}"


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    numbers = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, numbers, *lines))


def _targets(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        sign = "< " if row["unit"] in ("s", "%") else ""
        asked = tuple(f"{sign}{_figure(row[key], row['unit'])}" for key in ("gate", "target"))
        if "left_out" in row:
            lines.append((row["name"], *asked, "-", "", f"left out: {row['left_out']}"))
        else:
            least, greatest = (_figure(row[key], row["unit"]) for key in ("least", "greatest"))
            reached = f"**{_figure(row['reached'], row['unit'])}**"
            lines.append((row["name"], *asked, reached, f"{least} to {greatest}", row["verdict"]))
    return _table(("measure", "gate", "target", "reached", "rounds", ""), lines)


def _tricks(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        if "left_out" in row:
            lines.append((row["name"], "-", f"left out: {row['left_out']}"))
        else:
            least, greatest = (_figure(row[key], row["unit"]) for key in ("least", "greatest"))
            lines.append((row["name"], _figure(row["reached"], row["unit"]), f"{least} to {greatest}"))
    return _table(("measure", "gain", "rounds"), lines)


def _losses(rows: list[dict]) -> str:
    lost = [row for row in rows if row["unit"] == "x" and row.get("reached", 1) < 1]
    missed = [row["name"] for row in rows if row.get("verdict") == "below the gate"]
    losses = [f"{row['name']} ({_figure(row['reached'], 'x')})" for row in lost]
    return "\n".join([
        f"Where we lose (below 1x): {'; '.join(losses) or 'nowhere in this run'}.",
        f"Gates missed: {'; '.join(missed) or 'none'}.",
    ])  # fmt: skip


def _work(arithmetic: list[dict], groups: dict[str, dict]) -> str:
    memory = {}
    for name in ("training", "peer"):
        for contender, facts in groups.get(name, {}).get("facts", {}).items():
            memory.setdefault(contender, facts["peak_memory"])
    memory.pop("peak", None)
    found = {line["contender"]: line for line in arithmetic}
    lines = []
    for contender in [*memory, *(name for name in found if name not in memory)]:
        line = found.get(contender)
        cells = (f"{line['flops_a_step'] / 1e9:,.1f}", f"{line['flops_a_second'] / 1e9:,.0f}") if line else ("", "")
        mfu = f"{line['mfu']:.0%}" if line else ""
        if line and "mfu_of_data_sheet" in line:
            mfu += f" ({line['mfu_of_data_sheet']:.0%} of the data sheet)"
        peak = f"{memory[contender] / 2**30:.1f}" if contender in memory else ""
        lines.append((contender, *cells, mfu, peak))
    return _table(("contender", "GFLOP a step", "GFLOP/s", "MFU", "peak memory, GiB"), lines)


def _search(groups: dict[str, dict]) -> str:
    rows = groups.get("search", {}).get("facts", {}).get("search", {}).get("rows", [])
    if not rows:
        return ""
    head = tuple(dict.fromkeys(key for row in rows for key in row))
    cells = [tuple(f"{v:.4g}" if isinstance(v, float) else str(v) for v in map(row.get, head)) for row in rows]
    return _table(head, cells)


def markdown(results: dict) -> str:
    """Tables of gates and targets, tricks, arithmetic and memory, search; then losses and the machine."""
    machine, groups = results["environment"], results["groups"]
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB" if machine["memory_bytes"] else "memory unknown"
    flags = ", ".join(machine["processor_flags"]) or "no flags known"
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    parts = [_targets(results["targets"]) if results["targets"] else ""]
    parts += [_tricks(results["further"]) if results["further"] else ""]
    if results["arithmetic"] or "training" in groups:
        parts.append(_work(results["arithmetic"], groups))
    parts += [_search(groups), _losses(results["targets"] + results["further"])]
    parts.append(
        f"{machine['processor']} ({flags}), {machine['cores']} cores, {machine['threads']} threads, {memory}; "
        f"{machine['system']}; Python {machine['python']}; {packages}; commit {machine['git_commit']}; "
        f"{machine['date']}; {results['data']}; {results['seconds'] / 60:.0f} minutes in all."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def draw(results: dict, path: Path) -> None:
    """Bar chart of the ratios on a logarithmic axis, with gates and targets."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in results["targets"] + results["further"] if row["unit"] == "x" and "reached" in row][::-1]
    figure = Figure(figsize=(9, 1.3 + 0.34 * len(rows)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for y, row in enumerate(rows):
        aimed = row["gate"] is not None
        axes.barh(y, row["reached"] - 1, left=1, height=0.62, color="#2b6cb0" if aimed else "#a9bfd6")
        axes.annotate(
            _figure(row["reached"], "x"), (max(1, row["reached"], row["target"] or 1), y), (4, 0),
            textcoords="offset points", va="center",
            bbox={"color": "white", "pad": 0.5}, zorder=3,
        )  # fmt: skip
        if aimed:
            axes.plot([row["gate"]] * 2, [y - 0.4, y + 0.4], color="#dd6b20", lw=2.5, label="gate")
            axes.plot([row["target"]] * 2, [y - 0.4, y + 0.4], color="#2f855a", lw=2.5, label="target")
    axes.set_xscale("log")
    axes.axvline(1, color="black", lw=0.8)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    ends = [row["reached"] for row in rows] + [row["target"] or 1 for row in rows]
    axes.set_xlim(min(0.8, *ends) * 0.95, max(2, *ends) * 2)
    axes.set_xlabel("times as fast (median of paired rounds)")
    axes.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    if handles:
        axes.legend(handles.values(), handles, loc="lower right", frameon=False)
    figure.savefig(path)
