"""How many trajectories fit the memory: `--batch_size auto`."""

from __future__ import annotations

import functools
import logging

import numpy as np
import torch

from improved_diffusion.data import machine
from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.sampling.options import DEFAULT_BATCH_SIZE

logger = logging.getLogger(__name__)

SHARE = 0.8  # of the free memory; samplers keep a few more tensors than one call does
TRIAL_SIZES = 1, 4  # trajectories in the trial calls


def fitting_batch_size(
    denoiser: Denoiser, device: str, frames: tuple[int, int, int, int], most: int
) -> int:
    """The number of trajectories that fit the free memory, by two trial calls of the network.

    Says in one line what it has found.

    Args:
        frames: (K, 3, H, W) of a trajectory.
        most: how many there can be at once.
    """
    at = torch.device(device)
    if most == 1:
        return 1
    trials = [functools.partial(_trial_call, denoiser, at, (n, *frames)) for n in TRIAL_SIZES]
    peaks = [machine.peak_memory_bytes(at, trial) for trial in trials]
    free = machine.free_memory_bytes(at)
    few, many = TRIAL_SIZES
    each = 0 if None in peaks else (peaks[1] - peaks[0]) / (many - few)  # type: ignore[operator]
    if free is None or each <= 0:
        size = min(most, DEFAULT_BATCH_SIZE)
        logger.info("--batch_size auto: %d, as nothing here says what memory a call takes", size)
        return size
    size = max(1, min(most, int(SHARE * free / each)))
    words = "--batch_size auto: %d at once (at most %d can run), %.0f MB each, %.1f GB are free"
    logger.info(words, size, most, each / 1e6, free / 1e9)
    return size


@torch.inference_mode()
def _trial_call(denoiser: Denoiser, device: torch.device, shape: tuple[int, ...]) -> None:
    """One call for black frames, half of them observed, each trajectory at its own indices."""
    num_videos, num_frames = shape[:2]
    indices = np.arange(num_videos)[:, None] + np.arange(num_frames)
    batch = FrameBatch.from_uint8(np.zeros(shape, np.uint8), indices, num_frames // 2, device)
    t = torch.zeros(1, dtype=torch.int64, device=device)
    denoiser = denoiser.for_trajectories(batch, [(0, row) for row in range(num_videos)])
    with denoiser.autocast():
        denoiser.denoise(batch.frames, t, batch)
