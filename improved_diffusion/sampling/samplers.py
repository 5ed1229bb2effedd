"""Ways from noise to frames. Each goes through all timesteps that the denoiser's process keeps.

All have one signature: (denoiser, batch, *, generator, noise, eta) -> frames like batch.frames, the
latent ones sampled and the others untouched.
    generator: where noise comes from: a CPU generator, or one per video.
    noise: standard normals like batch.frames to start from (None: drawn).
    eta: of ddim alone.

ddpm and ddim step through the diffusion process itself; the others solve its probability flow with
fewer network calls. heun makes two calls a timestep and one at the last, all others one a timestep.
None of them turns gradients off: call them in torch.inference_mode().
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.data.rng_util import Generators, randn
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.sampling.multistep import adams_weights, decaying_weights


def ddpm(
    denoiser: Denoiser,
    batch: FrameBatch,
    *,
    generator: Generators = None,
    noise: Tensor | None = None,
    eta: float = 0.0,
) -> Tensor:
    """Ancestral sampling, DDPM (arXiv 2006.11239) Algorithm 2."""
    x = _start(batch, generator, noise)
    for t in denoiser.diffusion.countdown(1, batch.device):
        xstart, log_variance = denoiser.predict(x, t, batch)
        fresh = randn(x.shape, generator, x.device)
        x = denoiser.diffusion.ancestral_step(x, t, xstart, log_variance, fresh)
    return _finish(batch, x)


def ddim(
    denoiser: Denoiser,
    batch: FrameBatch,
    *,
    generator: Generators = None,
    noise: Tensor | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (arXiv 2010.02502) Eq. 12, with noise eta * sigma."""
    x = _start(batch, generator, noise)
    for t in denoiser.diffusion.countdown(1, batch.device):
        xstart = denoiser.denoise(x, t, batch)
        x = denoiser.diffusion.ddim_step(x, t, xstart, eta=eta, generator=generator)
    return _finish(batch, x)


def dpmpp2m(
    denoiser: Denoiser,
    batch: FrameBatch,
    *,
    generator: Generators = None,
    noise: Tensor | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095) Algorithm 2: one network call per step.

    The extrapolation never reaches further than the previous step was long. The plain rule
    overshoots where steps grow in log(sigma), as they do at the end of evenly spaced timesteps;
    the order of convergence stays 2.
    """
    flow = ProbabilityFlow(denoiser, batch)
    x = flow.start(_start(batch, generator, noise))
    previous, previous_h = None, 0.0
    for i in flow.indices():
        denoised = target = flow.denoise(x, i)
        h = flow.log_sigma[i] - flow.log_sigma[i - 1] if i else np.inf
        if previous is not None and i:
            # Linear in log(sigma), taken at the middle of the step.
            extrapolation = min(h, previous_h) / (2 * previous_h)
            target = (1 + extrapolation) * denoised - extrapolation * previous
        shrink = np.exp(-h)  # sigma of the next step over that of this one
        x = shrink * x + (1 - shrink) * target
        previous, previous_h = denoised, h
    return _finish(batch, x)


def heun(
    denoiser: Denoiser,
    batch: FrameBatch,
    *,
    generator: Generators = None,
    noise: Tensor | None = None,
    eta: float = 0.0,
) -> Tensor:
    """EDM's second-order sampler (arXiv 2206.00364, Algorithm 1): two calls a step, one in the last.

    A step in which sigma shrinks many times over is too long for it: few timesteps of a cosine
    schedule are better given to `dpmpp2m`.
    """
    flow = ProbabilityFlow(denoiser, batch)
    x = flow.start(_start(batch, generator, noise))
    for i in flow.indices():
        slope = (x - flow.denoise(x, i)) / flow.sigma[i]
        if i == 0:
            x = x - flow.sigma[0] * slope
            continue
        change = flow.sigma[i - 1] - flow.sigma[i]
        guess = x + change * slope
        corrected = (guess - flow.denoise(guess, i - 1)) / flow.sigma[i - 1]
        x = x + change * 0.5 * (slope + corrected)
    return _finish(batch, x)


def dpmpp3m(
    denoiser: Denoiser,
    batch: FrameBatch,
    *,
    generator: Generators = None,
    noise: Tensor | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DPM-Solver++(3M) (arXiv 2211.01095): the predictor of `unipc`, nothing corrected.

    The third term is the Taylor series'. Published code (diffusers, k-diffusion) halves it, which
    leaves order 2.
    """
    return _exponential_adams(denoiser, batch, _start(batch, generator, noise), corrected=False)


def unipc(
    denoiser: Denoiser,
    batch: FrameBatch,
    *,
    generator: Generators = None,
    noise: Tensor | None = None,
    eta: float = 0.0,
) -> Tensor:
    """UniPC of order 3 (arXiv 2302.04867) Algorithm 1, of clean frames; its corrector gives order 4.

    The call at the end of a step is made where the predictor led; it corrects the step afterwards.
    """
    return _exponential_adams(denoiser, batch, _start(batch, generator, noise), corrected=True)


def _exponential_adams(
    denoiser: Denoiser, batch: FrameBatch, noise: Tensor, *, corrected: bool
) -> Tensor:
    """Clean frames as a polynomial in u = -log(sigma), through those of the last three calls.

    Over a step h the flow is exactly x -> exp(-h) x + integral of exp(u - h) D(u), 0 to h. As in
    `dpmpp2m` the polynomial is followed no further than the previous step was long.
    """
    flow = ProbabilityFlow(denoiser, batch)
    x = flow.start(noise)
    points: list[tuple[float, Tensor]] = []  # (u, clean frames) of the last calls, newest first
    before, previous_h = x, 0.0
    for i in flow.indices():
        here = -flow.log_sigma[i], flow.denoise(x, i)
        if i == 0:
            return _finish(batch, here[1])
        if points and corrected:
            x = _exponential_step(before, points[0][0], [here, *points], here[0], np.inf)
        points = [here, *points][:3]
        before = x
        x = _exponential_step(x, here[0], points, -flow.log_sigma[i - 1], previous_h)
        previous_h = -flow.log_sigma[i - 1] - here[0]
    raise AssertionError("a process has timesteps")


def _exponential_step(
    x: Tensor, start: float, points: Sequence[tuple[float, Tensor]], end: float, reach: float
) -> Tensor:
    """x at u = start, brought to u = end."""
    h = end - start
    weights = decaying_weights([u - start for u, _ in points], h, reach=reach)
    return np.exp(-h) * x + _weighted(weights, [denoised for _, denoised in points])


def _weighted(weights: np.ndarray, tensors: Sequence[Tensor]) -> Tensor:
    return sum((float(w) * t for w, t in zip(weights, tensors, strict=True)), torch.tensor(0.0))


def ipndm4(
    denoiser: Denoiser,
    batch: FrameBatch,
    *,
    generator: Generators = None,
    noise: Tensor | None = None,
    eta: float = 0.0,
) -> Tensor:
    """iPNDM (arXiv 2204.13902, section 3.3): Adams-Bashforth of order 4, begun with orders 1 to 3.

    Solves dx/dsigma = (x - D) / sigma. The weights are those of the noise levels at hand (PNDM and
    iPNDM take those of equal steps: 55, -59, 37, -9 over 24).
    """
    flow = ProbabilityFlow(denoiser, batch)
    x = flow.start(_start(batch, generator, noise))
    sigmas: list[float] = []
    slopes: list[Tensor] = []  # both of the last calls, newest first
    for i in flow.indices():
        denoised = flow.denoise(x, i)
        if i == 0:
            return _finish(batch, denoised)
        sigmas = [flow.sigma[i], *sigmas][:4]
        slopes = [(x - denoised) / flow.sigma[i], *slopes][:4]
        x = x + _weighted(adams_weights(sigmas, flow.sigma[i], flow.sigma[i - 1]), slopes)
    raise AssertionError("a process has timesteps")


class ProbabilityFlow:
    """The probability flow of a denoiser's process, in coordinates x / sqrt(alpha_bar).

    There noisy frames are clean ones plus noise of standard deviation
    sigma_i = sqrt((1 - alpha_bar_i) / alpha_bar_i) (EDM, arXiv 2206.00364, section 4).
    """

    def __init__(self, denoiser: Denoiser, batch: FrameBatch):
        self.denoiser, self.batch = denoiser, batch
        bar = denoiser.diffusion.alphas_cumprod
        self.sqrt_bar = np.sqrt(bar)
        self.log_sigma = 0.5 * (np.log1p(-bar) - np.log(bar))
        self.sigma = np.exp(self.log_sigma)

    def start(self, noise: Tensor) -> Tensor:
        """Standard normals as frames of the last timestep."""
        return noise / self.sqrt_bar[-1]

    def indices(self) -> Iterator[int]:
        """The process's timesteps, last to first."""
        return iter(range(len(self.sigma) - 1, -1, -1))

    def denoise(self, x: Tensor, i: int) -> Tensor:
        """The predicted clean frames at noise level sigma[i]."""
        t = torch.full((1,), i, device=x.device, dtype=torch.int64)
        return self.denoiser.denoise(x * self.sqrt_bar[i], t, self.batch)


def _start(batch: FrameBatch, generator: Generators, noise: Tensor | None) -> Tensor:
    """Standard normals like the batch's frames."""
    if noise is not None:
        return noise.to(batch.device)
    return randn(batch.frames.shape, generator, batch.device)


def _finish(batch: FrameBatch, x: Tensor) -> Tensor:
    """Sampled latent frames beside the untouched other ones."""
    return torch.where(batch.latent_mask > 0, x, batch.frames)
