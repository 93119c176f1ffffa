"""The built-in scenes: the same for the same seed, true captions, hard twins, and no half-written set."""

import itertools
import random
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest

from clip_scratch.data.scenes import describe as words
from clip_scratch.data.scenes import draw as drawing
from clip_scratch.data.scenes import scene as scenes
from clip_scratch.data.scenes import write as writing
from clip_scratch.data.scenes.describe import describe_scene
from clip_scratch.data.scenes.draw import draw_scene
from clip_scratch.data.scenes.scene import PAIRS, PLACES, RADIUS, Scene, Thing, sample_scenes
from clip_scratch.data.scenes.write import ensure_scenes, training_captions, write_scenes
from clip_scratch.errors import UserError

SAMPLE = [scene for _, scene in sample_scenes(1500, seed=7)]
RED_CIRCLE, BLUE_SQUARE = Thing("circle", "red", "big", "solid"), Thing("square", "blue", "small", "solid")


def captions_of(scene, seed=0):
    return describe_scene(scene, random.Random(f"{seed} {scene}"))


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- Which scenes there are


def test_a_seed_fixes_the_scenes_and_another_seed_changes_them():
    assert list(sample_scenes(200, 1)) == list(sample_scenes(200, 1))
    assert list(sample_scenes(200, 1)) != list(sample_scenes(200, 2))


def test_no_description_occurs_twice_so_no_split_shares_one():
    assert len(set(SAMPLE)) == len(SAMPLE) == 1500


@pytest.mark.parametrize("n, held_out", [(30, 3), (1500, 150), (7000, 500)])
def test_split_sizes(n, held_out):
    counts = Counter(split for split, _ in sample_scenes(n, 0))
    assert counts == {"train": n - 2 * held_out, "valid": held_out, "test": held_out}


def test_a_larger_set_keeps_the_held_out_scenes():
    small, large = list(sample_scenes(5000, 3)), list(sample_scenes(6000, 3))
    assert small[:1000] == large[:1000]


def test_variety():
    things = [thing for scene in SAMPLE for thing in scene.things]
    assert len({thing.shape for thing in things}) == len(scenes.SHAPES) >= 8
    assert len({thing.colour for thing in things}) == len(scenes.COLOURS) >= 8
    assert {thing.size for thing in things} == set(RADIUS)
    assert {thing.fill for thing in things} == set(scenes.FILLS)
    assert {len(scene.things) for scene in SAMPLE} == {1, 2, 3}
    assert {scene.relation for scene in SAMPLE} == {*PLACES, *PAIRS, *scenes.TRIPLES}
    assert {(scene.tone, scene.pattern) for scene in SAMPLE} == set(itertools.product(scenes.TONES, scenes.PATTERNS))


def test_most_scenes_have_a_twin_of_the_same_words_in_their_split():
    def bag(split, scene):
        attributes = sorted(itertools.chain.from_iterable((t.shape, t.colour, t.size, t.fill) for t in scene.things))
        return split, tuple(attributes), scene.tone, scene.pattern

    bags = Counter(bag(split, scene) for split, scene in sample_scenes(1500, 7))
    for wanted in ("train", "valid", "test"):
        counts = [count for (split, *_), count in bags.items() if split == wanted]
        assert sum(count for count in counts if count > 1) > 0.6 * sum(counts)


# --- How a scene looks


def test_a_swap_is_another_picture_and_another_caption():
    scene = Scene("left", (RED_CIRCLE, BLUE_SQUARE), "white", "plain")
    swap = Scene("left", (BLUE_SQUARE, RED_CIRCLE), "white", "plain")
    assert np.mean(draw_scene(scene) != draw_scene(swap)) > 0.1
    assert (
        captions_of(scene)[0]
        == "a big solid red circle to the left of a small solid blue square on a plain white background"
    )
    assert (
        captions_of(swap)[0]
        == "a small solid blue square to the left of a big solid red circle on a plain white background"
    )


@pytest.mark.parametrize("size", [32, 96])
def test_draw_is_a_function_of_the_scene(size):
    picture = draw_scene(SAMPLE[0], size)
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    assert np.array_equal(picture, draw_scene(SAMPLE[0], size))


def centre_of(picture, colour):
    """Mean (x, y) of the pixels near a colour, in sides of the picture."""
    near = np.abs(picture.astype(int) - scenes.COLOURS[colour]).max(2) < 40
    assert near.sum() > 20
    y, x = np.nonzero(near)
    return x.mean() / len(picture), y.mean() / len(picture)


@pytest.mark.parametrize("relation", [*PAIRS, *scenes.TRIPLES, *PLACES])
def test_pixels_show_the_relation(relation):
    colours = ("red", "blue", "green")
    for shape, tone in itertools.product(("circle", "star", "crescent"), ("white", "beige")):
        count = 1 if relation in PLACES else 2 if relation in PAIRS else 3
        things = tuple(Thing(shape, colours[i], "medium", "solid") for i in range(count))
        if relation == "front" and shape != "circle":
            continue
        if relation == "inside":
            things = (Thing(shape, "red", "small", "solid"), Thing("square", "blue", "big", "outlined"))
        picture = draw_scene(Scene(relation, things, tone, "plain"))
        at = [centre_of(picture, thing.colour) for thing in things]
        x, y = [a[0] for a in at], [a[1] for a in at]
        if relation in PLACES:
            assert np.hypot(x[0] - PLACES[relation][0], y[0] - PLACES[relation][1]) < 0.08
        elif relation in ("left", "row"):
            assert np.all(np.diff(x) > 0.2) and np.ptp(y) < 0.15
        elif relation in ("above", "column"):
            assert np.all(np.diff(y) > 0.2) and np.ptp(x) < 0.15
        elif relation in ("under", "over"):
            sign = 1 if relation == "under" else -1
            assert x[1] - x[0] > 0.2 and min(sign * (y[2] - y[0]), sign * (y[2] - y[1])) > 0.2
        elif relation == "inside":
            assert np.hypot(x[0] - x[1], y[0] - y[1]) < 0.06
        else:  # front: the first is whole, the second is partly hidden
            seen = [np.sum(np.abs(picture.astype(int) - scenes.COLOURS[c]).max(2) < 40) for c in colours[:2]]
            assert seen[0] > seen[1]


def test_what_is_in_front_hides_a_part_of_what_is_behind(monkeypatch):
    drawn, draw_thing = [], drawing._draw_thing

    def watched(canvas, *args):
        before = canvas.copy()
        draw_thing(canvas, *args)
        drawn.append((canvas != before).any(2))

    monkeypatch.setattr(drawing, "_draw_thing", watched)
    fronts = [scene for scene in SAMPLE if scene.relation == "front"]
    assert len(fronts) > 50
    for scene in fronts:
        drawn.clear()
        draw_scene(scene)
        behind, front = drawn
        hidden = (front & behind).sum()
        assert hidden > 0.1 * front.sum() and hidden < 0.6 * behind.sum(), scene


def test_everything_stays_in_the_picture():
    for scene in SAMPLE[:400]:
        for thing, (x, y) in zip(scene.things, drawing.layout(scene, random.Random(repr(scene))), strict=True):
            assert all(RADIUS[thing.size] <= v + 0.005 and v <= 1.005 - RADIUS[thing.size] for v in (x, y)), scene


# --- What is said of a scene: read back by a parser of its own

PLAIN = {spoken: plain for plain, group in words.SYNONYMS.items() for spoken in group if spoken != "plain"}
COLOUR = "|".join(s for colour in scenes.COLOURS for s in words.SYNONYMS.get(colour, (colour,)))
SHAPE = "|".join(s for shape in scenes.SHAPES for s in words.SYNONYMS.get(shape, (shape,)))
SIZE = "|".join(s for size in RADIUS for s in sorted(words.SYNONYMS[size], key=len, reverse=True))
FILL = "|".join(s for fill in scenes.FILLS for s in words.SYNONYMS[fill])
THING = re.compile(
    rf"\ban? (?:(?P<size>{SIZE}) )?(?:(?P<fill>{FILL}) )?(?:(?P<colour>{COLOUR}) ?)?(?P<shape>{SHAPE}|shape)?\b"
    r"(?! background)"
)
LEFT, RIGHT = r"to the left of|left of|on the left side of", r"to the right of|right of|on the right side of"
OVER, UNDER = r"above|over|higher up than", r"below|under|beneath"


def spoken_things(caption):
    """[(position, {attribute: value})] of the things that a caption names, in its order."""
    found = []
    for match in THING.finditer(caption):
        said = {k: PLAIN.get(v, v) for k, v in match.groupdict().items() if v and v != "shape"}
        said = {k: "solid" if (k, v) == ("fill", "plain") else v for k, v in said.items()}
        if "shape" in said or "colour" in said:
            found.append((match.start(), said))
    return found


def fits(said, thing):
    return all(getattr(thing, name) == value for name, value in said.items())


def test_every_thing_that_is_named_is_there():
    for scene in SAMPLE:
        for caption in captions_of(scene):
            said = spoken_things(caption)
            assert 1 <= len(said) <= len(scene.things), caption
            orders = itertools.permutations(scene.things, len(said))
            assert any(all(fits(s, t) for (_, s), t in zip(said, order, strict=True)) for order in orders), caption


def test_the_canonical_caption_is_the_scene():
    for scene in SAMPLE:
        caption = captions_of(scene)[0]
        things = tuple(Thing(**said) for _, said in spoken_things(caption))
        pattern, tone = re.search(rf"on an? ({'|'.join(scenes.PATTERNS)}) ([a-z ]+) background$", caption).groups()
        assert (things, pattern, tone) == (scene.things, scene.pattern, scene.tone)
        signs = {
            "left": "to the left of", "above": " above ", "inside": " inside ", "front": " in front of ",
            "row": "from left to right", "column": "from top to bottom",
            "under": "below them both", "over": "above them both",
        }  # fmt: skip
        assert signs.get(scene.relation, words.PLACE_WORDS.get(scene.relation, [""])[0]) in caption


@pytest.mark.parametrize("relation, forward, backward", [("left", LEFT, RIGHT), ("above", OVER, UNDER)])
def test_relations_of_pairs_are_told_the_right_way_round(relation, forward, backward):
    told = 0
    for scene in SAMPLE:
        if scene.relation != relation:
            continue
        for caption in captions_of(scene):
            said = spoken_things(caption)
            way = re.search(rf"\b(?:(?P<forward>{forward})|(?P<backward>{backward}))\b an?\b", caption)
            if way is None or len(said) < 2:
                continue
            told += 1
            first_is_subject = way.start() > said[0][0]  # "a is left of b", not "left of b there is a"
            subject, other = (said[0][1], said[1][1]) if first_is_subject else (said[1][1], said[0][1])
            a, b = (subject, other) if way["forward"] else (other, subject)
            assert fits(a, scene.things[0]) and fits(b, scene.things[1]), caption
    assert told > 300


def test_lines_of_three_are_told_in_order():
    told = 0
    for scene in SAMPLE:
        ways = {
            "row": ("from left to right", "from right to left"),
            "column": ("from top to bottom", "from bottom to top"),
        }
        way, back = ways.get(scene.relation, ("", ""))
        for caption in captions_of(scene) if way else ():
            things = scene.things if way in caption else scene.things[::-1] if back in caption else ()
            if things:
                told += 1
                assert all(fits(s, t) for (_, s), t in zip(spoken_things(caption), things, strict=True)), caption
    assert told > 200


def test_five_different_captions_four_of_which_name_every_thing_and_its_colour():
    for scene in SAMPLE:
        captions = captions_of(scene)
        assert len(set(captions)) == 5
        for caption in captions[:4]:
            said = [s for _, s in spoken_things(caption)]
            assert len(said) == len(scene.things) and all({"shape", "colour"} <= set(s) for s in said), caption
            assert "{" not in caption and " a o" not in caption.replace(" a on", "")


# --- Files


def test_the_files_depend_on_the_seed_alone(tmp_path):
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        write_scenes(tmp_path / name, 40, seed, progress=False)
    one = files(tmp_path / "one")
    assert one == files(tmp_path / "two") and one != files(tmp_path / "three")
    assert len([name for name in one if name.startswith("Images")]) == 40


def test_an_ordinary_data_set(tmp_path):
    folder = tmp_path / "set"
    write_scenes(folder, 100, seed=1, progress=False)
    table = pd.read_csv(folder / "captions.txt")
    assert list(table.columns) == ["image", "caption"]
    assert (table.groupby("image").size() == 5).all() and table.image.nunique() == 100
    lists = {
        name: (folder / name).read_text().split() for name in ("trainImages.txt", "devImages.txt", "testImages.txt")
    }
    assert [len(names) for names in lists.values()] == [80, 10, 10]
    assert set().union(*lists.values()) == set(table.image) == {path.name for path in (folder / "Images").iterdir()}
    first = next(iter(sample_scenes(100, 1)))[1]
    picture = cv2.imread(str(folder / "Images" / "000000.png"))[:, :, ::-1]
    assert np.array_equal(picture, draw_scene(first))
    assert captions_of(first)[0] == table.caption[0]
    trained_on = table.image.isin(lists["trainImages.txt"])
    assert training_captions(100, 1) == table.caption[trained_on].tolist()  # without drawing
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_nothing_is_overwritten_and_too_few_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="exists already"):
        write_scenes(tmp_path / "mine", 60, seed=1)
    with pytest.raises(UserError, match="at least 30"):
        write_scenes(tmp_path / "few", 5, seed=1)
    assert not (tmp_path / "few").exists()


def test_ensure_draws_once_whatever_a_killed_run_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = SimpleNamespace(n_scenes=40, seed=9)
    partial = tmp_path / "data" / ".scenes-40-9.tmp"
    partial.mkdir(parents=True)
    (partial / "captions.txt").write_text("left by a killed run")
    captions, images = ensure_scenes(cfg)
    assert str(captions) == "data/scenes-40-9/captions.txt" and len(list(images.iterdir())) == 40
    assert not partial.exists()

    monkeypatch.setattr(writing, "_write", None)  # a second drawing would fail
    assert ensure_scenes(cfg) == (captions, images)
    write_scenes(tmp_path / "data/scenes-40-9", 40, 9, exist_ok=True)


def test_a_failure_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "describe_scene", lambda scene, rng: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_scenes(tmp_path / "set", 40, seed=1, progress=False)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_an_unwritable_place_is_the_users_mistake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write the scenes"):
        ensure_scenes(SimpleNamespace(n_scenes=40, seed=9))


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="cannot write the scenes to .*No space left"):
        write_scenes(tmp_path / "set", 40, seed=1, progress=False)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_only_the_vocabulary_is_shared():
    """draw, describe and write import scene.py, which imports none of them."""
    folder = Path(scenes.__file__).parent
    for name in ("scene", "draw", "describe"):
        own = re.findall(r"^ *from \.(\w+) import", (folder / f"{name}.py").read_text(), re.MULTILINE)
        assert set(own) <= {"scene"} - {name}
