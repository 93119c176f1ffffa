"""What the figures of a run depend on: processor, memory, system, versions, threads, commit and date."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

RECORD = "environment.json"  # in a run folder
_PACKAGES = (
    "clip_scratch", "torch", "torchvision", "timm", "transformers", "tokenizers", "albumentations",
    "opencv-python-headless", "numpy", "pandas", "pillow", "open_clip_torch",
)  # fmt: skip
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "neon", "asimd", "bf16")


def environment() -> dict[str, object]:
    """Describe the machine and the software."""
    import torch

    model, flags = processor()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "git_commit": git_commit(),
        "processor": model,
        "processor_flags": flags,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "gpu": gpu,
        "system": " ".join((platform.system(), platform.machine(), *platform.libc_ver())).strip(),
        "python": sys.version.split()[0],
        "packages": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of the packages that a run's figures depend on, where they are installed."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def processor() -> tuple[str, list[str]]:
    """The processor's name and its relevant flags, where the system reports them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    has = fields.get("flags", fields.get("Features", "")).split()
    family = f" (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else ""
    return fields.get("model name", platform.machine()) + family, [flag for flag in _FLAGS if flag in has]


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


@functools.cache
def git_commit() -> str | None:
    """The commit of this package, with + for local changes; None outside its own checkout, as in a user's .venv."""
    git = ["git", "-C", str(Path(__file__).parent)]
    options = {"capture_output": True, "text": True, "check": True, "timeout": 5}
    try:
        if subprocess.run([*git, "rev-parse", "--show-prefix"], **options).stdout.strip() != "clip_scratch/":
            return None
        describe = ("describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*")
        return subprocess.run([*git, *describe], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
