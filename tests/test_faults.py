"""A small part of `python -m benchmarks.faults`, which tries hundreds of kills and thousands of damaged files."""

import errno
import random

import pytest

from benchmarks import faults
from clip_scratch.errors import run_command
from clip_scratch.files import write_atomically

BAD = ("UNEXPECTED", "LONG", "MISSED", "EXECUTED", "OTHER", "FAILED", "LEFT", "longer than")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["captions", "images", "kills", "models"])
def test_what_is_tried_is_survived(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "JOBS", {name: faults.JOBS[name] for name in ("prepare shards", "train")})
    if kind == "models":
        for name in ("cut", "other JSON"):
            monkeypatch.delitem(faults.DAMAGES, name)
    tally = faults.main(faults.Arguments(only=[kind], kills=2, fuzz=200))
    assert sum(tally.values()) >= 2
    assert not [(what, outcome) for what, outcome in tally if any(word in outcome for word in BAD)]


def test_the_same_damage_for_a_seed():
    content = bytes(range(256)) * 4
    one, same, other = (faults.mutated(content, random.Random(seed)) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("number, status", [(errno.ENOSPC, 2), (errno.EROFS, 2), (errno.ENOENT, None)])
def test_a_disk_that_says_no_is_one_line(number, status, tmp_path, capsys):
    """Python names no file when a disk is full; another OSError is a bug of ours and keeps its traceback."""

    def write(path):
        path.write_text("half of it")
        raise OSError(number, "No room")

    def command():
        write_atomically(tmp_path / "weights", write)

    with pytest.raises(SystemExit if status else OSError) as raised:
        run_command(command)
    if status:
        assert raised.value.code == status
        assert capsys.readouterr().err == f"error: {tmp_path / 'weights'}: No room. What was saved before is whole\n"
    assert not list(tmp_path.iterdir())
