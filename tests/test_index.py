"""The saved index: what it holds after additions, removals, kills and damage, and what searches in it find."""

import json
import os
import shutil
import sqlite3
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clip_scratch import Index, encode_image, encode_text, find_matches, load
from clip_scratch.errors import UserError
from clip_scratch.retrieval import indexing, store
from clip_scratch.retrieval.index import log_mean_exp
from clip_scratch.retrieval.indexing import read_columns, update_index
from clip_scratch.retrieval.query import parse
from clip_scratch.retrieval.store import LocalStore

QUERY = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def built(scene_run, tmp_path_factory):
    """An index of 70 scenes: `.index`, `.photos`, `.run`, `.model`; copy what you change."""
    root = tmp_path_factory.mktemp("index")
    (root / "photos/more").mkdir(parents=True)
    for i, path in enumerate(sorted((scene_run.cwd / "data/scenes-240-42/Images").iterdir())[:70]):
        shutil.copy(path, root / "photos" / ("more" if i % 2 else "") / path.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(scene_run.cwd)
        report = update_index(scene_run.folder, root / "photos", root / "index", device="cpu")
    return SimpleNamespace(
        index=root / "index", photos=root / "photos", run=scene_run.folder, model=load(scene_run.folder), report=report
    )


@pytest.fixture
def copied(built, tmp_path):
    """The same with an index and photos of the test's own."""
    shutil.copytree(built.index, tmp_path / "index")
    shutil.copytree(built.photos, tmp_path / "photos")
    info = json.loads((tmp_path / "index/index.json").read_text())
    (tmp_path / "index/index.json").write_text(json.dumps(info | {"folder": str(tmp_path / "photos")}))
    return SimpleNamespace(**vars(built) | {"index": tmp_path / "index", "photos": tmp_path / "photos"})


def update(which, **options):
    return update_index(which.run, which.photos, which.index, device="cpu", **options)


def by_hand(model, photos, query):
    """Every image below `photos` with its cosine in float32, best first."""
    names = sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.png"))
    cosines = encode_image(model, [photos / name for name in names]) @ encode_text(model, query)[0]
    return sorted(zip(names, cosines.tolist(), strict=True), key=lambda pair: -pair[1])


def check_search(index, model, photos):
    found, wanted = index.search(QUERY, n=1000), by_hand(model, photos, QUERY)
    assert len(found) == len(wanted) == len(index)
    assert dict(found) == pytest.approx(dict(wanted), abs=1e-3)
    cosines = [cosine for _, cosine in found]
    assert cosines == sorted(cosines, reverse=True)


def same(found, wanted):
    """The same images in the same order, with the same cosines up to rounding."""
    assert [name for name, _ in found] == [name for name, _ in wanted]
    assert [cosine for _, cosine in found] == pytest.approx([cosine for _, cosine in wanted], abs=1e-3)


# ---- building and updating


def test_finds_what_a_scan_finds(built):
    assert (built.report.images, built.report.added, built.report.removed) == (70, 70, 0)
    check_search(Index.open(built.index), built.model, built.photos)


def test_it_needs_neither_the_run_nor_its_place(built, tmp_path):
    wanted = list(Index.open(built.index).search(QUERY))
    shutil.copytree(built.index, tmp_path / "elsewhere")
    assert list(Index.open(tmp_path / "elsewhere").search(QUERY)) == wanted


def test_an_update_embeds_what_is_new_or_changed_and_forgets_what_is_gone(copied):
    assert update(copied).added == 0
    names = sorted(path.name for path in copied.photos.glob("*.png"))
    (copied.photos / names[0]).unlink()
    shutil.copy(copied.photos / names[1], copied.photos / "copy.png")
    changed = copied.photos / names[2]
    Image.new("RGB", (40, 30), "red").save(changed)
    report = update(copied)
    assert (report.images, report.added, report.removed) == (70, 2, 1)
    index = Index.open(copied.index)
    check_search(index, copied.model, copied.photos)
    record = index.search(QUERY, n=100).to_frame().set_index("path").loc[names[2]]
    assert (record["width"], record["height"], record["size"]) == (40, 30, changed.stat().st_size)


def test_an_interrupted_update_goes_on(copied, monkeypatch):
    shutil.rmtree(copied.index)
    monkeypatch.setattr(indexing, "_BATCH", 8)
    embedded = indexing._embedded

    def interrupted(*args):
        for i, batch in enumerate(embedded(*args)):
            if i == 3:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(indexing, "_embedded", interrupted)
        update(copied)
    index = Index.open(copied.index)
    assert len(index) == 24 and len(index.search(QUERY, n=100)) == 24
    assert update(copied).added == 46
    check_search(index, copied.model, copied.photos)


def test_embeddings_that_no_transaction_names_are_overwritten(tmp_path):
    """A writer killed after it wrote the array and before it committed the manifest."""
    rows = np.eye(4, dtype=np.float32)
    with LocalStore(tmp_path, 4, writing=True) as writer:
        writer.add([{"path": "a"}, {"path": "b"}], rows[:2])
    with open(tmp_path / "embeddings-0.f16", "ab") as file:
        file.write(b"\x7f" * 20)
    with LocalStore(tmp_path, 4, writing=True) as writer:
        writer.add([{"path": "c"}], rows[2:3])
        assert [r["path"] for r in writer.search(rows[2:3], 1)[0]] == ["c"]
    assert len(LocalStore(tmp_path, 4)) == 3


def test_readers_follow_a_writer_and_never_wait(tmp_path):
    rows = np.eye(8, dtype=np.float32)
    with LocalStore(tmp_path, 8, writing=True) as writer:
        writer.add([{"path": str(i)} for i in range(4)], rows[:4])
        reader = LocalStore(tmp_path, 8)
        assert len(reader.search(rows[:1], 8)[0]) == 4
        writer._sql.execute("begin immediate")  # a transaction that takes its time
        writer._sql.execute("delete from photos")
        assert len(reader.search(rows[:1], 8)[0]) == 4
        writer._sql.rollback()
        writer.add([{"path": "7"}], rows[7:])
        assert reader.search(rows[7:], 1)[0][0]["path"] == "7"


def test_dead_rows_are_dropped_under_an_open_reader(tmp_path):
    rows = np.eye(16, dtype=np.float32)
    with LocalStore(tmp_path, 16, writing=True) as writer:
        writer.add([{"path": str(i)} for i in range(16)], rows)
        reader = LocalStore(tmp_path, 16)
        reader.search(rows[:1], 1)
        writer.remove([str(i) for i in range(0, 16, 2)])
        writer.finish(ann=False)
        assert not (tmp_path / "embeddings-0.f16").exists()
        assert (tmp_path / "embeddings-1.f16").stat().st_size == 8 * 16 * 2
        for which in (reader, writer, LocalStore(tmp_path, 16)):
            for i in range(1, 16, 2):
                assert [r["path"] for r in which.search(rows[i : i + 1], 1)[0]] == [str(i)]
            assert len(which.search(rows[:1], 100)[0]) == 8


def test_one_writer_at_a_time(copied, monkeypatch):
    inside, leave = threading.Event(), threading.Event()
    commit = indexing._commit

    def waiting(*args):
        inside.set()
        leave.wait(30)
        return commit(*args)

    monkeypatch.setattr(indexing, "_commit", waiting)
    thread = threading.Thread(target=update, args=(copied,))
    thread.start()
    assert inside.wait(30)
    try:
        with pytest.raises(UserError, match="another process is writing the index"):
            update(copied)
        assert len(Index.open(copied.index).search(QUERY)) == 9
    finally:
        leave.set()
        thread.join()


@pytest.mark.parametrize("suffix", ["gif", "webp", "bmp", "tiff", "jpg", "heic"])
def test_formats(copied, suffix):
    if suffix == "heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    source = Image.open(next(copied.photos.glob("*.png"))).convert("RGB")
    more = {"save_all": True, "append_images": [Image.new("RGB", source.size, "black")]} if suffix == "gif" else {}
    source.save(copied.photos / f"x.{suffix}", **more)
    assert update(copied).added == 1
    own = dict(Index.open(copied.index).search(copied.photos / f"x.{suffix}", n=2))  # it and its source, in any order
    assert own[f"x.{suffix}"] > 0.999


def test_files_that_are_no_images_are_listed(copied):
    (copied.photos / "broken.jpg").write_bytes(b"no picture")
    (copied.photos / "empty.png").write_bytes(b"")
    report = update(copied)
    assert (report.images, report.added) == (70, 0)
    assert list(report.faults) == ["broken.jpg", "empty.png"] and "cannot be decoded" in report.faults["broken.jpg"]


def test_exif(copied):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    exif.get_ifd(0x8769)[36867] = "2021:07:14 18:30:05"
    Image.new("RGB", (60, 20), "blue").save(copied.photos / "dated.jpg", exif=exif)
    update(copied)
    found = Index.open(copied.index).search(QUERY, where="year = 2021 and month = 7 and height > width")
    assert [(r["path"], r["date"], r["width"]) for r in found.records] == [("dated.jpg", "2021-07-14 18:30:05", 20)]


@pytest.mark.parametrize("text", ["0000:00:00 00:00:00", "yesterday", "", None, b"\xff", "2021-07-14"])
def test_dates_that_are_none(text):
    assert indexing._date(text) is None


# ---- conditions


def test_columns_of_a_table(copied, tmp_path):
    names = [path.relative_to(copied.photos).as_posix() for path in sorted(copied.photos.rglob("*.png"))]
    lines = [f"{names[0]},12.5,Ann", f"{names[1].split('/')[-1]},7,Bob", "elsewhere.png,1,Eve"]
    (tmp_path / "photos.csv").write_text("\n".join(["file,Unit Price,owner", *lines]))
    report = update(copied, table=str(tmp_path / "photos.csv"))
    assert (report.added, report.unmatched) == (0, 1)
    index = Index.open(copied.index)
    assert {"unit_price", "owner"} <= set(index.columns)
    assert [name for name, _ in index.search(QUERY, where="unit_price > 10")] == [names[0]]
    assert [r["owner"] for r in index.search(QUERY, where="unit_price < 10").records] == ["Bob"]
    Image.new("RGB", (9, 9)).save(copied.photos / names[0])  # changed, and the table is not given again
    assert update(copied).added == 1
    assert [name for name, _ in index.search(QUERY, where="owner = 'Ann'")] == [names[0]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,price\na.png,1", "no column with image names"),
        ("image,size\na.png,1", "rename the column 'size'"),
        ("image,a b,a-b\nx.png,1,2", "two columns of one name"),
        ("", "cannot be read as a CSV file"),
    ],
)
def test_tables_that_are_refused(tmp_path, content, message):
    (tmp_path / "photos.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        read_columns(tmp_path / "photos.csv")


def test_where_comes_before_the_search(built):
    index = Index.open(built.index)
    everything = index.search(QUERY, n=100)
    some = index.search(QUERY, n=5, where="path like 'more/%'")
    assert list(some) == [pair for pair in everything if pair[0].startswith("more/")][:5]
    assert len(index.search(QUERY, where="width < 0")) == 0


@pytest.mark.parametrize(
    "where",
    [
        "yaer > 3", "path like", "1); delete from photos; --", "1) union select value from meta --", "(", "path = 'a",
        "exists (select * from meta)", "row in (select 1 from sqlite_master)", "load_extension('x')",
        "(with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n)", "\0",
    ],
)  # fmt: skip
def test_conditions_that_are_refused(built, where, monkeypatch):
    monkeypatch.setattr(store, "_WHERE_SECONDS", 0.5)
    index = Index.open(built.index)
    with pytest.raises(UserError, match="is not a condition on the images"):
        index.search(QUERY, where=where)
    assert len(index) == 70 and len(index.search(QUERY)) == 9  # nothing is lost, and the next search works


# ---- scores and queries


def test_scores(built):
    """The log-likelihood ratio, computed by hand in float64; equal to the definition for images without captions."""
    index = Index.open(built.index)
    captions, bank = index.captions
    assert len(captions) == len(set(captions)) > 100
    query = encode_text(built.model, QUERY)[0].double().numpy()
    names = sorted(index.store.known())
    images = encode_image(built.model, [built.photos / name for name in names]).double().numpy()
    scale = built.model.logit_scale.item()
    of_query = np.log(np.exp(scale * images @ query).mean())
    of_image = np.log(np.exp(scale * images @ bank.T.astype(np.float64)).mean(1))
    wanted = scale * images @ query - (of_query + of_image) / 2
    found = {r["path"]: r["score"] for r in index.search(QUERY, n=100).records}
    assert found == pytest.approx(dict(zip(names, wanted, strict=True)), abs=0.05)
    by_image = index.nearest(["q"], query[None].astype(np.float32), 100, of_words=False)[0]
    wanted = scale * images @ query - of_query
    assert {r["path"]: r["score"] for r in by_image.records} == pytest.approx(
        dict(zip(names, wanted, strict=True)), abs=0.05
    )


@pytest.mark.parametrize("min_score", [-3.0, 0.0, 0.5, 1.0, 50.0])
@pytest.mark.parametrize("n", [1, 4, 100])
def test_min_score_is_exact(built, min_score, n):
    index = Index.open(built.index)
    every = index.search(QUERY, n=100).records
    wanted = [r["path"] for r in every if r["score"] >= min_score][:n]
    assert [name for name, _ in index.search(QUERY, n=n, min_score=min_score)] == wanted


def test_log_mean_exp():
    assert log_mean_exp(np.array([[0.0, 0.0], [np.log(1), np.log(3)]])) == pytest.approx([0, np.log(2)])
    assert log_mean_exp(np.array([1000.0, 1000.0])) == pytest.approx(1000)


@pytest.mark.parametrize(
    ("query", "terms"),
    [
        ("a dog", [(1, "a dog")]),
        ("a dog + snow - 0.5*people", [(1, "a dog"), (1, "snow"), (-0.5, "people")]),
        ("- people + 2 * a well-kept lawn", [(-1, "people"), (2, "a well-kept lawn")]),
        ("t-shirt, 3+4", [(1, "t-shirt, 3+4")]),
        ("a dog -b", [(1, "a dog -b")]),
    ],
)
def test_parse(query, terms):
    assert parse(query) == terms


@given(st.text(max_size=30))
def test_parse_never_fails_but_for_empty_terms(query):
    try:
        assert all(name.strip() == name and name for _, name in parse(query))
    except UserError as error:
        assert "no text" in str(error)


def test_sums_of_sentences_and_images(built):
    index, image = Index.open(built.index), next(built.photos.glob("*.png"))
    words, picture = encode_text(built.model, "a red circle")[0], encode_image(built.model, image)[0]
    wanted = (0.5 * words - 2 * picture).numpy()
    found, of_words = index.queries.composed(f"0.5*a red circle - 2*{image}")
    assert np.allclose(found, wanted / np.linalg.norm(wanted), atol=1e-5) and not of_words
    assert index.queries.composed("a red circle + blue")[1]
    assert index.search(image, n=1)[0][0] == image.name == index.search(str(image), n=1)[0][0]
    with pytest.raises(UserError, match="cancel out"):
        index.search("a - a")
    with pytest.raises(UserError, match="there is no image nowhere.png"):
        index.search("a + nowhere.png")


def test_similar_images_and_captions(built):
    index, name = Index.open(built.index), "more/" + next(built.photos.glob("more/*")).name
    others = index.similar(name, n=5)
    assert len(others) == 5 and name not in dict(others)
    same(others, [pair for pair in index.search(built.photos / name, n=6) if pair[0] != name])
    captions, _ = index.captions
    cosines = encode_text(built.model, captions) @ encode_image(built.model, built.photos / name)[0]
    best = index.find_captions(name, n=3)
    assert [score for _, score in best] == pytest.approx(sorted(cosines.tolist(), reverse=True)[:3], abs=2e-3)
    same(best, index.find_captions(built.photos / name, n=3))
    with pytest.raises(UserError, match="is not in the index"):
        index.similar("nothing.png")


def test_find_matches_takes_an_index(built, tmp_path):
    index = Index.open(built.index)
    found = find_matches(built.model, index, QUERY, n=4, save=tmp_path / "found.png")
    same(found, index.search(QUERY, n=4))
    assert (tmp_path / "found.png").is_file()
    other = load(built.run)
    other.log_scale.data += 1
    with pytest.raises(UserError, match="was built with another model"):
        find_matches(other, index, QUERY)


def test_results(built):
    found = Index.open(built.index).search([QUERY, "a green star"], n=3)
    assert [len(result) for result in found] == [3, 3]
    frame = found[0].to_frame()
    assert list(frame.columns[:3]) == ["path", "score", "cosine"] and list(frame["path"]) == [n for n, _ in found[0]]
    assert found[0]._repr_png_()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="n is at least 1"):
        Index.open(built.index).search(QUERY, n=0)


# ---- an approximate index


def test_approximate_search(copied):
    pytest.importorskip("usearch")
    report = update(copied, ann=True)
    assert report.recall > 0.95
    index = Index.open(copied.index)
    assert index.store._graph is not None
    same(index.search(QUERY, n=5), by_hand(copied.model, copied.photos, QUERY)[:5])
    next(copied.photos.glob("*.png")).unlink()
    update(copied, ann=True)
    assert len(index) == 69 and len(index.search(QUERY, n=20)) == 20
    assert update(copied).recall is None and not (copied.index / "neighbours.usearch").exists()


# ---- damage and mistakes


def test_an_index_of_something_else(copied, built, scene_run, tmp_path):
    with pytest.raises(UserError, match="is an index of .*photos: choose another --index"):
        update_index(built.run, built.photos, copied.index, device="cpu")
    shutil.copytree(copied.photos, tmp_path / "moved")
    shutil.rmtree(copied.photos)
    report = update_index(built.run, tmp_path / "moved", copied.index, device="cpu")
    assert (report.images, Index.open(copied.index).folder) == (70, tmp_path / "moved")
    info = json.loads((copied.index / "index.json").read_text())
    (copied.index / "index.json").write_text(json.dumps(info | {"fingerprint": "another"}))
    with pytest.raises(UserError, match="was built with another model"):
        update_index(built.run, tmp_path / "moved", copied.index, device="cpu")


def damaged(path, how):
    content = path.read_bytes()
    path.write_bytes({"short": content[: len(content) // 2], "noise": os.urandom(len(content)), "empty": b""}[how])


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("index.json", "short"), ("index.json", "empty"), ("manifest.sqlite", "noise"), ("embeddings-0.f16", "short"),
        ("embeddings-0.f16", "empty"), ("captions.f16", "short"),
    ],
)  # fmt: skip
def test_damaged_files(copied, name, how):
    with sqlite3.connect(copied.index / "manifest.sqlite") as connection:
        connection.execute("pragma wal_checkpoint(truncate)")
    damaged(copied.index / name, how)
    with pytest.raises(UserError, match=r"damaged.*(delete|index)"):
        index = Index.open(copied.index)
        index.search(QUERY)
        index.find_captions(next(iter(index.store.known())))


def test_an_index_on_a_disk_that_cannot_be_written(copied):
    if os.geteuid() == 0:
        pytest.skip("root can write everywhere")
    copied.index.chmod(0o555)
    assert len(Index.open(copied.index).search(QUERY)) == 9
    copied.index.chmod(0o755)


def test_no_index_and_no_images(built, tmp_path):
    with pytest.raises(UserError, match="is not an index"):
        Index.open(tmp_path)
    with pytest.raises(UserError, match="there are no images below"):
        update_index(built.run, tmp_path, tmp_path / "index", device="cpu")
    assert not (tmp_path / "index").exists()


def test_a_model_whose_captions_are_gone(built, tmp_path, capsys, monkeypatch):
    """Images are indexed all the same; scores are calibrated by the images alone."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(built.run / "best", tmp_path / "best")
    config = json.loads((tmp_path / "best/config.json").read_text())
    (tmp_path / "best/config.json").write_text(json.dumps(config | {"captions_path": str(tmp_path / "gone.csv")}))
    update_index(tmp_path / "best", built.photos, tmp_path / "index", device="cpu")
    assert "no captions to describe images" in capsys.readouterr().out
    index = Index.open(tmp_path / "index")
    same(index.search(QUERY), Index.open(built.index).search(QUERY))
    with pytest.raises(UserError, match="has no captions"):
        index.find_captions("x.png")
