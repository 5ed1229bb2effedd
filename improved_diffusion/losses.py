"""What the network predicts and how its error counts; Gaussian divergences and likelihoods, in nats."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from improved_diffusion.gaussian_diffusion import GaussianDiffusion


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)) per element; arguments broadcast."""
    ratio = torch.exp(logvar1 - logvar2)
    return 0.5 * (logvar2 - logvar1 - 1.0 + ratio + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the normal distribution function (as the published bounds use it)."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """log p(x) per element for 8-bit pixels x in [-1, 1] under N(means, e^(2 log_scales)).

    A pixel's probability is the Gaussian's mass on its bin of width 2/255; the outermost bins
    reach to infinity. Source: DDPM (arXiv 2006.11239), Eq. 13.
    """
    centered = x - means
    inv_std = torch.exp(-log_scales)
    cdf_upper = approx_standard_normal_cdf(inv_std * (centered + 1.0 / 255.0))
    cdf_lower = approx_standard_normal_cdf(inv_std * (centered - 1.0 / 255.0))
    tiny = 1e-12
    inner = (cdf_upper - cdf_lower).clamp(min=tiny).log()
    below = cdf_upper.clamp(min=tiny).log()
    above = (1.0 - cdf_lower).clamp(min=tiny).log()
    return torch.where(x < -0.999, below, torch.where(x > 0.999, above, inner))


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean per video [B] of values [B, T, C, H, W] times mask [B, T, 1, 1, 1] (None: ones).

    Divides by ALL elements, masked or not: frames of a video with few counted frames weigh the
    same as those of one with many.
    """
    if mask is not None:
        values = values * mask
    return values.flatten(1).mean(dim=1)


# ---------------------------------------------------------------- what the network predicts


class Noised(NamedTuple):
    """Clean frames, the noise in them, and both together at timestep t."""

    x_start: Tensor
    noise: Tensor
    x_t: Tensor
    t: Tensor


class PredictEps:
    """The network predicts the noise (DDPM Eq. 14)."""

    def target(self, diffusion: GaussianDiffusion, noised: Noised) -> Tensor:
        """What the network is trained to say."""
        return noised.noise

    def xstart(
        self, diffusion: GaussianDiffusion, output: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """The clean frames that the network's output stands for."""
        return diffusion.predict_xstart_from_eps(x_t, t, output)

    def error_scale(self, snr: Tensor) -> Tensor:
        """The squared error of the output per squared error of the clean frames, at `snr`."""
        return snr


class PredictXstart:
    """The network predicts the clean frames."""

    def target(self, diffusion: GaussianDiffusion, noised: Noised) -> Tensor:
        """What the network is trained to say."""
        return noised.x_start

    def xstart(
        self, diffusion: GaussianDiffusion, output: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """The clean frames that the network's output stands for."""
        return output

    def error_scale(self, snr: Tensor) -> Tensor:
        """The squared error of the output per squared error of the clean frames, at `snr`."""
        return torch.ones_like(snr)


# ---------------------------------------------------------------- how its error counts


def unweighted(snr: Tensor, error_scale: Tensor) -> Tensor:
    """Every timestep's error of the prediction counts alike.

    A loss weighting gives factors [B] on the squared error of the network's output, from the
    signal-to-noise ratio [B] and the prediction type's `error_scale` there [B].
    """
    return torch.ones_like(snr)
