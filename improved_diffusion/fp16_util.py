"""Half precision for the network, and loss scaling."""

from __future__ import annotations

import contextlib

import torch

from improved_diffusion.nn import update_ema as update_ema  # its place in 0.1.0


def autocast(
    device: torch.device, *, precision: str, use_fp16: bool
) -> contextlib.AbstractContextManager:
    """The context in which the network computes: float16, bf16, or (`precision` "fp32") float32.

    Weights, gradients and everything outside the network stay float32. Raises ValueError for
    float16 on the CPU.
    """
    if use_fp16:
        if device.type != "cuda":
            raise ValueError("--use_fp16 True needs a CUDA GPU: on the CPU use --precision bf16")
        return torch.autocast(device.type, torch.float16)
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


class LossScale:
    """The factor that keeps float16 gradients from vanishing: halved on overflow, else growing.

    Args: `growth`: added to log2(scale) per good step. Source: Micikevicius et al. 2018
    (arXiv 1710.03740), section 3.2.
    """

    INITIAL_LOG2 = 20.0

    def __init__(self, growth: float) -> None:
        self.growth = growth
        self.log2 = self.INITIAL_LOG2

    @property
    def value(self) -> float:
        """The factor on the loss."""
        return 2.0**self.log2

    def update(self, finite: bool) -> None:
        """Learn whether the step's gradients were finite; ValueError for a scale below 1."""
        self.log2 += self.growth if finite else -1.0
        if self.log2 < 0:
            raise ValueError(
                "the float16 loss scale fell below 2^0: gradients are infinite or not a number "
                "whatever the scale: resume with a lower --lr, or without --use_fp16"
            )
