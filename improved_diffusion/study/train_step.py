"""The update that the benchmark times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from improved_diffusion import fp16_util
from improved_diffusion.config import TrainConfig
from improved_diffusion.data.rng_util import make_generator
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.resample import create_schedule_sampler


def on_device(items: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Items as the network takes them: their frames as "x0", float in [-1, 1]."""
    batch = {key: value.to(device) for key, value in items.items()}
    batch["x0"] = batch.pop("frames").float() / 127.5 - 1
    return batch


class TrainStep:
    """Calls are updates as train_util.TrainLoop makes them, alone, in float32 or bf16.

    In it: items to the device, timesteps and noise, forward pass, loss, backward pass, gradient
    norm, AdamW, moving averages. Not in it: reading the items, logging, saving.

    Args:
        model: the network, changed by each call.
        diffusion: the process to train on.
        config: of its options lr, weight_decay, ema_rate, precision, schedule_sampler, batch_size
            and seed count.
        items: a batch as TrainDataset gives it, on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        config: TrainConfig,
        items: dict[str, Tensor],
        device: torch.device,
    ) -> None:
        self.model, self.diffusion, self.config = model.train(), diffusion, config
        self.items, self.device = items, device
        self.position = 0
        self.params = dict(model.named_parameters())
        self.emas = {
            rate: {name: param.detach().clone() for name, param in self.params.items()}
            for rate in config.ema_rates
        }
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay, foreach=True
        )
        self.sampler = create_schedule_sampler(config.schedule_sampler, diffusion.num_timesteps)

    def __call__(self) -> float:
        """Make one update; returns the norm of its gradient."""
        generator = make_generator(self.config.seed, self.position, 0)
        torch.manual_seed(generator.initial_seed())
        self.position += self.config.batch_size
        t, weights = self.sampler.sample(self.config.batch_size, generator)
        self.optimizer.zero_grad(set_to_none=True)
        (self._losses(t.to(self.device)) * weights.to(self.device)).mean().backward()
        grads = [param.grad for param in self.params.values() if param.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))
        self.optimizer.step()
        for rate, ema in self.emas.items():
            fp16_util.update_ema(ema, self.params.values(), float(rate))
        return norm

    def _losses(self, t: Tensor) -> Tensor:
        batch = on_device(self.items, self.device)
        return self.diffusion.training_losses(
            self._network,
            batch["x0"],
            t,
            model_kwargs=batch,
            noise=torch.randn_like(batch["x0"]),
            latent_mask=1 - batch["obs_mask"],
            eval_mask=batch["latent_mask"],
        )["loss"]

    def _network(self, *args: Any, **kwargs: Any) -> Tensor:
        with fp16_util.autocast(self.device, precision=self.config.precision, use_fp16=False):
            return self.model(*args, **kwargs)
