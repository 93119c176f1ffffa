"""Compare runs in one table: `python -m clip_scratch.compare RUN RUN ... [--markdown F --csv F --chart F]`."""

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from .errors import run_command


@dataclass
class Arguments:
    """Measure runs on the same images and captions, and show them in one table with intervals, zero-shot first."""

    runs: Positional[tuple[str, ...]]  # run folders, or their best/
    split: Literal["train", "valid", "test"] = "valid"  # which images to measure on
    captions_path: str = ""  # another captions file than the runs' own
    image_path: str = ""  # folder of its images
    markdown: str = ""  # write what is printed, a Markdown table, to this file
    csv: str = ""  # write all figures to this file, as CSV
    chart: str = ""  # write a bar chart to this PNG
    device: str = "auto"  # cpu, cuda, ...; auto: the best available


def main(arguments: Arguments) -> None:
    """Print the table, and write it to files where asked."""
    from .evaluation.comparison import compare
    from .files import check_target

    for target, suffix in ((arguments.markdown, ""), (arguments.csv, ""), (arguments.chart, ".png")):
        check_target(target, suffix)
    comparison = compare(
        arguments.runs, arguments.split, arguments.captions_path, arguments.image_path, arguments.device
    )
    print(comparison.text())
    comparison.write(arguments.markdown, arguments.csv, arguments.chart)


if __name__ == "__main__":
    import tyro

    run_command(lambda: main(tyro.cli(Arguments, prog="python -m clip_scratch.compare")))
