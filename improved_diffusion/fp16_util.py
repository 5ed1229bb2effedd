"""Arithmetic on the device: half precision with loss scaling, and TF32 in place of float32."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from improved_diffusion.nn import update_ema as update_ema  # its place in 0.1.0

logger = logging.getLogger(__name__)


def autocast(
    device: torch.device, *, precision: str, use_fp16: bool, tf32: bool = False
) -> contextlib.AbstractContextManager:
    """The context in which the network computes: float16, bf16, or (`precision` "fp32") float32.

    Weights, gradients and everything outside the network stay float32. tf32: as for `arithmetic`,
    for what stays float32 inside. Raises ValueError for float16 on the CPU.
    """
    if use_fp16 and device.type != "cuda":
        raise ValueError("--use_fp16 True needs a CUDA GPU: on the CPU use --precision bf16")
    half = torch.float16 if use_fp16 else torch.bfloat16 if precision == "bf16" else None
    if device.type == "cuda":
        return _autocast_on_gpu(half, tf32)
    return torch.autocast(device.type, half) if half else contextlib.nullcontext()


@contextlib.contextmanager
def _autocast_on_gpu(half: torch.dtype | None, tf32: bool) -> Iterator[None]:
    network = torch.autocast("cuda", half) if half else contextlib.nullcontext()
    with _cuda_settings(tf32, None), network:
        yield


def arithmetic(
    device: torch.device, *, tf32: bool, same_shapes: bool | None = None
) -> contextlib.AbstractContextManager[None]:
    """How a GPU computes products of float32 matrices and convolutions inside; for all threads.

    Args:
        device: nothing is done where it is no GPU: on some CPUs these settings would count, too.
        tf32: round factors to TF32, which keeps 10 of the 23 bits of a float32's mantissa (sums
            stay float32); False: not, in convolutions too, where torch would by itself.
        same_shapes: time cuDNN's algorithms once per shape and use the fastest, which pays where
            shapes come again (None: leave that as it is).
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return _cuda_settings(tf32, same_shapes)


@contextlib.contextmanager
def _cuda_settings(tf32: bool, same_shapes: bool | None) -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    cudnn.benchmark = before[2] if same_shapes is None else same_shapes
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def resolve_precision(precision: str, device: torch.device | str) -> str:
    """What `--precision auto` means on a device: bf16 where it has instructions for it, else fp32.

    Other values stay as they are.
    """
    if precision != "auto":
        return precision
    chosen = "bf16" if has_bf16(torch.device(device)) else "fp32"
    logger.info("--precision auto: %s on %s", chosen, device)
    return chosen


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices itself, and does not emulate it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # As torch asks for its own kernels; older versions do not know all of these.
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, question, bool)() for question in questions)


class LossScale:
    """The factor that keeps float16 gradients from vanishing: halved on overflow, else growing.

    It lives on the device, where `update` needs no answer to whether an overflow occurred.

    Args: `growth`: added to log2(scale) per good step. Source: Micikevicius et al. 2018
    (arXiv 1710.03740), section 3.2.

    Attributes: `log2`: float64 [].
    """

    INITIAL_LOG2 = 20.0

    def __init__(self, growth: float, device: torch.device | str = "cpu") -> None:
        self.growth = growth
        self.log2 = torch.full((), self.INITIAL_LOG2, dtype=torch.float64, device=device)

    @property
    def value(self) -> Tensor:
        """The factor on the loss, float32 []."""
        return torch.exp2(self.log2).float()

    def update(self, overflow: Tensor) -> None:
        """Learn whether the step's gradients were infinite or not a number; overflow: 0 or 1, []."""
        self.log2 = torch.where(overflow > 0, self.log2 - 1.0, self.log2 + self.growth)

    @staticmethod
    def check(log2: float) -> None:
        """Raise ValueError for a scale below 1, given its logarithm."""
        if log2 < 0:
            raise ValueError(
                "the float16 loss scale fell below 2^0: gradients are infinite or not a number "
                "whatever the scale: resume with a lower --lr, or without --use_fp16"
            )
