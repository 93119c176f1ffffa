"""An index in Milvus, through the embedded milvus-lite: the same answers as the local store on the same vectors."""

import json

import numpy as np
import pytest

from clip_scratch.errors import UserError
from clip_scratch.retrieval.index import FORMAT, INFO, Index
from clip_scratch.retrieval.milvus_store import MilvusStore
from clip_scratch.retrieval.store import LocalStore

pytest.importorskip("milvus_lite")
N, DIM = 300, 32


def unit(n, seed):
    rows = np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float16).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float16).astype(np.float32)


def record(i):
    date = f"20{10 + i % 10}-0{1 + i % 9}-01 00:00:00" if i % 3 else None
    return {"path": f"{'ab'[i % 2]}/{i}.jpg", "size": i, "mtime_ns": 10**18 + i, "date": date, "background": i / N}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("milvus")
    both = LocalStore(folder, DIM, writing=True), MilvusStore("photos.db", folder, DIM, writing=True)
    for store in both:
        store.add([record(i) for i in range(N)], unit(N, 0))
    return both


def test_the_same_answers(stores):
    local, milvus = stores
    queries = unit(5, 1)
    assert len(local) == len(milvus) == N and local.known() == milvus.known()
    for where in ("", "year >= 2013", "path like 'a/%' and size < 100", "month == 4 or size > 290"):
        for ours, theirs in zip(local.search(queries, 12, where), milvus.search(queries, 12, where), strict=True):
            assert [r["path"] for r in theirs] == [r["path"] for r in ours]
            assert [r["cosine"] for r in theirs] == pytest.approx([r["cosine"] for r in ours], abs=1e-5)
            for a, b in zip(ours, theirs, strict=True):
                assert {name: b[name] for name in record(0)} == {name: a[name] for name in record(0)}
    assert np.allclose(milvus.vector("a/4.jpg"), local.vector("a/4.jpg"), atol=1e-3) and milvus.vector("x") is None
    paths, sampled = milvus.sample(10)
    assert sampled.shape == (10, DIM) and np.allclose(sampled[3], milvus.vector(paths[3]))
    assert milvus.record("a/4.jpg")["size"] == local.record("a/4.jpg")["size"] == 4 and local.record("x") is None
    assert {"path", "year", "size"} <= set(milvus.columns)


def test_insert_replace_delete_count(tmp_path):
    with MilvusStore("photos.db", tmp_path, DIM, writing=True) as store:
        store.add([record(i) for i in range(20)], unit(20, 0))
        store.add([record(3) | {"size": 99}], unit(1, 5))
        store.update([{"path": record(4)["path"], "owner": "Ann"}])
        store.remove([record(i)["path"] for i in range(10, 20)])
        assert len(store) == 10
        assert store.search(unit(1, 5), 1)[0][0]["size"] == 99
        assert [r["path"] for r in store.search(unit(1, 5), 9, "owner == 'Ann'")[0]] == [record(4)["path"]]
        assert np.allclose(store.vector(record(4)["path"]), unit(20, 0)[4])


def test_an_index_searches_it(stores, tmp_path):
    local, _ = stores
    info = {"format": FORMAT, "dim": DIM, "logit_scale": 20.0, "folder": str(tmp_path), "run": "r", "fingerprint": "f"}
    results = []
    for store in ("", "photos.db"):
        (local.folder / INFO).write_text(json.dumps(info | {"store": store}))
        index = Index.open(local.folder)
        results.append(index.nearest(["q"], unit(1, 7), n=20, min_score=0.2)[0].to_frame())
        assert len(index) == N
    ours, theirs = results
    assert len(ours) > 0 and list(ours["path"]) == list(theirs["path"])
    assert list(ours["score"]) == pytest.approx(list(theirs["score"]), abs=1e-3)


def test_mistakes(stores, tmp_path, monkeypatch):
    _, milvus = stores
    with pytest.raises(UserError, match="is not a Milvus filter"):
        milvus.search(unit(1, 0), 3, "year >")
    with pytest.raises(UserError, match="neither milvus://HOST:PORT/COLLECTION nor a file name"):
        MilvusStore("http://localhost", tmp_path, DIM)
    with pytest.raises(UserError, match=r"Milvus \(milvus://127.0.0.1:9/photos\)"):
        MilvusStore("milvus://127.0.0.1:9/photos", tmp_path, DIM)
    with pytest.raises(UserError, match="has no collection 'photos'"):
        MilvusStore("new.db", tmp_path, DIM)
    with pytest.raises(UserError, match="has no embeddings of 7 dimensions"):
        MilvusStore("photos.db", stores[0].folder, 7)
    monkeypatch.setitem(__import__("sys").modules, "pymilvus", None)
    with pytest.raises(UserError, match="pip install 'clip_scratch"):
        MilvusStore("photos.db", tmp_path, DIM)
