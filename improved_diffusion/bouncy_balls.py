"""The built-in data set: coloured balls that bounce off the walls and off one another.

Positions and radii are in pixels, times in frames. Between collisions the balls fly straight, so
collisions are found exactly instead of by small time steps: energy is conserved to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from improved_diffusion.data.paths import atomic_write

NUM_FRAMES = 100
IMAGE_SIZE = 32
NUM_BALLS = 2
RADIUS_RANGE = (4.0, 5.0)
SPEED_RANGE = (0.6, 1.4)
BACKGROUND = np.array([12, 12, 20], dtype=np.float64)
COLOURS = np.array(
    [
        [235, 50, 45],
        [55, 205, 70],
        [65, 110, 250],
        [245, 215, 50],
    ],
    dtype=np.float64,
)


@dataclass(frozen=True)
class Trajectory:
    """How N balls move for T frames in a square box from 0 to `size`."""

    positions: np.ndarray  # [T, N, 2] float64 (x, y), pixels
    velocities: np.ndarray  # [T, N, 2] float64, pixels per frame
    radii: np.ndarray  # [N] float64, pixels
    colours: np.ndarray  # [N, 3] float64, in [0, 255]
    size: int

    @property
    def masses(self) -> np.ndarray:
        """[N]: proportional to the balls' areas."""
        return self.radii**2


def simulate(
    rng: np.random.Generator,
    num_frames: int = NUM_FRAMES,
    *,
    num_balls: int = NUM_BALLS,
    size: int = IMAGE_SIZE,
) -> Trajectory:
    """Let balls of random place, speed and size move; each has a colour of its own.

    Args:
        rng: where all randomness comes from.
        num_frames: T >= 1.
        num_balls: 1 to len(COLOURS).
        size: side of the box in pixels, large enough for the balls.

    Raises ValueError for a number of balls that is out of range or does not fit.
    """
    if not 1 <= num_balls <= len(COLOURS) or size < 4 * num_balls * RADIUS_RANGE[1] / 2:
        raise ValueError(f"{num_balls} balls in a box of {size} pixels: use fewer or a larger box")
    radii = rng.uniform(*RADIUS_RANGE, size=num_balls)
    state = _place(rng, radii, size), _draw_velocities(rng, num_balls)
    positions = np.empty((num_frames, num_balls, 2))
    velocities = np.empty_like(positions)
    for frame in range(num_frames):
        positions[frame], velocities[frame] = state
        state = _advance_frame(*state, radii, size)
    return Trajectory(positions, velocities, radii, COLOURS[:num_balls], size)


def _place(rng: np.random.Generator, radii: np.ndarray, size: int) -> np.ndarray:
    """[N, 2] positions inside the box without overlap."""
    i, j = np.triu_indices(len(radii), 1)
    while True:
        positions = rng.uniform(radii[:, None], size - radii[:, None], size=(len(radii), 2))
        gaps = _norm(positions[i] - positions[j]) - radii[i] - radii[j]
        if np.all(gaps > 0):
            return positions


def _draw_velocities(rng: np.random.Generator, num_balls: int) -> np.ndarray:
    """[N, 2] velocities: uniform direction, uniform speed.

    Directions come from points in the unit disk, since sines differ in the last bit between
    machines and colliding balls amplify that.
    """
    directions = np.empty((num_balls, 2))
    for ball in range(num_balls):
        norm = 0.0
        while not 0.1 < norm <= 1:
            point = rng.uniform(-1, 1, size=2)
            norm = float(_norm(point))
        directions[ball] = point / norm
    return directions * rng.uniform(*SPEED_RANGE, size=(num_balls, 1))


def _norm(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt(vectors[..., 0] ** 2 + vectors[..., 1] ** 2)


def _advance_frame(
    positions: np.ndarray, velocities: np.ndarray, radii: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(positions, velocities) one frame later."""
    low, high = radii[:, None], size - radii[:, None]
    velocities = velocities.copy()
    remaining = 1.0
    while remaining > 0:
        wall_times = _wall_times(positions, velocities, low, high)
        pair_times, i, j = _pair_times(positions, velocities, radii)
        time = min(wall_times.min(), pair_times.min(initial=np.inf), remaining)
        # Clipping takes away what rounding adds, never more.
        positions = np.clip(positions + time * velocities, low, high)
        if time < remaining:
            if wall_times.min() <= time:
                velocities[np.unravel_index(wall_times.argmin(), wall_times.shape)] *= -1
            else:
                pair = pair_times.argmin()
                _collide(positions, velocities, radii, i[pair], j[pair])
        remaining -= time
    return positions, velocities


def _wall_times(
    positions: np.ndarray, velocities: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """[N, 2] times until each coordinate reaches the wall it moves to."""
    distances = np.where(velocities > 0, high - positions, low - positions)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(velocities == 0, np.inf, distances / velocities)


def _pair_times(
    positions: np.ndarray, velocities: np.ndarray, radii: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(times, i, j) until balls i and j touch; infinite where they will not.

    With d and w the differences of positions and velocities: the smaller root of
    |d + w t| = r_i + r_j, which lies ahead only where d.w < 0.
    """
    i, j = np.triu_indices(len(radii), 1)
    d, w = positions[i] - positions[j], velocities[i] - velocities[j]
    approach = (d * w).sum(axis=1)
    speed2 = (w * w).sum(axis=1)
    gap = (d * d).sum(axis=1) - (radii[i] + radii[j]) ** 2
    root2 = approach**2 - speed2 * gap
    meets = (approach < 0) & (root2 > 0)
    times = np.full(len(i), np.inf)
    times[meets] = (-approach[meets] - np.sqrt(root2[meets])) / speed2[meets]
    return np.maximum(times, 0), i, j


def _collide(
    positions: np.ndarray, velocities: np.ndarray, radii: np.ndarray, i: int, j: int
) -> None:
    """Elastic collision of balls i and j: exchange momentum along the line of their centres."""
    mass_i, mass_j = radii[i] ** 2, radii[j] ** 2
    normal = positions[i] - positions[j]
    normal = normal / _norm(normal)
    impulse = 2 * ((velocities[i] - velocities[j]) * normal).sum() / (mass_i + mass_j)
    velocities[i] -= impulse * mass_j * normal
    velocities[j] += impulse * mass_i * normal


def render(trajectory: Trajectory) -> np.ndarray:
    """uint8 [T, size, size, 3]: anti-aliased disks on a dark background."""
    centres = np.arange(trajectory.size) + 0.5
    dx = centres - trajectory.positions[..., 0, None]  # [T, N, W]
    dy = centres - trajectory.positions[..., 1, None]  # [T, N, H]
    distance = np.sqrt(dy[..., :, None] ** 2 + dx[..., None, :] ** 2)
    # A pixel at the rim is covered by the share of it that lies inside, to first order.
    cover = np.clip(trajectory.radii[:, None, None] - distance + 0.5, 0, 1)[..., None]
    frames = np.broadcast_to(BACKGROUND, (*cover.shape[:1], *cover.shape[2:4], 3))
    for ball, colour in enumerate(trajectory.colours):
        frames = frames + cover[:, ball] * (colour - frames)
    return np.rint(frames).astype(np.uint8)


def make_dataset(folder: Path, num_train: int = 500, num_test: int = 100, seed: int = 0) -> None:
    """Write `<folder>/{train,test}/<i>.npy`, each uint8 [100, 32, 32, 3].

    Video i of a partition depends on (seed, partition, i) alone.
    """
    from tqdm import tqdm

    keys = [("train", 0, i) for i in range(num_train)] + [("test", 1, i) for i in range(num_test)]
    for partition, stream, i in tqdm(keys, desc="making bouncy_balls", unit="video"):
        video = render(simulate(np.random.default_rng([seed, stream, i])))
        with atomic_write(Path(folder) / partition / f"{i}.npy") as file:
            np.save(file, video)
