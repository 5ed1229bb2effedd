"""The training loop: data, timesteps, gradients, averages, checkpoints, and samples to look at.

Everything random in a step is a function of (seed, position, rank), where the position is the
number of training items that all ranks together have consumed. So a resumed run repeats an unbroken
one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import resource
import signal
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from improved_diffusion import checkpoints, dist_util, fp16_util, video_io
from improved_diffusion.config import TrainConfig
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.logger import RunLogger
from improved_diffusion.resample import create_schedule_sampler
from improved_diffusion.rng_util import make_generator
from improved_diffusion.runs import Run, resume_command
from improved_diffusion.video_datasets import ShardedSampler, TrainDataset

logger = logging.getLogger(__name__)

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: start again and it goes on
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
FIRST_SAMPLE_STEP = 500
NUM_SAMPLES = 4
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
    ) -> None:
        self.config, self.diffusion, self.data = config, diffusion, data
        self.run, self.stored_config, self.sample_diffusion = run, stored_config, sample_diffusion
        self.device = dist_util.dev()
        self._autocast()  # refuses what the device cannot do
        self.step = 0  # optimiser updates done
        self.position = 0  # training items consumed by all ranks together
        self.model = model.to(self.device)
        weights = run.state.model_state if run.state else run.weights
        if weights is not None:
            _load_weights(self.model, weights, config.resume_checkpoint or run.folder)
        self.ddp = dist_util.wrap_ddp(self.model)
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
        self._signal = 0  # the signal that this rank was sent
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
            self._catch_signals(),
            logging_redirect_tqdm(),
            tqdm(initial=self.step, total=self.last_step, unit="step", disable=show) as bar,
            contextlib.closing(self._batches()) as batches,
        ):
            while not self._stop and not self.finished:
                if self.run_step(next(batches)):
                    bar.update()
                    self._after_update()
            if self.step > self._logged[0]:
                self._dump_log()
            if self.step > self.saved_step:
                self.save()
        self.log.close()
        if dist_util.is_main():
            logger.info("to resume: %s", resume_command(self.run.run_id))
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
        if dist_util.is_main():
            state = self.model.state_dict()
            opt_state = {
                "optimizer": self.optimizer.state_dict(),
                "schedule_sampler": self.sampler.state_dict(),
                "position": self.position,
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
                if value.shape == param.shape:
                    slots[name] = torch.empty_like(param).copy_(value)
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
        losses = {key: value.tolist() for key, value in terms.items()}
        bad = not math.isfinite(grad_norm) or not all(map(math.isfinite, losses["loss"]))
        any_bad, any_signal = dist_util.max_over_ranks(int(bad), self._signal)
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
                terms = self._losses(
                    {key: v[part] for key, v in batch.items()}, t[part], noise[part]
                )
                loss = (terms["loss"] * weights[part]).sum() / batch_size
                (loss * scale).backward()
            parts.append(terms)
        return {key: torch.cat([part[key].detach() for part in parts]) for key in parts[0]}

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Ranks exchange gradients once, with the last microbatch."""
        if last or not isinstance(self.ddp, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.ddp.no_sync()

    def _losses(self, batch: Batch, t: Tensor, noise: Tensor) -> Batch:
        padding_counts = self.config.pad_with_random_frames
        return self.diffusion.training_losses(
            self._network,
            batch["x0"],
            t,
            model_kwargs=batch,
            noise=noise,
            latent_mask=1 - batch["obs_mask"] if padding_counts else batch["latent_mask"],
            eval_mask=batch["latent_mask"],
        )

    def _network(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._autocast():
            return self.ddp(*args, **kwargs)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        config = self.config
        return fp16_util.autocast(self.device, precision=config.precision, use_fp16=config.use_fp16)

    def _grad_norm(self) -> float:
        """The norm of the whole gradient; takes the loss scale out of it first."""
        grads = [param.grad for param in self.params.values() if param.grad is not None]
        if self.loss_scale is not None:
            torch._foreach_mul_(grads, 1.0 / self.loss_scale.value)
        return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))

    def _update(self) -> None:
        """One step of the optimiser and of the averages."""
        anneal = self.config.lr_anneal_steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * (1 - self.step / anneal if anneal else 1)
        self.optimizer.step()
        self.step += 1
        for rate, ema in self.emas.items():
            decay = fp16_util.ema_decay(float(rate), self.step, warmup=self.config.ema_warmup)
            fp16_util.update_ema(ema, self.params.values(), decay)

    def _skip(self, t: Tensor, losses: list[float], grad_norm: float) -> None:
        """Tell of a step whose numbers are not finite; raise where that does not stop."""
        if self.loss_scale is not None and self.loss_scale.log2 > 0:
            return  # float16 overflowed: the halved scale is the remedy
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
        config = self.config
        keys = ShardedSampler(
            len(self.data),
            rank=dist_util.rank(),
            world_size=dist_util.world_size(),
            seed=config.seed,
            start=self.position,
        )
        loader = DataLoader(
            _ItemsOrErrors(self.data),
            config.batch_size,
            sampler=keys,
            collate_fn=_collate,
            num_workers=config.num_workers if config.num_workers >= 0 else dist_util.cores() - 1,
            worker_init_fn=_leave_signals_to_parent,
            pin_memory=self.device.type == "cuda",
        )
        batches = iter(loader)
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
        config = self.config
        if self.step % config.log_interval == 0:
            self._dump_log()
        if self.step % config.save_interval == 0:
            self.save()
        interval = config.sample_interval
        due = interval > 0 and (self.step == FIRST_SAMPLE_STEP or self.step % interval == 0)
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
        self.log.add("peak_memory_gb", _peak_memory_gb(self.device))
        self.log.dump(self.step)

    @torch.no_grad()
    def _draw_samples(self) -> None:
        """Sample the latent frames of a few fixed items with the first EMA; write them as gifs.

        Each item by itself, without its padding: the network is to see real frames only.
        """
        ema = next(iter(self.emas.values()))

        def network(*args: Any, **kwargs: Any) -> Tensor:
            with self._autocast():
                return torch.func.functional_call(self.model, ema, args, kwargs)

        self.model.eval()
        files = []
        for index in range(min(NUM_SAMPLES, len(self.data))):
            if self._signal:
                break
            path = f"{self.run.folder}/samples/sample_{self.step:06d}_{index}.gif"
            self._draw_sample(network, index, path)
            files.append(path)
        self.model.train()
        self.log.videos(files, self.step)

    def _draw_sample(self, network: Any, index: int, path: str) -> None:
        batch = self._to_device({key: value[None] for key, value in self.data[0, index].items()})
        real = (batch["obs_mask"] + batch["latent_mask"]).flatten() > 0
        order = batch["frame_indices"][0, real].argsort()
        batch = {key: value[:, real][:, order] for key, value in batch.items()}
        sample = self.sample_diffusion.ddim_sample_loop(
            network,
            batch["x0"].shape,
            model_kwargs=batch,
            latent_mask=batch["latent_mask"],
            generator=make_generator(self.config.seed, index),
        )
        observed = batch["obs_mask"].flatten().cpu().numpy() > 0
        frames = video_io.add_border(video_io.to_uint8(sample[0].cpu()), observed)
        video_io.write_video(path, frames.transpose(0, 2, 3, 1))

    @contextlib.contextmanager
    def _catch_signals(self) -> Iterator[None]:
        """Note stop signals instead of dying of them; a second Ctrl-C ends the run at once."""

        def note(number: int, frame: Any) -> None:
            self._signal = number
            signal.signal(signal.SIGINT, signal.default_int_handler)
            logger.warning("%s: finishing this step, then saving", signal.Signals(number).name)

        previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _introduce(self) -> None:
        """What this run is, in a few lines."""
        if not dist_util.is_main():
            return
        ranks, batch_size = dist_util.world_size(), self.config.batch_size
        logger.info("ranks: %d, device: %s", ranks, self.device)
        logger.info(
            "run id: %s, folder: %s, at step %d", self.run.run_id, self.run.folder, self.step
        )
        logger.info("batch size: %d per rank, %d over all ranks", batch_size, batch_size * ranks)
        logger.info("parameters: %d", sum(param.numel() for param in self.params.values()))


class _ItemsOrErrors(Dataset[Any]):
    """Training items, or what reading one raised: a worker would wrap that in its own traceback."""

    def __init__(self, data: TrainDataset) -> None:
        self.data = data

    def __getitem__(self, key: tuple[int, int]) -> Any:
        try:
            return self.data[key]
        except (ValueError, OSError) as error:
            return error


def _collate(items: list[Any]) -> Any:
    """A batch of the items, or the first error among them."""
    errors = [item for item in items if isinstance(item, Exception)]
    return errors[0] if errors else default_collate(items)


def _load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[1].strip()
        raise ValueError(f"{source}: weights of another network: {first}") from None


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _peak_memory_gb(device: torch.device) -> float:
    """The most memory this rank has held so far, in 10^9 bytes: the GPU's, or the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _leave_signals_to_parent(worker: int) -> None:
    """A signal to the whole process group must not take the data away before the run has saved."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
