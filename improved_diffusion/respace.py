"""Shorter chains: a diffusion process that keeps some of another one's timesteps (IDDPM, section 4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from improved_diffusion.config import DiffusionConfig
from improved_diffusion.gaussian_diffusion import GaussianDiffusion, get_named_beta_schedule


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


class SpacedDiffusion(GaussianDiffusion):
    """The process of `config` on the timesteps that `config.timestep_respacing` keeps.

    The network still sees the original timesteps: `timestep_map[i]` is that of step i.
    """

    def __init__(self, config: DiffusionConfig):
        original = np.cumprod(
            1 - get_named_beta_schedule(config.noise_schedule, config.diffusion_steps)
        )
        self.timestep_map = np.array(
            space_timesteps(config.diffusion_steps, config.timestep_respacing)
        )
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
