"""Where a measurement was made: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """CPU model, usable cores, memory in bytes, and versions."""
    import torch

    from . import __version__

    return {
        "cpu": _cpu_model(),
        "cores": _num_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": _system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "optimus": __version__,
    }  # fmt: skip


def git_commit() -> str | None:
    """Commit of the source tree this package runs from ("-dirty" if changed); None if installed."""
    package = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(package), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "machine.py")
        return git("describe", "--always", "--abbrev=40", "--dirty", "--exclude", "*")
    except (OSError, subprocess.SubprocessError):
        return None


def _system() -> str:
    """Kernel, processor and C library by version; a kernel's local name says nothing elsewhere."""
    release = platform.release().partition("-")[0]
    return f"{platform.system()}-{release}-{platform.machine()}-with-{''.join(platform.libc_ver())}"


def _num_cores() -> int | None:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
