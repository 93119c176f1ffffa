"""Does the heat of `explain` lie on the object that a sentence names? On the built-in scenes, which know where it is.

    python -m benchmarks.explain RUN

For each object of the validation scenes whose colour and shape are unique in its scene, explains "a red circle" and
counts how often the heat's peak, and its centre of mass, falls into the bounding box of that object. Chance is measured
with the heat of another query, which names nothing in the scene, and with a random point.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tyro

from clip_scratch.data.scenes import draw
from clip_scratch.data.scenes.describe import _with_article
from clip_scratch.data.scenes.scene import COLOURS, SHAPES, Scene, sample_scenes
from clip_scratch.models.saved import load
from clip_scratch.retrieval.explain import Explanation, explain

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass
class Arguments:
    """Measure how often the heat of a query lies on the object that it names."""

    run: tyro.conf.Positional[str]  # a run on the built-in scenes
    n: int = 0  # objects, at most; 0: all
    device: str = "cpu"


class Case(NamedTuple):
    """One object to find in a picture (H, W, 3), and a query that names nothing in it."""

    image: np.ndarray
    query: str
    box: Box
    other: str
    objects: int  # in the picture


def boxes(scene: Scene) -> list[Box]:
    """The bounding box of each thing in the picture of `scene`, its hidden parts included."""
    rng = random.Random(repr(scene))  # as in draw_scene
    side = 4 * draw.SIZE
    canvas = draw._background(scene, side, rng)
    things = list(zip(scene.things, draw.layout(scene, rng), strict=True))
    found = []
    for thing, (x, y) in reversed(things):
        before = canvas.copy()
        draw._draw_thing(canvas, thing, x * side, y * side, rng)
        rows, columns = np.nonzero((canvas != before).any(-1))
        found.append((columns.min() / 4, rows.min() / 4, (columns.max() + 1) / 4, (rows.max() + 1) / 4))
    return found[::-1]


def cases(n_scenes: int, seed: int) -> Iterator[Case]:
    """The objects of the validation scenes, in the order of the scenes."""
    rng = random.Random(0)
    for split, scene in sample_scenes(n_scenes, seed):
        if split != "valid":
            return
        looks = [(thing.colour, thing.shape) for thing in scene.things]
        absent = [look for look in itertools.product(COLOURS, SHAPES) if look not in looks]
        for look, box in zip(looks, boxes(scene), strict=True):
            if looks.count(look) == 1:
                query, other = _with_article([*look]), _with_article([*rng.choice(absent)])
                yield Case(draw.draw_scene(scene), query, box, other, len(looks))


def peak(explanation: Explanation) -> tuple[float, float]:
    """The pixel of the greatest heat, (x, y); the middle of several."""
    y, x = np.argwhere(explanation.heat == explanation.heat.max()).mean(0) + 0.5
    return x, y


def main(arguments: Arguments) -> None:
    """Print the shares, for all objects and by the number of objects in the picture."""
    model = load(arguments.run, arguments.device)
    rng = np.random.default_rng(0)
    hits, counts = defaultdict(list), []
    found = cases(model.cfg.n_scenes, model.cfg.seed)
    for case in itertools.islice(found, arguments.n or None):
        named, other = (explain(model, case.image, query) for query in (case.query, case.other))
        left, top, right, bottom = case.box
        points = {"peak": peak(named), "peak, another query": peak(other), "centre": named.centre,
                  "centre, another query": other.centre, "random point": rng.uniform(0, draw.SIZE, 2)}  # fmt: skip
        for name, (x, y) in points.items():
            hits[name].append(left <= x < right and top <= y < bottom)
        hits["no heat at all"].append(not named.heat.any())
        counts.append(case.objects)
    print(f"{len(counts)} objects of validation scenes, of which on the named object, in percent")
    print(f"{'':<22}   all" + "".join(f"  {k} object{'s' * (k > 1)}" for k in sorted(set(counts))))
    for name, values in hits.items():
        parts = [np.array(counts) == k for k in sorted(set(counts))]
        shares = [100 * np.mean(values), *(100 * np.mean(np.array(values)[part]) for part in parts)]
        print(f"{name:<22} {shares[0]:5.1f}" + "".join(f"{share:10.1f}" for share in shares[1:]))


if __name__ == "__main__":
    from clip_scratch.errors import run_command

    run_command(lambda: main(tyro.cli(Arguments, prog="python -m benchmarks.explain")))
