"""The options of the demonstration, the study and the benchmark. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
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
    FEATURES,
    FRAME_METRICS,
    METRICS,
    SAMPLERS,
    SPACINGS,
    STRATEGIES,
    VIDEO_METRICS,
    JoinedRegistry,
)

# Those that give one number of a sample: what a comparison of ways to train asks for.
SINGLE_METRICS = JoinedRegistry("modes", FRAME_METRICS, VIDEO_METRICS)
PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """The studies that come with the repository."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


@dataclass(frozen=True)
class DemoConfig:
    """The demonstration (demo.py)."""

    minutes: float = option(5.0, "minutes of training (0: only show the network for mazes)")
    device: str = option("", "torch device of sampling (default: cuda if there is one)")
    seed: int = option(0, "seed of everything random")
    maze_checkpoint: str = option(
        "", "network that continues laps of mazes (default: the one that comes with the repository)"
    )
    maze_indices: tuple[int, ...] = option(
        (26,),
        "test videos of maze_laps to show it on; the default is the one that --subset_size 1 names",
        nargs="+",
        item_type=int,
    )
    maze_T: int = option(240, "length of these videos, of which 60 frames are observed")
    maze_timesteps: int = option(6, "timesteps of sampling them")
    balls_checkpoint: str = option(
        "", "network for bouncy_balls to compare with (default: as for mazes)"
    )
    num_videos: int = option(8, "test videos of bouncy_balls to sample")
    T: int = option(16, "length of these videos")
    obs_length: int = option(8, "frames observed at their start")
    timesteps: int = option(6, "timesteps of sampling them")
    queries: int = option(12, "held-out inference steps to measure errors on")
    warm_up_updates: int = option(20, "updates that measure the speed of this machine")

    def __post_init__(self) -> None:
        check_positive(self, "num_videos", "obs_length", "timesteps", "queries", "warm_up_updates")
        check_positive(self, "maze_timesteps")
        if not self.minutes >= 0:
            raise ValueError(f"--minutes {self.minutes}: must not be negative")


@dataclass(frozen=True)
class StudyConfig:
    """The study of inference strategies (study.py); options left out are its file's."""

    preset: str = field(
        metadata={
            "help": f"{', '.join(preset_names())}, or a FILE like "
            "improved_diffusion/study/presets/*.json",
            "positional": True,
        }
    )
    dataset: str = option("", "data set that the network was trained on")
    checkpoint: str = option(
        "", "checkpoint file (default: the one in checkpoints/pretrained/<dataset>)"
    )
    out: str = option("", "folder of all results (default: results/study/<name of the study>)")
    obs_length: int = option(-1, "frames observed at the start (-1: the study's)")
    T: int = option(-1, "length of the videos (-1: the study's)")
    max_frames: int = option(-1, "frames given to the network at once (-1: the study's)")
    step_size: int = option(-1, "frames to sample in each inference step (-1: the study's)")
    num_videos: int = option(-1, "test videos to sample (-1: the study's)")
    num_samples: int = option(-1, "samples of each (-1: the study's)")
    strategies: tuple[str, ...] = option(
        (),
        'strategies to compare, each with options of its own: autoreg "recall-autoreg --recall_recent 1"',
        nargs="+",
        item_type=str,
    )
    sampler: str = option("", "way of sampling, of", choices=SAMPLERS)
    timesteps: int = option(-1, "timesteps of sampling (-1: the study's)")
    spacing: str = option("", "which timesteps these are, of", choices=SPACINGS)
    bound_videos: int = option(
        -1, "test videos to estimate the bound on the likelihood of (0: none, -1: the study's)"
    )
    modes: tuple[str, ...] = option(
        (),
        "metrics to compute, of",
        choices=METRICS,
        nargs="+",
        item_type=str,
    )
    features: str = option("i3d", "what FVD and KVD are computed from", choices=FEATURES)
    metric_options: Any = owned_options(METRICS)
    feature_options: Any = owned_options(FEATURES)
    device: str = option("", "torch device (default: cuda if there is one)")
    seed: int = option(0, "seed of the noise")

    def __post_init__(self) -> None:
        check_choices(self)
        fill_options(self)


@dataclass(frozen=True)
class BenchmarkConfig:
    """One run of the benchmark (benchmark.py)."""

    sizes: str = option(
        "mazes_cwvae,minerl,carla_no_traffic",
        "training commands whose sizes to measure; also small (32x32, 32 channels)",
        nargs="+",
    )
    measure: str = option(
        "forward,train,sampling,data,masks", "what to measure, of these", nargs="+"
    )
    batch_size: int | None = option(None, "videos in one call (default: 1; 8 for small)")
    max_frames: int | None = option(None, "frames of a video in one call (default: the size's)")
    image_size: int | None = option(None, "height and width (default: the size's)")
    num_channels: int | None = option(None, "channels of the outermost level (default: the size's)")
    precision: str = option("fp32", "arithmetic of the network, of fp32, bf16", nargs="+")
    use_checkpoint: bool = option(
        False, "recompute activations in the backward pass to save memory", flag=True
    )
    compile: bool = option(False, COMPILE_HELP, flag=True)
    estimate: bool = option(
        False,
        "measure nothing: count what a forward call and an update would cost on an A100 and an H100",
        flag=True,
    )
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


@dataclass(frozen=True)
class ComparisonConfig:
    """The comparison of ways to train (training_comparison.py)."""

    runs: tuple[str, ...] = option(
        (),
        'what to compare, each "name: options of video_train.py", --config FILE among them',
        nargs="+",
        item_type=str,
        commas=False,
    )
    common: str = option("", "options of video_train.py that all runs share")
    updates: int = option(1500, "updates of each run")
    seconds: float = option(
        0.0, "end each run at the first measurement after so many seconds of training (0: never)"
    )
    every: int = option(250, "updates between measurements")
    queries: int = option(32, "inference steps on test videos to measure on")
    average: bool = option(
        False, "measure the first moving average of the weights, not the weights", flag=True
    )
    num_videos: int = option(
        0, "test videos to sample in the end, for scores and drift (0: sample nothing)"
    )
    strategies: tuple[str, ...] = option(
        ("autoreg", "hierarchy-2"),
        "inference strategies to sample with, of",
        choices=STRATEGIES,
        nargs="+",
        item_type=str,
    )
    timesteps: int = option(20, "timesteps of DPM-Solver++ 2M, which samples")
    modes: tuple[str, ...] = option(
        ("psnr", "fvd"),
        "metrics to compute of the samples, of",
        choices=SINGLE_METRICS,
        nargs="+",
        item_type=str,
    )
    out: str = option("results/comparison", "folder of all results; runs are named after it, too")
    device: str = option("", "torch device of measuring and sampling (default: cuda if any)")
    seed: int = option(0, "seed of the queries and their noise, and of samples")
    mask_shares: tuple[str, ...] = option(
        (),
        "print what the items of each mask distribution are like at these sizes, T x max_frames such "
        "as 300x20, and train nothing",
        nargs="+",
        item_type=str,
    )
    draws: int = option(20000, "items of each distribution to draw for --mask_shares")

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "updates", "every", "queries", "timesteps", "draws")
        if self.num_videos < 0 or not self.seconds >= 0:
            raise ValueError(
                f"--num_videos {self.num_videos}, --seconds {self.seconds}: must not be negative"
            )


@dataclass(frozen=True)
class SolverConfig:
    """The comparison of deterministic samplers at few calls (solver_errors.py)."""

    samplers: tuple[str, ...] = option(
        ("ddim", "dpmpp2m", "heun", "dpmpp3m", "unipc", "ipndm4"),
        "deterministic samplers to compare, of",
        choices=SAMPLERS,
        nargs="+",
        item_type=str,
    )
    spacings: tuple[str, ...] = option(
        ("time", "logsnr", "rho7"),
        "spacings to compare, of",
        choices=SPACINGS,
        nargs="+",
        item_type=str,
    )
    calls: tuple[int, ...] = option(
        (4, 6, 8, 10, 20), "network calls of a trajectory", nargs="+", item_type=int
    )
    reference_calls: int = option(1000, "network calls of the solution that errors are taken from")

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.calls, default=0) < 2:
            raise ValueError(f"--calls {self.calls}: give numbers from 2")


@dataclass(frozen=True)
class GuidanceSweepConfig:
    """The sweep over guidance (guidance_sweep.py)."""

    weights: tuple[float, ...] = option(
        (1.0, 1.25, 1.5, 2.0, 3.0), "values of --guidance", nargs="+", item_type=float
    )
    against: tuple[str, ...] = option(
        ("nothing", "recent", "subset"),
        "values of --guidance_against, checkpoint files among them",
        nargs="+",
        item_type=str,
        commas=False,
    )
    guidance_interval: tuple[float, ...] | None = option(
        None,
        "guide between these two noise levels sigma only (default: at all)",
        nargs="+",
        item_type=float,
    )
