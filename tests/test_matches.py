"""Embedding and finding, on tiny random models: what comes back, in which order, and how it draws itself."""

import dataclasses
import io
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from clip_scratch.data.images import load_image
from clip_scratch.errors import UserError
from clip_scratch.evaluation.zero_shot import classify
from clip_scratch.models.clip import CLIPModel
from clip_scratch.models.saved import prepare_best, save_best
from clip_scratch.retrieval.embed import encode_image, encode_text, get_image_embeddings
from clip_scratch.retrieval.exact import ExactSearch
from clip_scratch.retrieval.matches import Matches, find_captions, find_matches, save_grid

QUERIES = ["a red square", "There is a blue square in the left half of this picture", "green", "box"]


@pytest.fixture
def cfg(tiny_cfg):
    return dataclasses.replace(tiny_cfg, precision="fp32")


@pytest.fixture
def model(cfg, tiny_tokenizer):
    torch.manual_seed(0)
    return CLIPModel(cfg, tiny_tokenizer).eval()


@pytest.fixture
def names(tiny_data):
    """An image name for each caption: most occur several times."""
    return tiny_data.table["image"].tolist()


@pytest.fixture
def rows(names):
    """An embedding for each entry of `names`, the same for the same name; spread out, unlike a random tower's."""
    numbers, distinct = pd.factorize(np.array(names))
    vectors = torch.randn(len(distinct), 32, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(vectors, dim=-1)[torch.from_numpy(numbers)]


def paths(tiny_data, count=None):
    return sorted(tiny_data.image_path.iterdir())[:count]


# --- find_matches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 9, 25, 26, 27, 1000])
def test_matches_are_distinct_and_scored_by_cosine(model, rows, names, n):
    matches = find_matches(model, rows, QUERIES[0], names, n=n)
    query = encode_text(model, QUERIES[:1])[0].double()
    cosine = {name: (row.double() @ query).item() for name, row in zip(names, rows, strict=True)}
    wanted = sorted(cosine, key=cosine.get, reverse=True)[:n]
    assert [name for name, _ in matches] == wanted  # distinct, since they are the keys of a dict
    assert len(matches) == min(n, 26)
    assert [score for _, score in matches] == pytest.approx([cosine[name] for name in wanted], abs=1e-6)
    assert all(type(name) is str and type(score) is float for name, score in matches)


def test_a_name_counts_with_its_best_row(model):
    query = encode_text(model, "a red square")
    orthogonal = torch.nn.functional.normalize(torch.eye(32)[:1] - query[0, 0] * query, dim=-1)
    embeddings = torch.cat([-query, orthogonal, query])
    assert [name for name, _ in find_matches(model, embeddings, "a red square", ["a", "b", "a"])] == ["a", "b"]


@pytest.mark.parametrize("n", [1, 3, 9])
def test_names_that_fill_the_best_rows_are_looked_past(model, n):
    """Ten names, most with hundreds of rows: the search widens until there are n of them, for each query alone."""
    rows = torch.nn.functional.normalize(torch.randn(3000, 32, generator=torch.Generator().manual_seed(5)), dim=-1)
    near = encode_text(model, QUERIES[0]) + 0.01 * rows[:2900]  # "name 0" has nearly all that fits the first query
    embeddings = torch.cat([torch.nn.functional.normalize(near, dim=-1), rows[2900:]])
    names = [f"name {i % 10 if i >= 2900 else 0}" for i in range(3000)]
    for matches in find_matches(model, embeddings, QUERIES, names, n=n):
        cosine = (embeddings.double() @ encode_text(model, matches.query)[0].double()).tolist()
        best = {}
        for name, score in zip(names, cosine, strict=True):
            best[name] = max(score, best.get(name, -1))
        assert [name for name, _ in matches] == sorted(best, key=best.get, reverse=True)[:n]
        assert [score for _, score in matches] == pytest.approx([best[name] for name, _ in matches], abs=1e-6)


def test_a_prepared_search_gives_the_same(model, rows, names, tiny_data):
    prepared = ExactSearch(rows, half=True)
    shuffled = pd.Series(names, index=range(len(names))[::-1])  # labels that are not positions
    for n in (1, 9, 1000):
        wanted = find_matches(model, rows, QUERIES[0], names, n=n).pairs
        assert find_matches(model, prepared, QUERIES[0], shuffled, n=n).pairs == wanted
    captions = tiny_data.table["caption"]
    search = ExactSearch(encode_text(model, captions.tolist()))
    image = paths(tiny_data, 1)[0]
    assert find_captions(model, image, captions, text_embeddings=search) == find_captions(model, image, captions)


def test_the_image_folder_is_only_looked_for_to_draw(model, rows, names, tiny_data, tmp_path):
    """Finding reads no captions file; drawing takes the folder that training found, or looks for it."""
    model.cfg = dataclasses.replace(model.cfg, captions_path=str(tmp_path / "moved.csv"), image_path="")
    matches = find_matches(model, rows, "red", names, n=2)
    assert len(matches) == 2
    with pytest.raises(UserError, match=r"no captions file .*moved.csv"):
        matches.figure()
    model.cfg = dataclasses.replace(model.cfg, image_path=str(tiny_data.image_path))
    assert find_matches(model, rows, "red", names, n=2).folder == Path(tiny_data.image_path)
    assert find_matches(model, rows, "red", names, n=2, image_path=tmp_path).folder == tmp_path
    moved = {"captions_path": str(tiny_data.captions_path), "image_path": str(tmp_path / "gone")}
    model.cfg = dataclasses.replace(model.cfg, **moved)
    assert find_matches(model, rows, "red", names, n=2).folder == tiny_data.image_path


def test_matches_behave_like_a_sequence_and_print(model, rows, names):
    matches = find_matches(model, rows, "a red square", pd.Series(names), n=3)
    assert isinstance(matches, Matches) and matches.query == "a red square"
    assert matches[0] == next(iter(matches)) and len(matches[:2]) == 2
    lines = repr(matches).splitlines()
    assert lines[0] == "'a red square'" and len(lines) == 4 and lines[1].endswith(matches[0][0])


def test_a_list_of_queries_gives_what_each_gives_alone(model, rows, names):
    together = find_matches(model, rows, QUERIES, names, n=5)
    assert [matches.query for matches in together] == QUERIES
    for matches in together:
        alone = find_matches(model, rows, matches.query, names, n=5)
        assert [name for name, _ in matches] == [name for name, _ in alone]
        assert [s for _, s in matches] == pytest.approx([s for _, s in alone], abs=1e-5)
    assert isinstance(find_matches(model, rows, QUERIES[:1], names), list)


def test_numpy_and_half_precision_embeddings_are_taken(model, rows, names):
    wanted = [name for name, _ in find_matches(model, rows, QUERIES[0], names, n=4)]
    assert [name for name, _ in find_matches(model, rows.numpy(), QUERIES[0], np.array(names), n=4)] == wanted
    scores = [score for _, score in find_matches(model, rows.bfloat16(), QUERIES[0], names, n=4)]
    assert scores == sorted(scores, reverse=True)


def test_nothing_to_find_and_nothing_asked(model, rows, names, tmp_path):
    nothing = find_matches(model, torch.empty(0, 32), "a red square", [])
    assert list(nothing) == [] and nothing._repr_png_().startswith(b"\x89PNG")
    assert find_matches(model, rows, [], names) == []
    assert find_matches(model, rows, [], names, save=tmp_path / "none.png") == []


def test_wrong_arguments(model, rows, names):
    with pytest.raises(UserError, match=f"{len(rows)} embeddings do not line up with 3 names"):
        find_matches(model, rows, "red", names[:3])
    with pytest.raises(UserError, match="n is at least 1, not 0"):
        find_matches(model, rows, "red", names, n=0)


# --- pictures ---------------------------------------------------------------------------------------------------


def decoded(png):
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def close_to(pixels, colour):
    """How many pixels are nearly of this colour."""
    return (np.abs(pixels.astype(int) - colour).max(-1) < 12).sum()


def test_a_result_draws_its_images(model, tiny_data):
    red = Matches("red things", [(f"{i:02d}.png", 0.5) for i in (0, 4, 8)], tiny_data.image_path)
    pixels = decoded(red._repr_png_())
    assert 400 < pixels.shape[0] < 600 and 400 < pixels.shape[1] < 500  # 2 x 2, one of them empty
    for colour, seen in (((220, 30, 30), True), ((40, 60, 220), False)):
        assert (close_to(pixels, colour) > 1000) == seen


def test_n_beyond_the_images_leaves_no_blank_page(model, rows, names, tmp_path):
    find_matches(model, rows, "red", names, n=5000, save=tmp_path / "all.png")
    width, height = Image.open(tmp_path / "all.png").size
    assert width < 1500 and height < 1500  # 26 images: 6 a line


@pytest.mark.parametrize("query", ["red", QUERIES])
def test_save_writes_the_grid(model, rows, names, tmp_path, query):
    find_matches(model, rows, query, names, n=4, save=tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.format == "PNG"
        assert grid.height > grid.width * (1 if query == "red" else 3)
    found = find_matches(model, rows, "red", names, n=4)
    assert found.save(tmp_path / "one.jpg") == tmp_path / "one.jpg"
    assert Image.open(tmp_path / "one.jpg").format == "JPEG"


def test_save_where_nothing_can_be_written(model, rows, names, tmp_path):
    for path in (tmp_path / "no" / "grid.png", tmp_path / "grid.nosuch"):
        with pytest.raises(UserError, match=path.name):
            find_matches(model, rows, "red", names, n=1, save=path)


def test_missing_and_broken_images_are_drawn_as_text(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    matches = Matches("red", [("gone.png", 0.9), ("broken.png", 0.5)], tmp_path)
    texts = [text.get_text() for axis in matches.figure().findobj(match=_is_axes) for text in axis.texts]
    assert texts == ["gone.png\n(file is missing)", "broken.png\n(cannot be read)"]
    assert close_to(decoded(matches._repr_png_()), (0, 0, 0)) > 100


def _is_axes(artist):
    from matplotlib.axes import Axes

    return isinstance(artist, Axes)


@pytest.mark.parametrize("query", ["", "between $5 and $6", r"$\frac{", "word " * 200, "x" * 300, "line\nbreak"])
@pytest.mark.filterwarnings("error")
def test_any_query_can_be_drawn(tiny_data, query, tmp_path):
    matches = Matches(query, [("00.png", 1.0)], tiny_data.image_path)
    assert close_to(decoded(matches._repr_png_()), (220, 30, 30)) > 1000  # the image has its room
    assert save_grid([matches, matches], tmp_path / "grid.png", columns=2).is_file()


# --- find_captions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 10_000])
def test_captions_are_distinct_and_scored_by_cosine(model, tiny_data, n):
    captions = tiny_data.table["caption"].tolist()  # "green" and others belong to several images
    image = paths(tiny_data, 1)[0]
    found = find_captions(model, image, captions, n=n)
    vector = encode_image(model, image)[0].double()
    cosine = dict(zip(captions, (encode_text(model, captions).double() @ vector).tolist(), strict=True))
    assert len({caption for caption, _ in found}) == len(found) == min(n, len(cosine))
    assert [score for _, score in found] == pytest.approx(sorted(cosine.values(), reverse=True)[:n], abs=1e-5)
    assert [score for _, score in found] == pytest.approx([cosine[caption] for caption, _ in found], abs=1e-5)
    again = find_captions(model, image, captions, n=n, text_embeddings=encode_text(model, captions))
    assert again == found


def test_captions_of_nothing_and_wrong_arguments(model, tiny_data):
    image = paths(tiny_data, 1)[0]
    assert find_captions(model, image, []) == []
    with pytest.raises(UserError, match="1 embeddings do not line up with 2 names"):
        find_captions(model, image, ["a", "b"], text_embeddings=torch.zeros(1, 32))
    with pytest.raises(UserError, match="n is at least 1, not -1"):
        find_captions(model, image, ["a", "b"], n=-1)


# --- encode_image, encode_text ----------------------------------------------------------------------------------


def test_images_of_every_kind_encode_alike(model, tiny_data):
    path = paths(tiny_data)[1]
    kinds = [path, str(path), Image.open(path), load_image(path)]
    mixed = encode_image(model, kinds)
    assert mixed.shape == (4, 32) and mixed.dtype == torch.float32 and mixed.device.type == "cpu"
    assert not mixed.requires_grad
    torch.testing.assert_close(mixed, mixed[:1].expand(4, -1), rtol=0, atol=1e-6)
    for kind in kinds:
        torch.testing.assert_close(encode_image(model, kind), mixed[:1], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed.norm(dim=-1), torch.ones(4))


def test_image_embeddings_do_not_depend_on_the_batches(model, tiny_data):
    images = paths(tiny_data, 10)
    whole = encode_image(model.train(), images)  # a model left in training mode is put into eval mode
    for size in (1, 3, 10):
        torch.testing.assert_close(encode_image(model, images, batch_size=size), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(encode_image(model, images[::-1]).flip(0), whole, rtol=0, atol=1e-5)


def test_text_embeddings_do_not_depend_on_the_batches(model, tiny_data):
    captions = [*tiny_data.table["caption"], "", "x", "word " * 400]
    whole = encode_text(model, captions)
    assert whole.shape == (len(captions), 32) and whole.dtype == torch.float32 and not whole.requires_grad
    torch.testing.assert_close(whole.norm(dim=-1), torch.ones(len(captions)))
    for size in (1, 7, 64):
        torch.testing.assert_close(encode_text(model, captions, batch_size=size), whole, rtol=0, atol=1e-5)
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(2))
    shuffled = encode_text(model, [captions[i] for i in order])
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(encode_text(model, captions[3]), whole[3:4], rtol=0, atol=1e-5)


def test_nothing_to_encode(model):
    assert encode_image(model, []).shape == encode_text(model, []).shape == (0, 32)


def test_the_progress_bar_counts_every_batch(model, tiny_data, capsys):
    encode_image(model, paths(tiny_data, 5), batch_size=2, progress=True)
    encode_text(model, QUERIES, batch_size=3, progress=True)
    shown = capsys.readouterr().err
    assert "images" in shown and "3/3" in shown and "captions" in shown and "2/2" in shown
    encode_image(model, paths(tiny_data, 5))
    assert capsys.readouterr().err == ""


def test_an_unreadable_image_is_named(model, tiny_data, tmp_path):
    good = paths(tiny_data, 1)[0]
    (tmp_path / "notes.jpg").write_text("no image")
    (tmp_path / "half.png").write_bytes(good.read_bytes()[:200])
    for bad in ("notes.jpg", "half.png", "missing.png", ""):
        with pytest.raises(UserError, match=f"{bad} cannot be read as an image"):
            encode_image(model, [good, tmp_path / bad])
    for array in (np.zeros((4, 4, 3), np.float32), np.zeros((2, 4, 4, 3), np.uint8)):
        with pytest.raises(UserError, match="image 1 cannot be read as an image"):
            encode_image(model, [good, array])


def test_images_that_cannot_be_read_are_skipped_counted_and_named(model, tiny_data, tmp_path, capsys):
    """One broken file does not end a search: its row is zeros, and zeros are never found."""
    good = paths(tiny_data, 3)
    (tmp_path / "half.png").write_bytes(good[0].read_bytes()[:200])
    images = [good[0], tmp_path / "half.png", good[1], tmp_path / "gone.png", good[2]]
    embeddings = encode_image(model, images, batch_size=2, on_bad_image="skip")
    torch.testing.assert_close(embeddings[[0, 2, 4]], encode_image(model, good), rtol=0, atol=1e-6)
    assert not embeddings[[1, 3]].any()
    printed = capsys.readouterr().err
    assert "skipped 2 of 5 images" in printed and "half.png: cannot be decoded" in printed
    assert "gone.png: no such file" in printed
    names = [path.name for path in images]
    opposite = -embeddings  # zeros now score above every image
    for rows in (embeddings, opposite):
        assert {name for name, _ in find_matches(model, rows, "red", names)} == {path.name for path in good}
    with pytest.raises(UserError, match="none of the 2 images can be read"):
        encode_image(model, [images[1], images[3]], on_bad_image="skip")


def test_embeddings_are_ordinary_tensors(model, tiny_data):
    """In-place arithmetic and a linear probe in torch work on them; on inference tensors both raise."""
    images, texts = encode_image(model, paths(tiny_data, 4)), encode_text(model, QUERIES)
    for embeddings in (images, texts):
        embeddings /= 2
        probe = torch.nn.Linear(32, 2)
        loss = torch.nn.functional.cross_entropy(probe(embeddings), torch.tensor([0, 1, 0, 1]))
        loss.backward()
        assert probe.weight.grad.abs().sum() > 0 and not embeddings.is_inference()


# --- get_image_embeddings ---------------------------------------------------------------------------------------


@pytest.fixture
def run(model, cfg, tmp_path):
    """The run folder that training would leave of `model`."""
    prepare_best(tmp_path / "run" / "best", model, cfg)
    save_best(tmp_path / "run" / "best", model, 1, {"rsum": 0.0})
    return tmp_path / "run"


def test_image_embeddings_line_up_with_the_table(run, model, tiny_data):
    table = tiny_data.table.sample(frac=1, random_state=3)  # the rows of an image lie apart, the index is no range
    loaded, embeddings = get_image_embeddings(table, run)
    assert not loaded.training and len(embeddings) == len(table)
    wanted = encode_image(model, [tiny_data.image_path / name for name in table["image"]])
    torch.testing.assert_close(embeddings, wanted, rtol=0, atol=1e-5)
    matches = find_matches(loaded, embeddings, "a red square", table["image"], n=40)
    assert sorted(name for name, _ in matches) == sorted(set(table["image"]))
    assert matches.folder == Path(tiny_data.image_path)


def test_each_image_is_encoded_once(run, tiny_data, monkeypatch):
    seen = []
    encode = encode_image
    monkeypatch.setattr(
        "clip_scratch.retrieval.embed.encode_image", lambda m, images, **k: seen.extend(images) or encode(m, images)
    )
    get_image_embeddings(tiny_data.table, run)
    assert len(seen) == len(set(seen)) == 26


def test_image_embeddings_of_no_rows(run, tiny_data):
    assert get_image_embeddings(tiny_data.table.iloc[:0], run / "best")[1].shape == (0, 32)


def test_image_embeddings_after_bad_images_were_skipped(run, model, cfg, tiny_data, capsys):
    """A run that skipped bad images can be searched: the table still names them, and they are never found."""
    prepare_best(run / "best", model, dataclasses.replace(cfg, on_bad_image="skip"))
    table = pd.concat([tiny_data.table, tiny_data.table.iloc[:1].assign(image="bad.png")], ignore_index=True)
    loaded, embeddings = get_image_embeddings(table, run, device="cpu")
    assert len(embeddings) == len(table) and not embeddings[-1].any()
    assert "bad.png: no such file" in capsys.readouterr().err
    found = find_matches(loaded, embeddings, "a red square", table["image"], n=40)
    assert sorted(name for name, _ in found) == sorted(set(tiny_data.table["image"]))


def test_image_embeddings_take_a_device(run, tiny_data):
    with pytest.raises(UserError, match="device 'nonsense' is not available"):
        get_image_embeddings(tiny_data.table, run, device="nonsense")


def test_image_embeddings_of_a_missing_image_or_run(run, tiny_data):
    with pytest.raises(UserError, match="nosuch.png cannot be read as an image: no such file"):
        get_image_embeddings(tiny_data.table.assign(image="nosuch.png"), run)
    with pytest.raises(UserError, match="is not a run folder"):
        get_image_embeddings(tiny_data.table, run / "nosuch")


# --- classify ---------------------------------------------------------------------------------------------------


def test_classify_is_a_softmax_over_the_prompts_mean(model, tiny_data):
    images, labels, templates = paths(tiny_data, 3), ["red", "green", "blue"], ("a {}.", "one {} box")
    result = classify(model, images, labels, templates)
    for image, ranked in zip(images, result, strict=True):
        vector = encode_image(model, image)[0].double()
        logits = {}
        for label in labels:
            prompts = [encode_text(model, template.format(label))[0].double() for template in templates]
            mean = sum(prompts) / len(prompts)
            logits[label] = (mean @ vector / mean.norm() * model.logit_scale.item()).item()
        total = sum(math.exp(logit) for logit in logits.values())
        wanted = {label: math.exp(logit) / total for label, logit in logits.items()}
        assert dict(ranked) == pytest.approx(wanted, abs=1e-4)
        assert [p for _, p in ranked] == sorted((p for _, p in ranked), reverse=True)
    assert sum(p for _, p in result[0]) == pytest.approx(1, abs=1e-5)


def test_classify_one_image_none_and_a_wrong_template(model, tiny_data):
    image = paths(tiny_data, 1)[0]
    assert classify(model, image, ["red"]) == [[("red", 1.0)]]
    assert classify(model, [], ["red", "blue"]) == []
    with pytest.raises(UserError, match="a template has {} where the label goes, unlike 'a photo'"):
        classify(model, image, ["red"], templates=["a {}", "a photo"])
