"""What the machine gives this process: a device, memory, a version of the code."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def default_device(name: str = "") -> str:
    """`name`, or cuda where there is a GPU, else cpu. ValueError for a device that is not there."""
    import torch

    if not name:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except Exception as error:  # each backend raises another kind
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"--device {name} cannot be used here ({reason}): leave it out") from None
    return name


def keep_freed_memory() -> None:
    """Let glibc keep memory that tensors free, instead of returning it and asking for it again.

    Every tensor above 32 MB would otherwise be mapped anew, and the page faults of filling it cost
    several times an addition of it. Does nothing where the C library is another.
    """
    m_mmap_max, m_trim_threshold = -4, -1  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)  # never


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this process has held so far, in 10^9 bytes: the GPU's, or its own."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@functools.cache
def code_version() -> str:
    """The package's version, and the commit where it runs from a git checkout."""
    try:
        version = metadata.version("improved-diffusion")
    except metadata.PackageNotFoundError:
        version = "not installed"
    root = Path(__file__).parents[2]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(describe, capture_output=True, text=True, timeout=10)
        if (root / ".git").exists() and done.returncode == 0:
            return f"{version}+{done.stdout.strip()}"
    return version
