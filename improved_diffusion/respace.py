"""Shorter chains: a diffusion process that keeps some of another one's timesteps (IDDPM, section 4).

Which ones is a spacing, an entry of SPACINGS: a function of the trained noise levels
sigma = sqrt((1 - alpha_bar) / alpha_bar), float64 [num_timesteps] rising, and of the text of
--timestep_respacing, that returns the sorted timesteps to keep. It raises ValueError for a text that
it cannot follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from improved_diffusion.config import DiffusionConfig
from improved_diffusion.gaussian_diffusion import GaussianDiffusion, get_named_beta_schedule
from improved_diffusion.registry import SPACINGS

# The noise levels of EDM's sampler (arXiv 2206.00364, Table 1): beyond them there is nothing to gain.
SIGMA_RANGE = 0.002, 80.0


def space_timesteps(num_timesteps: int, respacing: str) -> list[int]:
    """The sorted timesteps that `respacing` keeps of `num_timesteps`.

    "" keeps all; "ddim<n>" takes n timesteps at an equal integer stride from 0 (DDIM's choice); a
    comma list of counts divides the chain into as many equal sections and keeps so many of each,
    first and last included. Raises ValueError where that cannot be done.
    """
    if not respacing:
        return list(range(num_timesteps))
    ddim = respacing.startswith("ddim")
    try:
        counts = [int(count) for count in respacing.removeprefix("ddim").split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1 or (ddim and len(counts) > 1):
        raise ValueError(
            f"--timestep_respacing {respacing!r}: must be an integer, a comma list of integers, or ddim<int>"
        )
    if ddim:
        for stride in range(1, num_timesteps + 1):
            if len(range(0, num_timesteps, stride)) == counts[0]:
                return list(range(0, num_timesteps, stride))
        raise ValueError(
            f"--timestep_respacing {respacing}: no integer stride takes {counts[0]} of {num_timesteps} timesteps"
        )
    return _space_sections(num_timesteps, counts, respacing)


def _space_sections(num_timesteps: int, counts: list[int], respacing: str) -> list[int]:
    size, longer = divmod(num_timesteps, len(counts))
    start, kept = 0, []
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if count > length:
            raise ValueError(
                f"--timestep_respacing {respacing}: cannot take {count} timesteps of a section of {length}"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        kept += [start + round(i * stride) for i in range(count)]
        start += length
    return kept


def space_by_time(sigma: np.ndarray, respacing: str) -> list[int]:
    """`space_timesteps`: even in the timestep, as published."""
    return space_timesteps(len(sigma), respacing)


def space_by_log_snr(sigma: np.ndarray, respacing: str) -> list[int]:
    """Even in log(sigma), which is -log(SNR) / 2, as DPM-Solver (arXiv 2206.00927) was made for."""
    return _nearest(sigma, respacing, "logsnr", np.log, np.exp)


def space_by_rho7(sigma: np.ndarray, respacing: str) -> list[int]:
    """Even in sigma^(1/7): EDM (arXiv 2206.00364) Eq. 5 with rho = 7."""
    return _nearest(sigma, respacing, "rho7", lambda s: s ** (1 / 7), lambda root: root**7)


def _nearest(
    sigma: np.ndarray,
    respacing: str,
    spacing: str,
    to_even: Callable[[Any], Any],
    back: Callable[[np.ndarray], np.ndarray],
) -> list[int]:
    """The timesteps nearest in log(sigma) to levels even in `to_even`(sigma), each taken once.

    From the first to the last level within SIGMA_RANGE. A level whose nearest timestep is taken gets
    the next one that is free.
    """
    count = int(respacing) if respacing.isdigit() else 0
    if not 2 <= count <= len(sigma):
        raise ValueError(
            f"--spacing {spacing} with --timestep_respacing {respacing!r}: give a number from 2 to "
            f"the {len(sigma)} trained timesteps"
        )
    low, high = to_even(np.clip(SIGMA_RANGE, sigma[0], sigma[-1]))
    wanted = np.log(back(np.linspace(low, high, count)))
    kept = np.abs(np.log(sigma)[:, None] - wanted).argmin(axis=0)
    free = np.arange(count)
    kept = np.maximum.accumulate(kept - free) + free  # each at least one above the one before
    return np.minimum(kept, len(sigma) - count + free).tolist()  # and none beyond the last


class SpacedDiffusion(GaussianDiffusion):
    """The process of `config` on the timesteps that `config.timestep_respacing` keeps.

    The network still sees the original timesteps: `timestep_map[i]` is that of step i. spacing: a
    name in SPACINGS.
    """

    def __init__(self, config: DiffusionConfig, spacing: str = "time"):
        original = np.cumprod(
            1 - get_named_beta_schedule(config.noise_schedule, config.diffusion_steps)
        )
        sigma = np.sqrt((1 - original) / original)
        self.timestep_map = np.array(SPACINGS[spacing](sigma, config.timestep_respacing))
        kept = original[self.timestep_map]
        super().__init__(1 - kept / np.append(1.0, kept[:-1]), config)

    def scale_timesteps(self, t: Tensor) -> Tensor:
        key = ("timestep_map", t.device)
        if key not in self._device_tables:
            self._device_tables[key] = torch.from_numpy(self.timestep_map).to(t.device)
        original: Any = self._device_tables[key][t]
        if self.config.rescale_timesteps:
            return original.float() * (1000.0 / self.config.diffusion_steps)
        return original
