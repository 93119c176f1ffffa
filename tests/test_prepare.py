"""The prepare verb, against a local server: resume, damage, unsafe archives, caches, and clear errors."""

import dataclasses
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from clip_scratch import prepare
from clip_scratch.cli import parse
from clip_scratch.data import download as downloads
from clip_scratch.data.download import Remote, download
from clip_scratch.data.image_cache import ImageCache, open_images
from clip_scratch.data.loaders import build_loaders
from clip_scratch.data.source import open_data
from clip_scratch.data.sources import fetch
from clip_scratch.data.unpack import unpack
from clip_scratch.errors import UserError
from clip_scratch.models.hf_clip import image_geometry
from clip_scratch.presets import PRESETS

ROOT = str(Path(prepare.__file__).parents[1])
NAMES = [f"{i}_abc.jpg" for i in range(6)]


def jpg(i):
    return cv2.imencode(".jpg", np.full((8, 8, 3), 20 * i, np.uint8))[1].tobytes()


def tar(members, links=()):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            content = content.encode() if isinstance(content, str) else content
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        for link in links:
            file.addfile(link)
    return data.getvalue()


def archive(members, compression=zipfile.ZIP_STORED):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return data.getvalue()


@pytest.fixture
def flickr():
    """The two archives in the shape of the published ones, six images small."""
    images = {f"Flicker8k_Dataset/{name}": jpg(i) for i, name in enumerate(NAMES)}
    tokens = "".join(f"{name}#{k}\tA dog , number {k} .\n" for name in NAMES for k in range(5))
    texts = {"Flickr8k.token.txt": tokens, "readme.txt": "hello", "__MACOSX/._readme.txt": "junk"}
    for split, names in (("train", NAMES[:4]), ("dev", NAMES[4:5]), ("test", NAMES[5:])):
        texts[f"Flickr_8k.{split}Images.txt"] = "\n".join(names)
    junk = {"__MACOSX/Flicker8k_Dataset/._0_abc.jpg": b"junk"}
    return {"Flickr8k_Dataset.zip": archive(images | junk), "Flickr8k_text.zip": archive(texts)}


@pytest.fixture
def server():
    """A local server of `server.files`; it notes each (path, Range) asked for, and can hang up after some bytes, fail
    with `server.statuses` first, name a version of its files, redirect to another folder, and claim another size."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            served.requests.append((self.path, asked))
            if served.statuses:
                return self.send_error(served.statuses.pop(0))
            if self.path.startswith("/moved/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/moved"))
                return self.end_headers()
            content = served.files.get(self.path.strip("/"))
            if content is None:
                return self.send_error(404)
            is_same = self.headers.get("If-Range") in (None, served.version)
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and served.ranges and is_same else 0
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                return self.end_headers()
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start + served.lie))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            if served.version:
                self.send_header("ETag", served.version)
            self.end_headers()
            self.wfile.write(content[start:][: served.hang_up_after])

        def log_message(self, *args):
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.files, served.requests, served.ranges, served.hang_up_after = {}, [], True, None
    served.statuses, served.version, served.lie = [], "", 0
    served.url = f"http://127.0.0.1:{served.server_port}"
    threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(downloads, "_PAUSES", (0, 0))


def remote(server, name="a.zip", **published):
    return Remote(f"{server.url}/{name}", **published)


def test_a_download_that_is_cut_is_resumed(server, tmp_path):
    server.files, server.hang_up_after, server.version = {"a.zip": CONTENT}, 4000, '"1"'
    download(remote(server), tmp_path)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, "bytes=4000-", "bytes=8000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("have", [100, len(CONTENT)])
def test_a_part_of_an_earlier_run_is_used_or_fetched_again(server, tmp_path, ranges, have):
    server.files, server.ranges = {"a.zip": CONTENT}, ranges
    (tmp_path / "a.zip.part").write_bytes(CONTENT[:have])
    download(remote(server), tmp_path)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT and len(server.requests) <= 2


def test_a_part_longer_than_the_file_is_dropped(server, tmp_path):
    server.files = {"a.zip": CONTENT}
    (tmp_path / "a.zip.part").write_bytes(CONTENT + b"of another file")
    download(remote(server), tmp_path)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_a_file_that_changes_between_two_attempts_is_fetched_again(server, tmp_path):
    """With If-Range: two halves of different files are never joined."""
    server.files, server.hang_up_after, server.version = {"a.zip": CONTENT[::-1]}, 4000, '"old"'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(downloads, "_append", lambda *args, real=downloads._append: real(*args) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            download(remote(server), tmp_path)
    server.files, server.hang_up_after, server.version = {"a.zip": CONTENT}, None, '"new"'
    download(remote(server), tmp_path)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


@pytest.mark.parametrize("version", ["", '"new"'])
def test_a_part_of_a_file_that_has_changed_is_dropped(version, server, tmp_path):
    """By its size where the server names no version; also if a kill came before the new version was written down."""
    old, new = CONTENT[:4000], CONTENT[::-1] + b"more"
    (tmp_path / "a.zip.part").write_bytes(old)
    (tmp_path / "a.zip.part.version").write_text(f"{version.replace('new', 'old')}\n{len(CONTENT)}")
    server.files, server.version = {"a.zip": new}, version
    if version:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(Path, "write_text", lambda *_: 1 / 0)
            download(remote(server), tmp_path)
    download(remote(server), tmp_path)
    assert (tmp_path / "a.zip").read_bytes() == new and len(list(tmp_path.iterdir())) == 1


def test_a_whole_part_is_not_fetched_again(server, tmp_path):
    server.files, server.version = {"a.zip": CONTENT}, '"1"'
    (tmp_path / "a.zip.part").write_bytes(CONTENT)
    (tmp_path / "a.zip.part.version").write_text(f'"1"\n{len(CONTENT)}')
    download(remote(server), tmp_path)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT and len(server.requests) == 1


def test_faults_between_new_bytes_do_not_add_up(server, tmp_path, monkeypatch):
    """A server that is busy or gone, now and then, over a long download."""
    server.files, server.hang_up_after, asked = {"a.zip": CONTENT}, 2000, []

    def flaky(*args, real=downloads.urlopen, **settings):
        asked.append(1)
        if len(asked) % 3 == 1:
            raise downloads.URLError(ConnectionRefusedError("refused"))
        if len(asked) % 3 == 2:
            server.statuses.append(503)
        return real(*args, **settings)

    monkeypatch.setattr(downloads, "urlopen", flaky)
    download(remote(server), tmp_path)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT and len(asked) == 18


def test_a_server_that_stops_is_an_error_and_the_part_stays(server, tmp_path):
    server.files, server.hang_up_after = {"a.zip": CONTENT}, 0
    (tmp_path / "a.zip.part").write_bytes(CONTENT[:100])
    with pytest.raises(UserError, match="stops at byte 100. Run this again"):
        download(remote(server), tmp_path)
    assert (tmp_path / "a.zip.part").read_bytes() == CONTENT[:100] and not (tmp_path / "a.zip").exists()


def test_a_server_that_is_busy_is_asked_again_and_one_that_moved_is_followed(server, tmp_path):
    server.files, server.statuses = {"a.zip": CONTENT}, [503, 429]
    download(remote(server, "moved/a.zip"), tmp_path)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT and len(server.requests) == 4
    server.statuses = [503] * 9
    with pytest.raises(UserError, match="cannot be downloaded: .* 503"):
        download(remote(server, "b.zip"), tmp_path)
    assert len(server.statuses) == 6


def test_a_size_that_is_claimed_and_not_sent(server, tmp_path):
    server.files, server.lie = {"a.zip": CONTENT}, 7
    with pytest.raises(UserError, match="Run this again"):
        download(remote(server), tmp_path)
    assert not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize("published", [{"size": 9}, {"digest": "md5:" + "0" * 32}, {"digest": "sha256:" + "0" * 64}])
def test_another_file_than_the_published_one_is_refused(server, tmp_path, published):
    server.files = {"a.zip": CONTENT}
    with pytest.raises(UserError, match="is not the published file"):
        download(remote(server, **published), tmp_path)
    assert not list(tmp_path.glob("a.zip*"))
    download(remote(server, size=len(CONTENT), digest=f"md5:{hashlib.md5(CONTENT).hexdigest()}"), tmp_path)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "http://no-such-host.invalid/x", "nonsense"])
def test_no_network_is_one_clear_line_and_soon(tmp_path, url):
    start = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached.*put it at .* yourself"):
        prepare.data_set("flickr8k")(out=str(tmp_path), url=url)
    assert time.monotonic() - start < 12


def test_a_file_that_the_server_lacks(server, tmp_path):
    with pytest.raises(UserError, match="Flickr8k_text.zip cannot be downloaded.*404"):
        prepare.data_set("flickr8k")(out=str(tmp_path), url=server.url)
    assert len(server.requests) == 1


@pytest.fixture
def any_digest(monkeypatch):
    """The files of a test are not the published ones."""
    monkeypatch.setattr(downloads, "_check", lambda *_: None)


def test_a_download_other_than_the_published_one_is_refused(server, flickr, tmp_path):
    server.files = flickr
    with pytest.raises(UserError, match="Flickr8k_text.zip is not the published file: it has the md5 digest"):
        prepare.data_set("flickr8k")(out=str(tmp_path), url=server.url)


def test_flickr8k_from_the_archives_to_a_data_set(server, flickr, tmp_path, capsys, any_digest):
    server.files = flickr
    prepare.data_set("flickr8k")(out=str(tmp_path), url=server.url)
    said = capsys.readouterr().out
    rows = [line.split()[:3] for line in said.splitlines()]
    assert rows[1:5] == [["train", "4", "20"], ["valid", "1", "5"], ["test", "1", "5"], ["all", "6", "30"]]
    assert f"python -m clip_scratch.train flickr8k --captions-path {tmp_path}" in said
    assert sorted(path.name for path in (tmp_path / "Images").iterdir()) == NAMES
    assert (tmp_path / "Images" / NAMES[2]).read_bytes() == jpg(2)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".part", ".tmp")]

    asked = len(server.requests)
    prepare.data_set("flickr8k")(out=str(tmp_path), url=server.url)
    assert len(server.requests) == asked  # all there: nothing is fetched again


def test_zips_placed_by_hand_need_no_network(flickr, tmp_path):
    for name, content in flickr.items():
        (tmp_path / name).write_bytes(content)
    prepare.data_set("flickr8k")(out=str(tmp_path), url="http://127.0.0.1:9")
    assert len(list((tmp_path / "Images").iterdir())) == 6


def test_an_image_that_a_split_lists_and_no_archive_holds(server, flickr, tmp_path, capsys, any_digest):
    server.files = flickr | {"Flickr8k_Dataset.zip": archive({f"x/{name}": jpg(1) for name in NAMES[1:]})}
    prepare.data_set("flickr8k")(out=str(tmp_path), url=server.url)
    said = capsys.readouterr().out
    assert re.search(rf"that are missing: 1\..*\n  {NAMES[0]} \(Flickr8k.token", said)
    assert "\nNot all is cached, as training would stop: 1 of 6 images in " in said


RULES = {r"(?:.*/)?([^/]+\.jpg)": r"Images/\1"}


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("name", ["../evil.jpg", "Images/../../evil.jpg", "/evil.jpg", "..\\evil.jpg", "._evil.jpg"])
def test_an_archive_that_reaches_outside_stays_inside(tmp_path, name, kind):
    (tmp_path / "in").mkdir()
    members = {"fine.jpg": jpg(1), name: b"evil"}
    (tmp_path / "in/a").write_bytes(archive(members) if kind == "zip" else tar(members))
    unpack(tmp_path / "in/a", tmp_path / "in/out", RULES)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "a"]
    assert {path.parent for path in files} == {tmp_path / "in/out/Images"}


def test_links_and_devices_are_left_out(tmp_path):
    links = [tarfile.TarInfo(f"{i}.jpg") for i in range(4)]
    for link, kind in zip(links, (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE), strict=True):
        link.type, link.linkname = kind, "/etc/passwd"
    (tmp_path / "a.tar").write_bytes(tar({"fine.jpg": jpg(1)}, links))
    assert unpack(tmp_path / "a.tar", tmp_path / "out", RULES) == 1
    assert [path.name for path in (tmp_path / "out/Images").iterdir()] == ["fine.jpg"]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_bomb_is_refused(tmp_path, kind):
    members = {f"{i}.jpg": bytes(3_000_000) for i in range(3)}
    content = archive(members, zipfile.ZIP_DEFLATED) if kind == "zip" else gzip.compress(tar(members))
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match="more than 50 times its size: refused"):
        unpack(tmp_path / "a", tmp_path / "out", RULES)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "a"]


def test_a_bomb_in_a_header_is_refused(tmp_path):
    """tarfile would hold a name of 20 MB in memory."""
    (tmp_path / "a").write_bytes(gzip.compress(tar({"x" * 20_000_000: b""})))
    with pytest.raises(UserError, match="more than 50 times its size: refused"):
        unpack(tmp_path / "a", tmp_path / "out", RULES)


def test_every_flipped_byte_of_a_tar_gz_is_noticed(tmp_path):
    """Its checksum is at the end, beyond the last member."""
    whole = gzip.compress(tar({f"{i}.jpg": np.random.default_rng(i).bytes(900) for i in range(3)}))
    for position in range(12, len(whole), 41):
        flipped = bytearray(whole)
        flipped[position] ^= 255
        (tmp_path / "a").write_bytes(flipped)
        with pytest.raises(UserError, match="is damaged|more than 50 times"):
            unpack(tmp_path / "a", tmp_path / "out", RULES)


def test_a_damaged_archive_leaves_nothing_half_unpacked(flickr, tmp_path):
    whole = flickr["Flickr8k_Dataset.zip"]
    flipped = whole.replace(jpg(3), jpg(3)[:-9] + bytes(9))
    cut = gzip.compress(tar({f"{i}.jpg": jpg(i) for i in range(6)}))
    assert flipped != whole
    for content in (whole[: len(whole) // 2], flipped, b"", cut[: len(cut) // 2]):
        (tmp_path / "a.zip").write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            unpack(tmp_path / "a.zip", tmp_path / "out", RULES)
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "a.zip"]


def karpathy(names, folder=""):
    images = [
        {
            "filename": name,
            "split": split,
            "sentences": [{"raw": "A dog ."}],
            **({"filepath": folder} if folder else {}),
        }
        for name, split in zip(names, ("train", "restval", "val", "test", "train", "train"), strict=True)
    ]
    return json.dumps({"images": images})


def fashion(split, numbers):
    lines = [
        {"image_path": f"images/{split}/{i}.jpeg", "product_title": f"a shirt, {i}", "class_label": "shirt"}
        for i in numbers
    ]
    return "\n".join(map(json.dumps, lines))


def images(pattern, numbers=range(6)):
    return {pattern.format(i): jpg(i) for i in numbers}


FOOD = {"food-101/meta/train.txt": "apple_pie/0\napple_pie/1\napple_pie/2\napple_pie/3\n"}
FOOD |= {"food-101/meta/test.txt": "apple_pie/4\napple_pie/5\n", "food-101/README.txt": "x"}
PARTS = {"train": range(4), "val": range(4, 5), "test": range(5, 6)}
FASHION = {f"{split}_data.json": fashion(split, numbers) for split, numbers in PARTS.items()}
for split, numbers in PARTS.items():
    FASHION |= images(f"images/{split}/{{}}.jpeg", numbers)
NOWHERE = "http://127.0.0.1:9"
LISTS = {f"Flickr_8k.{split}Images.txt": "\n".join(names)
         for split, names in (("train", NAMES[:4]), ("dev", NAMES[4:5]), ("test", NAMES[5:]))}  # fmt: skip
KAGGLE = "image,caption\n" + "".join(f"{name},A dog .\n" for name in NAMES)
ARCHIVES = {  # as their publishers, or Kaggle, lay them out
    "flickr8k": [images("Images/{}_abc.jpg") | {"captions.txt": KAGGLE}, LISTS],
    "flickr30k": [{"dataset_flickr30k.json": karpathy(NAMES), "x.json": "{}"}, images("flickr30k-images/{}_abc.jpg")],
    "coco": [{"dataset_coco.json": karpathy(NAMES, "val2014")}, images("val2014/{}_abc.jpg")],
    "food": [images("food-101/images/apple_pie/{}.jpg") | FOOD],
    "indo_fashion": [FASHION],
}


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_fetched_by_hand(name, kind, tmp_path, capsys, monkeypatch):
    """Of every layout, with every image found and in a split; a second call has nothing to do."""
    paths = []
    for i, members in enumerate(ARCHIVES[name]):
        paths.append(tmp_path / f"{i}.{kind}")
        paths[-1].write_bytes(archive(members) if kind == "zip" else gzip.compress(tar(members)))
    out = tmp_path / "data"
    words = [name, "--out", str(out), "--url", NOWHERE, "--archive", *map(str, paths)]
    prepare.main(words)
    said = capsys.readouterr().out
    assert re.search(r"^all +6 +\d+", said, re.M) and "missing" not in said
    assert f"clip_scratch.train {name} --captions-path {out}" in said
    monkeypatch.setattr("clip_scratch.data.sources.unpack", None)
    prepare.main(words)


@pytest.mark.parametrize("name", [name for name in ARCHIVES if name != "food"])  # whose preset is of another set
def test_the_preset_of_that_name_trains_on_it_and_names_prepare_without_it(name, tmp_path, capsys, monkeypatch):
    """Where there is no folder data, where data/NAME is empty, and where it has captions but no images."""
    monkeypatch.chdir(tmp_path)
    for i, members in enumerate(ARCHIVES[name]):
        Path(f"{i}.zip").write_bytes(archive(members))
    for folder in (None, f"data/{name}"):
        if folder:
            Path(folder).mkdir(parents=True)
        with pytest.raises(UserError, match=rf"^(no captions file )?data/{name}.* Run: .*clip_scratch.prepare {name}$"):
            open_data(parse([name]))
    prepare.main([name, "--url", NOWHERE, "--archive", *map(str, sorted(tmp_path.glob("*.zip")))])
    assert capsys.readouterr().out.endswith(f"Train on it:  python -m clip_scratch.train {name}\n")
    source = open_data(parse([name]))
    folder = source.image_folder
    assert source.table["image"].nunique() == 6 and Path("data", name) in (folder, folder.parent)
    for image in source.table["image"].unique():
        (folder / image).unlink()
    with pytest.raises(UserError, match=f"none of the 6 images .* Run: .*clip_scratch.prepare {name}$"):
        open_data(parse([name]))


def test_scenes_are_drawn_where_training_looks_for_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        prepare.main(["scenes", "--n", "30", "--seed", "3"])
        said = capsys.readouterr().out
        assert said.startswith("30 images and 150 captions in data/scenes-30-3\n")
    words = said.split("clip_scratch.train ")[1].split()
    monkeypatch.setattr("clip_scratch.data.scenes.write.write_scenes", None)
    assert words[0] == "scenes" and open_data(parse(words)).table["image"].nunique() == 30


@pytest.mark.parametrize("name", ["flickr8k", "food", "scenes"])
def test_training_finds_its_caches_ready(name, tmp_path, capsys, monkeypatch, hf_clip, tiny_tokenizer):
    """Also of a pretrained CLIP, whose image processor sets the size; a second call builds nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("clip_scratch.data.tokenizer._MANY", 10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(PRESETS["food"], "model_name", str(hf_clip()))
    monkeypatch.setattr(
        "clip_scratch.data.source.check_images", lambda table, *_, known, **__: seen.append(known) or table
    )
    seen, words = [], [name, "--n", "30"]
    if name != "scenes":
        for i, members in enumerate(ARCHIVES[name]):
            Path(f"{i}.zip").write_bytes(archive(members))
        words = [name, "--url", NOWHERE, "--archive", *map(str, sorted(tmp_path.glob("*.zip")))]
    prepare.main([*words, "--no-image-cache"])
    assert "Image cache" not in capsys.readouterr().out and not Path("cache").exists()

    prepare.main(words)
    said = capsys.readouterr().out
    n, mb = map(int, re.search(r"^Image cache:  (\d+) .* images, (\d+) MB, built in \d+\.\d s$", said, re.M).groups())
    assert n == {"flickr8k": 5, "food": 4, "scenes": 27}[name] and mb == round(
        n * {"flickr8k": 224, "food": 32}.get(name, 64) ** 2 * 3 / 1e6
    )
    assert len(seen[0]) == (0 if name == "scenes" else 6)  # the doctor has decoded them
    if name == "scenes":  # the tokenizer of flickr8k is on the hub, and food has few captions
        assert "\nToken cache:  135 captions, " in said
        assert len(list(Path("cache/clip_scratch").glob("tokens-*.npz"))) == 2
    monkeypatch.setattr("clip_scratch.data.image_cache._build", None)
    prepare.main(words)
    assert "MB, built before\n" in capsys.readouterr().out

    source = open_data(parse(said.split("clip_scratch.train ")[1].split()))
    cfg = image_geometry(source.cfg)[0] if name == "food" else {}
    for split in ("train", "valid"):
        loader = build_loaders(source.split(split), tiny_tokenizer, split, dataclasses.replace(source.cfg, **cfg))
        assert isinstance(loader.dataset.images, ImageCache)


@pytest.mark.parametrize("name", ["flickr8k", "food"])
def test_unpacking_that_is_killed_is_done_again(name, tmp_path, monkeypatch):
    """At every file that takes its place, as a kill leaves it."""
    for i, members in enumerate(ARCHIVES[name]):
        (tmp_path / f"{i}.zip").write_bytes(archive(members))
    archives, replace = tuple(sorted(tmp_path.glob("*.zip"))), os.replace

    class Killed(BaseException):
        pass

    for last in range(30):
        moved, out = [], tmp_path / f"out{last}"

        def dying(source, target, moved=moved, last=last):
            moved.append(target)
            if len(moved) > last:
                raise Killed
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            try:
                fetch(name, out, archives, NOWHERE)
                break
            except Killed:
                pass
        fetch(name, out, archives, NOWHERE)
        assert len([path for path in out.rglob("*.jpg") if "unpacked-" not in str(path)]) == 6
        assert not [path for path in out.rglob("*") if "unpacked-" in path.name]
    assert last > 6


def test_one_archive_by_hand_and_the_others_from_the_server(server, tmp_path, capsys, any_digest):
    """Captions of images that were fetched by hand, the other half of COCO, and Flickr8k's published split."""
    (tmp_path / "flickr30k-images.tar.gz").write_bytes(gzip.compress(tar(ARCHIVES["flickr30k"][1])))
    (tmp_path / "train.zip").write_bytes(archive({"train2014/a.jpg": jpg(1)}))
    (tmp_path / "kaggle.zip").write_bytes(archive(ARCHIVES["flickr8k"][0]))
    coco = [{"filename": f"{i}.jpg", "filepath": f"{part}2014", "split": part, "sentences": [{"raw": "A dog ."}]}
            for i, part in (("a", "train"), ("b", "val"))]  # fmt: skip
    server.files = {
        "caption_datasets.zip": archive({"dataset_flickr30k.json": karpathy(NAMES),
                                         "dataset_coco.json": json.dumps({"images": coco})}),
        "val2014.zip": archive({"val2014/b.jpg": jpg(2)}),
        "Flickr8k_text.zip": archive(LISTS),
    }  # fmt: skip
    for name, given, fetched in (
        ("flickr30k", "flickr30k-images.tar.gz", ["/caption_datasets.zip"]),
        ("coco", "train.zip", ["/caption_datasets.zip", "/val2014.zip"]),
        ("flickr8k", "kaggle.zip", ["/Flickr8k_text.zip"]),
    ):
        server.requests.clear()
        for _ in range(2):
            fetch(name, tmp_path / name, (tmp_path / given,), server.url)
        assert [path for path, _ in server.requests] == fetched
    prepare.check(str(tmp_path / "flickr8k"))
    assert re.search(r"^test +1 +1", capsys.readouterr().out, re.M)


def test_without_the_published_split_it_is_said(tmp_path, capsys):
    (tmp_path / "archive.zip").write_bytes(archive(ARCHIVES["flickr8k"][0]))
    fetch("flickr8k", tmp_path / "out", (tmp_path / "archive.zip",), NOWHERE)
    said = capsys.readouterr().err
    assert "not the published split, but a random one: http://127.0.0.1:9/Flickr8k_text.zip cannot be reached" in said


def test_what_was_removed_is_unpacked_again_and_names_of_archives_do_not_matter(flickr, tmp_path):
    for name, content in flickr.items():
        (tmp_path / name).write_bytes(content)
    fetch("flickr8k", tmp_path, url=NOWHERE)
    (tmp_path / "Images" / NAMES[2]).unlink()
    fetch("flickr8k", tmp_path, url=NOWHERE)
    assert (tmp_path / "Images" / NAMES[2]).read_bytes() == jpg(2)

    for folder, members in (("a", {"train_data.json": FASHION["train_data.json"]}), ("b", FASHION)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "archive.zip").write_bytes(archive(members))
    with pytest.raises(UserError, match="Kaggle|kaggle"):
        fetch("indo_fashion", tmp_path / "out", (tmp_path / "a/archive.zip",))
    fetch("indo_fashion", tmp_path / "out", (tmp_path / "b/archive.zip",))


@pytest.mark.parametrize(
    ("name", "site"), [("flickr30k", "kaggle.com/datasets/hsankesara"), ("indo_fashion", "validmodel")]
)
def test_what_only_the_user_can_get(name, site, server, tmp_path):
    server.files = {"caption_datasets.zip": archive({"dataset_flickr30k.json": karpathy(NAMES)})}
    with pytest.raises(UserError, match=rf"not found. .*{site}.*prepare {name} --archive FILE"):
        fetch(name, tmp_path, url=server.url)


def test_archives_of_something_else(tmp_path):
    (tmp_path / "a.zip").write_bytes(archive({"readme.txt": "x"}))
    with pytest.raises(UserError, match="has nothing of coco"):
        fetch("coco", tmp_path / "out", (tmp_path / "a.zip",))
    with pytest.raises(UserError, match="there is no archive"):
        fetch("coco", tmp_path / "out", (tmp_path / "b.zip",))
    (tmp_path / "a.zip").write_bytes(archive({"val2014/1.jpg": jpg(1)}))
    with pytest.raises(UserError, match=r"caption_datasets.zip cannot be reached.*put it at"):
        fetch("coco", tmp_path / "out", (tmp_path / "a.zip",), NOWHERE)


def test_check_reads_the_scenes_that_prepare_draws(tmp_path, capsys):
    prepare.main(["scenes", "--n", "60", "--out", str(tmp_path / "scenes")])
    assert "60 images and 300 captions" in capsys.readouterr().out
    prepare.main(["check", str(tmp_path / "scenes" / "captions.txt")])
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert rows[1:5] == [["train", "48", "240"], ["valid", "6", "30"], ["test", "6", "30"], ["all", "60", "300"]]


def test_check_reports_an_image_that_cannot_be_decoded(tmp_path, capsys):
    prepare.main(["scenes", "--n", "30", "--out", str(tmp_path / "scenes")])
    (tmp_path / "scenes" / "Images" / "000007.png").write_bytes(b"no image")
    prepare.check(str(tmp_path / "scenes" / "captions.txt"))
    assert re.search(r"cannot be decoded: 1\..*\n  000007\.png \(captions\.txt, row \d+\)", capsys.readouterr().out)


# ---- caches


def seconds_ago(path, days):
    os.utime(path, (time.time() - 86400 * days,) * 2)


@pytest.fixture
def caches(tmp_path, tiny_data, tiny_cfg):
    """A cache folder with one cache of each kind; the complete one was used today, the others 20 to 60 days ago."""
    folder = tmp_path / "caches"
    cfg = dataclasses.replace(tiny_cfg, cache_path=str(folder))
    names = [f"{i:02d}.png" for i in range(26)]
    open_images(names[:10], tiny_data.image_path, cfg, False)
    (partial,) = folder.glob("images-*")
    (partial / "done").write_bytes(b"\1" * 4 + b"\0" * 6)
    open_images(names, tiny_data.image_path, cfg, False)
    for name, size, days in (("features-abc.bin", 3_000_000, 20), ("precision-abc.json", 2, 60)):
        (folder / name).write_bytes(b"x" * size)
        seconds_ago(folder / name, days)
    (folder / ".features-def.bin.123.tmp").write_bytes(b"x" * 5_000_000)
    for file in (folder / ".features-def.bin.123.tmp", *partial.iterdir()):
        seconds_ago(file, 30)
    return folder, partial.name


def test_caches_are_listed_with_size_and_age(caches, tiny_data, capsys):
    folder, partial = caches
    prepare.main(["cache", "--cache-path", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines[1:-1]}
    assert len(rows) == 5 and lines[-1] == f"total: 8 MB in {folder}"
    assert re.search(r" 3 MB +20 days  features of a frozen tower$", rows["features-abc.bin"])
    assert re.search(r" 0 MB +60 days  measured precision$", rows["precision-abc.json"])
    assert re.search(r" 5 MB +30 days  unfinished file$", rows[".features-def.bin.123.tmp"])
    assert rows[partial].endswith(f"30 days  unfinished, 4 of 10 images of {tiny_data.image_path}")
    (complete,) = rows.keys() - {partial, "features-abc.bin", "precision-abc.json", ".features-def.bin.123.tmp"}
    assert re.search(rf" 0 days  26 images of {tiny_data.image_path}$", rows[complete])


def test_copies_of_shards_are_listed_and_removed(tmp_path, capsys):
    copy = tmp_path / "shards" / "abc.tar"
    copy.parent.mkdir()
    copy.write_bytes(b"x" * 2_000_000)
    prepare.cache(cache_path=str(tmp_path))
    assert re.search(r"^shards/abc.tar +2 MB +0 days  copy of a shard$", capsys.readouterr().out, re.M)
    prepare.cache(remove=("shards/abc.tar",), cache_path=str(tmp_path))
    assert not copy.exists()


def test_caches_are_removed_by_name_or_age(caches, capsys):
    folder, partial = caches

    def left():
        return {path.name for pattern in prepare.CACHES for path in folder.glob(pattern)}

    before = left()
    with pytest.raises(UserError, match="has no cache features-abd.bin. Did you mean features-abc.bin"):
        prepare.main(["cache", "--cache-path", str(folder), "--remove", partial, "features-abd.bin"])
    assert left() == before
    prepare.main(["cache", "--cache-path", str(folder), "--remove", "features-abc.bin"])
    assert before - left() == {"features-abc.bin"}
    prepare.main(["cache", "--cache-path", str(folder), "--older-than", "25"])
    assert len(left()) == 1 and "(removed)" in capsys.readouterr().out
    prepare.main(["cache", "--cache-path", str(folder), "--older-than", "0"])
    assert not left() and not [path for path in folder.iterdir() if path.is_dir()]


def test_no_home_folder_is_one_clear_line(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(UserError, match="cannot read or clear the cache folder: there is no home folder"):
        prepare.main(["cache"])


# ---- mistakes


@pytest.mark.parametrize(
    "args", [["flickr30k", "--out", "nowhere"], ["scenes", "--n", "3", "--out", "few"], ["nonsense"]]
)
def test_a_mistake_exits_with_status_2_and_no_traceback(tmp_path, args):
    command = [sys.executable, "-m", "clip_scratch.prepare", *args]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": ROOT, "PATH": ""}
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
