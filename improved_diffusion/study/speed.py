"""How long a call takes, how much it computes and holds, and what the machine could do at most."""

from __future__ import annotations

import ctypes
import functools
import gc
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from improved_diffusion.data import machine
from improved_diffusion.data.machine import default_device

CONV_IMAGES = (1, 4, 20)
GEMM_SIZES = (256, 512, 1024, 2048)
LIMIT_S = 0.3  # how long a limit is timed; larger calls follow only where one is shorter


def timed(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls; waits for the GPU where one is in use."""
    seconds = []
    for _ in range(repeats):
        _synchronise()
        began = time.perf_counter()
        call()
        _synchronise()
        seconds.append(time.perf_counter() - began)
    return seconds


def _synchronise() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def count_gflop(call: Callable[[], Any]) -> float:
    """10^9 operations of convolutions, matrix products and attention in one call of `call`.

    A product and a sum count as two. What the backward pass computes again counts again.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def conv_rate(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of a channels-last 3x3 convolution of 20 images of 32x32 with 256 channels.

    Of fewer images where one call would take too long, as emulated arithmetic does.
    """
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    layer = nn.Conv2d(256, 256, 3, padding=1, bias=False, **options)
    layer.to(memory_format=torch.channels_last)
    images = torch.randn(CONV_IMAGES[-1], 256, 32, 32, **options)
    images = images.contiguous(memory_format=torch.channels_last)
    return _rate([functools.partial(layer, images[:n]) for n in CONV_IMAGES])


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of the product of two matrices of 2048x2048, or of smaller ones as in `conv_rate`."""
    matrices = [torch.randn(n, n, device=device, dtype=dtype) for n in GEMM_SIZES]
    return _rate([functools.partial(torch.matmul, a, a) for a in matrices])


def limits(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(conv_rate, gemm_rate), as they are now."""
    return conv_rate(device, dtype), gemm_rate(device, dtype)


@torch.inference_mode()
def _rate(calls: Sequence[Callable[[], Any]]) -> float:
    """GFLOP/s of the largest of `calls` (smallest first) that is quick enough; its fastest call."""
    gflop, seconds = 0.0, [0.0]
    for call in calls:
        if seconds[-1] > LIMIT_S:
            break
        gflop = count_gflop(call)  # warms up, too
        largest, seconds = call, timed(call, 1)
    while sum(seconds) < LIMIT_S:
        seconds += timed(largest, 1)
    return gflop / min(seconds)


def reset_peak_memory(device: torch.device) -> bool:
    """Let the peak start anew, at what is in use now; False where the system does not allow that."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if sys.platform != "linux":
        return False
    # Memory that was freed, but is kept by the allocator, belongs to earlier measurements.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory_gb(device: torch.device) -> float:
    """The most memory since `reset_peak_memory`, in 10^9 bytes: the GPU's, or this whole process's."""
    if device.type == "cuda":
        return machine.peak_memory_gb(device)
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def open_device(name: str) -> torch.device:
    """The torch device of that name ("": the best there is); ValueError where it does not work."""
    try:
        return torch.empty(0, device=default_device(name)).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def describe_machine(device: torch.device) -> dict[str, Any]:
    """{"torch", "device", "threads"}: what the figures hold for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {"torch": torch.__version__, "device": name, "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = text.partition("model name")[2].partition("\n")[0].lstrip("\t :")
    return name or platform.processor() or platform.machine()


def profile_table(call: Callable[[], Any], title: str) -> str:
    """Where the time of one call goes, on the GPU where one is in use.

    `title`, then operation, self time, share and calls, the longest first.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_initialized()
    call()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        call()
        _synchronise()
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"  # microseconds
    # A GPU's kernels also stand by themselves: counted with the operations that start them, once.
    events = [
        (getattr(event, field), event.key, event.count)
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CPU
    ]
    total = sum(us for us, _, _ in events)
    lines = [["operation", "self ms", "share", "calls"]]
    for us, name, calls in sorted(events, reverse=True):
        lines.append([name, f"{us / 1e3:.3f}", f"{us / total:.1%}", str(calls)])
    return "\n".join([f"{title}: {total / 1e6:.3f} s", *aligned(lines), ""])


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Rows of texts as lines with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
