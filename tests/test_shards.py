"""WebDataset shards: written and read back, in few at a time, split over processes, resumed exactly, and damaged."""

import dataclasses
import io
import json
import os
import signal
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import clip_scratch.training.report as report
from clip_scratch import CFG, build_loaders
from clip_scratch.cli import parse
from clip_scratch.data import image_files
from clip_scratch.data.captions import read_captions
from clip_scratch.data.image_files import image_source, open_shard
from clip_scratch.data.loaders import EpochBatches
from clip_scratch.data.shards import list_shards, shard_order, write_shards
from clip_scratch.data.source import open_data
from clip_scratch.errors import UserError
from clip_scratch.evaluate import evaluate
from clip_scratch.export import export
from clip_scratch.prepare import shards
from clip_scratch.train import main


@pytest.fixture(autouse=True)
def _forget_places():
    image_files._places.cache_clear()


@pytest.fixture
def folder(tiny_data, tmp_path):
    """20 training images in 7 shards and 6 validation images in 2."""
    write_shards(tiny_data.table, tiny_data.image_path, tmp_path / "shards", 3)
    return tmp_path / "shards"


@pytest.fixture
def cfg(tiny_cfg, folder, tmp_path):
    """5 steps an epoch, 2 epochs, with everything random switched on."""
    paths = {"captions_path": f"{folder}/train/*.tar", "valid_captions_path": f"{folder}/valid/{{00000..00001}}.tar"}
    paths |= {"image_path": "", "cache_path": str(tmp_path / "cache"), "run_dir": str(tmp_path / "run")}
    random = {"dropout": 0.3, "text_dropout": 0.2, "crop_scale": 0.5, "head_lr": 3e-3}
    return dataclasses.replace(tiny_cfg, batch_size=4, **paths, **random)


@pytest.fixture
def write(tmp_path):
    """Write a shard of {file name: bytes}, and return its path."""

    def write(files, name="00000.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            for file, content in files.items():
                info = tarfile.TarInfo(file)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return str(tmp_path / name)

    return write


def png(grey=0):
    Image.fromarray(np.full((16, 16, 3), grey, np.uint8)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def pairs(n):
    """The files of n samples with one caption each."""
    return {f"{i:09d}.{end}": c for i in range(n) for end, c in (("jpg", png(i)), ("txt", f"grey {i}".encode()))}


def damage(path, keep):
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: int(len(content) * keep)])


# ---- written and read back


def test_the_round_trip_keeps_every_byte_and_caption(tiny_data, folder, cfg):
    source = open_data(cfg)
    found = {}
    for name, rows in source.table.groupby("image"):
        path = source.image_folder / name
        shard, key = name.split("/")[-2:]
        with tarfile.open(folder / rows["split"].iloc[0] / shard) as tar:
            record = json.load(tar.extractfile(key.replace(".png", ".json")))
        found[record["image"]] = rows["split"].iloc[0], image_source(path).getvalue(), rows["caption"].tolist()
    assert len(found) == 26
    for (image, split), rows in tiny_data.table.groupby(["image", "split"]):
        assert found[image] == (split, (tiny_data.image_path / image).read_bytes(), rows["caption"].tolist())


def test_writing_again_completes_what_is_missing(tiny_data, tmp_path, capsys):
    arguments = {"captions_path": str(tiny_data.captions_path), "shard_size": 4, "out": str(tmp_path / "out")}
    shards(**arguments)
    paths = sorted((tmp_path / "out").rglob("*.tar"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
    assert f"train: {len(list(tmp_path.glob('out/train/*.tar')))} shards" in capsys.readouterr().out
    paths[1].unlink()
    shards(**arguments)
    assert paths[1].read_bytes() == before.pop(paths[1])[0]
    assert all(path.stat().st_mtime_ns == at for path, (_, at) in before.items())
    with pytest.raises(UserError, match="shards of other captions, or of another size"):
        shards(**arguments | {"shard_size": 5})
    with pytest.raises(UserError, match="holds other files"):
        shards(**arguments | {"out": str(tiny_data.folder)})


def test_shards_of_img2dataset(write):
    """.jpg, .txt and .json without a list of captions; a sample in a folder."""
    files = {"000000000.json": json.dumps({"caption": "other", "url": "x"}).encode()} | pairs(2)
    files |= {"./a/000000002.webp": png(), "./a/000000002.json": b'{"caption": " only  here "}'}
    table = read_captions(CFG(captions_path=write(files), valid_fraction=0))
    assert table["caption"].tolist() == ["grey 0", "grey 1", "only here"]
    assert table["image"].tolist() == [
        f"00000.tar/{name}" for name in ("000000000.jpg", "000000001.jpg", "a/000000002.webp")
    ]


def test_patterns(tmp_path):
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b-09.tar"):
        (tmp_path / name).touch()
    assert [Path(p).name for p in list_shards(f"{tmp_path}/a-{{08..10}}.tar")] == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert [Path(p).name for p in list_shards(f"{tmp_path}/{{b,a}}-09.tar")] == ["b-09.tar", "a-09.tar"]
    assert [Path(p).name for p in list_shards(f"{tmp_path}/*-09.tar")] == ["a-09.tar", "b-09.tar"]


# ---- the order of the batches


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_share_every_image_exactly_once_and_each_reads_its_own_shards(monkeypatch, world_size):
    """Of 40 shards of very different sizes; together the ranks have the batches of one process."""
    monkeypatch.setattr("clip_scratch.data.shards._WINDOW", 20)
    shard_of = np.repeat(np.arange(40), np.random.default_rng(0).integers(1, 60, 40))
    n = len(shard_of) // 16 * 16
    one = EpochBatches(len(shard_of), 16, 0, shard_of=shard_of)
    ranks = [EpochBatches(len(shard_of), 16, 0, rank, world_size, shard_of) for rank in range(world_size)]
    for _ in range(2):
        parts = [list(rank) for rank in ranks]
        whole = list(one)
        assert [[key for batch in batches for key in batch] for batches in zip(*parts, strict=True)] == whole
        images = [i for batch in whole for _, i in batch]
        assert len(images) == len(set(images)) == n
        read = [len({shard_of[i] for batch in part for _, i in batch}) for part in parts]
        assert sum(read) <= 40 + 8  # a shard on the border of two lanes is read twice


def test_few_shards_are_read_at_a_time_and_neighbours_are_parted():
    shard_of = np.repeat(np.arange(100), 1000)
    order = shard_order(shard_of, 64, np.random.default_rng(0))
    batches = order.reshape(-1, 64)
    assert max(len(set(shard_of[batches[i : i + 10].ravel()])) for i in range(0, len(batches), 50)) <= 8 * 3
    assert len(set(shard_of[batches[0]])) >= 8
    gaps = np.abs(np.diff(order.reshape(-1, 8, 8), axis=2))
    assert np.median(gaps) > 100


def test_workers_make_the_same_batches(cfg, tiny_tokenizer):
    table = open_data(cfg).split("train")
    cfg.image_cache = False
    loaders = [build_loaders(table, tiny_tokenizer, "train", dataclasses.replace(cfg, num_workers=n)) for n in (0, 2)]
    for one, other in zip(*loaders, strict=True):
        assert one["names"] == other["names"] and torch.equal(one["pixel_values"], other["pixel_values"])


# ---- training


@pytest.mark.parametrize("image_cache", [True, False])
def test_an_interrupted_run_ends_as_if_it_had_not_been(cfg, tmp_path, monkeypatch, plain, image_cache):
    cfg.image_cache = image_cache
    whole = main(cfg)
    show = report.Report.step

    def interrupt(self, state, steps):
        show(self, state, steps)
        if state.progress.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(report.Report, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(dataclasses.replace(cfg, run_dir=str(tmp_path / "stopped"), num_workers=0 if image_cache else 2))
    monkeypatch.setattr(report.Report, "step", show)
    torch.manual_seed(12345)
    resumed = main(parse(["--resume", str(tmp_path / "stopped")]))
    one, other = (load_file(run / "best/model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_evaluates_and_notices_other_shards(cfg, folder, plain, capsys):
    run = main(dataclasses.replace(cfg, epochs=1))
    assert "train: 20 images, " in capsys.readouterr().out
    assert evaluate(run)["n_images"] == 6
    (folder / "train/00006.tar").unlink()
    with pytest.raises(UserError, match="has changed since"):
        main(parse(["--resume", str(run)]))


def test_images_are_held_out_of_one_pattern(cfg):
    table = open_data(dataclasses.replace(cfg, valid_captions_path="", valid_fraction=0.3)).table
    assert table.drop_duplicates("image")["split"].value_counts().to_dict() == {"train": 14, "valid": 6}


def test_shards_at_a_url(cfg, folder, tiny_tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(image_files, "_KEPT", 3)
    monkeypatch.setattr("clip_scratch.data.shards._WINDOW", 1)
    fsspec.filesystem("memory").put(str(folder), "/shards", recursive=True)
    remote = dataclasses.replace(cfg, captions_path="memory://shards/train/{00000..00006}.tar", image_cache=False)
    remote.valid_captions_path = "memory://shards/valid/*.tar"
    cfg = dataclasses.replace(cfg, image_cache=False)
    batches = []
    for own in (cfg, remote):
        source = open_data(own)
        batches.append(list(build_loaders(source.split("train"), tiny_tokenizer, "train", source.cfg)))
    for one, other in zip(*batches, strict=True):
        assert one["names"] == other["names"] and torch.equal(one["pixel_values"], other["pixel_values"])
    assert len(list((tmp_path / "home/clip_scratch/shards").glob("*.tar"))) == 3


def test_a_shard_that_was_rewritten_is_read_again(write):
    cfg = CFG(captions_path=write(pairs(2)), valid_fraction=0)
    assert read_captions(cfg)["caption"].tolist() == ["grey 0", "grey 1"]
    write(pairs(2) | {"000000001.txt": b"dark 1"})
    assert read_captions(cfg)["caption"].tolist() == ["grey 0", "dark 1"]


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"captions_path": "{}/none-*.tar"}, r"no shard matches .*none-\*.tar. A pattern is"),
        ({"captions_path": "{}/train/{{00000..00009}}.tar"}, "there is no shard .*/00007.tar. A pattern is"),
        ({"captions_path": "http://127.0.0.1:9/{{0..1}}.tar"}, "http://127.0.0.1:9/0.tar cannot be reached"),
        ({"captions_path": "nowhere://x/0.tar", "valid_captions_path": ""}, "nowhere://x/0.tar cannot be reached"),
        ({"valid_captions_path": "{}/train/00003.tar"}, "is both in train .* and in valid"),
        ({"valid_captions_path": "x.csv"}, "x.csv has no shards, as the other splits do"),
    ],
)
def test_a_wrong_setting_is_one_line(cfg, folder, settings, message):
    for name, value in settings.items():
        setattr(cfg, name, value.format(folder))
    with pytest.raises(UserError, match=message) as error:
        open_data(cfg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5])
def test_a_truncated_shard(cfg, folder, capsys, keep):
    damage(folder / "train/00002.tar", keep)
    with pytest.raises(UserError, match=r"train/00002.tar cannot be read to its end .*--on-bad-image skip"):
        open_data(cfg)
    cfg.on_bad_image = "skip"
    found = open_data(cfg).split("train")["image"].nunique()
    assert 17 <= found <= 20
    assert "00002.tar cannot be read to its end" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be read to its end"):  # what was left out is not taken for the whole
        open_data(dataclasses.replace(cfg, on_bad_image="error"))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"000000003.txt": b" "}, "000000003.jpg has no caption"),
        ({"000000003.jpg": b"not an image"}, "000000003.jpg .*cannot be decoded"),
        ({"000000003.jpg": None}, "000000003 has no image"),
    ],
)
def test_a_bad_sample(write, change, fault, capsys):
    files = {name: content for name, content in (pairs(8) | change).items() if content is not None}
    cfg = CFG(captions_path=write(files), image_cache=False)
    with pytest.raises(UserError, match=f"(?s){fault}.*--on-bad-image skip"):
        open_data(cfg)
    cfg.on_bad_image = "skip"
    assert sorted(int(name[-8:-4]) for name in open_data(cfg).table["image"]) == [0, 1, 2, 4, 5, 6, 7]
    assert "000000003" in capsys.readouterr().err


def test_a_shard_that_vanishes_is_one_line(cfg, folder, tiny_tokenizer):
    cfg.image_cache = False
    loader = build_loaders(open_data(cfg).split("train"), tiny_tokenizer, "train", cfg)
    (folder / "train/00003.tar").unlink()
    with pytest.raises(UserError, match=r"train/00003.tar/\d+.png: no such file"):
        list(loader)


def test_a_file_that_is_no_tar(write, tmp_path):
    (tmp_path / "x.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(UserError, match="x.tar cannot be read to its end"):
        open_data(CFG(captions_path=str(tmp_path / "x.tar")))
    with pytest.raises(OSError):
        open_shard(str(tmp_path / "y.tar"))


@pytest.mark.slow
def test_a_run_on_shards_is_exported(cfg, plain, tmp_path):
    run = main(dataclasses.replace(cfg, epochs=1, head="linear"))
    measured = export(run, tmp_path / "st", format="sentence-transformers")
    assert measured["n_images"] == 6 and measured["text_cosines"].min() > 1 - 1e-5
