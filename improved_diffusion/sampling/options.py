"""The options of sampling and of the search for optimal schedules. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from improved_diffusion.config import (
    COMPILE_HELP,
    check_choices,
    check_positive,
    fill_options,
    option,
    owned_options,
)
from improved_diffusion.registry import GUIDANCE_REFERENCES, SAMPLERS, SPACINGS, STRATEGIES

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
    spacing: str = option(
        "time", "which timesteps --timestep_respacing keeps, of", choices=SPACINGS
    )
    guidance: float = option(
        1.0, "lead predictions away from weaker ones: so many times as far from them (1: off)"
    )
    guidance_against: str = option(
        "nothing",
        "the weaker prediction: a checkpoint FILE's, or this network's that observes",
        names_of=GUIDANCE_REFERENCES,
    )
    guidance_interval: tuple[float, ...] | None = option(
        None,
        "guide between these two noise levels sigma only (default: at all)",
        nargs="+",
        item_type=float,
    )
    precision: str = option(
        "fp32",
        "arithmetic of the network; auto: bf16 where the device has instructions for it",
        choices=("fp32", "bf16", "auto"),
    )
    compile: bool = option(False, COMPILE_HELP)
    cuda_graphs: bool = option(
        False,
        "on a GPU: record the network call of each shape once and replay it, for small batches, whose "
        "kernels take no longer than their launches",
    )
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
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: must not be negative")
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
        if self.spacing != "time" and not self.timestep_respacing:
            raise ValueError(
                f"--spacing {self.spacing} chooses timesteps: say how many with --timestep_respacing"
            )
        self._check_guidance()

    def _check_guidance(self) -> None:
        low, *high = self.guidance_interval or (0.0, float("inf"))
        if not 0 <= self.guidance < float("inf"):
            raise ValueError(f"--guidance {self.guidance:g}: must not be negative")
        if len(high) != 1 or not 0 <= low < high[0]:
            shown = " ".join(f"{level:g}" for level in (low, *high))
            raise ValueError(f"--guidance_interval {shown}: give two noise levels, the lower first")
        if not self.is_guided and (
            self.guidance_against != "nothing" or self.guidance_interval is not None
        ):
            raise ValueError(
                "--guidance_against and --guidance_interval do nothing without --guidance W"
            )

    @property
    def is_guided(self) -> bool:
        """Whether guidance changes anything."""
        return self.guidance != 1

    @property
    def reference_checkpoint(self) -> str:
        """The checkpoint file that guidance leads away from; empty where it is no file."""
        named = self.guidance_against in GUIDANCE_REFERENCES
        return self.guidance_against if self.is_guided and not named else ""

    @property
    def sampler_name(self) -> str:
        """The registered name of the sampler that the options choose."""
        return self.sampler or ("ddim" if self.use_ddim else "ddpm")

    @property
    def sampler_suffix(self) -> str:
        """What the options that change the sampler add to the checkpoint's folder under results/."""
        name = "" if self.sampler_name == "ddpm" else f"_{self.sampler_name}"
        eta = f"_eta{self.eta:g}" if self.eta else ""
        respacing = f"_respace{self.timestep_respacing}" if self.timestep_respacing else ""
        spacing = f"_{self.spacing}" if self.spacing != "time" else ""
        return name + eta + respacing + spacing

    def guidance_suffix(self, reference: str = "") -> str:
        """What guidance adds to it. reference: what a FILE is called there."""
        if not self.is_guided:
            return ""
        parts = f"{self.guidance:g}", reference or self.guidance_against
        return "_g" + "-".join([*parts, *(f"{level:g}" for level in self.guidance_interval or ())])


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
    spacing: str = option("time", _NAMES_THE_FOLDER, choices=SPACINGS)
    guidance: float = option(1.0, _NAMES_THE_FOLDER)
    guidance_against: str = option("nothing", _NAMES_THE_FOLDER, names_of=GUIDANCE_REFERENCES)
    guidance_interval: tuple[float, ...] | None = option(
        None, _NAMES_THE_FOLDER, nargs="+", item_type=float
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
