"""Coherence of walks through places: can one step follow the other, does a place look the same again?

Nobody knows where a generated walk leads, so no true frame can stand beside it. A pose network
(pose_network.py), which has learned from true videos how two views of a walk differ, is asked instead. It
errs, and on true videos too: so their value by the same network stands beside each number.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from improved_diffusion.config import option
from improved_diffusion.data import paths
from improved_diffusion.data.metric_weights import sha256
from improved_diffusion.data.walks import far_apart
from improved_diffusion.evaluation.metrics import Lpips, SampleMetric, TrueVideo

if TYPE_CHECKING:
    from improved_diffusion.evaluation.pose_network import PoseJudge


@dataclass(frozen=True)
class PoseOptions:
    """The network that tells places apart."""

    pose_weights: str | None = option(
        None,
        "pose network of the place metrics, from scripts/train_pose_network.py (default: the one for "
        "colour_mazes and maze_laps that comes with the repository)",
    )


class PlaceMetric(SampleMetric):
    """A number of the samples and the same of the true videos. Needs a data set that the network knows."""

    columns = ("samples", "true videos")
    reference_columns = ("true videos",)
    Options = PoseOptions

    def settings(self) -> dict[str, Any]:
        self._judge()
        return {"pose_weights_sha256": sha256(self._weights)}

    def compute(self, sample: np.ndarray, truth: TrueVideo) -> np.ndarray:
        judge = self._judge()
        judge.require_dataset(truth.dataset)
        both = (sample, truth.frames)
        return np.array([self.value(judge, frames, truth.predicted) for frames in both])

    @abstractmethod
    def value(self, judge: PoseJudge, frames: np.ndarray, predicted: np.ndarray) -> float:
        """The number of frames uint8 [T, 3, H, W], of which those `predicted` count."""

    @property
    def _weights(self) -> Path:
        return Path(self.options.pose_weights or paths.POSE_NETWORK)

    def _judge(self) -> PoseJudge:
        from improved_diffusion.evaluation.pose_network import load_pose_network

        return load_pose_network(self._weights, self.device)


class PlaceJumps(PlaceMetric):
    """Share of the steps to a sampled frame that no walker of the true videos could make.

    Those whose views do not overlap, or that are twice as long, or turn twice as much, as any true step.
    """

    unit = "%"
    higher_is_better = False

    def value(self, judge: PoseJudge, frames: np.ndarray, predicted: np.ndarray) -> float:
        after = predicted[predicted > 0]
        if not len(after):
            return np.nan
        return 100 * float(judge.is_jump(judge.compare(frames, after - 1, after)).mean())


class PlaceReturns(PlaceMetric):
    """Share of the sampled frames that show a place and heading of more than 20 frames before.

    Neither more nor fewer are better: that of the true videos is right.
    """

    unit = "%"

    def value(self, judge: PoseJudge, frames: np.ndarray, predicted: np.ndarray) -> float:
        later, _ = returns(judge, frames, predicted)
        return 100 * len(later) / len(predicted)


class PlaceLpips(PlaceMetric):
    """LPIPS between these frames and the earlier one whose pose is most surely the same.

    nan for a video that never returns.
    """

    higher_is_better = False

    @dataclass(frozen=True)
    class Options(PoseOptions, Lpips.Options):
        """Both networks."""

    def settings(self) -> dict[str, Any]:
        return super().settings() | self._lpips().settings()

    def value(self, judge: PoseJudge, frames: np.ndarray, predicted: np.ndarray) -> float:
        later, earlier = returns(judge, frames, predicted)
        if not len(later):
            return np.nan
        return float(self._lpips().compute(frames[later], frames[earlier]).mean())

    def _lpips(self) -> Lpips:
        own = Lpips.Options(self.options.lpips_weights, self.options.lpips_precision)
        return Lpips(own, device=self.device)


def returns(
    judge: PoseJudge, frames: np.ndarray, predicted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which predicted frames show a place again, and which earlier frame shows it most surely.

    Both int64 [n], indices of frames uint8 [T, 3, H, W].
    """
    score, earlier = best_matches(judge, frames, predicted)
    return predicted[score > 0], earlier[score > 0]


def best_matches(
    judge: PoseJudge, frames: np.ndarray, predicted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How surely each predicted frame shows a place again (above 0: it does), and where it was before.

    float [n], -inf for the first frames, and int64 [n], indices of frames uint8 [T, 3, H, W].
    """
    allowed = far_apart(len(frames))[predicted]
    rows, earlier = np.nonzero(allowed)
    scores = np.full(allowed.shape, -np.inf)
    scores[rows, earlier] = judge.compare(frames, predicted[rows], earlier).same
    return scores.max(axis=1), scores.argmax(axis=1)
