"""Ways from noise to frames. All have one signature and keep observed frames as they are.

ddpm and ddim are steps of the diffusion process itself; dpmpp2m and heun solve its probability flow
with fewer network calls. They go through the timesteps that the process keeps (--timestep_respacing).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from improved_diffusion.data.rng_util import Generators, randn
from improved_diffusion.gaussian_diffusion import GaussianDiffusion, Model


def ddpm(
    diffusion: GaussianDiffusion,
    model: Model,
    shape: tuple[int, ...],
    *,
    eta: float,
    **options: Any,
) -> Tensor:
    """Ancestral sampling, DDPM (arXiv 2006.11239) Algorithm 2; has no eta."""
    return diffusion.p_sample_loop(model, shape, **options)


def ddim(
    diffusion: GaussianDiffusion,
    model: Model,
    shape: tuple[int, ...],
    *,
    eta: float,
    **options: Any,
) -> Tensor:
    """DDIM (arXiv 2010.02502) Eq. 12, with noise eta * sigma."""
    return diffusion.ddim_sample_loop(model, shape, eta=eta, **options)


def dpmpp2m(
    diffusion: GaussianDiffusion,
    model: Model,
    shape: tuple[int, ...],
    *,
    eta: float,
    **options: Any,
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095) Algorithm 2: one network call per step.

    The extrapolation never reaches further than the previous step was long. The plain rule
    overshoots where steps grow in log(sigma), as they do at the end of evenly spaced timesteps;
    the order of convergence stays 2.
    """
    flow = ProbabilityFlow(diffusion, model, shape, **options)
    x, previous, previous_h = flow.start, None, 0.0
    for step in flow.steps():
        denoised = target = flow.denoise(x, step)
        h = flow.log_sigma[step] - flow.log_sigma[step - 1] if step else np.inf
        if previous is not None and step:
            # Linear in log(sigma), taken at the middle of the step.
            extrapolation = min(h, previous_h) / (2 * previous_h)
            target = (1 + extrapolation) * denoised - extrapolation * previous
        shrink = np.exp(-h)  # sigma of the next step over that of this one
        x = shrink * x + (1 - shrink) * target
        previous, previous_h = denoised, h
    return flow.finish(x)


def heun(
    diffusion: GaussianDiffusion,
    model: Model,
    shape: tuple[int, ...],
    *,
    eta: float,
    **options: Any,
) -> Tensor:
    """EDM's second-order sampler (arXiv 2206.00364, Algorithm 1): two calls a step, one in the last.

    A step in which sigma shrinks many times over is too long for it: few timesteps of a cosine
    schedule are better given to `dpmpp2m`.
    """
    flow = ProbabilityFlow(diffusion, model, shape, **options)
    x = flow.start
    for step in flow.steps():
        slope = (x - flow.denoise(x, step)) / flow.sigma[step]
        if step == 0:
            x = x - flow.sigma[0] * slope
            continue
        change = flow.sigma[step - 1] - flow.sigma[step]
        guess = x + change * slope
        corrected = (guess - flow.denoise(guess, step - 1)) / flow.sigma[step - 1]
        x = x + change * 0.5 * (slope + corrected)
    return flow.finish(x)


class ProbabilityFlow:
    """The probability flow of a diffusion process, in coordinates x / sqrt(alpha_bar).

    There noisy frames are clean ones plus noise of standard deviation
    sigma_i = sqrt((1 - alpha_bar_i) / alpha_bar_i) (EDM, arXiv 2206.00364, section 4), and
    `denoise` is the network's guess at the clean frames.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        model: Model,
        shape: tuple[int, ...],
        *,
        model_kwargs: dict[str, Any],
        clip_denoised: bool = True,
        noise: Tensor | None = None,
        generator: Generators = None,
        progress: bool = False,
    ):
        self.diffusion, self.model, self.progress = diffusion, model, progress
        self.model_kwargs, self.clip_denoised = model_kwargs, clip_denoised
        self.sqrt_bar = np.sqrt(diffusion.alphas_cumprod)
        self.log_sigma = 0.5 * (
            np.log1p(-diffusion.alphas_cumprod) - np.log(diffusion.alphas_cumprod)
        )
        self.sigma = np.exp(self.log_sigma)
        x0: Tensor = model_kwargs["x0"]
        noise = randn(shape, generator, x0.device) if noise is None else noise.to(x0.device)
        self.start = noise / self.sqrt_bar[-1]

    def steps(self) -> Any:
        """Indices of the kept timesteps, last to first."""
        countdown: Any = range(self.diffusion.num_timesteps - 1, -1, -1)
        if self.progress:
            from tqdm import tqdm

            countdown = tqdm(countdown, leave=False)
        return countdown

    def denoise(self, x: Tensor, step: int) -> Tensor:
        """The predicted clean frames at noise level sigma[step]."""
        t = torch.full((x.shape[0],), step, device=x.device, dtype=torch.int64)
        out = self.diffusion.p_mean_variance(
            self.model,
            x * self.sqrt_bar[step],
            t,
            clip_denoised=self.clip_denoised,
            model_kwargs=self.model_kwargs,
        )
        return out["pred_xstart"]

    def finish(self, x: Tensor) -> Tensor:
        """Sampled latent frames beside the untouched other ones."""
        return torch.where(self.model_kwargs["latent_mask"] > 0, x, self.model_kwargs["x0"])


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp2m": dpmpp2m,
    "heun": heun,
}
