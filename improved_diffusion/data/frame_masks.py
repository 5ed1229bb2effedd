"""Which frames of a video one training item observes and which it predicts. No torch here.

Source: Harvey et al. 2022, "Flexible Diffusion Modeling of Long Videos" (arXiv 2205.11495),
section 3.2. `query_masks` has the distributions that are made of inference steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from improved_diffusion.config import chosen_options, option
from improved_diffusion.registry import MASK_DISTRIBUTIONS

OBSERVED, LATENT = 1, 2

# (observed, latent): sorted int64 arrays of indices in [0, T), disjoint, together at most max_frames;
# latent is never empty.
Frames = tuple[np.ndarray, np.ndarray]
DrawFrames = Callable[[int, int, np.random.Generator], Frames]


def create_mask_distribution(name: str, options: Any = None) -> DrawFrames:
    """The distribution `name`: called as `draw_frames` is.

    options: an instance of its `Options`, or a mapping of some of them (None: their defaults).

    Raises ValueError for an unknown name or option, and what the options raise.
    """
    return MASK_DISTRIBUTIONS.made(name, chosen_options(MASK_DISTRIBUTIONS, name, options))


def draw_frames(video_length: int, max_frames: int, rng: np.random.Generator) -> Frames:
    """Draw the observed and the latent frames of one training item.

    The first group of frames is latent; further groups are observed or latent by the flip of a
    coin, until one does not fit any more or every frame of the video is taken.

    Args:
        video_length: T >= 1, frames of the video (or of the window that is trained on).
        max_frames: K >= 1, frames given to the network at once.
        rng: where all randomness comes from.

    Returns:
        (observed, latent): sorted int64 arrays of indices in [0, T), disjoint, together at most
        K; latent is never empty.

    Raises:
        ValueError: T or K is below 1.
    """
    check_sizes(video_length, max_frames)
    roles = np.zeros(video_length, dtype=np.int8)
    first = _draw_group(video_length, max_frames, rng)
    roles[first] = LATENT
    taken = len(first)
    # A video of at most max_frames frames is used up without any group being too large.
    while taken < video_length:
        role = OBSERVED if rng.random() < 0.5 else LATENT
        group = _draw_group(video_length, max_frames, rng)
        group = group[roles[group] == 0]
        if taken + len(group) > max_frames:
            break
        roles[group] = role
        taken += len(group)
    return np.flatnonzero(roles == OBSERVED), np.flatnonzero(roles == LATENT)


@dataclass(frozen=True)
class FilledOptions:
    """How often a filled item observes nothing."""

    unconditional_share: float = option(
        0.1, "filled, mixed: share of filled items that observe no frame"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.unconditional_share <= 1:
            raise ValueError(
                f"--unconditional_share {self.unconditional_share}: must be from 0 to 1"
            )


class Filled:
    """Groups as in `draw_frames`, but of at most half an item, and every item is full.

    A group that does not fit is cut instead of ending the drawing. A stated share of the items
    observes nothing; of the others the first group is latent, the second observed, and coins are
    flipped for the rest. Only items of a single frame cannot but observe nothing.
    """

    Options = FilledOptions

    def __init__(self, options: FilledOptions) -> None:
        self.options = options

    def __call__(self, video_length: int, max_frames: int, rng: np.random.Generator) -> Frames:
        """As `draw_frames`; together the frames are min(T, K)."""
        check_sizes(video_length, max_frames)
        number = min(video_length, max_frames)
        all_latent = rng.random() < self.options.unconditional_share
        roles = np.zeros(video_length, dtype=np.int8)
        taken = 0
        while taken < number:
            group = self._free_group(roles, max(1, number // 2), rng)
            start = rng.integers(max(0, len(group) - (number - taken)) + 1)
            group = group[start : start + number - taken]
            is_first, nothing_observed = taken == 0, not (roles == OBSERVED).any()
            latent = all_latent or is_first or (not nothing_observed and rng.random() < 0.5)
            roles[group] = LATENT if latent else OBSERVED
            taken += len(group)
        return np.flatnonzero(roles == OBSERVED), np.flatnonzero(roles == LATENT)

    @staticmethod
    def _free_group(roles: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
        """Of a group of at most `most` frames those not taken yet; if there are none, any such frame."""
        group = _draw_group(len(roles), most, rng)
        group = group[roles[group] == 0]
        return group if len(group) else rng.choice(np.flatnonzero(roles == 0), 1)


def check_sizes(video_length: int, max_frames: int) -> None:
    """Raise ValueError unless both are at least 1."""
    if video_length < 1 or max_frames < 1:
        raise ValueError(f"T={video_length}, max_frames={max_frames}: both must be at least 1")


def _draw_group(video_length: int, max_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Distinct, evenly spaced indices: their number is uniform, their spacing log-uniform."""
    while True:
        size = int(rng.integers(1, max_frames + 1))
        spacing = np.exp(rng.random() * np.log(video_length / (size - 0.999)))
        start = rng.random() * (video_length - spacing * (size - 1))
        group = np.floor(start + spacing * np.arange(size)).astype(np.int64)
        if 0 <= group[0] and group[-1] < video_length:
            # Only a spacing below 1 (max_frames > T) can name a frame twice.
            return group if spacing >= 1 else np.unique(group)
