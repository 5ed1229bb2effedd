"""How training draws diffusion timesteps, and the weights that keep the loss unbiased."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from improved_diffusion import dist_util
from improved_diffusion.registry import TIMESTEP_DISTRIBUTIONS


class ScheduleSampler:
    """Timesteps in [0, num_timesteps), drawn uniformly; the base of the samplers."""

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps

    def probabilities(self) -> Tensor:
        """How likely each timestep is: [num_timesteps] float64, sum 1."""
        return torch.full((self.num_timesteps,), 1.0 / self.num_timesteps, dtype=torch.float64)

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw timesteps [B] int64 and loss weights [B] float32 = 1 / (num_timesteps * p)."""
        p = self.probabilities()
        t = torch.multinomial(p, batch_size, replacement=True, generator=generator)
        return t, (1.0 / (self.num_timesteps * p[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learn from this rank's timesteps [B] and unweighted losses [B]; all ranks must call."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s result."""


class LossSecondMomentSampler(ScheduleSampler):
    """Probability proportional to the root mean square of the last losses at each timestep.

    Uniform until every timestep has `history` losses; `uniform_share` of the draws stays uniform.
    Source: Improved DDPM (arXiv 2102.09672), section 3.3.
    """

    def __init__(
        self, num_timesteps: int, *, history: int = 10, uniform_share: float = 0.001
    ) -> None:
        super().__init__(num_timesteps)
        self.uniform_share = uniform_share
        self.losses = torch.zeros(num_timesteps, history, dtype=torch.float64)  # newest last
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        uniform = super().probabilities()
        if bool((self.counts < self.losses.shape[1]).any()):
            return uniform
        p = self.losses.square().mean(dim=1).sqrt()
        return torch.lerp(p / p.sum(), uniform, self.uniform_share)

    def update(self, t: Tensor, losses: Tensor) -> None:
        all_t, all_losses = (
            dist_util.all_gather(t).cpu(),
            dist_util.all_gather(losses.detach()).cpu(),
        )
        for step, loss in zip(all_t.tolist(), all_losses.tolist(), strict=True):
            self.losses[step] = torch.cat([self.losses[step, 1:], self.losses.new_tensor([loss])])
            self.counts[step] += 1

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of another sampler or number of timesteps."""
        if state.get("counts") is None or state["counts"].shape != self.counts.shape:
            raise ValueError(
                "the checkpoint was made with another --schedule_sampler: resume with that one"
            )
        self.losses, self.counts = state["losses"].clone(), state["counts"].clone()


def create_schedule_sampler(name: str, num_timesteps: int) -> ScheduleSampler:
    """The sampler that --schedule_sampler names."""
    return TIMESTEP_DISTRIBUTIONS[name](num_timesteps)
