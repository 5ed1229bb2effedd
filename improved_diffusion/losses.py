"""What the network predicts and how its error counts; Gaussian divergences and likelihoods, in nats.

Tensors' own methods do all the work: no torch is imported, so that --help, which shows the options
of loss weightings, stays quick.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from improved_diffusion.config import option

if TYPE_CHECKING:
    from torch import Tensor

    from improved_diffusion.gaussian_diffusion import GaussianDiffusion


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)) per element; arguments broadcast."""
    ratio = (logvar1 - logvar2).exp()
    return 0.5 * (logvar2 - logvar1 - 1.0 + ratio + (mean1 - mean2) ** 2 * (-logvar2).exp())


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the normal distribution function (as the published bounds use it)."""
    return 0.5 * (1.0 + (math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)).tanh())


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """log p(x) per element for 8-bit pixels x in [-1, 1] under N(means, e^(2 log_scales)).

    A pixel's probability is the Gaussian's mass on its bin of width 2/255; the outermost bins
    reach to infinity. Source: DDPM (arXiv 2006.11239), Eq. 13.
    """
    centered = x - means
    inv_std = (-log_scales).exp()
    cdf_upper = approx_standard_normal_cdf(inv_std * (centered + 1.0 / 255.0))
    cdf_lower = approx_standard_normal_cdf(inv_std * (centered - 1.0 / 255.0))
    tiny = 1e-12
    inner = (cdf_upper - cdf_lower).clamp(min=tiny).log()
    below = cdf_upper.clamp(min=tiny).log()
    above = (1.0 - cdf_lower).clamp(min=tiny).log()
    return below.where(x < -0.999, above.where(x > 0.999, inner))


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
        return snr.new_ones(snr.shape)


class PredictV:
    """The network predicts v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0.

    (x_t, v) is (x_0, eps) turned by the angle whose cosine is sqrt(alpha_bar), so that one map, that
    of `q_sample`, makes v of (eps, -x_0) and x_0 of (x_t, -v).
    Source: Salimans & Ho 2022 (arXiv 2202.00512), section 4.
    """

    def target(self, diffusion: GaussianDiffusion, noised: Noised) -> Tensor:
        """What the network is trained to say."""
        return diffusion.q_sample(noised.noise, noised.t, -noised.x_start)

    def xstart(
        self, diffusion: GaussianDiffusion, output: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """The clean frames that the network's output stands for."""
        return diffusion.q_sample(x_t, t, -output)

    def error_scale(self, snr: Tensor) -> Tensor:
        """The squared error of the output per squared error of the clean frames, at `snr`."""
        return snr + 1


# ---------------------------------------------------------------- how its error counts


def unweighted(snr: Tensor, error_scale: Tensor) -> Tensor:
    """Every timestep's error of the prediction counts alike.

    A loss weighting is a function like this one, or a class made from its `Options` whose instances
    are: it gives factors [B] on the squared error of the network's output, from the signal-to-noise
    ratio [B] and the prediction type's `error_scale` there [B].
    """
    return snr.new_ones(snr.shape)


class MinSnr:
    """The error of the clean frames counts as min(snr, gamma), whatever the network predicts.

    Source: Hang et al. 2023 (arXiv 2303.09556), section 3.
    """

    @dataclass(frozen=True)
    class Options:
        """From where on less noise counts no more."""

        min_snr_gamma: float = option(5.0, "min-snr: the largest weight of the clean frames' error")

        def __post_init__(self) -> None:
            if not 0 < self.min_snr_gamma < math.inf:
                raise ValueError(
                    f"--min_snr_gamma {self.min_snr_gamma}: must be above 0, and finite"
                )

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(self, snr: Tensor, error_scale: Tensor) -> Tensor:
        """See `unweighted`."""
        return snr.clamp(max=self.options.min_snr_gamma) / error_scale


class Sigmoid:
    """The error of the noise counts as sigmoid(bias - log snr), whatever the network predicts.

    Without the factor of a continuous noise schedule's speed: here timesteps have their own
    distribution. Source: Hoogeboom et al. 2024 (arXiv 2410.19324).
    """

    @dataclass(frozen=True)
    class Options:
        """Where the weight falls."""

        sigmoid_bias: float = option(
            -1.0,
            "sigmoid: the log SNR at which the noise's error counts half as much; less for "
            "larger frames",
        )

        def __post_init__(self) -> None:
            if not math.isfinite(self.sigmoid_bias):
                raise ValueError(f"--sigmoid_bias {self.sigmoid_bias}: must be finite")

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(self, snr: Tensor, error_scale: Tensor) -> Tensor:
        """See `unweighted`."""
        return (self.options.sigmoid_bias - snr.log()).sigmoid() * snr / error_scale
