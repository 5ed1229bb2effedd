"""The options of training. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from improved_diffusion.config import (
    COMPILE_HELP,
    check_choices,
    check_positive,
    fill_options,
    option,
    owned_options,
)
from improved_diffusion.registry import (
    DATASETS,
    MASK_DISTRIBUTIONS,
    OPTIMIZERS,
    TIMESTEP_DISTRIBUTIONS,
)


@dataclass(frozen=True)
class TrainConfig:
    """The training run (train_util.py)."""

    dataset: str = option(
        help="a folder of videos, or the name of a data set (required)", names_of=DATASETS
    )
    T: int = option(-1, "frames of a training video, a random window of it (-1: the data set's)")
    batch_size: int = option(1, "videos per rank and step")
    microbatch: int = option(-1, "videos per forward and backward pass (-1: batch_size)")
    max_frames: int = option(20, "frames given to the network at once (K)")
    num_workers: int = option(-1, "data loading processes per rank (-1: cores - 1)")
    optimizer: str = option("adamw", "what turns gradients into updates", choices=OPTIMIZERS)
    optimizer_options: Any = owned_options(OPTIMIZERS, chosen_by="optimizer")
    lr: float = option(1e-4, "learning rate of AdamW")
    weight_decay: float = option(0.0, "decoupled weight decay of all parameters")
    lr_anneal_steps: int = option(
        0, "anneal the rate linearly to 0 over so many steps, then stop (0: never)"
    )
    max_steps: int = option(0, "stop after so many steps, without annealing (0: no limit)")
    lr_warmup_steps: int = option(0, "raise the rate linearly from 0 over so many steps first")
    grad_clip: float = option(
        0.0, "scale the gradient down where its norm is larger than this (0: never)"
    )
    schedule_sampler: str = option(
        "uniform", "how timesteps are drawn", choices=TIMESTEP_DISTRIBUTIONS
    )
    timestep_options: Any = owned_options(TIMESTEP_DISTRIBUTIONS, chosen_by="schedule_sampler")
    stratified_timesteps: bool = option(
        False, "spread the timesteps of each update evenly over their distribution, over all ranks"
    )
    mask_distribution: str = option(
        "published", "how observed and latent frames are drawn", choices=MASK_DISTRIBUTIONS
    )
    mask_options: Any = owned_options(MASK_DISTRIBUTIONS, chosen_by="mask_distribution")
    ema_rate: str = option("0.9999", "rates of the moving averages of the weights", nargs="+")
    ema_warmup: bool = option(False, "use the rate min(rate, (1+n)/(10+n)) at step n")
    log_interval: int = option(10, "steps between log lines")
    save_interval: int = option(50000, "steps between checkpoints")
    sample_interval: int = option(50000, "steps between samples drawn while training (0: never)")
    sample_steps: int = option(50, "DDIM steps of the samples drawn while training")
    valid_interval: int = option(
        0,
        "steps between measurements of valid_loss and valid_bpd (bits per dimension) on test videos "
        "with the first EMA (0: never)",
    )
    valid_videos: int = option(16, "test videos to measure on, the first ones")
    save_latest_only: bool = option(False, "keep only the newest checkpoint (*_latest.pt)")
    keep_checkpoints: int = option(0, "numbered checkpoints to keep (0: all)")
    resume_id: str = option(
        "", "run to continue (or to start under this id): folder below checkpoints/"
    )
    resume_checkpoint: str = option(
        "",
        "start a new run from the weights of this model or EMA file (with --resume_id: unless that "
        "run has checkpoints)",
    )
    use_fp16: bool = option(False, "float16 with loss scaling (CUDA only)")
    fp16_scale_growth: float = option(1e-3, "growth of log2(loss scale) per good step")
    precision: str = option(
        "fp32",
        "arithmetic of the network; auto: bf16 where the GPU or CPU has instructions for it",
        choices=("fp32", "bf16", "auto"),
    )
    tf32: bool = option(
        True, "on a GPU: let products of float32 matrices and convolutions round factors to TF32"
    )
    compile: bool = option(False, COMPILE_HELP)
    resample_observed: float = option(
        0.0, "share of items whose observed frames are the network's own denoising of them"
    )
    pad_with_random_frames: bool = option(
        True, "fill up with frames of another video, which count in the loss (False: with nothing)"
    )
    seed: int = option(0, "seed of everything random")

    def __post_init__(self) -> None:
        check_choices(self)
        fill_options(self)
        positive = ("batch_size", "max_frames", "log_interval", "save_interval")
        check_positive(self, *positive, "sample_steps", "valid_videos")
        not_negative = ("lr", "lr_anneal_steps", "lr_warmup_steps", "grad_clip", "max_steps")
        for name in (*not_negative, "sample_interval", "valid_interval", "keep_checkpoints"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} {getattr(self, name)}: must not be negative")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed}: must be from 0 to 2^63 - 1")
        if self.keep_checkpoints and self.save_latest_only:
            raise ValueError(
                "--keep_checkpoints and --save_latest_only exclude each other: choose one"
            )
        if not 0 <= self.resample_observed <= 1:
            raise ValueError(f"--resample_observed {self.resample_observed}: must be from 0 to 1")
        if self.use_fp16 and self.precision != "fp32":
            raise ValueError(
                f"--use_fp16 True and --precision {self.precision} exclude each other: choose one"
            )
        for rate in self.ema_rates:
            try:
                valid = 0 <= float(rate) < 1
            except ValueError:
                valid = False
            if not valid:
                raise ValueError(f"--ema_rate {self.ema_rate}: {rate!r} is not a number in [0, 1)")

    @property
    def ema_rates(self) -> tuple[str, ...]:
        """The rates as typed: they name the files."""
        return tuple(rate.strip() for rate in self.ema_rate.split(","))


@dataclass(frozen=True)
class LaunchConfig:
    """How training is started (scripts/video_train.py); travels nowhere."""

    config: str = option(
        "",
        "start from the options in this config.json of a run, all but --resume_id and "
        "--resume_checkpoint; options on the command line win",
    )
    dry_run: bool = option(False, "print the resolved options as JSON and stop", flag=True)
    collective_timeout: float = option(
        2.0, "hours that ranks wait for each other, before they give up and end the run"
    )

    def __post_init__(self) -> None:
        if not 0 < self.collective_timeout <= 10_000:
            raise ValueError(
                f"--collective_timeout {self.collective_timeout}: must be above 0, at most 10000"
            )
