"""`search index` and `search find` as typed: what they print and write, and how little `find` loads."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tyro
from PIL import Image
from processes import Command

from clip_scratch import encode_text, load, search
from clip_scratch.retrieval import terminal
from clip_scratch.retrieval.index import Index

ENV = os.environ | {"PYTHONPATH": str(Path(search.__file__).parents[1])}


def run(*words):
    search.main(tyro.cli(search.Arguments, args=list(words)))


@pytest.fixture(scope="module")
def photos(scene_run, tmp_path_factory):
    """A folder with photos/ of 30 scenes and indexes/photos, made by the command: `.cwd`, `.run`, `.out`, `.err`."""
    cwd = tmp_path_factory.mktemp("search")
    (cwd / "photos/holiday").mkdir(parents=True)
    for i, path in enumerate(sorted((scene_run.cwd / "data/scenes-240-42/Images").iterdir())[:30]):
        shutil.copy(path, cwd / "photos" / ("holiday" if i % 3 == 0 else "") / path.name)
    (cwd / "photos/broken.jpg").write_bytes(b"no picture")
    (cwd / "photos/._broken.png").write_bytes(b"AppleDouble")
    (cwd / "photos/folder.png").mkdir()
    (cwd / "data").symlink_to(scene_run.cwd / "data")
    words = ["-m", "clip_scratch.search", "index", scene_run.folder, "photos", "--device", "cpu"]
    done = Command(words, cwd).wait()
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(cwd=cwd, run=scene_run.folder, out=done.stdout, err=done.stderr)


@pytest.fixture(autouse=True)
def _in_folder(photos, monkeypatch):
    monkeypatch.chdir(photos.cwd)


def test_index_says_what_it_did(photos):
    assert "indexes/photos: 30 images; 30 embedded" in photos.out and "search find indexes/photos" in photos.out
    assert "left out, since they cannot be read: 1\n  broken.jpg: cannot be decoded" in photos.err


def test_find_prints_scores_and_names(photos, capsys):
    run("find", "indexes/photos", "a red circle", "a green star + blue", "-n", "4")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[0] == "'a red circle'" and lines[5] == "'a green star + blue'"
    assert all(line.endswith(".png") for line in lines[1:5] + lines[6:])


def test_json_and_conditions(photos, capsys):
    run("find", "indexes/photos", "a red circle", "--json", "--where", "path like 'holiday/%'", "-n", "50")
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["query"] == "a red circle" and len(answer["results"]) == 10
    assert {"path", "score", "cosine", "width", "date"} <= answer["results"][0].keys()
    cut = answer["results"][4]["score"]
    run("find", "indexes/photos", "a red circle", "--json", "--where", "path like 'holiday/%'", "--min-score", str(cut))
    (answer,) = json.loads(capsys.readouterr().out)
    assert all(result["score"] >= cut for result in answer["results"])
    run("find", "indexes/photos", "a red circle", "--min-score", "99")
    assert capsys.readouterr().out == "'a red circle'  no image\n"


def test_by_image(photos, capsys, tmp_path):
    name = next(iter(Index.open("indexes/photos").store.known()))
    run("find", "indexes/photos", "--image", f"photos/{name}", "-n", "3")
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 4 and out.count(name) == 1  # the query's own name
    shutil.copy(f"photos/{name}", tmp_path / "other.png")
    run("find", "indexes/photos", "--image", str(tmp_path / "other.png"), "-n", "1")
    assert name in capsys.readouterr().out
    run("find", "indexes/photos", "--image", f"photos/{name}", "--captions", "-n", "3")
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize("explained", [False, True])
def test_grid(photos, tmp_path, explained, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    run(
        "find",
        "indexes/photos",
        "a red circle",
        "--grid",
        str(tmp_path / "x.png"),
        "--open",
        *["--explain"] * explained,
    )
    assert Image.open(tmp_path / "x.png").width > 300 and opened == [(tmp_path / "x.png").as_uri()]


@pytest.mark.parametrize("kind", ["onnx", "TorchScript"])
def test_find_loads_the_text_tower_alone(photos, kind, monkeypatch):
    """As ONNX, or as TorchScript where that was missing when the index was made; the answers are the model's."""
    folder, heavy = "indexes/photos", {"transformers", "timm", "pandas", "matplotlib", "cv2"}
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
        assert os.path.isfile("indexes/photos/query/text.onnx"), photos.err
        heavy |= {"torch"}
    else:
        folder = "indexes/traced"
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "onnxscript", None)
            run("index", str(photos.run), "photos", "--index", folder, "--device", "cpu")
        assert sorted(os.listdir(f"{folder}/query")) == ["text.pt", "tokenizer.json"]
    code = (
        "import sys; from clip_scratch import search;"
        f"search.main(search.FindArguments({folder!r}, ('a red circle',), n=30, json=True));"
        f"heavy = {heavy} & sys.modules.keys();"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    quick = {r["path"]: r["cosine"] for r in json.loads(done.stdout)[0]["results"]}
    index = Index.open(folder)
    query = encode_text(load(photos.run), "a red circle").numpy()
    assert quick == pytest.approx(dict(index.nearest(["q"], query, 30)[0].pairs), abs=1e-3)


def test_thumbnails(photos, monkeypatch):
    path = next(p for p in (photos.cwd / "photos").glob("0*.png"))
    for name in ("KITTY_WINDOW_ID", "TERM_PROGRAM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert terminal.thumbnail(path) == ""
    monkeypatch.setenv("TERM_PROGRAM", "iTerm.app")
    assert terminal.thumbnail(path).startswith("\033]1337;File=inline=1;height=5:iVBOR")
    monkeypatch.setenv("TERM", "xterm-kitty")
    assert terminal.thumbnail(path).startswith("\033_Ga=T,f=100,r=5,m=") and terminal.thumbnail(path).endswith(
        "\033\\ "
    )
    assert terminal.thumbnail(photos.cwd / "photos/broken.jpg") == ""
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    assert terminal.thumbnail(path) == ""
