"""The picture of a built-in scene."""

import functools
import random

import cv2
import numpy as np

from .scene import COLOURS, PLACES, RADIUS, TONES, Scene, Thing

SIZE = 96  # side of a drawn scene, in pixels


def draw_scene(scene: Scene, size: int = SIZE) -> np.ndarray:
    """The picture of `scene`, uint8 RGB (size, size, 3): the same scene always gives the same picture."""
    rng = random.Random(repr(scene))  # exact places, tilt and shade depend on the scene alone
    side = 4 * size  # drawn larger, then averaged down: smooth edges
    canvas = _background(scene, side, rng)
    positions = layout(scene, rng)
    for thing, (x, y) in reversed(list(zip(scene.things, positions, strict=True))):  # the first lies in front
        _draw_thing(canvas, thing, x * side, y * side, rng)
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)


def layout(scene: Scene, rng: random.Random) -> list[tuple[float, float]]:
    """The centre (x, y) of each thing, in sides of the picture: where its relation puts it, with some play."""
    r = [RADIUS[thing.size] for thing in scene.things]
    relation, play = scene.relation, rng.uniform
    if relation in PLACES:
        x, y = PLACES[relation]
        return [(x + play(-0.02, 0.02), y + play(-0.02, 0.02))]
    if relation in ("left", "above", "row", "column"):
        along, across = _spread(r, rng), play(max(r), 1 - max(r)) * 0.5 + 0.25
        centres = [(t, min(max(across + play(-0.03, 0.03), q + 0.03), 0.97 - q)) for t, q in zip(along, r, strict=True)]
        return centres if relation in ("left", "row") else [(y, x) for x, y in centres]
    if relation in ("under", "over"):
        top = [max(r[:2]), r[2]] if relation == "under" else [r[2], max(r[:2])]
        y_top, y_bottom = _spread(top, rng)
        y_pair, y_third = (y_top, y_bottom) if relation == "under" else (y_bottom, y_top)
        x_first, x_second = _spread(r[:2], rng)
        return [(x_first, y_pair), (x_second, y_pair), (play(0.44, 0.56), y_third)]
    if relation == "inside":
        return [(play(0.36, 0.64), play(0.36, 0.64))] * 2
    # front: the nearer thing sits on the edge of the farther one, wherever that edge is in this direction
    angle = play(0, 2 * np.pi)
    way = np.array([np.cos(angle), np.sin(angle)])
    outline = _OUTLINES[scene.things[1].shape].astype(np.float32)
    edge = max(t for t in np.linspace(0, 1.2, 61) if cv2.pointPolygonTest(outline, tuple(t * way), False) >= 0)
    offset = way * (edge * r[1] + 0.1 * r[0])
    return [tuple(0.5 + 0.6 * offset), tuple(0.5 - 0.4 * offset)]


def _spread(r: list[float], rng: random.Random) -> list[float]:
    """Centres of circles of radii `r` along a line from 0 to 1, in order, none touching."""
    slack = 0.96 - 2 * sum(r)
    gaps = [rng.uniform(0.3, 1) for _ in range(len(r) + 1)]
    gaps = [slack * gap / sum(gaps) for gap in gaps]
    centres, edge = [], 0.02
    for gap, q in zip(gaps, r, strict=False):
        centres.append(edge + gap + q)
        edge += gap + 2 * q
    return centres


def _arc(start: float, stop: float, n: int = 48) -> np.ndarray:
    t = np.radians(np.linspace(start, stop, n))
    return np.stack([np.cos(t), np.sin(t)], 1)  # (n, 2)


def _outlines() -> dict[str, np.ndarray]:
    """The shapes as polygons (n, 2), y downwards, of about the same area, within a unit circle or nearly so."""
    circle, t = _arc(0, 360, 72), np.linspace(0, 2 * np.pi, 90)
    spokes = np.where(np.arange(10) % 2 == 0, 1.1, 0.48)[:, None]
    heart = np.stack(
        [16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))], 1
    )
    a, b = 0.34, 0.98
    cross = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    moon = np.concatenate([_arc(55, 305), _arc(290, 70) * 0.82 + (0.42, 0)])
    return {
        "circle": circle * 0.94,
        "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.82,
        "triangle": _arc(-90, 150, 3) * 1.12 + (0, 0.2),
        "star": _arc(-90, 234, 10) * spokes + (0, 0.06),
        "heart": heart / 16.5 + (0, -0.1),
        "cross": np.array(cross),
        "diamond": np.array([(0, -1.1), (0.8, 0), (0, 1.1), (-0.8, 0)]),
        "hexagon": _arc(0, 300, 6) * 1.0,
        "crescent": moon + np.array([0.12, 0]),
        "flower": circle * (0.5 + 0.54 * np.abs(np.cos(np.radians(np.linspace(0, 360, 72)) * 2.5)) ** 0.6)[:, None],
    }


_OUTLINES = _outlines()


def _background(scene: Scene, side: int, rng: random.Random) -> np.ndarray:
    tone = TONES[scene.tone]
    mark = [0.88 * value if scene.tone != "dark" else value + 26 for value in tone]
    canvas = np.empty((side, side, 3), np.uint8)
    cv2.rectangle(canvas, (0, 0), (side, side), tone, -1)
    step, width = side // 8, max(side // 96, 1)
    if scene.pattern in ("lined", "gridded"):
        for edge in range(rng.randrange(step), side, step):
            canvas[edge : edge + width] = mark
            if scene.pattern == "gridded":
                canvas[:, edge : edge + width] = mark
    if scene.pattern == "speckled":
        for _ in range(90):
            centre = (rng.randrange(side), rng.randrange(side))
            cv2.circle(canvas, centre, rng.choice((1, 1, 2)) * width, mark, -1)
    return canvas


@functools.lru_cache
def _texture(fill: str, side: int) -> np.ndarray:
    """Where a striped or dotted thing shows its full colour, bool (side, side)."""
    y, x = np.indices((side, side)) / side
    if fill == "striped":
        return (x + y) / 0.075 % 1 < 0.55
    u, v = (x + y) / 0.08 % 1 - 0.5, (x - y) / 0.08 % 1 - 0.5
    return u * u + v * v < 0.1


def _draw_thing(canvas: np.ndarray, thing: Thing, x: float, y: float, rng: random.Random) -> None:
    side = len(canvas)
    tilt = np.radians(rng.uniform(-7, 7))
    turn = np.array([(np.cos(tilt), np.sin(tilt)), (-np.sin(tilt), np.cos(tilt))])
    polygon = np.rint(_OUTLINES[thing.shape] @ turn * RADIUS[thing.size] * side + (x, y)).astype(np.int32)
    colour = np.clip(np.array(COLOURS[thing.colour]) + rng.uniform(-10, 10), 0, 255)
    if thing.fill == "outlined":
        cv2.polylines(canvas, [polygon], True, colour.tolist(), max(side // 26, 1))
        return
    if thing.fill == "solid":
        cv2.fillPoly(canvas, [polygon], colour.tolist())
    else:
        left, top, width, height = cv2.boundingRect(polygon)
        box = np.s_[max(top, 0) : top + height, max(left, 0) : left + width]
        inside = np.zeros((side, side), np.uint8)
        cv2.fillPoly(inside, [polygon], 1)
        inside = inside[box].view(bool)
        canvas[box][inside] = 255 - (255 - colour) * 0.22
        canvas[box][inside & _texture(thing.fill, side)[box]] = colour
    cv2.polylines(canvas, [polygon], True, (colour * 0.72).tolist(), max(side // 80, 1))
