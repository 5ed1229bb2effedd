"""What is scored: videos and samples of an evaluation directory, and the truth beside them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from improved_diffusion.data import paths
from improved_diffusion.data.video_datasets import VideoTestSet, choose_videos, get_test_dataset
from improved_diffusion.evaluation.options import EvalConfig
from improved_diffusion.sampling.results import EvalDir, load_video
from improved_diffusion.sampling.trained_model import stored_dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scoring:
    """What is scored: which videos and samples, against what, and which frames count."""

    eval_dir: EvalDir
    truth: VideoTestSet
    partition: str
    videos: list[int]
    samples: list[int]
    T: int
    length: int  # the frames that have truth are the first so many
    predicted: np.ndarray  # those of them that were sampled

    @classmethod
    def resolve(cls, config: EvalConfig, folder: Path) -> Scoring:
        """Fill in from the evaluation directory what the options leave open.

        Raises ValueError or FileNotFoundError for a user's mistake.
        """
        eval_dir = EvalDir(folder)
        found = eval_dir.samples()
        stored = eval_dir.sample_config()
        if stored.get("obs_video"):
            raise ValueError(
                f"{eval_dir.path}: these samples continue {stored['obs_video']}, a clip of one's "
                "own: there is no truth to score them against"
            )
        T = int(_setting(config, eval_dir, "T"))
        partition = _setting(config, eval_dir, "dataset_partition")
        spec = stored_dataset(_setting(config, eval_dir, "dataset"), eval_dir.model_config())
        truth = get_test_dataset(spec, T=T, partition=partition, cache_dir=config.cache_dir)
        videos = sorted(found)
        if videos[-1] >= len(truth):
            raise ValueError(
                f"{eval_dir.path}: video {videos[-1]} is not in {truth.name} ({len(truth)} videos)"
            )
        length = min([T, *(truth.length(video) for video in videos)])
        if length < T:
            logger.info("scoring the %d of %d frames that have truth", length, T)
        predicted = np.setdiff1d(np.arange(length), _observed(config, eval_dir))
        if not len(predicted):
            raise ValueError(
                f"{eval_dir.path}: all {length} frames with truth are observed: nothing to score"
            )
        samples = _common_samples(eval_dir.path, found, config.num_samples)
        return cls(eval_dir, truth, partition, videos, samples, T, length, predicted)

    @property
    def path(self) -> Path:
        """The pickle of this table."""
        return paths.metrics_path(self.eval_dir.path, len(self.videos), len(self.samples), self.T)

    def info(self) -> dict[str, Any]:
        """What the numbers of this table belong to, as the .json tells it."""
        return {
            "dataset": self.truth.name,
            "dataset_partition": self.partition,
            "T": self.T,
            "frames_with_truth": self.length,
            "videos": self.videos,
            "samples": self.samples,
            "frames": self.predicted.tolist(),
        }

    def read_truth(self, video: int) -> np.ndarray:
        """The true frames, uint8 [length, 3, H, W]."""
        return self.truth.read(video, range(self.length))

    def read_sample(self, video: int, sample: int) -> np.ndarray:
        """The sampled frames, uint8 [length, 3, H, W]. Raises ValueError where they do not fit."""
        path = paths.sample_path(self.eval_dir.path, video, sample)
        frames = load_video(path)
        size = self.truth.files.spec.image_size
        if len(frames) < self.T or frames.shape[2:] != (size, size):
            raise ValueError(
                f"{path} holds {len(frames)} frames of {frames.shape[2]}x{frames.shape[3]}, not "
                f"{self.T} of {size}x{size}: check --T and --dataset, or sample it again"
            )
        return np.array(frames[: self.length])

    def floor_videos(self) -> tuple[VideoTestSet, list[int]]:
        """True videos of the other partition to compare with, as many as are scored if there are.

        Raises ValueError for fewer than two.
        """
        other = "train" if self.partition == "test" else "test"
        files = self.truth.files
        videos = get_test_dataset(files.spec, T=self.T, partition=other, cache_dir=files.cache_dir)
        order = choose_videos(len(videos), indices=None, subset_size=len(videos))
        chosen: list[int] = []
        for video in order:
            if len(chosen) < len(self.videos) and videos.length(video) >= self.length:
                chosen.append(video)
        if len(chosen) < 2:
            raise ValueError(
                f"--floor: {self.eval_dir.path} and the {other} partition of {self.truth.name} share "
                f"no 2 videos of {self.length} frames: leave it out"
            )
        return videos, chosen


def _setting(config: EvalConfig, eval_dir: EvalDir, name: str) -> Any:
    given = getattr(config, name)
    stored = eval_dir.sample_config()
    if given is None and name not in stored:
        raise ValueError(f"{eval_dir.sample_config_path} does not say {name}: give --{name}")
    return stored[name] if given is None else given


def _observed(config: EvalConfig, eval_dir: EvalDir) -> list[int]:
    """The frames that were not sampled; --obs_length replaces those at the start."""
    stored = eval_dir.sample_config()
    if config.obs_length is not None:
        goals = [i for i in stored.get("observed_frames", []) if i >= stored.get("obs_length", 0)]
        return [*range(config.obs_length), *goals]
    if "observed_frames" not in stored:
        raise ValueError(
            f"{eval_dir.sample_config_path} does not say obs_length: give --obs_length"
        )
    return stored["observed_frames"]


def _common_samples(folder: Path, found: dict[int, list[int]], number: int | None) -> list[int]:
    """The first `number` sample indices that every video has (None: all of those)."""
    common = sorted(set.intersection(*map(set, found.values())))
    if len(common) < (number or 1):
        fewest = min(found, key=lambda video: len(found[video]))
        raise ValueError(
            f"{folder}: the videos share the samples {common} (video {fewest} has {found[fewest]}), "
            f"not the {number or 1} asked for: sample the others or give a smaller --num_samples"
        )
    return common[:number]
