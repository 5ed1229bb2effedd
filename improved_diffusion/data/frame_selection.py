"""Pure functions that choose frames of a video: the mathematics of `inference_utils`.

Frames are indices from 0 to T-1; `done` ones exist: they were observed or sampled.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence, Set

import numpy as np

from improved_diffusion.data.frame_distances import FrameDistances


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
    frames, first, last = sorted(done), latent[0], latent[-1]
    between = frames[bisect_right(frames, first) : bisect_left(frames, last)]
    return frames[: bisect_left(frames, first)], between, frames[bisect_right(frames, last) :]


def hierarchy_stride(num_missing: int, step_size: int, level: int, levels: int) -> int:
    """Distance between latent frames on a level l of n (from 1): L^((n-l)/(n-1)), at least 1.

    L = num_missing / (step_size - 1) spreads one step over all frames that are not observed.
    """
    span = num_missing / max(1, step_size - 1)
    return max(1, int(span ** ((levels - level) / (levels - 1))))


def walk(undone: Sequence[int], start: int, stride: int, count: int) -> list[int]:
    """At most `count` of the sorted `undone` frames from `start` on, at least `stride` apart."""
    taken: list[int] = []
    place = bisect_left(undone, start)
    while place < len(undone) and len(taken) < count:
        taken.append(undone[place])
        place = bisect_left(undone, undone[place] + stride)
    return taken


def farthest_points(distances: FrameDistances, start: Sequence[int], count: int) -> list[int]:
    """Choose at most `count` of the known frames that are far from each other; returns them sorted.

    Takes the frames of `start` in order, then again and again the frame whose distance to its
    nearest chosen one is largest, the lowest frame on ties.
    """
    frames = distances.frames
    nearest = np.full(len(frames), np.inf)
    chosen: list[int] = []
    while len(chosen) < min(count, len(frames)):
        is_start = len(chosen) < len(start)
        chosen.append(start[len(chosen)] if is_start else frames[int(nearest.argmax())])
        nearest = np.minimum(nearest, distances.row(chosen[-1]))
        nearest[np.searchsorted(frames, chosen)] = -np.inf
    return sorted(chosen)


def moment_distances(distances: FrameDistances, window: int) -> np.ndarray:
    """How different each frame's moment looks from the last frame's, float64 [N].

    The moment of frame t is the `window` frames up to t, or as many as the video has; two of them differ
    by the mean of the distances of their frames, last with last and so on.

    Args:
        distances: those of the frames 0 to N-1.
    """
    count = len(distances)
    total, frames = np.zeros(count), np.zeros(count)
    for back in range(min(window, count)):
        total[back:] += distances.row(count - 1 - back)[: count - back]
        frames[back:] += 1
    return total / frames


def similar_moments(distances: np.ndarray, gap: int, count: int) -> list[int]:
    """The moments nearest to the last frame's, nearest first, the earlier one on ties.

    At most `count` of them, each named by its last frame, at least `gap` frames apart from one another
    and from the last frame of all.

    Args:
        distances: [N] from `moment_distances`.
    """
    left = distances[: max(0, len(distances) - gap)].astype(np.float64)
    moments: list[int] = []
    while len(moments) < count and np.isfinite(left).any():
        moments.append(int(left.argmin()))
        left[max(0, moments[-1] - gap + 1) : moments[-1] + gap] = np.inf
    return moments


def recalled_frames(moments: Sequence[int], recent: Sequence[int], places: int) -> list[int]:
    """At most `places` frames in order: those that follow the moments, and the `recent` ones.

    The places beside the recent frames are shared equally, the first moments getting what is left
    over; what they cannot use, since frames are taken or do not exist yet, goes to the frames
    before the recent ones.

    Args:
        moments: distinct frames, most important first.
        recent: frames at the end of the video so far, at least one.
    """
    taken = set(last_items(recent, places))
    for i, moment in enumerate(moments):
        share = -(-(places - len(taken)) // (len(moments) - i))
        following = [moment + 1 + k for k in range(share)]
        taken.update(frame for frame in following if frame <= recent[-1])
    for frame in range(recent[-1], -1, -1):
        if len(taken) >= places:
            break
        taken.add(frame)
    return sorted(taken)


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
