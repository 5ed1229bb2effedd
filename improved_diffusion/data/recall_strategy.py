"""The strategy that recalls: which past moment looks like now, and what followed it. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from improved_diffusion.config import option
from improved_diffusion.data import frame_selection as select
from improved_diffusion.inference_utils import AdaptiveAutoregressive


class RecallAutoregressive(AdaptiveAutoregressive):
    """Observe the most recent frames, and those that followed the past moments most like now.

    A moment is some frames in a row, now the last such ones; see `frame_selection.similar_moments`. A moment
    that was recalled is followed, as time goes on, unless another looks much more like now: sampled frames
    are a little late or early, and what is recalled by their looks alone drifts away with them. With too
    little past it observes what autoreg does.
    """

    @dataclass(frozen=True)
    class Options(AdaptiveAutoregressive.Options):
        """Which moments are recalled, and how many places they get."""

        recall_recent: int = option(2, "recall-autoreg: most recent frames to observe")
        recall_window: int = option(2, "recall-autoreg: frames of a moment")
        recall_gap: int = option(
            20, "recall-autoreg: frames between moments, and between the last one and now"
        )
        recall_moments: int = option(1, "recall-autoreg: moments that share the other places")
        recall_follow: float = option(
            0.5,
            "recall-autoreg: factor on the distance of the moment that goes on from the one recalled "
            "last, which is kept unless another is that much nearer; 1: it counts like any other",
        )

        recall_from: str = option(
            "all",
            "recall-autoreg: all moments, or only those that observed frames follow, which are real: "
            "what was sampled wrong is not recalled, and what was never observed cannot be",
            choices=("all", "observed"),
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            for item in fields(self):
                value = getattr(self, item.name)
                if item.type == "int" and value < 1:
                    raise ValueError(f"--{item.name} {value}: must be at least 1")
            if not 0 < self.recall_follow <= 1:
                raise ValueError(
                    f"--recall_follow {self.recall_follow}: must be above 0, at most 1"
                )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # For each video: the frame that was the last one, and the moments it recalled then.
        self._recalled: dict[int, tuple[int, list[int]]] = {}
        self._real_frames = set(self.observed_from_data)

    @classmethod
    def folder_suffix(cls, options: Any) -> str:
        """`_<word><value>` for each option, without its prefix, that is not the default."""
        return "".join(
            f"_{item.name.removeprefix('recall_')}{getattr(options, item.name)}"
            for item in fields(options)
            if item.name.startswith("recall_") and getattr(options, item.name) != item.default
        )

    def _plan(self) -> tuple[list[int], int, list[int]]:
        recent = select.last_items(sorted(self._done_frames), self.options.recall_recent)
        return recent, self._places, self._next_block()

    def _choose(self, video: int, start: list[int], places: int) -> list[int]:
        frames, options = self._distances[video], self.options
        now = len(frames) - 1
        distances = select.moment_distances(frames, options.recall_window)
        then, followed = self._recalled.get(video, (now, []))
        distances[[moment + now - then for moment in followed]] *= options.recall_follow
        if options.recall_from == "observed":
            distances[[t for t in range(now + 1) if t + 1 not in self._real_frames]] = np.inf
        moments = select.similar_moments(distances, options.recall_gap, options.recall_moments)
        self._recalled[video] = now, moments
        return select.recalled_frames(moments, start, places)
