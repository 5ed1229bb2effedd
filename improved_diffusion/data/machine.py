"""What the machine gives this process: a device, memory, a version of the code."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
import sys
from collections.abc import Callable
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not do, on the GPU or, as far as the system says so, on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def release_memory(device: torch.device) -> None:
    """Give back what a failed computation leaves in the cache of the GPU's allocator."""
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


def free_memory_bytes(device: torch.device) -> int | None:
    """What a process could still take on the device; None where the system does not say.

    On the CPU, of the machine or of what the control groups (cgroup v2) of this process leave.
    """
    if device.type == "cuda":
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = [int(lines["MemAvailable"].split()[0]) * 1024]
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::/")[2]
    except (OSError, KeyError, ValueError):
        return None
    root = Path("/sys/fs/cgroup")
    for folder in (root / group, *(root / group).parents):
        with contextlib.suppress(OSError, ValueError):  # no limit here, or not this kind of folder
            limit = int((folder / "memory.max").read_text())
            free.append(limit - int((folder / "memory.current").read_text()))
    return max(0, min(free))


def peak_memory_bytes(device: torch.device, work: Callable[[], object]) -> int | None:
    """The most memory that the process holds on the device during `work`; None where nothing says."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        work()
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return None


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
