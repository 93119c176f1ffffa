"""The search page: what it serves and refuses, and, in a real Chromium, that it works without the network."""

import importlib.util
import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from processes import Command

from clip_scratch import CFG, Index, app, read_captions
from clip_scratch.errors import UserError
from clip_scratch.models.saved import best_folder
from clip_scratch.retrieval.indexing import update_index

# Not importorskip: every worker collects this file, and importing gradio takes seconds
pytestmark = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="there is no gradio")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def served(scene_run, tmp_path_factory):
    """The page of an index of 40 scenes on a free port: `.url`, `.client`, `.photos`, `.index`."""
    root = tmp_path_factory.mktemp("app")
    os.environ["GRADIO_TEMP_DIR"], os.environ["GRADIO_ANALYTICS_ENABLED"] = str(root / "uploads"), "False"
    import uvicorn
    from fastapi.testclient import TestClient

    from clip_scratch.retrieval.page import build_page

    shutil.copytree(scene_run.cwd / "data/scenes-240-42/Images", root / "photos")
    for path in sorted((root / "photos").iterdir())[40:]:
        path.unlink()
    (root / "secret.png").write_bytes(next((root / "photos").iterdir()).read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(scene_run.cwd)
        update_index(scene_run.folder, root / "photos", root / "index", device="cpu")
    index = Index.open(root / "index")
    page = build_page(index)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(page, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    client = TestClient(page, base_url="http://127.0.0.1")
    yield SimpleNamespace(url=f"http://127.0.0.1:{port}", client=client, photos=root / "photos", index=index, root=root)
    server.should_exit = True
    thread.join(10)


# ---- what is served


def test_pictures_of_indexed_images(served):
    name = sorted(served.index.store.known())[0]
    answer = served.client.get("/picture", params={"path": name})
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/jpeg"
    explained = served.client.get("/explained", params={"path": name, "query": "a red circle"})
    assert explained.status_code == 200 and explained.content[:2] == b"\xff\xd8"


@pytest.mark.parametrize(
    "path",
    [
        "../secret.png",
        "./../photos/../secret.png",
        "..%2fsecret.png",
        "/etc/passwd",
        "nothing.png",
        "",
        "\0",
        "a" * 9000,
    ],
)
def test_nothing_else(served, path):
    for address in ("/picture", "/explained"):
        answer = served.client.get(address, params={"path": path, "query": "x"})
        assert answer.status_code == 404 and b"PNG" not in answer.content


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "{root}/secret.png", "{root}/index/index.json", "{root}/photos/../secret.png", "{cwd}/setup.cfg"],
)
@pytest.mark.parametrize("route", ["/gradio_api/file=", "/file=", "/gradio_api/proxy=", "/static/", "/assets/"])
def test_gradio_serves_no_files(served, path, route):
    path = path.format(root=served.root, cwd=Path.cwd())
    assert served.client.get(route + path).status_code in (400, 401, 403, 404, 422)


def test_a_file_that_was_swapped(served, tmp_path):
    """A symlink in the place of an indexed image shows nothing of where it leads."""
    name = sorted(served.index.store.known())[1]
    shutil.move(served.photos / name, tmp_path / "kept.png")
    try:
        (served.photos / name).symlink_to(served.root / "secret.png")
        assert served.client.get("/picture", params={"path": name, "large": True}).status_code == 404
        (served.photos / name).unlink()
        assert served.client.get("/picture", params={"path": name, "large": True}).status_code == 404
    finally:
        (served.photos / name).unlink(missing_ok=True)
        shutil.move(tmp_path / "kept.png", served.photos / name)


def test_other_hosts_are_refused(served):
    assert served.client.get("/", headers={"Host": "evil.example"}).status_code == 400


# ---- queries


def test_messages_in_the_page(served, tmp_path):
    from clip_scratch.retrieval import page

    def asked(text="", file=None, least=-6.0, where=""):
        return page._results(served.index, text, file, least, where)

    assert asked("a red circle").count("<figure") == 40 and asked("") == ""
    assert "is not a condition on the images" in asked("a red circle", where="yaer > 2")
    assert "&lt;script&gt;" in asked("a red circle", where="<script>")
    assert "No image" in asked("a red circle", least=7.9)
    (tmp_path / "x.png").write_bytes(b"no picture")
    assert "cannot be read as an image" in asked(file=str(tmp_path / "x.png"))
    Image.fromarray(np.zeros((10_000, 10_000), bool)).save(tmp_path / "huge.png")
    assert "has 10000 x 10000 pixels" in asked(file=str(tmp_path / "huge.png"))
    assert asked("ignored", file=str(next(served.photos.iterdir()))).count("<figure") == 40
    assert "Give two labels" in page._labelled(served.index, "one")
    assert page._labelled(served.index, "a red circle\na blue square").count("<h4>") == 2


def test_names_are_escaped(served):
    from clip_scratch.retrieval import page

    figure = page._figure('<b>"x"&.png', "<i>")
    assert "<b>" not in figure and "<i>" not in figure and "path=%3Cb%3E%22x%22%26.png" in figure


# ---- in a browser


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_in_chromium(served, monkeypatch):
    sync = pytest.importorskip("playwright.sync_api")
    from clip_scratch.retrieval.page import _results as results

    options = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
               "--disable-component-update", "--disable-quic"]  # fmt: skip
    errors, addresses = [], []
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(60_000)
        sync.expect.set_options(timeout=60_000)  # a loaded machine is slow
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(served.url)
        figures = page.locator("#results figure")

        page.get_by_label("Query").fill("a red circle")
        page.get_by_label("Query").press("Enter")
        sync.expect(figures).to_have_count(40)
        loaded = "() => [...document.querySelectorAll('#results img')].filter(i => i.naturalWidth).length >= 9"
        page.wait_for_function(loaded)

        least = sorted((r["score"] for r in served.index.search("a red circle", 40).records), reverse=True)[9]
        number = page.get_by_label("number input for Least score")
        number.fill(f"{least:.1f}")
        number.press("Enter")
        slider = page.locator("input[type=range]")
        slider.focus()
        slider.press("ArrowRight")
        sync.expect(figures).not_to_have_count(40)
        assert 0 < figures.count() < 20
        number.fill("-6")
        begun, may_end = threading.Event(), threading.Event()

        def slow(*args):
            begun.set()
            may_end.wait(30)
            return results(*args)

        monkeypatch.setattr("clip_scratch.retrieval.page._results", slow)
        slider.focus()
        slider.press("ArrowLeft")
        assert begun.wait(30)
        # A search while another runs comes after it, and is not lost
        page.get_by_label("Only where").fill("path < '000013'")
        page.get_by_label("Only where").press("Enter")
        page.wait_for_timeout(500)
        may_end.set()
        sync.expect(figures).to_have_count(13)
        figures.first.click()
        sync.expect(page.locator("#details figure")).to_have_count(8)
        page.wait_for_function("() => document.querySelector('#details .explained')?.naturalWidth > 0")
        assert page.locator("#details li").count() == 5

        page.get_by_label("Only where").fill("")
        page.locator("input[type=file]").set_input_files(str(served.photos / "000003.png"))
        sync.expect(figures).to_have_count(40)
        sync.expect(figures.first).to_have_attribute("data-path", "000003.png")

        page.get_by_role("tab", name="Map").click()
        sync.expect(page.locator("#map circle")).to_have_count(40)
        page.get_by_role("tab", name="Labels").click()
        page.get_by_label("Labels, one a line").fill("a red circle\na green star")
        page.get_by_role("button", name="Sort the images").click()
        sync.expect(page.locator("#labels figure").first).to_be_visible()
        browser.close()
    outside = [url for url in addresses if not url.startswith((served.url, "data:", "blob:"))]
    assert not errors and not outside


# ---- mistakes


def test_mistakes(served, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is not an index"):
        app.main(app.Arguments(str(tmp_path)))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="choose another --port"):
            app.main(app.Arguments(str(served.root / "index"), port=taken.getsockname()[1]))
    with pytest.raises(UserError, match="choose another --port"):
        app.main(app.Arguments(str(served.root / "index"), port=99999))
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"pip install 'clip_scratch\[app\]'"):
        app.main(app.Arguments(str(served.root / "index"), port=0))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command(served, number):
    """It says where the page is; Ctrl-C or SIGTERM ends it and deletes the uploads."""
    words = ["-m", "clip_scratch.app", served.root / "index", "--port", "0"]
    command = Command(words, served.root, {"TMPDIR": str(served.root)})
    deadline = time.monotonic() + 60
    while "40 images in" not in command.out and command.returncode is None and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    os.kill(command.pid, number)
    done = command.wait(30)
    assert "40 images in" in done.stdout and "Traceback" not in done.stdout + done.stderr
    assert done.returncode in (130, 143, 0), done
    assert not list(served.root.glob("clip-scratch-uploads-*"))


@pytest.mark.slow
def test_the_released_model(tmp_path, monkeypatch):
    """Without a run or an index: it loads, is small, finds what it has not seen, and is what the page shows."""
    best = best_folder("scenes-tiny")
    assert sum(file.stat().st_size for file in best.iterdir()) < 4e6
    assert "/" not in (best / "config.json").read_text()  # no path of the machine that made it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("clip_scratch.retrieval.indexing._CAPTIONS", 1000)
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # a traced text tower, in a tenth of the time
    index = Index.open(app._demo())
    assert len(index) == 500 and len(index.captions[0]) == 1000
    assert not list(Path("data").glob("scenes-6000*"))  # the scenes that the model was trained on are not drawn again
    captions = read_captions(CFG(captions_path="data/scenes-demo/captions.txt"))
    firsts = captions.groupby("image").head(1)
    found = [image == index.search(caption, n=10)[0][0] for image, caption in firsts[["image", "caption"]].values[:100]]
    assert np.mean(found) > 0.2
    assert app._demo() == "indexes/scenes-demo"  # again: nothing to do
