"""The seam between networks and all that uses them: training, samplers, bounds, searches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.gaussian_diffusion import GaussianDiffusion, Model
from improved_diffusion.registry import LOSS_WEIGHTINGS


class Prediction(NamedTuple):
    """What a network says of noisy frames, both [B, K, 3, H, W]."""

    xstart: Tensor  # the clean frames
    log_variance: Tensor  # of p(x_{t-1} | x_t), natural logarithm


class Denoiser:
    """A network, the diffusion process that it works in, and the meaning of its output.

    Everywhere x_t are noisy frames [B, K, 3, H, W] and t int64 [B], or [1] where all videos are at
    one timestep (the network then embeds it once). t is an index into the process's own timesteps,
    0 to num_timesteps - 1: with a respaced process that of a kept timestep, which the network is
    shown as the trained timestep it stands for. Nothing is moved between devices here.

    Args:
        network: called as unet.UNetVideoModel is.
        diffusion: the process, respaced or not; its `prediction` says what the output means.
        clip_denoised: clip predicted clean frames to [-1, 1], in all but losses.
        autocast: makes the context in which the network computes (default: none, float32).
    """

    def __init__(
        self,
        network: Model,
        diffusion: GaussianDiffusion,
        *,
        clip_denoised: bool = True,
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        self.network, self.diffusion = network, diffusion
        self.clip_denoised, self.autocast = clip_denoised, autocast
        self._calls = 0

    @property
    def calls(self) -> int:
        """Of the network, so far."""
        return self._calls

    def for_trajectories(self, batch: FrameBatch, names: Sequence[tuple[int, ...]]) -> Denoiser:
        """The denoiser that goes from noise to the latent frames of `batch`.

        names: what identifies each trajectory (the seed, video, sample and inference step): all that
        is drawn for it depends on that alone.
        """
        return self

    def output(self, x_t: Tensor, t: Tensor, batch: FrameBatch) -> Tensor:
        """The network's raw output [B, K, 3, H, W], or 6 channels with learn_sigma."""
        self._calls += 1
        with self.autocast():
            return self.diffusion.run_model(self.network, x_t, t, batch.conditioning)

    def predict(self, x_t: Tensor, t: Tensor, batch: FrameBatch) -> Prediction:
        """The clean frames and the log variance of the next step, from one network call."""
        output = self.output(x_t, t, batch)
        out = self.diffusion.distribution(output, x_t, t, clip_denoised=self.clip_denoised)
        return Prediction(out["pred_xstart"], out["log_variance"])

    def denoise(self, x_t: Tensor, t: Tensor, batch: FrameBatch) -> Tensor:
        """The predicted clean frames [B, K, 3, H, W], clipped to [-1, 1] with clip_denoised.

        Those of observed frames mean nothing: the network is not trained on them.
        """
        return self.predict(x_t, t, batch).xstart

    def losses(
        self,
        batch: FrameBatch,
        t: Tensor,
        noise: Tensor,
        *,
        mask: Tensor,
    ) -> dict[str, Tensor]:
        """Training losses per video [B]: "loss" to train on, its parts "mse", "eval-mse", "vb".

        mask: where the loss counts, [B, K, 1, 1, 1]; "eval-mse" counts the latent frames. The MSE
        in "loss" is weighted as --loss_weighting says, those that are logged beside it are not.
        """
        noised = self.diffusion.noised(batch.frames, t, noise)
        output = self.output(noised.x_t, t, batch)
        snr = self.diffusion.snr(t)
        config = self.diffusion.config
        weighting = LOSS_WEIGHTINGS.made(config.loss_weighting, config.loss_weighting_options)
        return self.diffusion.losses(
            output,
            noised,
            mask,
            eval_mask=batch.latent_mask,
            weights=weighting(snr, self.diffusion.prediction.error_scale(snr)),
        )

    def bound_term(self, batch: FrameBatch, t: Tensor, noise: Tensor) -> Tensor:
        """One term of the variational bound on the latent frames (DDPM Eq. 5), float64 [B].

        In bits per dimension of all K frames.
        """
        noised = self.diffusion.noised(batch.frames, t, noise)
        output = self.output(noised.x_t, t, batch)
        return self.diffusion.bound_term(
            output, noised, batch.latent_mask, clip_denoised=self.clip_denoised
        ).double()

    def bound(
        self,
        batch: FrameBatch,
        timesteps: Tensor,
        noise: Callable[[Tensor], Tensor],
        *,
        weights: Tensor | None = None,
        batch_size: int = 1,
    ) -> float:
        """A weighted sum of one video's terms at some timesteps, and the prior's, in bits.

        Over all timesteps with weights of 1 (None) it is the variational bound (DDPM Eq. 5), the
        negative ELBO of the latent frames given the observed ones.

        Args:
            batch: one video without padding.
            timesteps: int64 [n].
            noise: t [b] -> standard normals [b, K, 3, H, W], in the order of `timesteps`.
            weights: factors [n] on the terms.
            batch_size: timesteps that go through the network at once; changes no result beyond
                rounding.
        """
        weights = torch.ones(len(timesteps)) if weights is None else weights
        bits = self.diffusion.prior_bpd(batch.frames, batch.latent_mask).double().sum()
        for t, w in zip(timesteps.split(batch_size), weights.split(batch_size), strict=True):
            terms = self.bound_term(batch.repeated(len(t)), t.to(batch.device), noise(t))
            bits += (terms * w.to(terms)).sum()
        return float(bits) * batch.frames.numel()
