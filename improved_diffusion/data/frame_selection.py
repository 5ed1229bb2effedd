"""Pure functions that choose frames of a video: the mathematics of `inference_utils`.

Frames are indices from 0 to T-1; `done` ones exist: they were observed or sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set

import numpy as np


def last_items(items: Sequence[int], count: int) -> list[int]:
    """The last `count` items; none for 0, where the slice [-0:] would take all."""
    return list(items[max(0, len(items) - count) :])


def spread(num_frames: int, count: int) -> list[int]:
    """At most `count` of the frames 0 ... num_frames-1, evenly from the first to the last."""
    if count >= num_frames:
        return list(range(num_frames))
    return [int(frame) for frame in np.linspace(0, num_frames - 0.001, count)]


def split_around(done: Set[int], latent: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Sorted done frames before the first latent frame, between first and last, and after."""
    before = sorted(frame for frame in done if frame < latent[0])
    between = sorted(frame for frame in done if latent[0] < frame < latent[-1])
    return before, between, sorted(frame for frame in done if frame > latent[-1])


def hierarchy_stride(num_missing: int, step_size: int, level: int, levels: int) -> int:
    """Distance between latent frames on a level l of n (from 1): L^((n-l)/(n-1)), at least 1.

    L = num_missing / (step_size - 1) spreads one step over all frames that are not observed.
    """
    span = num_missing / max(1, step_size - 1)
    return max(1, int(span ** ((levels - level) / (levels - 1))))


def walk(undone: Sequence[int], start: int, stride: int, count: int) -> list[int]:
    """At most `count` of the sorted `undone` frames from `start` on, at least `stride` apart."""
    taken: list[int] = []
    for frame in undone:
        if frame >= start and len(taken) < count:
            taken.append(frame)
            start = frame + stride
    return taken


def farthest_points(
    embeddings: dict[int, np.ndarray], start: Sequence[int], count: int
) -> list[int]:
    """Choose at most `count` frames that are far from each other; returns them sorted.

    Takes the frames of `start` in order, then again and again the frame whose distance to its
    nearest chosen one is largest, the lowest frame on ties.

    Args:
        embeddings: {frame: [d] float array} of all frames to choose from; distances are squared
            Euclidean.
        start: some of these frames.
    """
    chosen: list[int] = []
    nearest = dict.fromkeys(sorted(embeddings), math.inf)
    while len(chosen) < count and nearest:
        is_start = len(chosen) < len(start)
        frame = start[len(chosen)] if is_start else max(nearest, key=nearest.__getitem__)
        chosen.append(frame)
        del nearest[frame]
        for other in nearest:
            difference = embeddings[other] - embeddings[frame]
            nearest[other] = min(nearest[other], float(np.dot(difference, difference)))
    return sorted(chosen)


def step_fault(
    observed: Sequence[int],
    latent: Sequence[int],
    done: Set[int],
    fixed: Set[int],
    T: int,
    max_frames: int,
) -> str:
    """Which rule of inference steps this one breaks, in words; empty if none.

    Only `done` frames may be observed, and `fixed` ones may not be sampled.
    """
    frames = [*observed, *latent]
    twice = sorted({frame for frame in frames if frames.count(frame) > 1})
    outside = sorted(frame for frame in frames if not 0 <= frame < T)
    missing = sorted(set(observed) - done)
    again = sorted(fixed & set(latent))
    rules = (
        (not latent, "samples no frame and so would never end"),
        (len(frames) > max_frames, f"takes {len(frames)} frames, above --max_frames {max_frames}"),
        (twice, f"uses frames {twice} twice"),
        (outside, f"uses frames {outside}, outside a video of --T {T}"),
        (missing, f"observes frames {missing}, neither observed nor sampled before"),
        (again, f"samples frames {again} again (samples_frame_twice allows it for sampled ones)"),
    )
    return next((fault for is_broken, fault in rules if is_broken), "")
