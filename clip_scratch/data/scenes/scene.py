"""What a built-in scene is: its vocabulary, and which scenes a data set has.

A scene is one to three things, each with a shape, a colour, a size and a fill, in one relation on one background.
Most scenes come with twins whose captions use the same words for another picture (a red circle left of a blue
square; a blue circle left of a red square), so that a model must learn which attribute belongs to which thing.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

SHAPES = (
    "circle", "square", "triangle", "star", "heart", "cross", "diamond", "hexagon", "crescent", "flower",
)  # fmt: skip
RADIUS = {"small": 0.09, "medium": 0.14, "big": 0.21}  # of a thing, in sides of the picture
COLOURS = {
    "red": (216, 40, 40), "orange": (245, 132, 28), "yellow": (250, 208, 40), "green": (40, 156, 60),
    "turquoise": (26, 190, 190), "blue": (40, 88, 220), "purple": (132, 60, 186), "pink": (246, 122, 182),
    "brown": (130, 80, 42), "black": (26, 26, 30),
}  # fmt: skip
TONES = {
    "white": (250, 250, 250), "gray": (188, 190, 196), "beige": (240, 226, 196), "pale blue": (204, 224, 246),
    "pale green": (208, 236, 206), "dark": (58, 60, 68),
}  # fmt: skip
PLACES = {  # of a single thing: its centre, in sides of the picture
    "top left": (0.26, 0.26), "top": (0.5, 0.26), "top right": (0.74, 0.26),
    "left side": (0.26, 0.5), "center": (0.5, 0.5), "right side": (0.74, 0.5),
    "bottom left": (0.26, 0.74), "bottom": (0.5, 0.74), "bottom right": (0.74, 0.74),
}  # fmt: skip
FILLS = ("solid", "striped", "dotted", "outlined")
PATTERNS = ("plain", "lined", "gridded", "speckled")
# Relations of two and three things, in the order of Scene.things. A mirror image ("right of") is the same scene.
PAIRS = ("left", "above", "inside", "front")
TRIPLES = ("row", "column", "under", "over")  # left to right; top to bottom; the third under, over the first two
UNSEEN = {"dark": ("black", "brown", "purple")}  # colours that are hard to see on a tone
HOLDERS = ("circle", "square", "hexagon", "diamond", "flower")  # shapes with room for a thing inside


@dataclass(frozen=True)
class Thing:
    """One coloured shape."""

    shape: str
    colour: str
    size: str
    fill: str


@dataclass(frozen=True)
class Scene:
    """The canonical description of a picture: two scenes are equal where a full caption of each would be."""

    relation: str  # a place for one thing; one of PAIRS or TRIPLES for more
    things: tuple[Thing, ...]
    tone: str
    pattern: str


def sample_scenes(n: int, seed: int) -> Iterator[tuple[str, Scene]]:
    """`n` different scenes, each with its split, in a fixed order: validation, test, training.

    About 80/10/10, at most 500 for validation and for test: from 5,000 scenes on, these two are the same whatever
    `n`, so that training on more scenes is measured on the same pictures. Twins share a split.
    """
    rng = random.Random(f"scenes {seed}")
    seen: set[Scene] = set()
    held_out = min(n // 10, 500)
    for split, wanted in (("valid", held_out), ("test", held_out), ("train", n - 2 * held_out)):
        while wanted:
            for scene in _family(rng)[:wanted]:
                if scene not in seen:
                    seen.add(scene)
                    wanted -= 1
                    yield split, scene


def _family(rng: random.Random) -> list[Scene]:
    """A random scene and, most of the time, one to three of its twins."""
    relation = rng.choice(rng.choices((tuple(PLACES), PAIRS, TRIPLES), weights=(20, 50, 30))[0])
    count = 3 if relation in TRIPLES else 2 if relation in PAIRS else 1
    sizes = ("small", "big") if relation == "inside" else ()
    scene = None
    while scene is None or not _drawable(scene):
        things = [
            Thing(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(tuple(RADIUS)), rng.choice(FILLS))
            for _ in range(count)
        ]
        things[: len(sizes)] = [replace(thing, size=size) for thing, size in zip(things, sizes, strict=False)]
        scene = Scene(relation, tuple(things), rng.choice(tuple(TONES)), rng.choice(PATTERNS))
    twins = [twin for twin in _twins(scene) if _drawable(twin) and twin != scene]
    return [scene, *rng.sample(twins, min(len(twins), rng.randint(0, 3)))]


def _twins(scene: Scene) -> Iterator[Scene]:
    """Scenes that differ from this one only in what belongs to what, or in the relation."""
    for i, j in itertools.combinations(range(len(scene.things)), 2):
        for names in (("colour",), ("shape",), ("size", "fill"), ("shape", "colour", "size", "fill")):
            things = list(scene.things)
            things[i] = replace(things[i], **{name: getattr(scene.things[j], name) for name in names})
            things[j] = replace(things[j], **{name: getattr(scene.things[i], name) for name in names})
            yield replace(scene, things=tuple(things))
    for relations in (PLACES, PAIRS, TRIPLES):
        if scene.relation in relations:
            yield from (replace(scene, relation=relation) for relation in relations)


def _drawable(scene: Scene) -> bool:
    """Whether every thing can be seen, told from the others, and fits into the picture."""
    relation, things = scene.relation, scene.things
    r = [RADIUS[thing.size] for thing in things]
    if len(set(things)) < len(things) or any(thing.colour in UNSEEN.get(scene.tone, ()) for thing in things):
        return False
    if relation == "inside":
        roomy = things[1].shape in HOLDERS and things[1].fill in ("solid", "outlined")
        return roomy and (things[0].size, things[1].size) == ("small", "big") and things[0].colour != things[1].colour
    if relation == "front":  # what is in front hides some of what is behind, and leaves enough of it
        hides = things[0].shape != "crescent" and r[0] < r[1]
        compact = things[1].shape in (*HOLDERS, "triangle", "heart") and things[0].colour != things[1].colour
        return hides and compact and "outlined" not in (things[0].fill, things[1].fill)
    if relation in ("row", "column"):
        return sum(r) <= 0.44
    if relation in ("under", "over"):
        return max(r[:2]) + r[2] <= 0.42 and r[0] + r[1] <= 0.42
    return True
