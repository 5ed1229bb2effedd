"""What is scored: videos and samples of an evaluation directory, and the truth beside them."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from improved_diffusion.data import paths
from improved_diffusion.data.video_datasets import VideoTestSet, choose_videos, get_test_dataset
from improved_diffusion.evaluation.metrics import TrueVideo
from improved_diffusion.evaluation.options import EvalConfig
from improved_diffusion.sampling.results import EvalDir, content_digest, load_video
from improved_diffusion.sampling.trained_model import stored_dataset

logger = logging.getLogger(__name__)


class Clip:
    """A video on disk, known by its label.

    Args:
        label: what its results are called in the cache.
        read: returns its frames, uint8 [length, 3, H, W].
    """

    def __init__(self, label: str, read: Callable[[], np.ndarray]) -> None:
        self.label = label
        self._read = read
        self._digest = ""

    def frames(self) -> np.ndarray:
        """The frames, uint8 [length, 3, H, W], as the file holds them now."""
        frames = self._read()
        self._digest = content_digest(frames)
        return frames

    @property
    def digest(self) -> str:
        """The hash of the frames that were read last; they are read if none were yet."""
        if not self._digest:
            self.frames()
        return self._digest


@dataclass(frozen=True)
class ScoredSet:
    """What is scored: which videos and samples, against what, and which frames count."""

    eval_dir: EvalDir
    test_set: VideoTestSet
    partition: str
    videos: list[int]
    samples: list[int]
    T: int
    length: int  # the frames that have truth are the first so many
    predicted: np.ndarray  # those of them that were sampled

    @classmethod
    def resolve(cls, config: EvalConfig, folder: Path) -> ScoredSet:
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
        unchecked = [video for video in videos if eval_dir.truth(video) is None]
        if unchecked and not stored.get("observed_frames"):
            logger.warning(
                "%s does not say what %d of %d samples continue: it cannot be checked that they are "
                "scored against their own truth", eval_dir.path, len(unchecked), len(videos)
            )  # fmt: skip
        return cls(eval_dir, truth, partition, videos, samples, T, length, predicted)

    @property
    def path(self) -> Path:
        """The pickle of this table."""
        return paths.metrics_path(self.eval_dir.path, len(self.videos), len(self.samples), self.T)

    def info(self) -> dict[str, Any]:
        """What the numbers of this table belong to, as the .json tells it."""
        return {
            "dataset": self.test_set.name,
            "dataset_partition": self.partition,
            "T": self.T,
            "frames_with_truth": self.length,
            "videos": self.videos,
            "samples": self.samples,
            "frames": self.predicted.tolist(),
        }

    @functools.cached_property
    def truth_clips(self) -> list[Clip]:
        """The true videos, in the order of `videos`.

        Reading one raises ValueError where its samples continue another video.
        """
        return [
            Clip(f"truth_{video:04d}", functools.partial(self._read_truth, video))
            for video in self.videos
        ]

    @functools.cached_property
    def periods(self) -> list[int]:
        """`VideoTestSet.period` of each true video, in the order of `videos`."""
        return [self.test_set.period(video) for video in self.videos]

    def true_video(self, position: int, frames: np.ndarray) -> TrueVideo:
        """The video at `position` of the list, whose frames have been read."""
        return TrueVideo(frames, self.predicted, self.test_set.name, self.periods[position])

    @functools.cached_property
    def sample_clips(self) -> list[list[Clip]]:
        """The samples [videos][samples]; reading one raises ValueError where it does not fit."""
        return [
            [
                Clip(
                    paths.sample_name(video, sample),
                    functools.partial(self._read_sample, video, sample),
                )
                for sample in self.samples
            ]
            for video in self.videos
        ]

    @property
    def sample_sets(self) -> list[list[Clip]]:
        """The same [samples][videos]: the sets whose distance from the truth is measured."""
        return [list(clips) for clips in zip(*self.sample_clips, strict=True)]

    @functools.cached_property
    def floor_clips(self) -> list[Clip]:
        """True videos of the other partition to compare with, as many as are scored if there are.

        Raises ValueError for fewer than two.
        """
        return [
            Clip(f"floor_{video:04d}", functools.partial(others.read, video, range(self.length)))
            for others, video in self._floor_videos
        ]

    @functools.cached_property
    def shared_floor_clips(self) -> list[Clip]:
        """`floor_clips` that begin as samples do: with the observed frames of the true video beside.

        Empty where nothing is observed.
        """
        if len(self.predicted) == self.length:
            return []
        return [
            Clip(f"{clip.label}-shared", functools.partial(self._read_shared, clip, truth))
            for clip, truth in zip(self.floor_clips, self.truth_clips, strict=False)
        ]

    def _read_shared(self, clip: Clip, truth: Clip) -> np.ndarray:
        frames = truth.frames().copy()
        frames[self.predicted] = clip.frames()[self.predicted]
        return frames

    @functools.cached_property
    def _floor_videos(self) -> list[tuple[VideoTestSet, int]]:
        files = self.test_set.files
        others = get_test_dataset(
            files.spec, T=self.T, partition=self.other, cache_dir=files.cache_dir
        )
        order = choose_videos(len(others), indices=None, subset_size=len(others))
        long = (video for video in order if others.length(video) >= self.length)
        chosen = list(itertools.islice(long, len(self.videos)))
        if len(chosen) < 2:
            raise ValueError(
                f"--floor: {self.eval_dir.path} and the {self.other} partition of "
                f"{self.test_set.name} share no 2 videos of {self.length} frames: leave it out"
            )
        return [(others, video) for video in chosen]

    @property
    def other(self) -> str:
        """The partition that is not scored."""
        return "train" if self.partition == "test" else "test"

    def _read_truth(self, video: int) -> np.ndarray:
        """A true video's first `length` frames, once they are known to be those of its samples."""
        kept = self.eval_dir.truth(video)
        length = self.length if kept is None else max(self.length, kept["frames"])
        frames = self.test_set.read(video, range(min(length, self.test_set.length(video))))
        if kept is not None and content_digest(frames[: kept["frames"]]) != kept["sha256"]:
            raise self._other_truth(
                f"the samples of video {video} continue another video than that"
            )
        for sample in self.samples:
            self._check_observed(video, sample, frames[: self.length])
        return frames[: self.length]

    def _check_observed(self, video: int, sample: int, truth: np.ndarray) -> None:
        """See that a sample's observed frames are the true ones, up to one level of grey.

        The published code rounds them down.
        """
        observed = self.eval_dir.sample_config().get("observed_frames", [])
        observed = [frame for frame in observed if frame < self.length]
        frames = self._open_sample(video, sample)[observed].astype(int)
        if observed and np.abs(frames - truth[observed]).max() > 1:
            name = paths.sample_name(video, sample)
            raise self._other_truth(f"{name} observes other frames than video {video} has")

    def _other_truth(self, fault: str) -> ValueError:
        return ValueError(
            f"{self.eval_dir.path}: {fault} of {self.test_set.name}, partition {self.partition}: "
            "check --dataset and --dataset_partition; if the data set has changed, restore it"
        )

    def _read_sample(self, video: int, sample: int) -> np.ndarray:
        return np.array(self._open_sample(video, sample)[: self.length])

    def _open_sample(self, video: int, sample: int) -> np.ndarray:
        """A sample, memory-mapped; ValueError where it does not fit."""
        path = paths.sample_path(self.eval_dir.path, video, sample)
        frames = load_video(path)
        size = self.test_set.files.spec.image_size
        if len(frames) < self.T or frames.shape[2:] != (size, size):
            raise ValueError(
                f"{path} holds {len(frames)} frames of {frames.shape[2]}x{frames.shape[3]}, not "
                f"{self.T} of {size}x{size}: check --T and --dataset, or sample it again"
            )
        return frames


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
