"""Which frames of a video one training item observes and which it predicts.

Source: Harvey et al. 2022, "Flexible Diffusion Modeling of Long Videos" (arXiv 2205.11495),
section 3.2.
"""

from __future__ import annotations

import numpy as np

OBSERVED, LATENT = 1, 2


def draw_frames(
    video_length: int, max_frames: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
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
    if video_length < 1 or max_frames < 1:
        raise ValueError(f"T={video_length}, max_frames={max_frames}: both must be at least 1")
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
