"""How training draws diffusion timesteps, and what their losses then weigh.

torch is imported by the functions that need it: --help, which shows the options here, stays quick.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from improved_diffusion import dist_util
from improved_diffusion.config import NoOptions, option
from improved_diffusion.registry import TIMESTEP_DISTRIBUTIONS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from improved_diffusion.gaussian_diffusion import GaussianDiffusion
    from improved_diffusion.training.options import TrainConfig


class ScheduleSampler:
    """Timesteps in [0, num_timesteps), drawn uniformly; the base of the distributions.

    Args:
        num_timesteps: how many there are.
        log_snr: the logarithm of their signal-to-noise ratios, falling, float64 [num_timesteps];
            distributions over noise levels need it.
        options: an instance of the class's `Options` (None: all defaults).
    """

    # A frozen dataclass of fields made by `config.option`, each a flag of that name.
    Options: ClassVar[type] = NoOptions

    # Whether other timesteps than uniform ones are to count more: then every loss weighs 1. Else
    # losses are weighted by 1 / (num_timesteps * p), which leaves the mean loss as it is.
    changes_objective: ClassVar[bool] = False

    def __init__(
        self, num_timesteps: int, *, log_snr: Tensor | None = None, options: Any = None
    ) -> None:
        self.num_timesteps, self.log_snr = num_timesteps, log_snr
        self.options = self.Options() if options is None else options

    def probabilities(self) -> Tensor:
        """How likely each timestep is: [num_timesteps] float64, sum 1."""
        import torch

        return torch.full((self.num_timesteps,), 1.0 / self.num_timesteps, dtype=torch.float64)

    def sample(
        self, batch_size: int, generator: torch.Generator, *, quantiles: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw timesteps [B] int64 and the weights [B] float32 of their losses.

        quantiles: float64 [B] in [0, 1): take the timesteps at these of the distribution function,
        in place of independent draws; the generator is not used then.
        """
        import torch

        p = self.probabilities()
        if quantiles is None:
            t = torch.multinomial(p, batch_size, replacement=True, generator=generator)
        else:
            cdf = p.cumsum(0)
            t = torch.searchsorted(cdf, quantiles * cdf[-1], right=True)
            t = t.clamp(max=int(p.nonzero().max()))  # 1 - 1e-17 is 1
        if self.changes_objective:
            return t, torch.ones(batch_size)
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
        self,
        num_timesteps: int,
        *,
        history: int = 10,
        uniform_share: float = 0.001,
        **process: Any,
    ) -> None:
        import torch

        super().__init__(num_timesteps, **process)
        self.uniform_share = uniform_share
        self.losses = torch.zeros(num_timesteps, history, dtype=torch.float64)  # newest last
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        uniform = super().probabilities()
        if bool((self.counts < self.losses.shape[1]).any()):
            return uniform
        p = self.losses.square().mean(dim=1).sqrt()
        return (p / p.sum()).lerp(uniform, self.uniform_share)

    def update(self, t: Tensor, losses: Tensor) -> None:
        all_t, all_losses = (
            dist_util.all_gather(t).cpu(),
            dist_util.all_gather(losses.detach()).cpu(),
        )
        for step, loss in zip(all_t.tolist(), all_losses.tolist(), strict=True):
            self.losses[step] = self.losses[step].roll(-1)
            self.losses[step, -1] = loss
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


class NoiseLevelSampler(ScheduleSampler):
    """The base of distributions over log SNR, a continuous noise level.

    A timestep stands for all levels to which it is the nearest one: its probability is exactly that
    of the bin whose edges lie midway to its neighbours', as if a level was drawn and rounded.
    """

    changes_objective = True

    def edges(self) -> Tensor:
        """Edges of the bins, falling from inf to -inf, float64 [num_timesteps + 1]."""
        import torch

        assert self.log_snr is not None, f"{type(self).__name__} needs log_snr"
        middles = (self.log_snr[1:] + self.log_snr[:-1]) / 2
        ends = torch.tensor([math.inf], dtype=torch.float64)
        return torch.cat([ends, middles, -ends])


class LogNormalSampler(NoiseLevelSampler):
    """log sigma ~ N(mean, std^2), where sigma = sqrt((1 - alpha_bar) / alpha_bar).

    A share of the draws is uniform over the timesteps instead, so that no noise level that sampling
    passes through is left out, however narrow the distribution is.

    Source: EDM (arXiv 2206.00364), section 5. Its mean and std are for single images of 64x64. A
    picture of twice the height and width averages as much noise out if the mean is log 2 more (by
    the argument of arXiv 2301.11093, section 2.1); observed frames move it up further.
    """

    @dataclass(frozen=True)
    class Options:
        """The normal distribution of log sigma."""

        log_sigma_mean: float = option(
            -1.2, "lognormal: mean of log sigma (as for images; video given some frames wants more)"
        )
        log_sigma_std: float = option(1.2, "lognormal: standard deviation of log sigma")
        lognormal_uniform_share: float = option(
            0.0, "lognormal: share of the timesteps that are drawn uniformly instead"
        )

        def __post_init__(self) -> None:
            if not math.isfinite(self.log_sigma_mean):
                raise ValueError(f"--log_sigma_mean {self.log_sigma_mean}: must be finite")
            if not 0 < self.log_sigma_std < math.inf:
                raise ValueError(
                    f"--log_sigma_std {self.log_sigma_std}: must be above 0, and finite"
                )
            if not 0 <= self.lognormal_uniform_share <= 1:
                raise ValueError(
                    f"--lognormal_uniform_share {self.lognormal_uniform_share}: must be from 0 to 1"
                )

    def probabilities(self) -> Tensor:
        """Raises ValueError where most of the noise levels lie beyond those of the process."""
        import torch

        mean, std = self.options.log_sigma_mean, self.options.log_sigma_std
        below = torch.special.ndtr((-self.edges() / 2 - mean) / std)  # log sigma = -log SNR / 2
        assert self.log_snr is not None
        least, most = (-float(self.log_snr[i]) / 2 for i in (0, -1))
        if not least < mean < most:
            raise ValueError(
                f"--log_sigma_mean {mean}: must lie among the log sigmas of the noise schedule, "
                f"between {least:.2f} and {most:.2f}: most updates would fall on one timestep"
            )
        uniform = ScheduleSampler.probabilities(self)
        return below.diff().lerp(uniform, self.options.lognormal_uniform_share)


class LogSnrUniformSampler(NoiseLevelSampler):
    """All values of log SNR between two alike."""

    @dataclass(frozen=True)
    class Options:
        """The range of log SNR."""

        log_snr_min: float = option(-10.0, "logsnr-uniform: the least log SNR to train on")
        log_snr_max: float = option(10.0, "logsnr-uniform: the greatest log SNR to train on")

        def __post_init__(self) -> None:
            if not -math.inf < self.log_snr_min < self.log_snr_max < math.inf:
                raise ValueError(
                    f"--log_snr_min {self.log_snr_min} must be below --log_snr_max "
                    f"{self.log_snr_max}, and both finite"
                )

    def probabilities(self) -> Tensor:
        """Raises ValueError where the range lies beyond the noise levels of the process.

        The range ends where those of the process end.
        """
        assert self.log_snr is not None
        least = max(self.options.log_snr_min, float(self.log_snr[-1]))
        most = min(self.options.log_snr_max, float(self.log_snr[0]))
        if not least < most:
            raise ValueError(
                f"--log_snr_min {self.options.log_snr_min}, --log_snr_max "
                f"{self.options.log_snr_max}: the noise schedule has none of these, but "
                f"{float(self.log_snr[-1]):.2f} to {float(self.log_snr[0]):.2f}"
            )
        widths = -self.edges().clamp(least, most).diff()
        return widths / widths.sum()


def create_schedule_sampler(
    name: str, num_timesteps: int, *, log_snr: Tensor | None = None, options: Any = None
) -> ScheduleSampler:
    """The distribution that --schedule_sampler names; arguments as for `ScheduleSampler`."""
    return TIMESTEP_DISTRIBUTIONS[name](num_timesteps, log_snr=log_snr, options=options)


def timestep_distribution(config: TrainConfig, diffusion: GaussianDiffusion) -> ScheduleSampler:
    """The distribution that the training options choose, over the timesteps of the process.

    Raises ValueError where it cannot be drawn from, and where it changes the objective but the
    bound is to be trained on, which weighs timesteps itself.
    """
    import torch

    sampler = create_schedule_sampler(
        config.schedule_sampler,
        diffusion.num_timesteps,
        log_snr=torch.from_numpy(diffusion.log_snr),
        options=config.timestep_options,
    )
    if sampler.changes_objective and diffusion.config.use_kl:
        raise ValueError(
            f"--use_kl True and --schedule_sampler {config.schedule_sampler} exclude each other: "
            "the bound counts all timesteps alike: choose one"
        )
    sampler.probabilities()  # says what cannot be
    return sampler


def stratified_quantiles(
    batch_size: int, rank: int, world_size: int, *, shared: torch.Generator, own: torch.Generator
) -> Tensor:
    """Quantiles [B] float64 of one rank's draws: one in each of this rank's share of equal strata.

    [0, 1) has as many strata as all ranks together have items; a random permutation, which all
    ranks know, deals them out. So each quantile by itself is uniform, and all together are spread
    evenly over the items of all ranks, whatever microbatches they fall into.

    Args:
        shared: a generator in the same state on all ranks.
        own: this rank's generator, for the places inside the strata.
    """
    import torch

    total = batch_size * world_size
    strata = torch.randperm(total, generator=shared)[rank * batch_size :][:batch_size]
    return (strata + torch.rand(batch_size, dtype=torch.float64, generator=own)) / total
