"""The training loop: data, updates, checkpoints, the log, and samples to look at."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from improved_diffusion import dist_util
from improved_diffusion.data import checkpoints, machine, paths, video_io
from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.data.nested_state import snapshot
from improved_diffusion.data.rng_util import make_generator, randn
from improved_diffusion.data.video_datasets import TrainDataset
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.logger import RunLogger
from improved_diffusion.training import signals, validation
from improved_diffusion.training.options import TrainConfig
from improved_diffusion.training.runs import Run, resume_command
from improved_diffusion.training.saver import Saver
from improved_diffusion.training.train_data import train_loader
from improved_diffusion.training.train_step import Items, TrainStep, Update

logger = logging.getLogger(__name__)

FIRST_SAMPLE_STEP = 500
NUM_SAMPLES = 4
VALIDATION_STREAM = 1 << 40  # a position that no run reaches: its random numbers are free
MAX_BAD_STEPS = 5  # updates in a row that may be skipped for numbers that are not finite


@dataclass(frozen=True)
class Monitoring:
    """What is measured while training, and with what."""

    sample_diffusion: GaussianDiffusion  # the process to draw samples with (fewer steps)
    valid_data: TrainDataset | None = None  # items of held-out videos, for --valid_interval


class TrainLoop:
    """Trains `model` on `data` until a limit of `config` or a signal; see `run_loop`.

    Args:
        model: the network, called as unet.UNetVideoModel is; the loop moves it to the device.
        diffusion: the process to train on.
        data: training items, indexed by the keys of ShardedSampler.
        config: the training options.
        run: from `open_run`; its options are written into checkpoints.
        monitoring: what is measured and drawn on the way.

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
        monitoring: Monitoring,
    ) -> None:
        self.config, self.data, self.monitoring = config, data, monitoring
        self.run = run.forget_start()
        weights = run.state.model_state if run.state else run.weights
        if weights is not None:
            _load_weights(model, weights, config.resume_checkpoint or run.folder)
        self.train_step = TrainStep(model, diffusion, config)
        if run.state is not None:
            self._restore(run.state)
        self.saved_step = self.step
        self.log = RunLogger(run.folder, run.run_id, run.options, self.step)
        self._logged = (self.step, time.perf_counter())
        self._saver = Saver()
        self._bad_steps = 0
        self._stop = False  # what all ranks agreed on

    @property
    def step(self) -> int:
        """Updates made."""
        return self.train_step.step

    def run_loop(self) -> bool:
        """Train, save and log; returns whether a signal ended it before its limit.

        SIGTERM, SIGINT or SIGUSR1 at any one rank lets all finish the step and save. Raises
        ValueError where losses stay infinite or not a number, OSError where saving fails.
        """
        with contextlib.ExitStack() as ends:
            ends.callback(self.run.close)
            ends.callback(self.log.close)
            ends.callback(self._saver.wait)
            try:
                self._introduce()
                self._train()
            except KeyboardInterrupt:  # the second Ctrl-C, which ends at once
                ends.pop_all()
                raise
        if dist_util.is_main():
            logger.info("to resume: %s", resume_command(self.run.run_id))
        # A rank that left with code 75 while rank 0 still saves would have the launcher kill it.
        dist_util.barrier("the end of the run")
        return self._stop and not self.finished

    def _train(self) -> None:
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        show = None if dist_util.is_main() else True  # None: only where there is a terminal
        with (
            signals.deferred(),
            logging_redirect_tqdm(),
            tqdm(initial=self.step, total=self.last_step, unit="step", disable=show) as bar,
            contextlib.closing(self._batches()) as batches,
        ):
            self._stop = any(dist_util.max_over_ranks(signals.received(), what="the first step"))
            while not self._stop and not self.finished:
                self.run_step(next(batches))
                bar.update(self.step - bar.n)
            self._see_to(self.train_step.finish())
            if self.step > self._logged[0]:
                self._dump_log()
            if self.step > self.saved_step:
                self.save()
            self._saver.wait()

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
        """Begin to write a checkpoint of this step, at which `*_latest.pt` will point.

        Training may go on at once; what the writing raises, a later step does. One is written at a
        time.
        """
        self.log.flush()
        if dist_util.is_main():
            self._saver.wait()
            weights = self.train_step.network.state_dict()
            emas = {rate: {**weights, **ema} for rate, ema in self.train_step.emas.items()}
            rest = self.train_step.state_dict() | {"ranks": dist_util.world_size()}
            copies = (snapshot(part) for part in (weights, emas, rest))
            self._saver.start(functools.partial(self._write, self.step, *copies))
        self.saved_step = self.step

    def _write(self, step: int, weights: Any, emas: Any, rest: Any) -> None:
        self.run.check_held()
        checkpoints.save_run(
            self.run.folder,
            step,
            weights,
            emas,
            rest,
            self.run.options,
            latest_only=self.config.save_latest_only,
            keep=self.config.keep_checkpoints,
        )

    def _restore(self, state: checkpoints.RunState) -> None:
        """Take up the optimiser, the averages and the position of a saved run."""
        self.train_step.load_state_dict(state.opt_state, state.step)
        for rate, ema in self.train_step.emas.items():
            if rate not in state.ema_states:
                logger.warning(
                    "--ema_rate %s is new: its average starts from the current weights", rate
                )
                continue
            for name, value in ema.items():
                value.copy_(state.ema_states[rate][name])
        ranks = state.opt_state.get("ranks", dist_util.world_size())
        if ranks != dist_util.world_size() and dist_util.is_main():
            logger.info(
                "%d ranks before, %d now: the order of the data and the noise may differ from an "
                "unbroken run's",
                ranks,
                dist_util.world_size(),
            )

    # ------------------------------------------------------------ one step

    def run_step(self, items: Items) -> None:
        """Begin the update of one batch of items, and see to the one that is finished by then.

        What the next step needs finished, is: whatever happens at it needs its weights and averages.
        items: B items as TrainDataset gives them, stacked. All ranks must call.
        """
        self._saver.check()
        self._see_to(self.train_step.begin(items, signals.received))
        if self._is_due(self.step + 1):
            self._see_to(self.train_step.finish())

    def _see_to(self, update: Update | None) -> None:
        """Log a finished update, and do what is due after it; or tell that it was skipped."""
        if update is None:
            return
        self._stop = update.signal > 0
        if update.done:
            self._bad_steps = 0
            self._log_update(update)
            self._after_update()
        else:
            self._skip(update)

    def _skip(self, update: Update) -> None:
        """Tell of an update whose numbers are not finite; raise where that does not stop."""
        if self.train_step.loss_scale is not None:
            return  # float16 overflowed: the halved scale is the remedy, and has its own limit
        self._bad_steps += 1
        pairs = zip(update.losses["loss"], update.timesteps, strict=True)
        shown = ", ".join(f"{loss:.4g} at timestep {t}" for loss, t in pairs)
        where = f"step {self.step}, rank {dist_util.rank()}"
        message = f"{where}: loss {shown}; gradient norm {update.grad_norm:.4g}"
        logger.warning("%s: update skipped", message)
        if self._bad_steps >= MAX_BAD_STEPS:
            raise ValueError(
                f"{message}: not finite {MAX_BAD_STEPS} times in a row: "
                "resume from the last checkpoint with a lower --lr or --precision fp32"
            )

    # ------------------------------------------------------------ around the steps

    def _batches(self) -> Generator[Items, None, None]:
        """Batches from this run's position on, for ever; the time they take is logged."""
        batches = iter(train_loader(self.data, self.config, self.train_step.position))
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

    def _is_due(self, step: int) -> bool:
        """Whether after update number `step` its weights are looked at, or training ends."""
        intervals = (self.config.save_interval, self.config.valid_interval)
        at_interval = any(interval > 0 and step % interval == 0 for interval in intervals)
        return at_interval or self._samples_are_due(step) or step == self.last_step

    def _samples_are_due(self, step: int) -> bool:
        interval = self.config.sample_interval
        return interval > 0 and (step == FIRST_SAMPLE_STEP or step % interval == 0)

    def _after_update(self) -> None:
        step, config = self.step, self.config
        validate = config.valid_interval > 0 and step % config.valid_interval == 0
        if validate:
            self._validate()
        if validate or step % config.log_interval == 0:
            self._dump_log()
        if step % config.save_interval == 0:
            self.save()
        if self._samples_are_due(step) and dist_util.is_main():
            self._draw_samples()

    def _log_update(self, update: Update) -> None:
        timesteps = self.train_step.diffusion.num_timesteps
        for name, values in update.losses.items():
            for t, value, weight in zip(update.timesteps, values, update.weights, strict=True):
                self.log.add(name, value * weight)
                self.log.add(f"{name}_q{4 * t // timesteps}", value * weight)
        for quarter, error in self.train_step.clean_errors(update):
            self.log.add(f"xstart_mse_snr_q{quarter}", error)
        self.log.add("grad_norm", update.grad_norm)
        self.log.add("lr", update.lr)
        if update.loss_scale_log2 is not None:
            self.log.add("loss_scale_log2", update.loss_scale_log2)

    def _dump_log(self) -> None:
        step, began = self._logged
        self._logged = (self.step, time.perf_counter())
        self.log.add("steps_per_second", (self.step - step) / (self._logged[1] - began))
        self.log.add("peak_memory_gb", machine.peak_memory_gb(self.train_step.device))
        self.log.dump(self.step)

    def _validate(self) -> None:
        """Log valid_loss and valid_bpd, each a mean over the first test videos. All ranks call.

        Masks, timesteps and noise of a video are the same every time.
        """
        data = self.monitoring.valid_data
        assert data is not None, "--valid_interval without held-out videos"
        videos = min(self.config.valid_videos, len(data))
        values = []
        for index in range(dist_util.rank(), videos, dist_util.world_size()):
            if signals.received():
                break
            generator = make_generator(self.config.seed, VALIDATION_STREAM, index)
            spread = (index + torch.rand((), generator=generator)) / videos
            values.append(self._measure(self._item(data, index), float(spread), generator))
        if not any(dist_util.max_over_ranks(signals.received(), what="validation")):
            for loss, bits in values:
                self.log.add("valid_loss", loss)
                self.log.add("valid_bpd", bits)

    def _measure(
        self, item: FrameBatch, spread: float, generator: torch.Generator
    ) -> tuple[float, float]:
        """(loss at one timestep, bound in bits per dimension) of an item, by the first EMA.

        spread: where in the chain the timestep lies, in [0, 1).
        """
        t = torch.tensor([int(spread * self.train_step.diffusion.num_timesteps)])
        noise = randn(item.frames.shape, generator, item.device)
        with self.train_step.ema_denoiser() as denoiser:
            losses = self.train_step.losses(item, t.to(item.device), noise, denoiser)
            bits = validation.bits_per_dim(denoiser, item.without_padding(), generator)
        return float(losses["loss"]), bits

    def _draw_samples(self) -> None:
        """Sample the latent frames of a few fixed items with the first EMA; write them as gifs."""
        files = []
        with self.train_step.ema_denoiser(self.monitoring.sample_diffusion) as denoiser:
            for index in range(min(NUM_SAMPLES, len(self.data))):
                if signals.received():
                    break
                path = f"{self.run.folder}/samples/sample_{self.step:06d}_{index}.gif"
                generator = make_generator(self.config.seed, index)
                frames = validation.draw_sample(denoiser, self._item(self.data, index), generator)
                video_io.write_video(path, frames)
                files.append(path)
        if not paths.is_remote(self.run.folder):  # wandb reads local files alone
            self.log.videos(files, self.step)

    def _item(self, data: TrainDataset, index: int) -> FrameBatch:
        """One item, always the same, as a batch on the device."""
        return self.train_step.batch({key: value[None] for key, value in data[0, index].items()})

    def _introduce(self) -> None:
        """What this run is, in a few lines."""
        hosts = Counter(dist_util.hosts())
        if not dist_util.is_main():
            return
        ranks, batch_size = dist_util.world_size(), self.config.batch_size
        launcher = dist_util.launcher() or "none"
        device = self.train_step.device
        logger.info("ranks: %d, device: %s, launcher: %s", ranks, device, launcher)
        if device.type == "cuda":
            network = "fp16" if self.config.use_fp16 else self.config.precision
            factors = "rounded to TF32" if self.config.tf32 else "not rounded to TF32"
            logger.info("arithmetic: %s, factors of float32 products %s", network, factors)
        logger.info("hosts: %s", ", ".join(f"{host} x {n}" for host, n in hosts.items()))
        folder = self.run.folder
        folder = folder if paths.is_remote(folder) else os.path.abspath(folder)
        logger.info("run id: %s, folder: %s, at step %d", self.run.run_id, folder, self.step)
        logger.info("batch size: %d per rank, %d over all ranks", batch_size, batch_size * ranks)
        logger.info(
            "parameters: %d", sum(param.numel() for param in self.train_step.params.values())
        )
        logger.info("should it be killed: %s", resume_command(self.run.run_id))


def _load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[1].strip()
        raise ValueError(f"{source}: weights of another network: {first}") from None
