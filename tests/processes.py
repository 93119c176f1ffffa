"""Commands in processes forked from one that has imported the libraries: importing takes most of a small command."""

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

_FORKSERVER = sys.platform == "linux"
_CONTEXT = multiprocessing.get_context("forkserver" if _FORKSERVER else "spawn")
if _FORKSERVER:
    _CONTEXT.set_forkserver_preload([
        "timm", "albumentations", "transformers.models.bert.modeling_bert", "tyro", "matplotlib.pyplot",
        "torch.utils.tensorboard", "clip_scratch.training.run", "clip_scratch.retrieval.indexing",
    ])  # fmt: skip


class Command:
    """`python WORDS...`, where the first of the words is `-m` or a file; its output is in files of its own."""

    def __init__(self, words, cwd, env=None):
        self.files = [Path(cwd, f".{time.monotonic_ns()}.{name}") for name in ("out", "err")]
        environment = os.environ | (env or {})
        self.process = _CONTEXT.Process(target=_run, args=([*map(str, words)], str(cwd), environment, self.files))
        self.process.start()

    @property
    def pid(self):
        return self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    @property
    def out(self):
        return self._read(0)

    @property
    def err(self):
        return self._read(1)

    def _read(self, number):
        return self.files[number].read_text() if self.files[number].exists() else ""

    def wait(self, timeout=240):
        """The finished command, as of subprocess.run; it is killed after `timeout` seconds."""
        self.process.join(timeout)
        self.process.kill()
        self.process.join()
        done = subprocess.CompletedProcess([], self.returncode, self.out, self.err)
        for file in self.files:
            file.unlink(missing_ok=True)
        return done


def _run(words, cwd, environment, files):
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files, 1):
        with open(file, "w") as opened:
            os.dup2(opened.fileno(), number)
    sys.stdout.reconfigure(line_buffering=True)
    os.fsync = lambda descriptor: None  # as in conftest.py
    _python(words, cwd)


def _python(words, cwd):
    os.chdir(cwd)
    sys.argv = words
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def together(processes, words, cwd):
    """A command in several processes of one group, as torchrun starts them; all finished, in the order of ranks."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with contextlib.ExitStack() as stack:
        commands = []
        for rank in range(processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            commands.append(Command(words, cwd, address | ranks))
            stack.callback(commands[-1].process.kill)
        return [command.wait() for command in commands]


def torchrun(processes, words, cwd, restarts=0):
    """A command under torchrun's engine, which restarts all processes where one dies; the first one's output."""
    logs = DefaultLogsSpecs(log_dir=str(Path(cwd, ".logs")), redirects=Std.ALL)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, max_restarts=restarts, monitor_interval=0.1,
        rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", start_method=_CONTEXT.get_start_method(), logs_specs=logs,
    )  # fmt: skip
    elastic_launch(config, _python)([*map(str, words)], str(cwd))
    return "".join(path.read_text() for path in sorted(Path(cwd, ".logs").rglob("0/stdout.log")))
