"""Guidance: predictions are led away from those of something weaker (classifier-free guidance for videos).

D = D_ref + W (D - D_ref), of predicted clean frames. The weaker prediction D_ref is the same network's
that observes fewer frames, an entry of GUIDANCE_REFERENCES (history guidance, arXiv 2502.06764), or an
earlier or smaller network's (autoguidance, arXiv 2406.02507); perhaps within an interval of noise levels
only (arXiv 2404.07724).

An entry is a function (observed, latent, generators) -> kept. observed, latent: int64 [B, n] and [B, m],
frames of B videos; generators: B of them, which depend on the seed, video, sample and inference step
alone; kept: int64 [B, k], which of the n observed frames are observed still, the same number for all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.data.rng_util import make_generator
from improved_diffusion.registry import GUIDANCE_REFERENCES
from improved_diffusion.sampling.denoiser import Denoiser, Prediction
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.sampling.trained_model import TrainedModel

ObserveFewer = Callable[[Tensor, Tensor, Sequence[torch.Generator]], Tensor]

_DRAWN_FRAMES = 1  # ends the names of the streams that observed frames are drawn from


def observe_nothing(
    observed: Tensor, latent: Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    """No frame at all."""
    return observed[:, :0]


def observe_recent(
    observed: Tensor, latent: Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    """The half (rounded down) that is nearest to any latent frame; the later one of two as near."""
    distance = (observed[:, :, None] - latent[:, None]).abs().amin(dim=2)
    later_first = observed.argsort(dim=1, descending=True, stable=True)
    nearest_first = distance.gather(1, later_first).argsort(dim=1, stable=True)
    return later_first.gather(1, nearest_first)[:, : observed.shape[1] // 2]


def observe_subset(
    observed: Tensor, latent: Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    """A random half, rounded down."""
    n = observed.shape[1]
    return torch.stack([torch.randperm(n, generator=row)[: n // 2] for row in generators])


class GuidedDenoiser(Denoiser):
    """A denoiser that is guided, for every sampler; `for_trajectories` first, where frames are drawn.

    Clean frames are clipped after guidance. The variance of a step is the guided network's; output,
    losses and bounds are its own, without guidance. A network that is its own reference is called
    apart for it: frames that are not observed are left out, never padding, so the counts differ.

    Args:
        denoiser: to be guided.
        weight: W; 1 changes nothing.
        against: how the reference observes fewer frames, or a denoiser in the same process.
        interval: lowest and highest noise level sigma at which to guide (None: all).

    Raises ValueError where no timestep of the process lies within the interval.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        weight: float,
        *,
        against: ObserveFewer | Denoiser,
        interval: tuple[float, float] | None = None,
    ) -> None:
        network, diffusion, autocast = denoiser.network, denoiser.diffusion, denoiser.autocast
        super().__init__(
            network, diffusion, clip_denoised=denoiser.clip_denoised, autocast=autocast
        )
        self._own = _unclipped(denoiser)
        self._other = _unclipped(against) if isinstance(against, Denoiser) else None
        self._observe_fewer = None if isinstance(against, Denoiser) else against
        self._is_partial = interval is not None
        self._weights = _weights(denoiser, weight, interval)
        self._fewer: tuple[Tensor, FrameBatch] | None = None

    @property
    def calls(self) -> int:
        """Of both networks, so far."""
        return self._own.calls + (self._other.calls if self._other else 0)

    def output(self, x_t: Tensor, t: Tensor, batch: FrameBatch) -> Tensor:
        """The guided network's raw output, not guided."""
        return self._own.output(x_t, t, batch)

    def for_trajectories(
        self, batch: FrameBatch, names: Sequence[tuple[int, ...]]
    ) -> GuidedDenoiser:
        """The guided denoiser of these trajectories. All videos observe as many frames."""
        bound = copy.copy(self)  # its networks are these, which count all calls
        bound._weights = self._weights.to(batch.device)
        if self._observe_fewer is not None:
            bound._fewer = self._observed_fewer(batch, names)
        return bound

    def predict(self, x_t: Tensor, t: Tensor, batch: FrameBatch) -> Prediction:
        """The guided clean frames, and the log variance of the next step."""
        own = self._own.predict(x_t, t, batch)
        xstart, weights = own.xstart, self._weights[t][:, None, None, None, None]
        if not self._is_partial or (weights != 1).any():
            reference = self._reference(xstart, x_t, t, batch)
            xstart = reference + weights * (xstart - reference)
        return own._replace(xstart=xstart.clamp(-1, 1) if self.clip_denoised else xstart)

    def _observed_fewer(
        self, batch: FrameBatch, names: Sequence[tuple[int, ...]]
    ) -> tuple[Tensor, FrameBatch]:
        """What the reference is given: the places of its frames, and these."""
        assert self._observe_fewer is not None
        columns = _reference_columns(batch, names, self._observe_fewer)
        return columns, batch.columns(columns)

    def _reference(self, own: Tensor, x_t: Tensor, t: Tensor, batch: FrameBatch) -> Tensor:
        """The weaker prediction of the latent frames; `own` in the place of others."""
        if self._other is not None:
            return self._other.denoise(x_t, t, batch)
        names = [(row,) for row in range(len(batch))]  # of a batch that no trajectory is known for
        columns, fewer = self._fewer or self._observed_fewer(batch, names)
        if columns.shape[1] == x_t.shape[1]:  # there is nothing to observe less
            return own
        index = columns[:, :, None, None, None]
        seen = self._own.denoise(torch.take_along_dim(x_t, index, dim=1), t, fewer)
        return own.scatter(1, index.expand_as(seen), seen)


def _unclipped(denoiser: Denoiser) -> Denoiser:
    return Denoiser(
        denoiser.network, denoiser.diffusion, clip_denoised=False, autocast=denoiser.autocast
    )


def _weights(denoiser: Denoiser, weight: float, interval: tuple[float, float] | None) -> Tensor:
    """The weight at each timestep, float32: 1 outside of the interval."""
    sigma = np.exp(-denoiser.diffusion.log_snr / 2)
    low, high = interval or (0.0, np.inf)
    within = (low <= sigma) & (sigma <= high)
    if not within.any():
        levels = ", ".join(f"{level:.3g}" for level in sigma)
        raise ValueError(
            f"--guidance_interval {low:g} {high:g}: none of the sampled noise levels lies within, "
            f"which are {levels}"
        )
    return torch.from_numpy(np.where(within, weight, 1.0)).float()


def _reference_columns(
    batch: FrameBatch, names: Sequence[tuple[int, ...]], observe_fewer: ObserveFewer
) -> Tensor:
    """The frames that the reference is given of each video, int64 [B, k] or [1, k], in their order."""
    size, device = len(batch), batch.device
    observed, latent = (
        (mask.flatten(1) > 0).nonzero()[:, 1].view(size, -1)
        for mask in (batch.obs_mask, batch.latent_mask)
    )
    indices = batch.frame_indices.expand(size, -1)
    generators = [make_generator(*name, _DRAWN_FRAMES) for name in names]
    kept = observe_fewer(indices.gather(1, observed), indices.gather(1, latent), generators)
    columns = torch.cat([observed.gather(1, kept.to(device)), latent], dim=1).sort(dim=1).values
    return columns[:1] if (columns == columns[:1]).all() else columns


def reference_model(options: SampleConfig, model: TrainedModel) -> TrainedModel | None:
    """The checkpoint that guidance leads away from, if it is one.

    Raises FileNotFoundError, or ValueError for one that cannot guide `model`.
    """
    path = options.reference_checkpoint
    if not path:
        return None
    if not Path(path).exists():
        names = ", ".join(GUIDANCE_REFERENCES)
        raise FileNotFoundError(f"--guidance_against {path}: is no file, and none of {names}")
    reference = TrainedModel.load(path, model.device, compile=options.compile)
    if reference.identity == model.identity:
        raise ValueError(f"--guidance_against {path}: has the weights of the checkpoint itself")
    own, other = model.process().config, reference.process().config
    for what, mine, its in (
        ("data set", model.dataset, reference.dataset),
        ("image size", model.image_size, reference.image_size),
        ("noise schedule", own.noise_schedule, other.noise_schedule),
        ("number of timesteps", own.diffusion_steps, other.diffusion_steps),
    ):
        if mine != its:
            raise ValueError(
                f"--guidance_against {path}: was trained with the {what} {its}, the checkpoint with "
                f"{mine}: give an earlier or smaller network of the same kind"
            )
    return reference
