"""The options of scores, bounds and pictures. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from improved_diffusion.config import (
    check_choices,
    check_known,
    check_positive,
    fill_options,
    option,
    owned_options,
    required_list,
)
from improved_diffusion.registry import FEATURES, METRICS, VIDEO_METRICS
from improved_diffusion.sampling.options import SampleConfig


def as_words(groups: Iterable[Any]) -> tuple[str, ...]:
    """Options that differ from their defaults, as a user types them."""
    words: list[str] = []
    for group in groups:
        for item in fields(group):
            value = getattr(group, item.name)
            if value != item.default:
                values = value if isinstance(value, tuple) else (value,)
                words += [f"--{item.name}", *map(str, values)]
    return tuple(words)


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation (evaluate.py)."""

    eval_dir: tuple[str, ...] = required_list(
        "evaluation directory: the folder that holds samples/ (required); several are "
        "compared in one table"
    )
    num_samples: int | None = option(
        None, "samples per video (default: as many as every video has)"
    )
    modes: tuple[str, ...] = option(
        ("psnr", "ssim", "lpips"),
        "metrics to compute, of",
        choices=METRICS,
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
    features: str = option(
        "i3d",
        "what FVD, KVD and other distances are computed from; a file's name is one of one's own",
        names_of=FEATURES,
    )
    metric_options: Any = owned_options(METRICS)
    feature_options: Any = owned_options(FEATURES)
    floor: bool = option(
        False,
        "also distances of real videos against real ones, those of the other partition (of the same "
        "n), as they are and with the observed frames shared, as samples share them",
        flag=True,
    )
    allow_differences: bool = option(
        False, "compare tables of different n, T, frames or settings all the same", flag=True
    )
    log_to_wandb: bool = option(
        False, "log the tables and some videos to the wandb run that trained the network", flag=True
    )

    def __post_init__(self) -> None:
        check_choices(self)
        fill_options(self)
        if self.features not in FEATURES:
            self._take_feature_file(self.features)
        if self.dataset_partition is not None:
            check_known("dataset_partition", [self.dataset_partition], ("test", "train"))
        check_positive(self, "num_samples", "T", "batch_size")
        if self.floor and not any(mode in VIDEO_METRICS for mode in self.modes):
            raise ValueError(
                f"--floor goes with --modes {' or '.join(VIDEO_METRICS)}: add one of them"
            )

    def _take_feature_file(self, name: str) -> None:
        """`--features FILE` is the extractor "file" with that file. Raises ValueError for no file."""
        if not Path(name).is_file():
            raise ValueError(
                f"--features {name!r} is unknown: choose from {', '.join(FEATURES)}, or name a "
                "TorchScript or torch.export file that is there"
            )
        chosen = FEATURES["file"].Options
        filled = (
            replace(options, feature_file=name) if isinstance(options, chosen) else options
            for options in self.feature_options
        )
        object.__setattr__(self, "features", "file")
        object.__setattr__(self, "feature_options", tuple(filled))


@dataclass(frozen=True)
class FvdConfig(EvalConfig):
    """The same evaluation with the metrics of whole videos as its default."""

    modes: tuple[str, ...] = option(
        ("fvd", "kvd"),
        "metrics to compute, of",
        choices=METRICS,
        nargs="+",
        item_type=str,
    )


@dataclass(frozen=True)
class NllConfig(SampleConfig):
    """Bounds on the likelihood (nll.py): the options of sampling that choose steps and videos."""

    batch_size: int = option(8, "timesteps in one network call, and videos per array task")
    timestep_respacing: str = option(
        "", "bound the chain of these timesteps only: an integer or ddim<int> (empty: as trained)"
    )
    stratified: bool = option(
        False,
        "estimate the bound from one timestep drawn from each of {0}, {1}, {2, 3}, {4 .. 7}, ...: "
        "unbiased, and 11 network calls for an inference step instead of 1000",
        flag=True,
    )


@dataclass(frozen=True)
class PoseConfig:
    """Training of the network that the metrics by place ask (pose_training.py)."""

    dataset: tuple[str, ...] = option(
        ("colour_mazes", "maze_laps"),
        "data sets of true videos with poses, one network for all",
        nargs="+",
        item_type=str,
    )
    out: str = option("pose_network.pt", "file to write")
    updates: int = option(2000, "updates (0: only test the network in --out)")
    batch_size: int = option(8, "videos in an update")
    lr: float = option(2e-3, "highest learning rate")
    seed: int = option(0, "seed of everything random")
    device: str = option("", "torch device (default: cuda if there is one)")

    def __post_init__(self) -> None:
        check_positive(self, "batch_size")
        if self.updates < 0:
            raise ValueError(f"--updates {self.updates}: must not be negative")


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
    out: str = option(
        "", "file of the grid, .gif or .mp4 (default: in videos/ of the first eval_dir)"
    )
    num_videos: int | None = option(None, "test videos to show, the first ones (default: all)")
    every: int = option(1, "show every n-th frame")
    width: int = option(128, "enlarge smaller frames by a whole factor up to about this width")
    fps: int = option(10, "frames per second")

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "num_videos", "every", "width", "fps")


@dataclass(frozen=True)
class ReportConfig:
    """The report of evaluation directories as one HTML file (report/)."""

    eval_dir: tuple[str, ...] = required_list(
        "evaluation directories, side by side in this order; differences are from the first one until "
        "another is chosen in the page (required)"
    )
    out: str = option("report.html", "HTML file to write")
    title: str = option("", "heading of the page (default: the data set)")
    num_videos: int | None = option(None, "test videos to show, the first ones (default: all)")
    num_samples: int | None = option(None, "samples of each video to show (default: all)")
    max_mb: float = option(25.0, "largest size of the file in 10^6 bytes; says what is left out")
    fps: int = option(10, "frames per second at the speed 1")
    allow_differences: bool = option(
        False, "show tables of different n, T, frames or settings all the same", flag=True
    )

    def __post_init__(self) -> None:
        check_positive(self, "num_videos", "num_samples", "fps")
        if not self.max_mb > 0:
            raise ValueError(f"--max_mb {self.max_mb}: must be above 0")
