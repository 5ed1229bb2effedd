"""The options of sampling and of the search for optimal schedules. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from improved_diffusion.config import (
    check_choices,
    check_positive,
    fill_options,
    option,
    owned_options,
)
from improved_diffusion.registry import SAMPLERS, STRATEGIES

DEFAULT_BATCH_SIZE = 8


@dataclass(frozen=True)
class SampleConfig:
    """One sampling run (video_sampling.py)."""

    checkpoint_path: str = field(
        metadata={"help": "model or EMA checkpoint file", "positional": True}
    )
    inference_mode: str = option(help="inference strategy (required), one of", choices=STRATEGIES)
    step_size: int = option(1, "frames to sample in each inference step")
    obs_length: int = option(36, "frames observed at the start of the video")
    max_frames: int | None = option(
        None, "frames given to the network at once (default: as trained)"
    )
    num_samples: int = option(1, "samples per test video")
    T: int | None = option(None, "length of the videos (default: the data set's)")
    subset_size: int | None = option(None, "use the first so many videos of one fixed permutation")
    batch_size: int | None = option(
        DEFAULT_BATCH_SIZE,
        "trajectories (inference steps, of several videos or of one) sampled at once, and videos per "
        "array task; auto: as many as fit the memory",
        word_for_none="auto",
    )
    eval_dir: str | None = option(
        None, "replaces results/<run>/<checkpoint> (default: from the path)"
    )
    use_ddim: bool = option(False, "sample with DDIM")
    sampler: str = option("", "way of sampling (default: ddpm)", choices=SAMPLERS)
    eta: float = option(0.0, "noise of DDIM: 0 none, 1 as much as DDPM's small variance")
    timestep_respacing: str = option(
        "", "timesteps to sample with: an integer or ddim<int> (empty: as trained)"
    )
    precision: str = option(
        "fp32",
        "arithmetic of the network; auto: bf16 where the device has instructions for it",
        choices=("fp32", "bf16", "auto"),
    )
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
    strategy_options: Any = owned_options(STRATEGIES, chosen_by="inference_mode")
    status: bool = option(False, "print what is missing, sample nothing", flag=True)
    just_visualise: bool = option(
        False, "draw the schedule to a PNG file, sample nothing", flag=True
    )
    seed: int = option(0, "seed of the noise")

    def __post_init__(self) -> None:
        check_choices(self)
        fill_options(self)
        check_positive(self, "step_size", "num_samples", "batch_size", "T", "max_frames")
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
        if not 0 <= self.eta <= 1:
            raise ValueError(f"--eta {self.eta}: must be from 0 to 1")
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


_NAMES_THE_FOLDER = (
    "as the samples will be made that --optimal of video_sample.py makes; the search only takes from "
    "it the name of the folder in which they will look for the schedule"
)


@dataclass(frozen=True)
class SearchedConfig(SampleConfig):
    """The sampling run that an optimal schedule is searched for (optimal_schedule.py)."""

    use_ddim: bool = option(False, _NAMES_THE_FOLDER)
    sampler: str = option("", _NAMES_THE_FOLDER, choices=SAMPLERS)
    eta: float = option(0.0, _NAMES_THE_FOLDER)
    timestep_respacing: str = option("", _NAMES_THE_FOLDER)
    batch_size: int = option(
        DEFAULT_BATCH_SIZE, "pairs of a video and a timestep in one network call"
    )
    cache_dir: str | None = option(
        None, "copy training videos here on first use, and read them here"
    )


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
