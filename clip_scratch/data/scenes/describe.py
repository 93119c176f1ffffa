"""Five differently worded English captions of a built-in scene."""

import random

from .scene import Scene, Thing

# The first word is the one in scene.py and in the canonical caption.
SYNONYMS = {
    "small": ("small", "little", "tiny"), "medium": ("medium", "medium-sized", "mid-sized"), "big": ("big", "large"),
    "solid": ("solid", "plain"), "striped": ("striped", "stripy"), "dotted": ("dotted", "spotted", "polka-dot"),
    "outlined": ("outlined", "hollow"), "turquoise": ("turquoise", "teal"), "purple": ("purple", "violet"),
    "circle": ("circle", "disc"), "square": ("square", "box"), "cross": ("cross", "plus sign"),
    "diamond": ("diamond", "rhombus"), "crescent": ("crescent", "moon"), "flower": ("flower", "blossom"),
    "gray": ("gray", "grey"), "beige": ("beige", "cream"), "pale blue": ("pale blue", "light blue"),
    "pale green": ("pale green", "light green"), "dark": ("dark", "charcoal"), "lined": ("lined", "ruled"),
    "gridded": ("gridded", "squared"), "speckled": ("speckled", "flecked"),
}  # fmt: skip
# A relation with the first thing as the subject, and with the second.
FORWARD = {
    "left": ("to the left of", "left of", "on the left side of"), "above": ("above", "over", "higher up than"),
    "inside": ("inside", "within", "in the middle of"), "front": ("in front of", "partly covering", "partly hiding"),
}  # fmt: skip
BACKWARD = {
    "left": ("to the right of", "right of", "on the right side of"), "above": ("below", "under", "beneath"),
    "inside": ("around", "surrounding", "enclosing"), "front": ("behind", "partly covered by", "partly hidden by"),
}  # fmt: skip
PAIR_TEMPLATES = (
    "{a} {R} {b}", "there is {a} {R} {b}", "{b} {Q} {a}", "{R} {b} there is {a}", "{Q} {a} there is {b}",
    "on {bg}, {b} is {Q} {a}", "{a} is {R} {b} on {bg}", "{bg} with {a} {R} {b}", "a picture of {b} {Q} {a}",
    "we see {b} {Q} {a}", "two shapes on {bg}: {a} {R} {b}",
)  # fmt: skip
MORE_PAIR_TEMPLATES = {
    "left": ("{a} on the left and {b} on the right", "on the right {b}, on the left {a}", "{b} with {a} to its left"),
    "above": ("{a} at the top and {b} at the bottom", "at the bottom {b}, at the top {a}", "{a} with {b} below it"),
    "inside": ("{b} with {a} inside it", "{b} has {a} in its middle"),
    "front": ("{a} hides part of {b}", "{b} with {a} in front of it"),
}
LINE_TEMPLATES = (
    "{way}: {a}, {b} and {c}", "{a}, {b} and {c}, {way}", "{back}: {c}, {b} and {a}", "{c}, {b} and {a} {back}",
    "{first} {a}, in the middle {b} and {last} {c}", "{b} between {a} {first} and {c} {last}",
    "a {line} of three shapes {way}: {a}, {b} and {c}", "{a} {R} {b}, which is {R} {c}",
    "on {bg} there are {a}, {b} and {c} {way}", "{c} {last}, {b} in the middle and {a} {first}",
)  # fmt: skip
GROUP_TEMPLATES = (
    "{c} {V} {a} on the left and {b} on the right", "{a} on the left and {b} on the right, with {c} {V} both",
    "{b} to the right of {a}, and {c} {V} both of them", "{a} with {b} to its right, both {W} {c}",
    "at the {up} left {a}, at the {up} right {b}, and at the {down} {c}",
    "on {bg}, {a} and, to its right, {b} are {W} {c}",
    "{c} at the {down}, {a} at the {up} left and {b} at the {up} right",
    "there is {c} {V} a pair of shapes: {a} on the left, {b} on the right",
)  # fmt: skip
PLACE_TEMPLATES = (
    "{a} {P}", "{P} there is {a}", "{a} {P} of the picture", "a picture of {a} {P}", "on {bg} there is {a} {P}",
    "{bg} with {a} {P}", "{P} of the picture, {a}", "{a} sits {P}", "we see {a} {P}",
)  # fmt: skip
# Words of the templates for three things; base: the pair relation between two of them.
TRIPLE_WORDS = {
    "row": {"base": "left", "way": "from left to right", "back": "from right to left", "first": "on the left",
            "last": "on the right", "line": "row"},
    "column": {"base": "above", "way": "from top to bottom", "back": "from bottom to top", "first": "at the top",
               "last": "at the bottom", "line": "column"},
    "under": {"base": "left", "V": "below", "W": "above", "up": "top", "down": "bottom"},
    "over": {"base": "left", "V": "above", "W": "below", "up": "bottom", "down": "top"},
}  # fmt: skip
# Pairs of things within three, by position, and their relation.
WITHIN = {
    "row": ((0, 1, "left"), (1, 2, "left"), (0, 2, "left")),
    "column": ((0, 1, "above"), (1, 2, "above"), (0, 2, "above")),
    "under": ((0, 1, "left"), (0, 2, "above"), (1, 2, "above")),
    "over": ((0, 1, "left"), (2, 0, "above"), (2, 1, "above")),
}
PLACE_WORDS = {
    "top left": ("in the top left corner", "at the top left"), "top": ("at the top", "near the top edge"),
    "top right": ("in the top right corner", "at the top right"), "left side": ("on the left", "near the left edge"),
    "center": ("in the center", "in the middle"), "right side": ("on the right", "near the right edge"),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom": ("at the bottom", "near the bottom edge"),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
}  # fmt: skip


def describe_scene(scene: Scene, rng: random.Random) -> list[str]:
    """Five differently worded captions, all true of `scene`.

    The first names everything, in a fixed form. The next three name each thing with its colour, and the relation;
    the rest is optional. The last is vaguer still, as people's captions are.
    """
    if len(scene.things) == 1:
        canonical, templates = "{a} {P} on {bg}", PLACE_TEMPLATES
    elif len(scene.things) == 2:
        canonical, templates = "{a} {R} {b} on {bg}", PAIR_TEMPLATES + MORE_PAIR_TEMPLATES[scene.relation]
    elif scene.relation in ("row", "column"):
        canonical, templates = "{a}, {b} and {c} {way} on {bg}", LINE_TEMPLATES
    else:
        canonical, templates = "{a} to the left of {b}, with {c} {V} them both, on {bg}", GROUP_TEMPLATES
    captions = [_fill_in(canonical, scene, rng, "canonical")]
    captions += [_fill_in(template, scene, rng, "free") for template in rng.sample(templates, 3)]
    return [*captions, _vague(scene, rng)]


def _fill_in(template: str, scene: Scene, rng: random.Random, style: str) -> str:
    """The template with its words in place. style: canonical, free, short (see `_thing`), colour or shape."""
    words = dict(zip("abc", (_thing(thing, scene, rng, style) for thing in scene.things), strict=False))
    words["bg"] = _background(scene, rng, style)
    pick = (lambda options: options[0]) if style == "canonical" else rng.choice
    if len(scene.things) == 1:
        words["P"] = pick(PLACE_WORDS[scene.relation])
    else:
        words |= TRIPLE_WORDS.get(scene.relation, {"base": scene.relation})
        words["R"], words["Q"] = pick(FORWARD[words["base"]]), pick(BACKWARD[words["base"]])
    return template.format(**words)


def _thing(thing: Thing, scene: Scene, rng: random.Random, style: str) -> str:
    """'a big striped red circle', or less.

    canonical: every attribute, by its first word; free: colour, shape and often the rest, by any synonym; short:
    colour and shape. Both add what distinguishes it from another thing of the same colour and shape. colour, shape:
    that attribute alone.
    """
    if style == "canonical":
        return _with_article([thing.size, thing.fill, thing.colour, thing.shape])
    if style in ("colour", "shape"):
        return _with_article([_word(thing.colour, rng), "shape"] if style == "colour" else [_word(thing.shape, rng)])
    alike = [t for t in scene.things if t != thing and (t.shape, t.colour) == (thing.shape, thing.colour)]
    words = []
    for name, usual in (("size", "medium"), ("fill", "solid")):  # people seldom mention the usual
        value = getattr(thing, name)
        by_chance = style == "free" and rng.random() < (0.3 if value == usual else 0.75)
        if by_chance or any(getattr(other, name) != value for other in alike):
            words.append(_word(value, rng))
    return _with_article([*words, _word(thing.colour, rng), _word(thing.shape, rng)])


def _background(scene: Scene, rng: random.Random, style: str) -> str:
    if style == "canonical":
        return _with_article([scene.pattern, scene.tone, "background"])
    pattern = [] if scene.pattern == "plain" and rng.random() < 0.6 else [_word(scene.pattern, rng)]
    return _with_article([*pattern, _word(scene.tone, rng), "background"])


def _vague(scene: Scene, rng: random.Random) -> str:
    """A caption that leaves out the relation, or a thing, or most attributes."""
    things = list(scene.things)
    if len(things) == 1:
        template, style = rng.choice(
            (("{a}", "short"), ("a picture of {a}", "short"), ("{a} on {bg}", "short"),
             ("{a} {P}", "colour"), ("{a} {P}", "shape"))
        )  # fmt: skip
        return _fill_in(template, scene, rng, style)
    if len(things) == 2 and rng.random() < 0.5:
        return _fill_in(rng.choice(PAIR_TEMPLATES), scene, rng, rng.choice(("colour", "shape")))
    if len(things) == 3 and rng.random() < 0.5:
        first, second, relation = rng.choice(WITHIN[scene.relation])
        a, b = (_thing(things[i], scene, rng, "short") for i in (first, second))
        return rng.choice((f"{a} {rng.choice(FORWARD[relation])} {b}", f"{b} {rng.choice(BACKWARD[relation])} {a}"))
    rng.shuffle(things)
    *others, last = (_thing(thing, scene, rng, "short") for thing in things)
    listed = f"{', '.join(others)} and {last}"
    return rng.choice((listed, f"{listed} on {_background(scene, rng, 'free')}"))


def _word(plain: str, rng: random.Random) -> str:
    return rng.choice(SYNONYMS.get(plain, (plain,)))


def _with_article(words: list[str]) -> str:
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"
