"""A small part of `python -m benchmarks.faults`, which tries hundreds of kills and thousands of damaged files."""

import errno
import random
import shutil

import pytest

from benchmarks import faults
from benchmarks.fuzz import mutated
from clip_scratch import CFG
from clip_scratch.errors import UserError, run_command
from clip_scratch.files import write_atomically
from clip_scratch.train import main as train

BAD = ("UNEXPECTED", "LONG", "MISSED", "EXECUTED", "longer than")


@pytest.mark.parametrize("kind", ["captions", "images"])
def test_what_is_tried_is_survived(kind):
    tally = faults.main(faults.Arguments(only=[kind], fuzz=300))
    assert sum(tally.values()) == 300
    assert not [(what, outcome) for what, outcome in tally if any(word in outcome for word in BAD)]


def test_damaged_records_of_a_run(scene_run, tmp_path):
    shutil.copytree(scene_run.folder, tmp_path / "run")
    for name, content in (("metrics.jsonl", "{"), ("best/metrics.json", "[]"), ("best/metrics.json", "")):
        whole = (tmp_path / "run" / name).read_text()
        (tmp_path / "run" / name).write_text(content)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=f"{name} is damaged"):
            patch.chdir(scene_run.cwd)
            train(CFG(resume=str(tmp_path / "run")))
        (tmp_path / "run" / name).write_text(whole)


def test_the_same_damage_for_a_seed():
    content = bytes(range(256)) * 4
    one, same, other = (mutated(content, random.Random(seed)) for seed in (1, 1, 2))
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
