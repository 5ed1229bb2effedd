"""The diffusion process: DDPM's mathematics, masked losses and bounds, and its own samplers.

Sources: DDPM = Ho et al. 2020 (arXiv 2006.11239); IDDPM = Nichol & Dhariwal 2021 (2102.09672);
DDIM = Song et al. 2020 (2010.02502); FDM = Harvey et al. 2022 (2205.11495).

Frames are [B, T, C, H, W] in [-1, 1], timesteps t int64 [B] (or [1], where all videos are at one) in
[0, num_timesteps), masks float [B, T, 1, 1, 1]. Methods that take a `model`, called as
`model(x, timesteps, **FrameBatch.conditioning)`, are the published ones; this package uses `Denoiser`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from improved_diffusion.config import DiffusionConfig
from improved_diffusion.data.rng_util import Generators, randn
from improved_diffusion.losses import Noised, masked_mean, normal_kl
from improved_diffusion.losses import discretized_gaussian_log_likelihood as log_likelihood
from improved_diffusion.registry import PREDICTIONS

Model = Callable[..., Tensor]
Kwargs = dict[str, Any] | None


def get_named_beta_schedule(name: str, num_timesteps: int) -> np.ndarray:
    """The noise variances beta_t, float64 [num_timesteps] in (0, 1).

    linear: DDPM section 4, scaled to any number of steps; cosine: IDDPM Eq. 17.
    Raises ValueError for an unknown name and for linear schedules of 20 steps or fewer.
    """
    if name == "linear":
        if num_timesteps <= 20:
            raise ValueError(
                f"the linear noise schedule needs more than 20 steps, not {num_timesteps}: "
                "use --noise_schedule cosine"
            )
        scale = 1000 / num_timesteps
        return np.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=np.float64)
    if name == "cosine":
        steps = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
        alphas_cumprod = np.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)
    raise ValueError(f"--noise_schedule {name!r} is unknown: choose from linear, cosine")


class GaussianDiffusion:
    """A diffusion process with variances `betas` (float64 [num_timesteps], in (0, 1])."""

    def __init__(self, betas: np.ndarray, config: DiffusionConfig):
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("betas must be a vector of numbers in (0, 1]")
        self.config, self.prediction = config, PREDICTIONS[config.prediction_type]()
        self.betas, self.num_timesteps = betas, len(betas)
        self.alphas_cumprod = np.cumprod(1.0 - betas)
        self.log_snr = np.log(self.alphas_cumprod) - np.log1p(-self.alphas_cumprod)  # falling
        self._tables = self._make_tables()
        self._device_tables: dict[tuple[str, torch.device], Tensor] = {}

    def _make_tables(self) -> dict[str, np.ndarray]:
        """All per-timestep coefficients, in float64."""
        bar, bar_prev = self.alphas_cumprod, np.append(1.0, self.alphas_cumprod[:-1])
        posterior_variance = self.betas * (1 - bar_prev) / (1 - bar)  # DDPM Eq. 7
        # The first posterior variance is 0: its logarithm is clipped to the next one.
        first = posterior_variance[1:2] if len(bar) > 1 else self.betas
        clipped = np.append(first, posterior_variance[1:])
        return {
            "sqrt_bar": np.sqrt(bar),
            "sqrt_one_minus_bar": np.sqrt(1 - bar),
            "log_one_minus_bar": np.log(1 - bar),
            "sqrt_recip_bar": np.sqrt(1 / bar),
            "sqrt_recip_bar_minus_one": np.sqrt(1 / bar - 1),
            "bar": bar,
            "snr": bar / (1 - bar),
            "bar_prev": bar_prev,
            "posterior_x0": self.betas * np.sqrt(bar_prev) / (1 - bar),
            "posterior_xt": (1 - bar_prev) * np.sqrt(1 - self.betas) / (1 - bar),
            "posterior_variance": posterior_variance,
            "posterior_log_variance": np.log(clipped),
            "log_betas": np.log(self.betas),
            "large_variance": np.append(clipped[:1], self.betas[1:]),
            "large_log_variance": np.log(np.append(clipped[:1], self.betas[1:])),
        }

    def _table(self, name: str, t: Tensor) -> Tensor:
        """Coefficient `name` at timesteps t, float32 [B, 1, 1, 1, 1]; kept on the device."""
        key = (name, t.device)
        if key not in self._device_tables:
            self._device_tables[key] = torch.from_numpy(self._tables[name]).float().to(t.device)
        return self._device_tables[key][t][:, None, None, None, None]

    # ------------------------------------------------------------ the process

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x_0), DDPM Eq. 4."""
        variance = 1.0 - self._table("bar", t)
        return self._table("sqrt_bar", t) * x_start, variance, self._table("log_one_minus_bar", t)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """A draw of x_t given x_0; `noise` stands in for the standard normals (DDPM Eq. 4)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return self._table("sqrt_bar", t) * x_start + self._table("sqrt_one_minus_bar", t) * noise

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_{t-1} | x_t, x_0), DDPM Eq. 7."""
        mean = self._table("posterior_x0", t) * x_start + self._table("posterior_xt", t) * x_t
        return mean, self._table("posterior_variance", t), self._table("posterior_log_variance", t)

    def predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The clean frames that `eps` implies."""
        scaled = self._table("sqrt_recip_bar_minus_one", t) * eps
        return self._table("sqrt_recip_bar", t) * x_t - scaled

    def predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """The noise that clean frames `x_start` imply."""
        scaled = self._table("sqrt_recip_bar", t) * x_t - x_start
        return scaled / self._table("sqrt_recip_bar_minus_one", t)

    def noised(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Noised:
        """Clean frames with `noise` in them at timesteps t."""
        return Noised(x_start, noise, self.q_sample(x_start, t, noise), t)

    def snr(self, t: Tensor) -> Tensor:
        """The signal-to-noise ratio alpha_bar / (1 - alpha_bar) at timesteps t [B], like t."""
        return self._table("snr", t).flatten()

    def countdown(self, batch_size: int, device: torch.device | str) -> Iterator[Tensor]:
        """Timesteps [batch_size] from the last to 0."""
        for step in range(self.num_timesteps - 1, -1, -1):
            yield torch.full((batch_size,), step, device=device, dtype=torch.int64)

    def scale_timesteps(self, t: Tensor) -> Tensor:
        """Timesteps as the network sees them: 0..1000 whatever their number, with rescaling on."""
        return t.float() * (1000.0 / self.num_timesteps) if self.config.rescale_timesteps else t

    def run_model(self, model: Model, x_t: Tensor, t: Tensor, model_kwargs: Kwargs) -> Tensor:
        """The network's output at x_t, timesteps scaled."""
        return model(x_t, self.scale_timesteps(t), **(model_kwargs or {}))

    def distribution(
        self, output: Tensor, x: Tensor, t: Tensor, *, clip_denoised: bool = True
    ) -> dict[str, Tensor]:
        """p(x_{t-1} | x_t) of a network's output: {"mean", "variance", "log_variance", "pred_xstart"}.

        All are like x. clip_denoised: clip the predicted clean frames to [-1, 1].
        """
        if self.config.learn_sigma:
            output, fraction = output.chunk(2, dim=2)
            fraction = (fraction + 1) / 2  # IDDPM Eq. 15
            least = self._table("posterior_log_variance", t)
            log_variance = fraction * self._table("log_betas", t) + (1 - fraction) * least
            variance = log_variance.exp()
        else:
            fixed = "posterior" if self.config.sigma_small else "large"
            variance = self._table(f"{fixed}_variance", t).expand_as(x)
            log_variance = self._table(f"{fixed}_log_variance", t).expand_as(x)
        pred_xstart = self.prediction.xstart(self, output, x, t)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        spread = {"variance": variance, "log_variance": log_variance}
        return {"mean": mean, **spread, "pred_xstart": pred_xstart}

    def ancestral_step(
        self, x: Tensor, t: Tensor, xstart: Tensor, log_variance: Tensor, noise: Tensor
    ) -> Tensor:
        """x_{t-1} given x_t and predicted clean frames; `noise` are standard normals (DDPM Alg. 2)."""
        mean, _, _ = self.q_posterior_mean_variance(xstart, x, t)
        not_last = (t > 0).float()[:, None, None, None, None]  # the last step adds no noise
        return mean + not_last * torch.exp(0.5 * log_variance) * noise

    def ddim_step(
        self, x: Tensor, t: Tensor, xstart: Tensor, *, eta: float, generator: Generators = None
    ) -> Tensor:
        """The same by DDIM Eq. 12; eta 0: deterministic, 1: DDPM's small variance, up to rounding."""
        eps = self.predict_eps_from_xstart(x, t, xstart)
        bar, bar_prev = self._table("bar", t), self._table("bar_prev", t)
        sigma = eta * torch.sqrt((1 - bar_prev) / (1 - bar) * (1 - bar / bar_prev))  # DDIM Eq. 16
        sample = bar_prev.sqrt() * xstart + (1 - bar_prev - sigma**2).clamp(min=0).sqrt() * eps
        return sample + sigma * randn(x.shape, generator, x.device) if eta else sample

    # ------------------------------------------------------------ the published ways to sample

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        *,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """`distribution` of the network's output at x."""
        output = self.run_model(model, x, t, model_kwargs)
        return self.distribution(output, x, t, clip_denoised=clip_denoised)

    def p_sample(
        self, model: Model, x: Tensor, t: Tensor, *, generator: Generators = None, **options: Any
    ) -> dict[str, Tensor]:
        """One DDPM step: {"sample": x_{t-1}, "pred_xstart"}. Options as for p_mean_variance."""
        out = self.p_mean_variance(model, x, t, **options)
        noise = randn(x.shape, generator, x.device)
        sample = self.ancestral_step(x, t, out["pred_xstart"], out["log_variance"], noise)
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        *,
        eta: float = 0.0,
        generator: Generators = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """One DDIM step: {"sample": x_{t-1}, "pred_xstart"}. Options as for p_mean_variance."""
        xstart = self.p_mean_variance(model, x, t, **options)["pred_xstart"]
        sample = self.ddim_step(x, t, xstart, eta=eta, generator=generator)
        return {"sample": sample, "pred_xstart": xstart}

    def p_sample_loop(self, model: Model, shape: tuple[int, ...], **options: Any) -> Tensor:
        """Sample frames [B, T, C, H, W] with DDPM; options as for `sample_loop`."""
        return self.sample_loop(self.p_sample, model, shape, **options)

    def ddim_sample_loop(
        self, model: Model, shape: tuple[int, ...], *, eta: float = 0.0, **options: Any
    ) -> Tensor:
        """Sample frames [B, T, C, H, W] with DDIM; options as for `sample_loop`."""
        step = functools.partial(self.ddim_sample, eta=eta)
        return self.sample_loop(step, model, shape, **options)

    @torch.inference_mode()
    def sample_loop(
        self,
        step: Callable[..., dict[str, Tensor]],
        model: Model,
        shape: tuple[int, ...],
        *,
        model_kwargs: dict[str, Any] | None = None,
        latent_mask: Tensor | None = None,
        noise: Tensor | None = None,
        generator: Generators = None,
        device: torch.device | str | None = None,
        clip_denoised: bool = True,
    ) -> Tensor:
        """Go through all timesteps with `step`, from `noise` (default: drawn) to clean frames.

        latent_mask: the frames to sample (default: model_kwargs' latent_mask; none there: all), the
        others stay as x0 has them; generator: on the CPU, or one per video; device: default x0's.
        """
        kwargs = model_kwargs or {}
        latent_mask = kwargs.get("latent_mask") if latent_mask is None else latent_mask
        device = device or (kwargs["x0"].device if "x0" in kwargs else torch.device("cpu"))
        x = randn(shape, generator, device) if noise is None else noise.to(device)
        options = {"clip_denoised": clip_denoised, "model_kwargs": kwargs, "generator": generator}
        for t in self.countdown(shape[0], device):
            x = step(model, x, t, **options)["sample"]
        return x if latent_mask is None else torch.where(latent_mask > 0, x, kwargs["x0"])

    # ------------------------------------------------------------ losses and bounds

    def losses(
        self,
        output: Tensor,
        noised: Noised,
        mask: Tensor | None,
        *,
        eval_mask: Tensor | None = None,
        weights: Tensor | float = 1.0,
    ) -> dict[str, Tensor]:
        """Losses per video [B] of a network's output: "loss" to train on, "mse", "eval-mse", "vb".

        mask: where the loss counts (None: everywhere); eval_mask: where the second, logged MSE
        counts; weights: factors [B] on the MSE in the loss. Sources: DDPM Eq. 14; IDDPM Eq. 16 for
        learn_sigma; FDM section 3.
        """
        terms = {}
        prediction = output.chunk(2, dim=2)[0] if self.config.learn_sigma else output
        if self.config.use_kl:
            terms["loss"] = terms["vb"] = self.num_timesteps * self.bound_term(
                output, noised, mask, clip_denoised=False
            )
        elif self.config.learn_sigma:
            # The bound trains the variance alone: the mean is held fixed in it.
            frozen = torch.cat([prediction.detach(), output.chunk(2, dim=2)[1]], dim=2)
            bound = self.bound_term(frozen, noised, mask, clip_denoised=False)
            rescaled = self.config.rescale_learned_sigmas
            terms["vb"] = bound * self.num_timesteps / 1000 if rescaled else bound
        squared_error = (self.prediction.target(self, noised) - prediction) ** 2
        terms["mse"] = masked_mean(squared_error, mask)
        terms["eval-mse"] = masked_mean(squared_error.detach(), eval_mask)
        if not self.config.use_kl:
            terms["loss"] = weights * terms["mse"] + terms.get("vb", 0.0)
        return terms

    def bound_term(
        self, output: Tensor, noised: Noised, mask: Tensor | None, *, clip_denoised: bool
    ) -> Tensor:
        """One term of the bound of a network's output, in bits per dimension [B].

        The KL divergence of DDPM Eq. 5, or at t = 0 the negative log likelihood of the pixels;
        masked, and averaged over all dimensions of the T frames given.
        """
        out = self.distribution(output, noised.x_t, noised.t, clip_denoised=clip_denoised)
        return self._bound_term(out, noised.x_start, noised.x_t, noised.t, mask)

    def _bound_term(
        self, out: dict[str, Tensor], x_start: Tensor, x_t: Tensor, t: Tensor, mask: Tensor | None
    ) -> Tensor:
        mean, log_variance = out["mean"], out["log_variance"]
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
        likelihood = log_likelihood(x_start, means=mean, log_scales=0.5 * log_variance)
        nats = torch.where((t == 0)[:, None, None, None, None], -likelihood, kl)
        return masked_mean(nats, mask) / math.log(2.0)

    def prior_bpd(self, x_start: Tensor, latent_mask: Tensor | None = None) -> Tensor:
        """KL(q(x_T | x_0) || N(0, 1)) in bits per dimension [B]: the bound's constant term."""
        t = torch.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        zero = torch.zeros_like(log_variance)
        return masked_mean(normal_kl(mean, log_variance, zero, zero), latent_mask) / math.log(2.0)

    # ------------------------------------------------------------ the published losses and bounds

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        *,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
        latent_mask: Tensor | None = None,
        eval_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`losses` of the network's output at noised frames; latent_mask: where the loss counts."""
        noised = self.noised(x_start, t, torch.randn_like(x_start) if noise is None else noise)
        output = self.run_model(model, noised.x_t, t, model_kwargs)
        return self.losses(output, noised, latent_mask, eval_mask=eval_mask)

    def vb_terms_bpd(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        *,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
        latent_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """{"output": `bound_term` of the network's output [B], "pred_xstart"}."""
        options: dict[str, Any] = {"clip_denoised": clip_denoised, "model_kwargs": model_kwargs}
        out = self.p_mean_variance(model, x_t, t, **options)
        bits = self._bound_term(out, x_start, x_t, t, latent_mask)
        return {"output": bits, "pred_xstart": out["pred_xstart"]}

    @torch.inference_mode()
    def calc_bpd_loop(
        self,
        model: Model,
        x_start: Tensor,
        *,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
        latent_mask: Tensor | None = None,
        generator: Generators = None,
    ) -> dict[str, Tensor]:
        """The whole bound on the masked frames, in bits per dimension of all T frames given.

        Returns "total_bpd" and "prior_bpd" [B]; "vb", "xstart_mse" and "mse" (of the noise)
        [B, num_timesteps], index t.
        """
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        options: dict[str, Any] = {"model_kwargs": model_kwargs, "latent_mask": latent_mask}
        options["clip_denoised"] = clip_denoised
        for t in self.countdown(x_start.shape[0], x_start.device):
            noised = self.noised(x_start, t, randn(x_start.shape, generator, x_start.device))
            out = self.vb_terms_bpd(model, x_start, noised.x_t, t, **options)
            xstart = out["pred_xstart"]
            errors = (
                xstart - x_start,
                self.predict_eps_from_xstart(noised.x_t, t, xstart) - noised.noise,
            )
            columns["vb"].append(out["output"])
            for name, error in zip(("xstart_mse", "mse"), errors, strict=True):
                columns[name].append(masked_mean(error**2, latent_mask))
        terms = {name: torch.stack(values[::-1], dim=1) for name, values in columns.items()}
        prior = self.prior_bpd(x_start, latent_mask)
        return terms | {"prior_bpd": prior, "total_bpd": terms["vb"].sum(dim=1) + prior}
