"""One update of the weights: timesteps and noise, losses, gradients, optimiser, averages.

Everything random in an update is a function of (seed, position, rank), where the position is the
number of training items that all ranks together have consumed. So a resumed run repeats an unbroken
one.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from improved_diffusion import dist_util, fp16_util
from improved_diffusion.config import TrainConfig
from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.data.rng_util import make_generator
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.nn import compile_network, ema_decay, update_ema
from improved_diffusion.registry import OPTIMIZERS
from improved_diffusion.resample import stratified_quantiles, timestep_distribution
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.training.own_errors import OwnErrors

Items = Mapping[str, Tensor]

LOG_SNR_EDGES = (-4.0, 0.0, 4.0)  # of the quarters by which errors are logged
SHARED_STREAM = 1 << 31  # a rank that no run has: what all ranks draw alike


@dataclass(frozen=True)
class Update:
    """What one update was made from, for the log; whether it was made at all."""

    timesteps: list[int]  # [B]
    weights: list[float]  # [B], of the timestep distribution
    losses: dict[str, list[float]]  # by term, [B] each
    grad_norm: float  # before clipping
    done: bool  # False: numbers on some rank were not finite, and nothing was changed

    @property
    def finite(self) -> bool:
        """Whether this rank's own numbers are finite."""
        return math.isfinite(self.grad_norm) and all(map(math.isfinite, self.losses["loss"]))


class TrainStep:
    """Makes updates of `network` on its device, and keeps all that an exact resume needs.

    Args:
        network: the network, moved to the device and changed by each update.
        diffusion: the process to train on.
        config: the training options.
        device: where to train (None: this rank's device).

    Raises ValueError for float16 without a GPU, a distribution of timesteps that does not go with
    the process, and an optimiser that this torch lacks.
    """

    def __init__(
        self,
        network: nn.Module,
        diffusion: GaussianDiffusion,
        config: TrainConfig,
        device: torch.device | None = None,
    ) -> None:
        self.config, self.diffusion = config, diffusion
        self.device = device or dist_util.dev()
        self._autocast = functools.partial(
            fp16_util.autocast, self.device, precision=config.precision, use_fp16=config.use_fp16
        )
        self._autocast()  # refuses what the device cannot do
        self.step = 0  # updates made
        self.position = 0  # training items consumed by all ranks together
        self.network = network.to(self.device).train()
        self.params = dict(self.network.named_parameters())
        self.ddp = dist_util.wrap_ddp(self.network)
        trained = compile_network(self.ddp) if config.compile else self.ddp
        self.denoiser = Denoiser(trained, diffusion, autocast=self._autocast)
        self.own_errors = OwnErrors(self.network, diffusion, config, autocast=self._autocast)
        self.emas = {rate: self._copies() for rate in config.ema_rates}
        make_optimizer = OPTIMIZERS.made(config.optimizer, config.optimizer_options)
        self.optimizer = make_optimizer(self.network, config)
        self._peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.timesteps = timestep_distribution(config, diffusion)
        self.loss_scale = fp16_util.LossScale(config.fp16_scale_growth) if config.use_fp16 else None

    def _copies(self) -> dict[str, Tensor]:
        return {name: param.detach().clone() for name, param in self.params.items()}

    # ------------------------------------------------------------ one update

    def __call__(self, items: Items, any_rank: Callable[[bool], bool] = bool) -> Update:
        """Update the weights from one batch of items.

        items: B items as TrainDataset gives them, stacked. any_rank: says whether something is so
        on any rank (default: there is one rank). All ranks must call.
        """
        config = self.config
        generator = make_generator(config.seed, self.position, dist_util.rank())
        torch.manual_seed(generator.initial_seed())  # noise and dropout
        t, weights = self._draw_timesteps(generator)
        self.position += config.batch_size * dist_util.world_size()
        self.optimizer.zero_grad(set_to_none=True)
        batch = self.own_errors(self.batch(items), self.position)
        terms = self._backward(batch, t.to(self.device), weights.to(self.device))
        norm = self._grad_norm()
        self._clip_grad(norm)
        losses = {name: values.tolist() for name, values in terms.items()}
        update = Update(t.tolist(), weights.tolist(), losses, norm, done=False)
        bad = any_rank(not update.finite)
        if self.loss_scale is not None:
            self.loss_scale.update(not bad)
        if bad:
            return update
        self._update()
        self.timesteps.update(t.to(self.device), terms["loss"])
        return Update(t.tolist(), weights.tolist(), losses, norm, done=True)

    def _draw_timesteps(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """This rank's timesteps [B], and the weights [B] of their losses."""
        size, quantiles = self.config.batch_size, None
        if self.config.stratified_timesteps:
            ranks = dist_util.world_size()
            shared = make_generator(self.config.seed, self.position, SHARED_STREAM)
            quantiles = stratified_quantiles(
                size, dist_util.rank(), ranks, shared=shared, own=generator
            )
        return self.timesteps.sample(size, generator, quantiles=quantiles)

    def clean_errors(self, update: Update) -> Iterator[tuple[int, float]]:
        """(quarter of log SNR, unweighted squared error of the clean frames) of each item.

        Quarter 0 has a log SNR below -4, 1 one below 0, 2 one below 4, 3 the rest: the same noise
        whatever the schedule. The error is "eval-mse", whatever the network predicts.
        """
        t = torch.tensor(update.timesteps)
        scale = self.diffusion.prediction.error_scale(self.diffusion.snr(t))
        quarters = np.digitize(self.diffusion.log_snr[t.numpy()], LOG_SNR_EDGES)
        errors = torch.tensor(update.losses["eval-mse"]) / scale
        return zip(quarters.tolist(), errors.tolist(), strict=True)

    def batch(self, items: Items) -> FrameBatch:
        """Stacked items on the device, as the network is given them."""
        batch = FrameBatch.from_items(items, self.device)
        return batch if self.config.pad_with_random_frames else batch.with_padding_zeroed()

    def losses(
        self, batch: FrameBatch, t: Tensor, noise: Tensor, denoiser: Denoiser | None = None
    ) -> dict[str, Tensor]:
        """The losses [B] that training descends, of the trained network or of another denoiser.

        Padding with frames of another video counts in them, as published.
        """
        padding_counts = self.config.pad_with_random_frames
        mask = 1 - batch.obs_mask if padding_counts else batch.latent_mask
        return (denoiser or self.denoiser).losses(batch, t, noise, mask=mask)

    def _backward(self, batch: FrameBatch, t: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Gradients of the batch's mean loss, microbatch by microbatch; returns its terms [B]."""
        total = len(t)
        size = self.config.microbatch if self.config.microbatch > 0 else total
        noise = torch.randn_like(batch.frames)
        scale = self.loss_scale.value if self.loss_scale else 1.0
        parts = []
        for start in range(0, total, size):
            rows = slice(start, start + size)
            with self._synchronised(start + size >= total):
                terms = self.losses(batch.rows(rows), t[rows], noise[rows])
                loss = (terms["loss"] * weights[rows]).sum() / total
                with dist_util.collective(f"the gradients of step {self.step}"):
                    (loss * scale).backward()
            parts.append(terms)
        return {name: torch.cat([part[name].detach() for part in parts]) for name in parts[0]}

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Ranks exchange gradients once, with the last microbatch."""
        if last or not isinstance(self.ddp, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.ddp.no_sync()

    def _gradients(self) -> list[Tensor]:
        return [param.grad for param in self.params.values() if param.grad is not None]

    def _grad_norm(self) -> float:
        """The norm of the whole gradient; takes the loss scale out of it first."""
        gradients = self._gradients()
        if self.loss_scale is not None:
            torch._foreach_mul_(gradients, 1.0 / self.loss_scale.value)
        return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))

    def _clip_grad(self, norm: float) -> None:
        if 0 < self.config.grad_clip < norm < math.inf:
            torch._foreach_mul_(self._gradients(), self.config.grad_clip / norm)

    def _update(self) -> None:
        """One step of the optimiser and of the averages."""
        for group, peak in zip(self.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = learning_rate(self.config, self.step, peak)
        self.optimizer.step()
        self.step += 1
        for rate, ema in self.emas.items():
            decay = ema_decay(float(rate), self.step, warmup=self.config.ema_warmup)
            update_ema(ema, self.params.values(), decay)

    # ------------------------------------------------------------ the averaged network

    @contextlib.contextmanager
    def ema_denoiser(self, diffusion: GaussianDiffusion | None = None) -> Iterator[Denoiser]:
        """The network with the weights of the first EMA, without dropout and gradients.

        diffusion: another process than the trained one, such as a shorter chain.
        """
        ema = next(iter(self.emas.values()))

        def network(*args: Any, **kwargs: Any) -> Tensor:
            return torch.func.functional_call(self.network, ema, args, kwargs)

        self.network.eval()
        with torch.no_grad():
            yield Denoiser(network, diffusion or self.diffusion, autocast=self._autocast)
        self.network.train()

    # ------------------------------------------------------------ what a resume needs

    def state_dict(self) -> dict[str, Any]:
        """All but the weights and their averages."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule_sampler": self.timesteps.state_dict(),
            "position": self.position,
            "loss_scale_log2": self.loss_scale.log2 if self.loss_scale else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on from `state_dict`'s result of update `step`; the options may be others by now."""
        self.step, self.position = step, int(state["position"])
        chosen = [_hyperparameters(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, chosen, strict=True):
            group.update(values)
        for param, slots in self.optimizer.state.items():
            for name, value in slots.items():
                # Files hold no memory layout; the fast path needs the parameter's own.
                # Scalars are copied too, as `state` may lie in a mapped file.
                same = value.shape == param.shape
                slots[name] = torch.empty_like(param).copy_(value) if same else value.clone()
        self.timesteps.load_state_dict(state["schedule_sampler"])
        if self.loss_scale is not None and state["loss_scale_log2"] is not None:
            self.loss_scale.log2 = state["loss_scale_log2"]


def learning_rate(config: TrainConfig, step: int, peak: float) -> float:
    """The rate of the update that follows `step` updates: linear warm-up, linear annealing.

    peak: the rate without either.
    """
    warmup, anneal = config.lr_warmup_steps, config.lr_anneal_steps
    rate = peak * (1 - step / anneal if anneal else 1)
    return rate * min(1.0, (step + 1) / warmup) if warmup else rate


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """All but the parameters of one of an optimiser's groups."""
    return {name: value for name, value in group.items() if name != "params"}
