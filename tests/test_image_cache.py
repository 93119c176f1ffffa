"""The cache of decoded images: the bytes of the files, whoever builds it, and however often a build is interrupted."""

import dataclasses
import errno
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_scratch.data import image_cache
from clip_scratch.data.captions import check_images
from clip_scratch.data.image_cache import ImageCache, ImageFiles, decoded_before, open_images
from clip_scratch.data.images import image_transform, load_image
from clip_scratch.errors import UserError

NAMES = [f"{i:02d}.png" for i in range(26)]


@pytest.fixture
def folder(tiny_data, tmp_path):
    return shutil.copytree(tiny_data.image_path, tmp_path / "Images")


@pytest.fixture
def cfg(tiny_cfg, tmp_path):
    return dataclasses.replace(tiny_cfg, cache_path=tmp_path / "cache")


def equal(images, files):
    (squares, ratios), (expected, expected_ratios) = (source.read(range(26)) for source in (images, files))
    return np.array_equal(np.stack(squares), np.stack(expected)) and np.array_equal(ratios, expected_ratios)


def caches(cfg):
    return {path.name for path in image_cache.cache_folder(cfg).glob("images-*")}


def counted(monkeypatch):
    """The numbers of the images that are decoded from now on."""
    decoded, decode = [], ImageFiles.decode
    monkeypatch.setattr(ImageFiles, "decode", lambda self, number: decoded.append(number) or decode(self, number))
    return decoded


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("resize", ["stretch", "crop"])
@pytest.mark.parametrize("interpolation", ["area", "bilinear", "bicubic"])
def test_the_cache_holds_the_bytes_of_the_files(folder, cfg, interpolation, resize, train):
    cfg = dataclasses.replace(cfg, interpolation=interpolation, resize=resize)
    images, files = open_images(NAMES, folder, cfg, train), ImageFiles(NAMES, folder, cfg, train)
    assert isinstance(images, ImageCache) and images.side == files.side == (37 if train else 32)
    assert equal(images, files)
    assert images.ratios[0] == np.float32(48 / 40)
    if not train:
        transform = image_transform(cfg, train=False)
        for name, square in zip(NAMES, images.pixels, strict=True):
            assert np.array_equal(transform(image=load_image(folder / name))["image"].permute(1, 2, 0), square)


def test_a_finished_cache_is_opened_and_not_built(folder, cfg, monkeypatch):
    first = open_images(NAMES, folder, cfg, True)
    decoded = counted(monkeypatch)
    assert equal(open_images(NAMES, folder, cfg, True), first) and not decoded


def test_the_side_follows_the_images(folder, cfg):
    def side(**settings):
        return ImageFiles(NAMES, folder, dataclasses.replace(cfg, **settings), True).side

    assert side() == 37  # 32 * 8 / 7
    assert side(size=44) == 48  # half are 48 x 48 or larger
    assert side(size=90) == 90
    assert side(crop_scale=1) == 32


def test_another_file_or_setting_is_another_cache(folder, cfg):
    open_images(NAMES, folder, cfg, False)
    for other in ({"interpolation": "bilinear"}, {"size": 24}, {"resize": "crop"}, {"resize": "crop:40"}):
        before = len(caches(cfg))
        open_images(NAMES, folder, dataclasses.replace(cfg, **other), False)
        assert len(caches(cfg)) == before + 1, other
    before = caches(cfg)
    open_images(NAMES, folder, dataclasses.replace(cfg, batch_size=5, color_jitter=0.9, seed=3), False)
    assert caches(cfg) == before
    open_images(NAMES[:25], folder, cfg, False)
    os.utime(folder / NAMES[3], ns=(1, 1))
    open_images(NAMES, folder, cfg, False)
    Image.new("RGB", (9, 9), "red").save(folder / NAMES[4])
    assert equal(open_images(NAMES, folder, cfg, False), ImageFiles(NAMES, folder, cfg, False))
    assert len(caches(cfg)) == len(before) + 3


def test_a_build_that_is_killed_is_resumed(folder, cfg, monkeypatch):
    monkeypatch.setattr(image_cache, "_CHUNK", 4)

    def killed():
        decode = ImageFiles.decode

        def decode_until(self, number):
            if number == 17:
                os.kill(os.getpid(), signal.SIGKILL)
            return decode(self, number)

        ImageFiles.decode = decode_until
        open_images(NAMES, folder, cfg, True)

    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start(), child.join(60)
    assert child.exitcode == -signal.SIGKILL
    known = decoded_before(folder, cfg)
    assert 8 <= len(known) <= 16  # the chunk before row 17's may have been on its way, or just being recorded
    decoded = counted(monkeypatch)
    assert equal(open_images(NAMES, folder, cfg, True), ImageFiles(NAMES, folder, cfg, True))
    assert sorted(set(decoded[: 26 - len(known)])) == list(range(len(known), 26))


def test_a_damaged_cache_is_rebuilt(folder, cfg):
    open_images(NAMES, folder, cfg, True)
    cache = image_cache.cache_folder(cfg) / caches(cfg).pop()
    for damage in (lambda: os.truncate(cache / "pixels", 100), lambda: (cache / "done").unlink(),
                   lambda: (cache / "done").write_bytes(b""), lambda: (cache / "ratios").unlink()):  # fmt: skip
        damage()
        assert equal(open_images(NAMES, folder, cfg, True), ImageFiles(NAMES, folder, cfg, True))


def _open_and_compare(folder, cfg, results):
    results.put(equal(open_images(NAMES, folder, cfg, True), ImageFiles(NAMES, folder, cfg, True)))


def test_processes_build_and_read_one_cache(folder, cfg):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=_open_and_compare, args=(folder, cfg, results)) for _ in range(3)]
    for child in children:
        child.start()
    assert all(results.get(timeout=60) for _ in children)
    for child in children:
        child.join(60)
    assert len(caches(cfg)) == 1


def test_without_room_images_are_decoded(folder, cfg, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    images = open_images(NAMES, folder, cfg, True)
    assert isinstance(images, ImageFiles)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "GB free" in line and "--cache-path" in line


def test_a_partial_cache_gives_its_space_back_when_the_disk_is_full(folder, cfg, monkeypatch, capsys):
    allocate = image_cache.allocate

    def until_full(path, size):
        if path.name == "ratios":
            assert (path.parent / "pixels").stat().st_size
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(path, size)

    monkeypatch.setattr(image_cache, "allocate", until_full)
    images = open_images(NAMES, folder, cfg, True)
    assert isinstance(images, ImageFiles) and len(images.read([3])[0]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "No space left on device" in line and "decoded in every step" in line
    assert not caches(cfg)


def test_a_partial_cache_that_cannot_be_completed_is_removed(folder, cfg, monkeypatch):
    open_images(NAMES, folder, cfg, True)
    (cache,) = image_cache.cache_folder(cfg).glob("images-*")
    (cache / "done").write_bytes(bytes(26))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert isinstance(open_images(NAMES, folder, cfg, True), ImageFiles) and not caches(cfg)


def test_a_cache_folder_that_cannot_be_written(folder, cfg, capsys):
    (folder.parent / "cache").write_text("a file where the folder would be")
    assert not decoded_before(folder, cfg)
    assert isinstance(open_images(NAMES, folder, cfg, True), ImageFiles)
    assert capsys.readouterr().err.startswith("no image cache (")


@pytest.mark.parametrize("home", ["unset", "unreadable"])
def test_without_a_home_folder_there_is_no_cache(folder, cfg, monkeypatch, capsys, home):
    cfg = dataclasses.replace(cfg, cache_path="")
    monkeypatch.delenv("XDG_CACHE_HOME")

    def refused(*_):
        raise RuntimeError if home == "unset" else PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, *(("home", refused) if home == "unset" else ("glob", refused)))
    if home == "unreadable":
        monkeypatch.setenv("HOME", str(folder / "00.png"))  # what is below a file cannot be made, not even by root
    assert decoded_before(folder, cfg) == set()
    assert isinstance(open_images(NAMES, folder, cfg, True), ImageFiles)
    assert capsys.readouterr().err.count("\n") == 1


def test_no_cache_is_a_setting(folder, cfg):
    assert isinstance(open_images(NAMES, folder, dataclasses.replace(cfg, image_cache=False), True), ImageFiles)
    assert not caches(cfg)


@pytest.mark.parametrize("cached", [True, False])
def test_a_corrupt_image_is_named(folder, cfg, cached):
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:300])
    cfg = dataclasses.replace(cfg, image_cache=cached)
    with pytest.raises(UserError, match=r"07\.png: cannot be decoded .* --on-bad-image skip"):
        open_images(NAMES, folder, cfg, False).read(range(26))
    (folder / "07.png").unlink()
    with pytest.raises(UserError, match=r"07\.png: no such file"):
        open_images(NAMES, folder, cfg, False).read(range(26))


def test_cached_images_are_not_decoded_to_be_checked(folder, cfg, tiny_data):
    table = tiny_data.table.assign(file="captions.txt", row=range(len(tiny_data.table)))
    assert not decoded_before(folder, cfg)
    open_images(NAMES[:20], folder, cfg, True)
    open_images(NAMES[20:25], folder, cfg, False)
    os.utime(folder / "03.png", ns=(1, 1))
    known = decoded_before(folder, cfg)
    assert known == set(NAMES[:25]) - {"03.png"}
    assert not decoded_before(folder.parent, cfg)
    assert check_images(table, folder, "error", progress=False, known=known) is table
    size = (folder / "02.png").stat()
    (folder / "02.png").write_bytes(b"x" * size.st_size)  # as the stamp sees, another file
    os.utime(folder / "02.png", ns=(size.st_atime_ns, size.st_mtime_ns))
    assert check_images(table, folder, "error", progress=False, known=known) is table  # proof: it was not decoded
    (folder / "01.png").unlink()
    (folder / "25.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"2 of 26 images.*\n.*01\.png .*no such file\n.*25\.png .*cannot be decoded"):
        check_images(table, folder, "error", progress=False, known=decoded_before(folder, cfg))


@pytest.mark.real_data
def test_real_images_from_the_cache_and_from_files(flickr8k, cfg):
    names = sorted(path.name for path in (flickr8k / "Images").glob("*.jpg"))[::270][:26]
    for train in (True, False):
        real = dataclasses.replace(cfg, size=224)
        images = open_images(names, flickr8k / "Images", real, train)
        assert equal(images, ImageFiles(names, flickr8k / "Images", real, train))
