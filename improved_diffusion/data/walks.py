"""What data sets of walks keep beside their videos: where the walker was, after how long it repeats.

For a video `<folder>/<partition>/<i>.npy`, `<folder>/poses/<partition>/<i>.npy` are poses, float32
[T, 3]: place (x, y) in cells of the map and heading in radians, of which 0 looks along x and pi/2 along y.
`<folder>/maps/<partition>/<i>.npz` holds `period`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

# Two poses are near each other that differ by at most so much, and a frame returns to a pose only
# if it is more than so many frames later: a walker is near the place where it was just before.
NEAR_CELLS, NEAR_RADIANS, GAP_FRAMES = 0.5, np.radians(20), 20


def pose_path(video: Path) -> Path:
    """The file of a video's poses."""
    return video.parent.parent / "poses" / video.parent.name / f"{video.stem}.npy"


def map_path(video: Path) -> Path:
    """The file of the map that a video was made in."""
    return video.parent.parent / "maps" / video.parent.name / f"{video.stem}.npz"


def load_poses(video: Path) -> np.ndarray:
    """float64 [T, 3]: the poses of a video. Raises FileNotFoundError where none are kept."""
    path = pose_path(video)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file: take a data set that keeps true poses (datasets/README.md)"
        )
    return np.load(path).astype(np.float64)


def load_period(video: Path) -> int:
    """Frames after which a video repeats itself; 0 where that is not known."""
    path = map_path(video)
    if not path.is_file():
        return 0
    with np.load(path) as kept:
        return int(kept["period"])


def relative_poses(poses: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
    """float64 [T, N, 3]: pose j of `others` [N, 3] as seen from pose i of [T, 3]: ahead, aside, turn.

    ahead and aside are in cells; aside is where the heading turns to as it grows. The turn is in
    [-pi, pi) radians. others: None for the poses themselves.
    """
    x, y, heading = poses.T[:, :, None]
    other_x, other_y, other_heading = (poses if others is None else others).T
    cos, sin = np.cos(heading), np.sin(heading)
    dx, dy = other_x - x, other_y - y
    turn = (other_heading - heading + np.pi) % (2 * np.pi) - np.pi
    return np.stack([cos * dx + sin * dy, cos * dy - sin * dx, turn], axis=-1)


def within(
    relative: np.ndarray, cells: float = NEAR_CELLS, radians: float = NEAR_RADIANS
) -> np.ndarray:
    """bool [...]: which relative poses [..., 3] differ by at most so much."""
    distance = np.hypot(relative[..., 0], relative[..., 1])
    return (distance <= cells) & (np.abs(relative[..., 2]) <= radians)


def near_poses(poses: np.ndarray) -> np.ndarray:
    """bool [T, T]: which poses, [T, 3], show the same place and heading."""
    return within(relative_poses(poses.astype(np.float64)))


def far_apart(num_frames: int) -> np.ndarray:
    """bool [T, T]: where frame j is more than GAP_FRAMES earlier than frame i."""
    index = np.arange(num_frames)
    return index[None] < index[:, None] - GAP_FRAMES
