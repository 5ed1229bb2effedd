"""All options of all commands: one frozen dataclass per group, each field with its default and help.

No torch here, so that `--help` is quick. `script_util` turns these into flags and back; the code
that consumes an option reads it from the dataclass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any


def option(default: Any, help: str, *, choices: tuple[str, ...] | None = None, **extra: Any) -> Any:
    """A dataclass field that is also a command-line flag of the same name."""
    return field(default=default, metadata={"help": help, "choices": choices, **extra})


def required_list(help: str) -> Any:
    """A dataclass field that is also a required flag of one or more texts."""
    return field(metadata={"help": help, "nargs": "+", "item_type": str})


def check_choices(config: Any) -> None:
    """Raise ValueError for a field whose value is not among its choices."""
    for item in fields(config):
        choices = item.metadata.get("choices")
        if choices:
            check_known(item.name, [getattr(config, item.name)], choices)


def check_known(flag: str, values: Iterable[Any], known: Collection[Any]) -> None:
    """Raise ValueError for the first of a flag's values that is not among `known`."""
    for value in values:
        if value not in known:
            raise ValueError(f"--{flag} {value!r} is unknown: choose from {', '.join(known)}")


def check_positive(config: Any, *names: str) -> None:
    """Raise ValueError for the first of these fields that is given and below 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")


def defaults(*groups: type) -> dict[str, Any]:
    """{option: default} of option groups, in order; options without a default are left out."""
    items: list[Field[Any]] = [item for group in groups for item in fields(group)]
    return {item.name: item.default for item in items if item.default is not MISSING}


@dataclass(frozen=True)
class ModelConfig:
    """The network's size and form (unet.py)."""

    image_size: int | None = option(
        None, "height and width of the frames (default: the data set's)"
    )
    num_channels: int = option(128, "channels of the outermost level; a multiple of 32")
    num_res_blocks: int = option(2, "residual blocks per level")
    num_heads: int = option(4, "attention heads")
    num_heads_upsample: int = option(-1, "attention heads in the decoder (-1: num_heads)")
    attention_resolutions: str = option("16,8", "image sizes that get attention, comma list")
    dropout: float = option(0.0, "dropout rate inside residual blocks")
    learn_sigma: bool = option(False, "also predict the variance (6 output channels)")
    use_checkpoint: bool = option(
        False, "recompute activations in the backward pass to save memory"
    )
    use_scale_shift_norm: bool = option(
        True, "time embedding scales and shifts the norm (False: added)"
    )

    def __post_init__(self) -> None:
        if self.num_channels < 32 or self.num_channels % 32:
            raise ValueError(
                f"--num_channels {self.num_channels}: must be a multiple of 32 (GroupNorm 32)"
            )
        for flag in ("num_heads", "num_heads_upsample"):
            heads = getattr(self, flag)
            if heads != -1 and (heads < 1 or self.num_channels % heads):
                raise ValueError(
                    f"--{flag} {heads}: must divide --num_channels {self.num_channels}"
                )


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion process (gaussian_diffusion.py, respace.py)."""

    learn_sigma: bool = option(False, "also predict the variance (6 output channels)")
    sigma_small: bool = option(False, "fixed variance: the posterior's instead of beta")
    diffusion_steps: int = option(1000, "number of diffusion timesteps")
    noise_schedule: str = option(
        "linear", "shape of the noise schedule", choices=("linear", "cosine")
    )
    timestep_respacing: str = option(
        "",
        "timesteps to keep: an integer, a comma list of section counts, or ddim<int> (empty: all)",
    )
    use_kl: bool = option(False, "train on the variational bound instead of the MSE")
    predict_xstart: bool = option(
        False, "the network predicts the clean frames instead of the noise"
    )
    rescale_timesteps: bool = option(True, "the network sees timesteps scaled to 0..1000")
    rescale_learned_sigmas: bool = option(True, "with learn_sigma: weigh the bound by steps/1000")

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "diffusion_steps")
        if self.noise_schedule == "linear" and self.diffusion_steps <= 20:
            raise ValueError(
                f"--diffusion_steps {self.diffusion_steps} is too few for the linear noise schedule "
                "(more than 20 are needed): use --noise_schedule cosine or more steps"
            )


@dataclass(frozen=True)
class TrainConfig:
    """The training run (train_util.py)."""

    dataset: str = field(metadata={"help": "data set name, or a folder of videos (required)"})
    T: int = option(-1, "frames of a training video, a random window of it (-1: the data set's)")
    batch_size: int = option(1, "videos per rank and step")
    microbatch: int = option(-1, "videos per forward and backward pass (-1: batch_size)")
    max_frames: int = option(20, "frames given to the network at once (K)")
    num_workers: int = option(-1, "data loading processes per rank (-1: cores - 1)")
    lr: float = option(1e-4, "learning rate of AdamW")
    weight_decay: float = option(0.0, "weight decay of AdamW")
    lr_anneal_steps: int = option(
        0, "anneal the rate linearly to 0 over so many steps, then stop (0: never)"
    )
    max_steps: int = option(0, "stop after so many steps, without annealing (0: no limit)")
    lr_warmup_steps: int = option(0, "raise the rate linearly from 0 over so many steps first")
    grad_clip: float = option(
        0.0, "scale the gradient down where its norm is larger than this (0: never)"
    )
    schedule_sampler: str = option(
        "uniform", "how timesteps are drawn", choices=("uniform", "loss-second-moment")
    )
    ema_rate: str = option("0.9999", "rates of the moving averages of the weights, comma list")
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
        "", "start a new run from the weights of this model or EMA file"
    )
    use_fp16: bool = option(False, "float16 with loss scaling (CUDA only)")
    fp16_scale_growth: float = option(1e-3, "growth of log2(loss scale) per good step")
    precision: str = option("fp32", "arithmetic of the network", choices=("fp32", "bf16"))
    compile: bool = option(False, "compile the network with torch.compile (needs a C++ compiler)")
    pad_with_random_frames: bool = option(
        True, "fill up with frames of another video, which count in the loss (False: with nothing)"
    )
    seed: int = option(0, "seed of everything random")

    def __post_init__(self) -> None:
        check_choices(self)
        positive = ("batch_size", "max_frames", "log_interval", "save_interval")
        check_positive(self, *positive, "sample_steps", "valid_videos")
        not_negative = ("lr", "lr_anneal_steps", "lr_warmup_steps", "grad_clip", "max_steps")
        for name in (*not_negative, "sample_interval", "valid_interval", "keep_checkpoints"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} {getattr(self, name)}: must not be negative")
        if self.use_fp16 and self.precision == "bf16":
            raise ValueError("--use_fp16 True and --precision bf16 exclude each other: choose one")
        if self.resume_id and self.resume_checkpoint:
            raise ValueError("--resume_id and --resume_checkpoint exclude each other: choose one")
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


@dataclass(frozen=True)
class DataConfig:
    """How the videos of the data set are read (dataset_files.py); travels in the checkpoint."""

    frame_stride: int = option(1, "take one frame in so many")
    fps: float | None = option(
        None, "take so many frames per second of the files' time (default: all)"
    )
    test_fraction: float | None = option(
        None, "share of a folder's videos to test with (default: it has train/ and test/)"
    )
    skip_broken: bool = option(
        False, "leave out broken or too short training videos, named and counted (False: stop)"
    )
    cache_dir: str | None = option(None, "copy the files here on first use, and read them here")


@dataclass(frozen=True)
class SampleConfig:
    """One sampling run (video_sampling.py)."""

    checkpoint_path: str = field(
        metadata={"help": "model or EMA checkpoint file", "positional": True}
    )
    inference_mode: str = field(metadata={"help": "inference strategy (required), see README.md"})
    step_size: int = option(1, "frames to sample in each inference step")
    obs_length: int = option(36, "frames observed at the start of the video")
    max_frames: int | None = option(
        None, "frames given to the network at once (default: as trained)"
    )
    num_samples: int = option(1, "samples per test video")
    T: int | None = option(None, "length of the videos (default: the data set's)")
    subset_size: int | None = option(None, "use the first so many videos of one fixed permutation")
    batch_size: int = option(8, "videos sampled at once")
    eval_dir: str | None = option(
        None, "replaces results/<run>/<checkpoint> (default: from the path)"
    )
    use_ddim: bool = option(False, "sample with DDIM")
    sampler: str = option(
        "", "way of sampling (default: ddpm)", choices=("", "ddpm", "ddim", "dpmpp2m", "heun")
    )
    eta: float = option(0.0, "noise of DDIM: 0 none, 1 as much as DDPM's small variance")
    timestep_respacing: str = option(
        "", "timesteps to sample with: an integer or ddim<int> (empty: as trained)"
    )
    precision: str = option("fp32", "arithmetic of the network", choices=("fp32", "bf16"))
    compile: bool = option(False, "compile the network with torch.compile (needs a C++ compiler)")
    indices: tuple[int, ...] | None = option(
        None, "only these test videos", nargs="+", item_type=int
    )
    sample_idx: int | None = option(
        None, "make only the sample of this index (num_samples is ignored)"
    )
    optimal: bool = option(False, "use <evaluation directory>/optimal_schedule.pt", flag=True)
    device: str = option("", "torch device (default: cuda if there is one)")
    clip_denoised: bool = option(True, "clip predicted clean frames to the range of pixels")
    dataset_partition: str = option("test", "which videos to observe", choices=("test", "train"))
    override_dataset: str = option("", "sample another data set than the model was trained on")
    cache_dir: str | None = option(None, "copy test videos here on first use, and read them here")
    obs_video: str = option("", "observe the start of this video file instead of a test video")
    gibbs_sweeps: int = option(1, "gibbs: sweeps over the video after the first pass")
    distance: str = option(
        "lpips", "adaptive strategies: distance between frames", choices=("lpips", "l2")
    )
    status: bool = option(False, "print what is missing, sample nothing", flag=True)
    just_visualise: bool = option(
        False, "draw the schedule to a PNG file, sample nothing", flag=True
    )
    seed: int = option(0, "seed of the noise")

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "step_size", "num_samples", "batch_size")
        if self.subset_size is not None and self.indices is not None:
            raise ValueError("--subset_size and --indices exclude each other: choose one")
        if self.obs_video and (self.indices is not None or self.subset_size is not None):
            raise ValueError("--obs_video is one video: leave out --indices and --subset_size")
        if self.sample_idx is not None and self.sample_idx < 0:
            raise ValueError(f"--sample_idx {self.sample_idx}: must not be negative")
        if self.use_ddim and self.sampler not in ("", "ddim"):
            raise ValueError(
                f"--use_ddim True and --sampler {self.sampler} contradict each other: drop one"
            )
        if self.eta and self.sampler_name != "ddim":
            raise ValueError(
                f"--eta {self.eta} goes with --use_ddim True, not with {self.sampler_name}"
            )

    @property
    def sampler_name(self) -> str:
        """The registered name of the sampler that the options choose."""
        return self.sampler or ("ddim" if self.use_ddim else "ddpm")

    @property
    def sampler_suffix(self) -> str:
        """What the options that change the sampler add to the checkpoint's folder under results/."""
        name = "" if self.sampler_name == "ddpm" else f"_{self.sampler_name}"
        eta = f"_eta{self.eta:g}" if self.eta else ""
        return (
            name + eta + (f"_respace{self.timestep_respacing}" if self.timestep_respacing else "")
        )


@dataclass(frozen=True)
class NllConfig(SampleConfig):
    """Bounds on the likelihood (nll.py): the options of sampling that choose steps and videos."""

    batch_size: int = option(8, "timesteps in one network call, and videos per array task")
    timestep_respacing: str = option(
        "", "bound the chain of these timesteps only: an integer or ddim<int> (empty: as trained)"
    )


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation (evaluation.py)."""

    eval_dir: tuple[str, ...] = required_list(
        "evaluation directory: the folder that holds samples/ (required); several are "
        "compared in one table"
    )
    num_samples: int | None = option(
        None, "samples per video (default: as many as every video has)"
    )
    modes: tuple[str, ...] = option(
        ("psnr", "ssim", "lpips"),
        "metrics to compute, of psnr, ssim, lpips, fvd, kvd",
        nargs="+",
        item_type=str,
    )
    T: int | None = option(None, "length of the videos (default: as sampled)")
    obs_length: int | None = option(None, "observed frames at the start (default: as sampled)")
    dataset: str | None = option(None, "data set of the truth (default: as sampled)")
    dataset_partition: str | None = option(
        None, "its partition: test or train (default: as sampled)"
    )
    cache_dir: str | None = option(None, "copy true videos here on first use, and read them here")
    device: str = option("", "torch device (default: cuda if there is one)")
    batch_size: int = option(8, "videos per array task (SLURM_ARRAY_TASK_ID)")
    ssim_data_range: float = option(
        1.0, "range that SSIM assumes of frames in [0, 1]; 2 reproduces numbers of old scikit-image"
    )
    lpips_weights: str | None = option(
        None, "AlexNet file of LPIPS (default: what fetch_metric_weights.py stored)"
    )
    backend: str = option("torch", "what computes FVD and KVD", choices=("torch", "tensorflow"))
    resize: str = option(
        "legacy",
        "how FVD and KVD scale frames: TF1's way, as published numbers do, or today's",
        choices=("legacy", "half-pixel"),
    )
    i3d_weights: str | None = option(
        None, "I3D file, or TF-Hub folder (default: what fetch_metric_weights.py stored)"
    )
    floor: bool = option(
        False, "also FVD and KVD between true videos of both partitions, of the same n", flag=True
    )
    allow_differences: bool = option(
        False, "compare tables of different n, T, frames or settings all the same", flag=True
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.dataset_partition is not None:
            check_known("dataset_partition", [self.dataset_partition], ("test", "train"))
        check_positive(self, "num_samples", "T", "batch_size")
        if self.ssim_data_range <= 0:
            raise ValueError(f"--ssim_data_range {self.ssim_data_range}: must be above 0")


@dataclass(frozen=True)
class FvdConfig(EvalConfig):
    """The same evaluation with the metrics of whole videos as its default."""

    modes: tuple[str, ...] = option(
        ("fvd", "kvd"),
        "metrics to compute, of psnr, ssim, lpips, fvd, kvd",
        nargs="+",
        item_type=str,
    )


@dataclass(frozen=True)
class PlotConfig:
    """Pictures of metrics (plots.py)."""

    eval_dir: tuple[str, ...] = required_list(
        "evaluation directories with metrics or elbos/ in them, a curve each (required)"
    )
    out: str | None = option(None, "PNG file to write (default: metrics.png in the first of them)")
    allow_differences: bool = option(
        False, "draw tables of different n, T, frames or settings all the same", flag=True
    )


@dataclass(frozen=True)
class GifConfig:
    """Videos to look at (gallery.py)."""

    eval_dir: tuple[str, ...] = required_list(
        "evaluation directory: the folder that holds samples/; several stand side by "
        "side in a grid (required)"
    )
    format: str = option("gif", "file format", choices=("gif", "mp4"))
    add_gt: bool = option(False, "put the true video to the left of each sample", flag=True)
    grid: bool = option(
        False, "write one grid of all videos (rows) and samples (columns) instead", flag=True
    )
    out: str = option("", "file of the grid, .gif or .mp4 (default: in videos/ of the first eval_dir)")
    num_videos: int | None = option(None, "test videos to show, the first ones (default: all)")
    every: int = option(1, "show every n-th frame")
    width: int = option(128, "enlarge smaller frames by a whole factor up to about this width")
    fps: int = option(10, "frames per second")

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "num_videos", "every", "width", "fps")


@dataclass(frozen=True)
class DemoConfig:
    """The demonstration (demo.py)."""

    minutes: float = option(5.0, "minutes of training")
    device: str = option("", "torch device of sampling (default: cuda if there is one)")
    num_videos: int = option(8, "test videos to sample")
    seed: int = option(0, "seed of everything random")


@dataclass(frozen=True)
class StudyConfig:
    """The study of inference strategies (study.py); options left out are the data set's preset."""

    dataset: str = field(metadata={"help": "memory_mazes or bouncy_balls", "positional": True})
    checkpoint: str = option("", "checkpoint file (default: the preset's)")
    out: str = option("", "folder of all results (default: results/study/<dataset>)")
    obs_length: int = option(-1, "frames observed at the start (-1: the preset's)")
    T: int = option(-1, "length of the videos (-1: the preset's)")
    max_frames: int = option(-1, "frames given to the network at once (-1: the preset's)")
    step_size: int = option(-1, "frames to sample in each inference step (-1: the preset's)")
    num_videos: int = option(-1, "test videos to sample (-1: the preset's)")
    strategies: str = option(
        "autoreg,long-range,hierarchy-2,hierarchy-3,adaptive-hierarchy-2,independent",
        "strategies to compare, comma list",
    )
    solver_steps: int = option(20, "steps of DPM-Solver++ 2M, which samples with all strategies")
    ddpm_steps: int = option(100, "steps of DDPM, to compare with")
    ddpm_strategies: str = option(
        "autoreg,hierarchy-2", "strategies to sample with DDPM too, comma list (empty: none)"
    )
    elbo_videos: int = option(4, "test videos to bound the likelihood of (0: none)")
    elbo_respacing: str = option("100", "timesteps of the chain that is bounded (empty: all)")
    optimal: bool | None = option(
        None, "also search an optimal schedule, and sample with it (default: the preset's)"
    )
    modes: tuple[str, ...] = option(
        ("psnr", "ssim", "lpips", "fvd"),
        "metrics to compute, of psnr, ssim, lpips, fvd, kvd",
        nargs="+",
        item_type=str,
    )
    device: str = option("", "torch device (default: cuda if there is one)")
    seed: int = option(0, "seed of the noise")

    def __post_init__(self) -> None:
        check_positive(self, "solver_steps", "ddpm_steps")
        if self.elbo_videos < 0:
            raise ValueError(f"--elbo_videos {self.elbo_videos}: must not be negative")


@dataclass(frozen=True)
class ScheduleConfig:
    """The search for an optimal schedule (optimal_schedule.py), beyond the options of sampling."""

    num_videos: int = option(10, "training videos to average over")
    num_timesteps: int = option(
        10, "diffusion timesteps to average over, the middles of equal parts of the chain"
    )
    start_from: str = option(
        "nothing", "observed frames to start from in each step", choices=("nothing", "nearest")
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "num_videos", "num_timesteps")


@dataclass(frozen=True)
class BenchmarkConfig:
    """One run of the benchmark (benchmark.py)."""

    sizes: str = option(
        "mazes_cwvae,minerl,carla_no_traffic",
        "training commands whose sizes to measure, comma list; also small (32x32, 32 channels)",
    )
    measure: str = option(
        "forward,train,sampling,data,masks", "what to measure, comma list of these"
    )
    batch_size: int | None = option(None, "videos in one call (default: 1; 8 for small)")
    max_frames: int | None = option(None, "frames of a video in one call (default: the size's)")
    image_size: int | None = option(None, "height and width (default: the size's)")
    num_channels: int | None = option(
        None, "channels of the outermost level (default: the size's)"
    )
    precision: str = option("fp32", "arithmetic of the network, comma list of fp32, bf16")
    use_checkpoint: bool = option(
        False, "recompute activations in the backward pass to save memory", flag=True
    )
    compile: bool = option(False, "compile the network", flag=True)
    repeats: int = option(3, "timed calls of each kind; the table shows their median")
    device: str = option("", "torch device (default: cuda if there is one)")
    threads: int = option(0, "threads of the CPU (0: as torch chooses)")
    out: str = option("results/benchmark.json", "file for the figures")
    profile: str | None = option(
        None, "text file for a table of where the time of one forward call goes"
    )

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "max_frames", "repeats")
        if self.threads < 0:
            raise ValueError(f"--threads {self.threads}: must not be negative")
