"""R@1 on the validation images over the minutes of a run.

    python -m benchmarks.learning_curve --run runs/trio --chart docs/recall.png

docs/recall.png is that of the trained run in benchmarks/recall.md.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from clip_scratch.files import write_figure


@dataclass
class Arguments:
    """Draw the learning curve of a run."""

    run: str
    chart: str  # the picture to write


def main(arguments: Arguments) -> None:
    """Draw both directions, a point for each epoch."""
    from matplotlib.figure import Figure

    epochs = [json.loads(line) for line in (Path(arguments.run) / "metrics.jsonl").read_text().splitlines()]
    figure = Figure((6, 3.4), dpi=120, layout="constrained")
    axis = figure.subplots()
    for direction, name in (("text", "image to text"), ("image", "text to image")):
        recalls = [100 * epoch[f"{direction}_retrieval_recall@1"] for epoch in epochs]
        (line,) = axis.plot([epoch["wall_seconds"] / 60 for epoch in epochs], recalls, "o-", markersize=4, label=name)
        axis.annotate(f"{recalls[-1]:.1f}", (epochs[-1]["wall_seconds"] / 60, recalls[-1]), (6, -3),
                      textcoords="offset points", color=line.get_color())  # fmt: skip
    axis.set(xlabel="minutes since the start", ylabel="R@1 in percent", xlim=(0, None), ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
    print(write_figure(figure, arguments.chart))


if __name__ == "__main__":
    import tyro

    from clip_scratch.errors import run_command

    run_command(lambda: main(tyro.cli(Arguments, prog="python -m benchmarks.learning_curve")))
