"""The prepare verb, against a local server: resume, damage, unsafe archives, caches, and clear errors."""

import dataclasses
import http.server
import io
import os
import re
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from clip_scratch import prepare
from clip_scratch.data.image_cache import open_images
from clip_scratch.errors import UserError

ROOT = str(Path(prepare.__file__).parents[1])
NAMES = [f"{i}_abc.jpg" for i in range(6)]


def jpg(i):
    return cv2.imencode(".jpg", np.full((8, 8, 3), 20 * i, np.uint8))[1].tobytes()


def archive(members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as zipped:
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
    """A local server of `server.files`; it notes each (path, Range) asked for, and can hang up after some bytes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            served.requests.append((self.path, asked))
            content = served.files.get(self.path.strip("/"))
            if content is None:
                return self.send_error(404)
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and served.ranges else 0
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                return self.end_headers()
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:][: served.hang_up_after])

        def log_message(self, *args):
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.files, served.requests, served.ranges, served.hang_up_after = {}, [], True, None
    served.url = f"http://127.0.0.1:{served.server_port}"
    threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


CONTENT = bytes(range(256)) * 40


def test_a_download_that_is_cut_is_resumed(server, tmp_path):
    server.files, server.hang_up_after = {"a.zip": CONTENT}, 4000
    prepare.download(f"{server.url}/a.zip", tmp_path)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, "bytes=4000-", "bytes=8000-"]
    assert not (tmp_path / "a.zip.part").exists()


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("have", [100, len(CONTENT)])
def test_a_part_of_an_earlier_run_is_used_or_fetched_again(server, tmp_path, ranges, have):
    server.files, server.ranges = {"a.zip": CONTENT}, ranges
    (tmp_path / "a.zip.part").write_bytes(CONTENT[:have])
    prepare.download(f"{server.url}/a.zip", tmp_path)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT and len(server.requests) <= 2


def test_a_part_longer_than_the_file_is_dropped(server, tmp_path):
    server.files = {"a.zip": CONTENT}
    (tmp_path / "a.zip.part").write_bytes(CONTENT + b"of another file")
    prepare.download(f"{server.url}/a.zip", tmp_path)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_a_server_that_stops_is_an_error_and_the_part_stays(server, tmp_path):
    server.files, server.hang_up_after = {"a.zip": CONTENT}, 0
    (tmp_path / "a.zip.part").write_bytes(CONTENT[:100])
    with pytest.raises(UserError, match="stops at byte 100. Run this again"):
        prepare.download(f"{server.url}/a.zip", tmp_path)
    assert (tmp_path / "a.zip.part").read_bytes() == CONTENT[:100] and not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "http://no-such-host.invalid/x", "nonsense"])
def test_no_network_is_one_clear_line_and_soon(tmp_path, url):
    start = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached.*put it at .* yourself"):
        prepare.flickr8k(out=str(tmp_path), url=url)
    assert time.monotonic() - start < 12


def test_a_file_that_the_server_lacks(server, tmp_path):
    with pytest.raises(UserError, match="Flickr8k_text.zip cannot be downloaded.*404"):
        prepare.flickr8k(out=str(tmp_path), url=server.url)


def test_flickr8k_from_the_archives_to_a_data_set(server, flickr, tmp_path, capsys):
    server.files = flickr
    prepare.flickr8k(out=str(tmp_path), url=server.url)
    said = capsys.readouterr().out
    rows = [line.split()[:3] for line in said.splitlines()]
    assert rows[1:5] == [["train", "4", "20"], ["valid", "1", "5"], ["test", "1", "5"], ["all", "6", "30"]]
    assert "python -m clip_scratch.train flickr8k" in said
    assert sorted(path.name for path in (tmp_path / "Images").iterdir()) == NAMES
    assert (tmp_path / "Images" / NAMES[2]).read_bytes() == jpg(2)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".part", ".tmp")]

    asked = len(server.requests)
    prepare.flickr8k(out=str(tmp_path), url=server.url)
    assert len(server.requests) == asked  # all there: nothing is fetched again


def test_zips_placed_by_hand_need_no_network(flickr, tmp_path):
    for name, content in flickr.items():
        (tmp_path / name).write_bytes(content)
    prepare.flickr8k(out=str(tmp_path), url="http://127.0.0.1:9")
    assert len(list((tmp_path / "Images").iterdir())) == 6


def test_an_image_that_a_split_lists_and_no_archive_holds(server, flickr, tmp_path, capsys):
    server.files = flickr | {"Flickr8k_Dataset.zip": archive({f"x/{name}": jpg(1) for name in NAMES[1:]})}
    prepare.flickr8k(out=str(tmp_path), url=server.url)
    assert re.search(rf"that are missing: 1\..*\n  {NAMES[0]} \(Flickr8k.token", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["../evil.jpg", "Images/../../evil.jpg", "/evil.jpg", "..\\evil.jpg"])
def test_an_archive_that_reaches_outside_stays_inside(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.zip").write_bytes(archive({"fine.jpg": jpg(1), name: b"evil"}))
    prepare.unzip(tmp_path / "in" / "a.zip", tmp_path / "in" / "out", ".jpg")
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "a.zip"]
    assert {path.parent for path in files} == {tmp_path / "in" / "out"}


def test_a_damaged_archive_leaves_nothing_half_unpacked(flickr, tmp_path):
    whole = flickr["Flickr8k_Dataset.zip"]
    flipped = whole.replace(jpg(3), jpg(3)[:-9] + bytes(9))
    assert flipped != whole
    for content in (whole[: len(whole) // 2], flipped, b""):
        (tmp_path / "a.zip").write_bytes(content)
        with pytest.raises(UserError, match="a.zip is damaged.*remove it"):
            prepare.unzip(tmp_path / "a.zip", tmp_path / "out", ".jpg")
        assert not (tmp_path / "out").exists()


def test_flickr30k_names_the_missing_files(tmp_path):
    with pytest.raises(UserError) as error:
        prepare.flickr30k(out=str(tmp_path / "f30k"))
    assert "results.csv" in str(error.value) and "flickr30k_images" in str(error.value)


def test_check_reads_the_scenes_that_prepare_draws(tmp_path, capsys):
    prepare.main(["scenes", "--n", "60", "--out", str(tmp_path / "scenes")])
    said = capsys.readouterr().out
    assert "60 images and 300 captions" in said and re.search(r"\([\d,]+ pairs per second\)", said)
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
