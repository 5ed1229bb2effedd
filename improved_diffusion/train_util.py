"""The training loop: data, timesteps, gradients, averages, checkpoints, and samples to look at.

Everything random in a step is a function of (seed, position, rank), where the position is the
number of training items that all ranks together have consumed. So a resumed run repeats an unbroken
one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from improved_diffusion import dist_util, fp16_util
from improved_diffusion.config import TrainConfig
from improved_diffusion.data import checkpoints, paths, video_io
from improved_diffusion.data.rng_util import make_generator, randn
from improved_diffusion.data.video_datasets import TrainDataset
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.logger import RunLogger
from improved_diffusion.nn import compile_network
from improved_diffusion.resample import create_schedule_sampler
from improved_diffusion.training import signals, validation
from improved_diffusion.training.runs import Run, resume_command
from improved_diffusion.training.train_data import train_loader

logger = logging.getLogger(__name__)

FIRST_SAMPLE_STEP = 500
NUM_SAMPLES = 4
VALIDATION_STREAM = 1 << 40  # a position that no run reaches: its random numbers are free
MAX_BAD_STEPS = 5  # updates in a row that may be skipped for numbers that are not finite

Batch = dict[str, Tensor]


# ---------------------------------------------------------------- the loop


class TrainLoop:
    """Trains `model` on `data` until a limit of `config` or a signal; see `run_loop`.

    Args:
        model: the network, called as unet.UNetVideoModel is; the loop moves it to the device.
        diffusion: the process to train on.
        data: training items, indexed by the keys of ShardedSampler.
        run: from `open_run`.
        stored_config: the flat options written into checkpoints.
        sample_diffusion: the process to draw samples with (fewer steps).
        valid_data: items of held-out videos, for --valid_interval.

    Raises ValueError for float16 without a GPU and for weights that do not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        data: TrainDataset,
        config: TrainConfig,
        *,
        run: Run,
        stored_config: Mapping[str, Any],
        sample_diffusion: GaussianDiffusion,
        valid_data: TrainDataset | None = None,
    ) -> None:
        self.config, self.diffusion, self.data = config, diffusion, data
        self.run = run.forget_start()
        self.stored_config, self.sample_diffusion = stored_config, sample_diffusion
        self.valid_data = valid_data
        self.device = dist_util.dev()
        self._autocast()  # refuses what the device cannot do
        self.step = 0  # optimiser updates done
        self.position = 0  # training items consumed by all ranks together
        self.model = model.to(self.device)
        weights = run.state.model_state if run.state else run.weights
        if weights is not None:
            _load_weights(self.model, weights, config.resume_checkpoint or run.folder)
        self.ddp = dist_util.wrap_ddp(self.model)
        self.trained = compile_network(self.ddp) if config.compile else self.ddp
        self.params = dict(self.model.named_parameters())
        self.emas = {rate: _copies(self.params) for rate in config.ema_rates}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, foreach=True
        )
        self.sampler = create_schedule_sampler(config.schedule_sampler, diffusion.num_timesteps)
        self.loss_scale = fp16_util.LossScale(config.fp16_scale_growth) if config.use_fp16 else None
        if run.state is not None:
            self._restore(run.state)
        self.saved_step = self.step
        self.log = RunLogger(run.folder, run.run_id, stored_config, self.step)
        self._logged = (self.step, time.perf_counter())
        self._bad_steps = 0
        self._stop = False  # what all ranks agreed on

    def run_loop(self) -> bool:
        """Train, save and log; returns whether a signal ended it before its limit.

        SIGTERM, SIGINT or SIGUSR1 at any one rank lets all finish the step and save. Raises
        ValueError where losses stay infinite or not a number, OSError where saving fails.
        """
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        self._introduce()
        show = None if dist_util.is_main() else True  # None: only where there is a terminal
        with (
            signals.deferred(),
            logging_redirect_tqdm(),
            tqdm(initial=self.step, total=self.last_step, unit="step", disable=show) as bar,
            contextlib.closing(self._batches()) as batches,
        ):
            self._stop = any(dist_util.max_over_ranks(signals.received(), what="the first step"))
            while not self._stop and not self.finished:
                if self.run_step(next(batches)):
                    bar.update()
                    self._after_update()
            if self.step > self._logged[0]:
                self._dump_log()
            if self.step > self.saved_step:
                self.save()
        self.log.close()
        self.run.close()
        if dist_util.is_main():
            logger.info("to resume: %s", resume_command(self.run.run_id))
        # A rank that left with code 75 while rank 0 still saves would have the launcher kill it.
        dist_util.barrier("the end of the run")
        return self._stop and not self.finished

    @property
    def last_step(self) -> int | None:
        """The step at which the run ends, None for never."""
        limits = [limit for limit in (self.config.lr_anneal_steps, self.config.max_steps) if limit]
        return min(limits, default=None)

    @property
    def finished(self) -> bool:
        """Whether all updates are done."""
        return self.last_step is not None and self.step >= self.last_step

    def save(self) -> None:
        """Write a checkpoint of this step and point `*_latest.pt` at it."""
        self.log.flush()
        if dist_util.is_main():
            self.run.check_held()
            state = self.model.state_dict()
            opt_state = {
                "optimizer": self.optimizer.state_dict(),
                "schedule_sampler": self.sampler.state_dict(),
                "position": self.position,
                "ranks": dist_util.world_size(),
                "loss_scale_log2": self.loss_scale.log2 if self.loss_scale else None,
            }
            emas = {rate: {**state, **ema} for rate, ema in self.emas.items()}
            checkpoints.save_run(
                self.run.folder,
                self.step,
                state,
                emas,
                opt_state,
                self.stored_config,
                latest_only=self.config.save_latest_only,
                keep=self.config.keep_checkpoints,
            )
        self.saved_step = self.step

    def _restore(self, state: checkpoints.RunState) -> None:
        """Take up the optimiser, the averages and the position of a saved run."""
        self.step, self.position = state.step, int(state.opt_state["position"])
        for rate, ema in self.emas.items():
            if rate not in state.ema_states:
                logger.warning(
                    "--ema_rate %s is new: its average starts from the current weights", rate
                )
                continue
            for name, value in ema.items():
                value.copy_(state.ema_states[rate][name])
        self.optimizer.load_state_dict(state.opt_state["optimizer"])
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.config.weight_decay
        for param, slots in self.optimizer.state.items():
            for name, value in slots.items():
                # Files hold no memory layout; the fast path needs the parameter's own.
                same = value.shape == param.shape
                slots[name] = torch.empty_like(param).copy_(value) if same else value.clone()
        ranks = state.opt_state.get("ranks", dist_util.world_size())
        if ranks != dist_util.world_size() and dist_util.is_main():
            logger.info(
                "%d ranks before, %d now: the order of the data and the noise may differ from an "
                "unbroken run's",
                ranks,
                dist_util.world_size(),
            )
        self.sampler.load_state_dict(state.opt_state["schedule_sampler"])
        if self.loss_scale is not None and state.opt_state["loss_scale_log2"] is not None:
            self.loss_scale.log2 = state.opt_state["loss_scale_log2"]

    # ------------------------------------------------------------ one step

    def run_step(self, items: Batch) -> bool:
        """Update the weights from one batch of items; False where the update was skipped.

        items: B items as TrainDataset gives them, stacked. All ranks must call.
        """
        generator = make_generator(self.config.seed, self.position, dist_util.rank())
        torch.manual_seed(generator.initial_seed())  # noise and dropout
        self.position += self.config.batch_size * dist_util.world_size()
        t, weights = self.sampler.sample(self.config.batch_size, generator)
        self.optimizer.zero_grad(set_to_none=True)
        terms = self._forward_backward(
            self._to_device(items), t.to(self.device), weights.to(self.device)
        )
        grad_norm = self._grad_norm()
        self._clip_grad(grad_norm)
        losses = {key: value.tolist() for key, value in terms.items()}
        bad = not math.isfinite(grad_norm) or not all(map(math.isfinite, losses["loss"]))
        any_bad, any_signal = dist_util.max_over_ranks(
            int(bad), signals.received(), what=f"the end of step {self.step}"
        )
        self._stop = any_signal > 0
        if self.loss_scale is not None:
            self.loss_scale.update(not any_bad)
        if any_bad:
            self._skip(t, losses["loss"], grad_norm)
            return False
        self._bad_steps = 0
        self._update()
        self.sampler.update(t.to(self.device), terms["loss"])
        self._log_step(t.tolist(), losses, weights.tolist(), grad_norm)
        return True

    def _to_device(self, items: Batch) -> Batch:
        """The items on the device; their frames as "x0", float in [-1, 1]."""
        batch = {key: value.to(self.device, non_blocking=True) for key, value in items.items()}
        batch["x0"] = batch.pop("frames").float() / 127.5 - 1
        if not self.config.pad_with_random_frames:
            batch["x0"] = batch["x0"] * (batch["obs_mask"] + batch["latent_mask"])
        return batch

    def _forward_backward(self, batch: Batch, t: Tensor, weights: Tensor) -> Batch:
        """Gradients of the batch's mean loss, microbatch by microbatch; returns its terms [B]."""
        batch_size = len(t)
        size = self.config.microbatch if self.config.microbatch > 0 else batch_size
        noise = torch.randn_like(batch["x0"])
        scale = self.loss_scale.value if self.loss_scale else 1.0
        parts = []
        for start in range(0, batch_size, size):
            part = slice(start, start + size)
            with self._synchronised(start + size >= batch_size):
                items = {key: value[part] for key, value in batch.items()}
                terms = self._losses(self._network, items, t[part], noise[part])
                loss = (terms["loss"] * weights[part]).sum() / batch_size
                with dist_util.collective(f"the gradients of step {self.step}"):
                    (loss * scale).backward()
            parts.append(terms)
        return {key: torch.cat([part[key].detach() for part in parts]) for key in parts[0]}

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Ranks exchange gradients once, with the last microbatch."""
        if last or not isinstance(self.ddp, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.ddp.no_sync()

    def _losses(self, network: Any, batch: Batch, t: Tensor, noise: Tensor) -> Batch:
        padding_counts = self.config.pad_with_random_frames
        return self.diffusion.training_losses(
            network,
            batch["x0"],
            t,
            model_kwargs=batch,
            noise=noise,
            latent_mask=1 - batch["obs_mask"] if padding_counts else batch["latent_mask"],
            eval_mask=batch["latent_mask"],
        )

    def _network(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._autocast():
            return self.trained(*args, **kwargs)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        config = self.config
        return fp16_util.autocast(self.device, precision=config.precision, use_fp16=config.use_fp16)

    def _grad_norm(self) -> float:
        """The norm of the whole gradient; takes the loss scale out of it first."""
        grads = [param.grad for param in self.params.values() if param.grad is not None]
        if self.loss_scale is not None:
            torch._foreach_mul_(grads, 1.0 / self.loss_scale.value)
        return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))

    def _clip_grad(self, norm: float) -> None:
        if 0 < self.config.grad_clip < norm < math.inf:
            grads = [param.grad for param in self.params.values() if param.grad is not None]
            torch._foreach_mul_(grads, self.config.grad_clip / norm)

    def _update(self) -> None:
        """One step of the optimiser and of the averages."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.optimizer.step()
        self.step += 1
        for rate, ema in self.emas.items():
            decay = fp16_util.ema_decay(float(rate), self.step, warmup=self.config.ema_warmup)
            fp16_util.update_ema(ema, self.params.values(), decay)

    def _skip(self, t: Tensor, losses: list[float], grad_norm: float) -> None:
        """Tell of a step whose numbers are not finite; raise where that does not stop."""
        if self.loss_scale is not None:
            return  # float16 overflowed: the halved scale is the remedy, and has its own limit
        self._bad_steps += 1
        pairs = zip(losses, t.tolist(), strict=True)
        shown = ", ".join(f"{loss:.4g} at timestep {step}" for loss, step in pairs)
        where = f"step {self.step}, rank {dist_util.rank()}"
        message = f"{where}: loss {shown}; gradient norm {grad_norm:.4g}"
        logger.warning("%s: update skipped", message)
        if self._bad_steps >= MAX_BAD_STEPS:
            raise ValueError(
                f"{message}: not finite {MAX_BAD_STEPS} times in a row: "
                "resume from the last checkpoint with a lower --lr or --precision fp32"
            )

    # ------------------------------------------------------------ around the steps

    def _batches(self) -> Generator[Batch, None, None]:
        """Batches from this run's position on, for ever; the time they take is logged."""
        batches = iter(train_loader(self.data, self.config, self.position))
        try:
            while True:
                began = time.perf_counter()
                batch = next(batches)
                self.log.add("seconds_waiting_for_data", time.perf_counter() - began)
                if isinstance(batch, Exception):
                    raise batch
                yield batch
        finally:
            del batches  # ends the workers, who ignore signals, even while a traceback is alive

    def _after_update(self) -> None:
        step, config = self.step, self.config
        validate = config.valid_interval > 0 and step % config.valid_interval == 0
        if validate:
            self._validate()
        if validate or step % config.log_interval == 0:
            self._dump_log()
        if step % config.save_interval == 0:
            self.save()
        interval = config.sample_interval
        due = interval > 0 and (step == FIRST_SAMPLE_STEP or step % interval == 0)
        if due and dist_util.is_main():
            self._draw_samples()

    def _log_step(
        self, t: list[int], losses: dict[str, list[float]], weights: list[float], grad_norm: float
    ) -> None:
        for name, values in losses.items():
            for step, value, weight in zip(t, values, weights, strict=True):
                self.log.add(name, value * weight)
                self.log.add(f"{name}_q{4 * step // self.diffusion.num_timesteps}", value * weight)
        self.log.add("grad_norm", grad_norm)
        self.log.add("lr", self.optimizer.param_groups[0]["lr"])
        if self.loss_scale is not None:
            self.log.add("loss_scale_log2", self.loss_scale.log2)

    def _dump_log(self) -> None:
        step, began = self._logged
        self._logged = (self.step, time.perf_counter())
        self.log.add("steps_per_second", (self.step - step) / (self._logged[1] - began))
        self.log.add("peak_memory_gb", dist_util.peak_memory_gb(self.device))
        self.log.dump(self.step)

    @contextlib.contextmanager
    def _ema_network(self) -> Iterator[Any]:
        """The network with the weights of the first EMA, without dropout and gradients."""
        ema = next(iter(self.emas.values()))

        def network(*args: Any, **kwargs: Any) -> Tensor:
            with self._autocast():
                return torch.func.functional_call(self.model, ema, args, kwargs)

        self.model.eval()
        with torch.no_grad():
            yield network
        self.model.train()

    def _validate(self) -> None:
        """Log valid_loss and valid_bpd, each a mean over the first test videos. All ranks call.

        Masks, timesteps and noise of a video are the same every time.
        """
        assert self.valid_data is not None, "--valid_interval without held-out videos"
        videos = min(self.config.valid_videos, len(self.valid_data))
        values, timesteps = [], self.diffusion.num_timesteps
        with self._ema_network() as network:
            for index in range(dist_util.rank(), videos, dist_util.world_size()):
                if signals.received():
                    break
                generator = make_generator(self.config.seed, VALIDATION_STREAM, index)
                t = int((index + torch.rand((), generator=generator)) * timesteps / videos)
                item = self._item(self.valid_data, index)
                noise = randn(item["x0"].shape, generator, self.device)
                terms = self._losses(network, item, torch.tensor([t], device=self.device), noise)
                item = validation.without_padding(item)
                bits = validation.bits_per_dim(self.diffusion, network, item, generator)
                values.append((float(terms["loss"]), bits))
        if not any(dist_util.max_over_ranks(signals.received(), what="validation")):
            for loss, bits in values:
                self.log.add("valid_loss", loss)
                self.log.add("valid_bpd", bits)

    def _draw_samples(self) -> None:
        """Sample the latent frames of a few fixed items with the first EMA; write them as gifs."""
        files = []
        with self._ema_network() as network:
            for index in range(min(NUM_SAMPLES, len(self.data))):
                if signals.received():
                    break
                path = f"{self.run.folder}/samples/sample_{self.step:06d}_{index}.gif"
                generator = make_generator(self.config.seed, index)
                item = self._item(self.data, index)
                frames = validation.draw_sample(self.sample_diffusion, network, item, generator)
                video_io.write_video(path, frames)
                files.append(path)
        self.log.videos(files, self.step)

    def _item(self, data: TrainDataset, index: int) -> Batch:
        """One item, always the same, as a batch on the device."""
        return self._to_device({key: value[None] for key, value in data[0, index].items()})

    def _introduce(self) -> None:
        """What this run is, in a few lines."""
        hosts = Counter(dist_util.hosts())
        if not dist_util.is_main():
            return
        ranks, batch_size = dist_util.world_size(), self.config.batch_size
        launcher = dist_util.launcher() or "none"
        logger.info("ranks: %d, device: %s, launcher: %s", ranks, self.device, launcher)
        logger.info("hosts: %s", ", ".join(f"{host} x {n}" for host, n in hosts.items()))
        folder = self.run.folder
        folder = folder if paths.is_remote(folder) else os.path.abspath(folder)
        logger.info("run id: %s, folder: %s, at step %d", self.run.run_id, folder, self.step)
        logger.info("batch size: %d per rank, %d over all ranks", batch_size, batch_size * ranks)
        logger.info("parameters: %d", sum(param.numel() for param in self.params.values()))
        logger.info("should it be killed: %s", resume_command(self.run.run_id))


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of the update that follows `step` updates: linear warm-up, linear annealing."""
    warmup, anneal = config.lr_warmup_steps, config.lr_anneal_steps
    rate = config.lr * (1 - step / anneal if anneal else 1)
    return rate * min(1.0, (step + 1) / warmup) if warmup else rate


def _load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[1].strip()
        raise ValueError(f"{source}: weights of another network: {first}") from None


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
