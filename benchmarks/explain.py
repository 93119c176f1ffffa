"""Does `explain` point at what the sentence names? On the built-in scenes, where every position is known.

    python -m benchmarks.explain runs/demo

For each thing of the validation scenes whose colour and shape no other thing of its scene shares, the query is "a red
circle", say. A hit: the heat's peak, or its centre of mass, lies within the thing's radius of its centre. Chance is
the same with the heat of the next scene's query, and with a uniformly random point.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np

from clip_scratch import load
from clip_scratch.data.scenes.draw import SIZE, _background, layout
from clip_scratch.data.scenes.scene import RADIUS, sample_scenes
from clip_scratch.retrieval.embed import trained_folder
from clip_scratch.retrieval.explain import explain


def cases(n: int, seed: int, limit: int) -> list[tuple[int, str, tuple[float, float], float]]:
    """(number of the image, query, the thing's centre and its radius in sides of the picture)."""
    found = []
    for i, (split, scene) in enumerate(sample_scenes(n, seed)):
        if split != "valid" or len(found) >= limit:
            return found
        names = [f"a {thing.colour} {thing.shape}" for thing in scene.things]
        rng = random.Random(repr(scene))
        _background(scene, 4 * SIZE, rng)  # which draws from the same random numbers first
        places = layout(scene, rng)
        for thing, name, place in zip(scene.things, names, places, strict=True):
            if names.count(name) == 1 and len(names) > 1:
                found.append((i, name, place, RADIUS[thing.size]))
    return found


def main() -> None:
    """Print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--n", type=int, default=300, help="things to look for")
    options = parser.parse_args()
    model = load(options.run)
    folder = trained_folder(model.cfg)
    todo = cases(model.cfg.n_scenes, model.cfg.seed, options.n)
    rng = np.random.default_rng(0)
    hits = {name: [] for name in ("peak", "centre of mass", "peak, another query", "a random point")}
    for k, (i, query, (x, y), radius) in enumerate(todo):
        image, other = folder / f"{i:06d}.png", todo[(k + 7) % len(todo)][1]
        found, control = explain(model, image, query), explain(model, image, other)
        side = len(found.heat)
        points = {
            "peak": peak(found.heat), "centre of mass": np.array(found.centre),
            "peak, another query": peak(control.heat), "a random point": rng.random(2) * side,
        }  # fmt: skip
        for name, point in points.items():
            hits[name].append(np.hypot(*(point / side - (x, y))) <= radius)
    print(f"{len(todo)} things in scenes of two or three; hits within the thing's radius, in percent")
    for name, values in hits.items():
        print(f"{name:<20} {100 * np.mean(values):5.1f}")


def peak(heat: np.ndarray) -> np.ndarray:
    """x and y of the greatest heat."""
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    return np.array([x, y])


if __name__ == "__main__":
    main()
