"""One update of the weights: timesteps and noise, losses, gradients, optimiser, averages.

Everything random in an update is a function of (seed, position, rank), where the position is the
number of training items that all ranks together have consumed. So a resumed run repeats an unbroken
one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from improved_diffusion import dist_util, fp16_util
from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.data.rng_util import make_generator
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.nn import compile_network, ema_decay, update_ema
from improved_diffusion.registry import OPTIMIZERS
from improved_diffusion.resample import (
    ScheduleSampler,
    stratified_quantiles,
    timestep_distribution,
)
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.training.optimizers import can_skip
from improved_diffusion.training.options import TrainConfig
from improved_diffusion.training.own_errors import OwnErrors
from improved_diffusion.training.transfer import Readback, SideCopy, send

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
    lr: float  # of the optimiser's first parameters
    loss_scale_log2: float | None  # after this update, of float16
    done: bool  # False: numbers on some rank were not finite, and nothing was changed
    signal: int  # the largest number of a stop signal that a rank had by then, or 0


@dataclass(frozen=True)
class _Begun:
    """An update whose numbers are on their way from the device."""

    timesteps: Tensor  # [B], on the CPU
    weights: Tensor  # [B], on the CPU
    losses: dict[str, Tensor]  # [B] each, on the device
    numbers: Readback
    lr: float


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
            fp16_util.autocast,
            self.device,
            precision=config.precision,
            use_fp16=config.use_fp16,
            tf32=config.tf32,
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
        self.timestep_distribution = timestep_distribution(config, diffusion)
        self.loss_scale = (
            fp16_util.LossScale(config.fp16_scale_growth, self.device) if config.use_fp16 else None
        )
        learns = type(self.timestep_distribution).update is not ScheduleSampler.update
        self._runs_ahead = can_skip(self.optimizer) and not learns
        self._side_copy = SideCopy(self.device)
        self._begun: _Begun | None = None

    def _copies(self) -> dict[str, Tensor]:
        return {name: param.detach().clone() for name, param in self.params.items()}

    # ------------------------------------------------------------ one update

    def __call__(self, items: Items) -> Update:
        """Make the update of one batch of items, and wait for it; as `begin`, then `finish`."""
        finished = self.begin(items)
        update = self.finish() or finished
        assert update is not None, "an update was begun and never finished"
        return update

    def begin(self, items: Items, signal: Callable[[], int] = int) -> Update | None:
        """Begin the update of one batch of items; returns the one that is finished by now, if any.

        That is this one, unless the device itself can leave out a step whose numbers are not finite
        (`can_skip`): then it is the one before, and nothing here waits for the device to have done
        more than that. The weights are those of the update that was begun; the averages, the count
        of updates, and the rates that depend on it, go with `finish`, before the next step of the
        optimiser.

        items: B items as TrainDataset gives them, stacked. signal: gives a stop signal's number or 0,
        which all ranks are told; asked for last. All ranks must call.
        """
        config = self.config
        generator = make_generator(config.seed, self.position, dist_util.rank())
        torch.manual_seed(generator.initial_seed())  # noise and dropout
        t, weights = self._draw_timesteps(generator)
        self.position += config.batch_size * dist_util.world_size()
        self.optimizer.zero_grad(set_to_none=True)
        batch = self.own_errors(self.batch(items), self.position, observed=items["obs_mask"])
        with fp16_util.arithmetic(self.device, tf32=config.tf32, same_shapes=True):
            losses = self._backward(batch, send(t, self.device), send(weights, self.device))
        norm = self._grad_norm()
        before = self.finish()
        self._set_rates()
        flags, numbers = self._numbers(losses, norm, signal())
        lr = self.optimizer.param_groups[0]["lr"]
        self._begun = _Begun(t, weights, losses, Readback(numbers), lr)
        if not self._runs_ahead:
            return self.finish()
        self._step_unless(flags[0], norm)
        return before

    def finish(self) -> Update | None:
        """See to the update that was begun last, once its numbers are here; None where there is none.

        Raises ValueError where the float16 loss scale fell below 1.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return None
        with dist_util.collective(f"the end of step {self.step}"):
            bad, signal, scale, norm, *values = begun.numbers.read()
        if self.loss_scale is not None:
            self.loss_scale.check(scale)
        if not bad:
            if not self._runs_ahead:
                self._clip_grad(norm)
                self.optimizer.step()
            self._count(begun)
        size = len(begun.timesteps)
        rows = [values[start : start + size] for start in range(0, len(values), size)]
        return Update(
            timesteps=begun.timesteps.tolist(),
            weights=begun.weights.tolist(),
            losses=dict(zip(begun.losses, rows, strict=True)),
            grad_norm=norm,
            lr=begun.lr,
            loss_scale_log2=scale if self.loss_scale is not None else None,
            done=not bad,
            signal=int(signal),
        )

    def _numbers(
        self, losses: Mapping[str, Tensor], norm: Tensor, signal: int
    ) -> tuple[Tensor, Tensor]:
        """([not finite on some rank, signal], these and all that `finish` wants to know); float64.

        They stay on the device. Teaches the loss scale.
        """
        finite = norm.isfinite() & losses["loss"].isfinite().all()
        flags = torch.stack([(~finite).double(), torch.full_like(norm, signal).double()])
        dist_util.take_max_over_ranks(flags, what=f"the end of step {self.step}")
        if self.loss_scale is not None:
            self.loss_scale.update(flags[0])
        scale = torch.zeros_like(flags[0]) if self.loss_scale is None else self.loss_scale.log2
        scalars = torch.stack([scale, norm.double()])
        return flags, torch.cat([flags, scalars, *(v.double() for v in losses.values())])

    def _draw_timesteps(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """This rank's timesteps [B], and the weights [B] of their losses."""
        size, quantiles = self.config.batch_size, None
        if self.config.stratified_timesteps:
            ranks = dist_util.world_size()
            shared = make_generator(self.config.seed, self.position, SHARED_STREAM)
            quantiles = stratified_quantiles(
                size, dist_util.rank(), ranks, shared=shared, own=generator
            )
        return self.timestep_distribution.sample(size, generator, quantiles=quantiles)

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
        batch = FrameBatch.from_items(self._side_copy(items), self.device)
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
        scale = self.loss_scale.value if self.loss_scale is not None else 1.0
        parts = []
        for start in range(0, total, size):
            rows = slice(start, start + size)
            last = start + size >= total
            # Ranks exchange gradients once, with the last microbatch.
            with contextlib.nullcontext() if last else dist_util.without_exchange(self.ddp):
                terms = self.losses(batch.rows(rows), t[rows], noise[rows])
                loss = (terms["loss"] * weights[rows]).sum() / total
                with dist_util.collective(f"the gradients of step {self.step}"):
                    (loss * scale).backward()
            parts.append(terms)
        return {name: torch.cat([part[name].detach() for part in parts]) for name in parts[0]}

    def _gradients(self) -> list[Tensor]:
        return [param.grad for param in self.params.values() if param.grad is not None]

    def _grad_norm(self) -> Tensor:
        """The norm [] of the whole gradient; takes the loss scale out of it first."""
        gradients = self._gradients()
        if self.loss_scale is not None:
            torch._foreach_mul_(gradients, 1 / self.loss_scale.value)
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    def _clip_grad(self, norm: float) -> None:
        if 0 < self.config.grad_clip < norm:
            torch._foreach_mul_(self._gradients(), self.config.grad_clip / norm)

    def _set_rates(self) -> None:
        for group, peak in zip(self.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = learning_rate(self.config, self.step, peak)

    def _step_unless(self, bad: Tensor, norm: Tensor) -> None:
        """A step of an optimiser that clips and, where `bad` [] is 1, skips on the device."""
        self.optimizer.found_inf = bad.float()
        if self.config.grad_clip > 0:
            self.optimizer.grad_scale = (norm / self.config.grad_clip).clamp(min=1)
        self.optimizer.step()

    def _count(self, begun: _Begun) -> None:
        """The optimiser has made a step: count it, and take it into the averages."""
        self.step += 1
        for rate, ema in self.emas.items():
            decay = ema_decay(float(rate), self.step, warmup=self.config.ema_warmup)
            update_ema(ema, self.params.values(), decay)
        if not self._runs_ahead:
            t = begun.timesteps.to(self.device)
            self.timestep_distribution.update(t, begun.losses["loss"])

    # ------------------------------------------------------------ the averaged network

    @contextlib.contextmanager
    def ema_denoiser(self, diffusion: GaussianDiffusion | None = None) -> Iterator[Denoiser]:
        """The network with the weights of the first EMA, without dropout and gradients.

        diffusion: another process than the trained one, such as a shorter chain.
        """
        assert self._begun is None, "the averages lack the update that is under way: finish it"
        ema = next(iter(self.emas.values()))

        def network(*args: Any, **kwargs: Any) -> Tensor:
            return torch.func.functional_call(self.network, ema, args, kwargs)

        self.network.eval()
        try:
            with torch.no_grad():
                yield Denoiser(network, diffusion or self.diffusion, autocast=self._autocast)
        finally:
            self.network.train()

    # ------------------------------------------------------------ what a resume needs

    def state_dict(self) -> dict[str, Any]:
        """All but the weights and their averages."""
        assert self._begun is None, "an update is under way: finish it"
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule_sampler": self.timestep_distribution.state_dict(),
            "position": self.position,
            "loss_scale_log2": None if self.loss_scale is None else float(self.loss_scale.log2),
        }

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on from `state_dict`'s result of update `step`; the options may be others by now."""
        self.step, self.position = step, int(state["position"])
        chosen = [_hyperparameters(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, chosen, strict=True):
            group.update(values)
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                slots = self.optimizer.state.get(param, {})
                for name, value in slots.items():
                    # Files hold no memory layout; the fast path needs the parameter's own.
                    # Scalars are copied too, as `state` may lie in a mapped file.
                    same = value.shape == param.shape
                    own = torch.empty_like(param).copy_(value) if same else value.clone()
                    # A fused optimiser counts its steps on the device.
                    slots[name] = own.to(param.device) if group.get("fused") else own
        self.timestep_distribution.load_state_dict(state["schedule_sampler"])
        if self.loss_scale is not None and state["loss_scale_log2"] is not None:
            self.loss_scale.log2.fill_(state["loss_scale_log2"])


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
