"""All ranks at work on the same videos, where there are fewer videos than ranks to make them."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import numpy as np

from improved_diffusion import dist_util
from improved_diffusion.sampling.plan import Job, VideoPlan
from improved_diffusion.sampling.video_sampler import Trajectory, VideoSampler


class RankTeam:
    """A sampler whose rounds are shared out among all ranks.

    Rank 0 has the videos and calls `sample`, in a `with` block; meanwhile the others `follow`. What
    goes between ranks are the observed frames of trajectories, and the sampled ones.
    """

    def __init__(self, own: VideoSampler) -> None:
        self.own = own

    @property
    def round_size(self) -> int:
        """Trajectories that run at once, on all ranks together."""
        return self.own.batch_size * dist_util.world_size()

    def sample(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        """As `VideoSampler.sample`."""
        ranks = dist_util.world_size()
        bounds = [-(-len(trajectories) * rank // ranks) for rank in range(ranks + 1)]
        shares = [trajectories[bounds[rank] : bounds[rank + 1]] for rank in range(ranks)]
        return [frames for part in self._sample_share(shares) or () for frames in part]

    def follow(self) -> None:
        """Sample this rank's share of each round, until rank 0 leaves its `with` block."""
        while self._sample_share(None) is not None:
            pass

    def _sample_share(
        self, shares: Sequence[Sequence[Trajectory]] | None
    ) -> list[list[np.ndarray]] | None:
        """What all ranks have sampled of rank 0's `shares`; None where it says that all is done."""
        shares = dist_util.broadcast_object(shares, what="the next round of sampling")
        if shares is None:
            return None
        sampled = self.own.sample(shares[dist_util.rank()])
        return dist_util.gather_objects(sampled, what="the frames of a round of sampling")

    def __enter__(self) -> RankTeam:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:  # else the whole run ends
            self._sample_share(None)


def split_jobs(jobs: list[Job], plan: VideoPlan) -> tuple[list[Job], list[Job]]:
    """(videos that all ranks make together, those that this rank makes by itself).

    Every rank gets as many of its own. What is left over is shared, if the strategy has steps that
    run side by side; else the first ranks make one more.
    """
    ranks, rank = dist_util.world_size(), dist_util.rank()
    left_over = len(jobs) % ranks if plan.is_side_by_side else 0
    return jobs[:left_over], jobs[left_over + rank :: ranks]
