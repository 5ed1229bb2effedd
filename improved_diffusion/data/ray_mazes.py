"""Two built-in worlds that reward memory: walks through small mazes of coloured walls.

colour_mazes: an agent wanders through a maze without dead ends and comes back often.
maze_laps: an agent walks round a ring of corridors; frames t and t + period are the same bytes.

Lengths are in cells of the map, times in frames, headings in turns of 1/4096. A video of a given seed
and index has the same bytes everywhere (see ray_casting.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from improved_diffusion.data.paths import atomic_write
from improved_diffusion.data.ray_casting import (
    COLOURS,
    HEADINGS,
    OPEN,
    Maze,
    Walk,
    exact,
    render,
)
from improved_diffusion.data.walks import map_path, pose_path

IMAGE_SIZE = 32
LAPS_FRAMES = 240  # T of maze_laps: four laps or more
MAZE_FRAMES = 300  # T of colour_mazes
FRAMES_PER_CELL = 6  # how slowly the agent of colour_mazes walks
TURN_FRAMES = 12  # how long a quarter turn takes; the path is rounded over as many frames
# (outer sides of the ring in cells, shortest and longest period). Of 60 observed frames two are in the
# second lap, so that one can see that it has begun.
RINGS = (
    ((3, 3), (40, 54)),
    ((3, 4), (48, 58)),
    ((4, 4), (55, 58)),
)

# (x, y) steps by quarter turn: east, south, west, north (y grows downwards, as in images).
STEPS = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])


@dataclass(frozen=True)
class Video:
    """Frames and how they came about."""

    frames: np.ndarray  # uint8 [T, size, size, 3]
    poses: np.ndarray  # float32 [T, 3], as `Walk.poses`
    walls: np.ndarray  # int8 [Y, X], as in Maze
    period: int  # frames of a lap; 0: the walk has none


# ---------------------------------------------------------------- maps


def paint(rng: np.random.Generator, is_open: np.ndarray) -> Maze:
    """A maze of random colours for a bool map [Y, X] of where one can walk."""
    colours = rng.integers(len(COLOURS), size=is_open.shape)
    walls = np.where(is_open, OPEN, colours).astype(np.int8)
    floor = rng.integers(35, 105, size=3).astype(np.float64)
    sky = rng.integers(120, 225, size=3).astype(np.float64)
    return Maze(walls, floor, sky)


def ring_map(width: int, height: int) -> np.ndarray:
    """bool [height + 2, width + 2]: True in a ring of corridors, one cell wide."""
    is_open = np.zeros((height + 2, width + 2), dtype=bool)
    is_open[1:-1, 1:-1] = True
    is_open[2:-2, 2:-2] = False
    return is_open


def maze_map(rng: np.random.Generator, rooms_x: int, rooms_y: int) -> np.ndarray:
    """bool [2 rooms_y + 1, 2 rooms_x + 1]: rooms at odd places, passages between them.

    A random spanning tree, to which passages are added until every room has two or more: so there
    are loops and no dead ends.
    """
    is_open = np.zeros((2 * rooms_y + 1, 2 * rooms_x + 1), dtype=bool)
    is_open[1, 1] = True
    frontier = [np.array([1, 1])]
    while frontier:  # depth first
        room = frontier[-1]
        closed = [s for s in _room_steps(is_open, room) if not _at(is_open, room + 2 * s)]
        if closed:
            frontier.append(_dig(is_open, room, closed[rng.integers(len(closed))]))
        else:
            frontier.pop()
    for i in range(rooms_x * rooms_y):
        room = 1 + 2 * np.array([i % rooms_x, i // rooms_x])
        steps = _room_steps(is_open, room)
        shut = [s for s in steps if not _at(is_open, room + s)]
        if len(steps) - len(shut) < 2:
            _dig(is_open, room, shut[rng.integers(len(shut))])
    return is_open


def _room_steps(is_open: np.ndarray, room: np.ndarray) -> list[np.ndarray]:
    """The directions in which another room lies."""
    height, width = is_open.shape
    return [s for s in STEPS if 0 < room[0] + 2 * s[0] < width and 0 < room[1] + 2 * s[1] < height]


def _at(grid: np.ndarray, cell: np.ndarray) -> bool:
    return bool(grid[cell[1], cell[0]])


def _dig(is_open: np.ndarray, room: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Open the passage and the room beyond; return that room."""
    for cell in (room + step, room + 2 * step):
        is_open[cell[1], cell[0]] = True
    return room + 2 * step


# ---------------------------------------------------------------- walks


def ring_directions(width: int, height: int) -> np.ndarray:
    """Quarter turns [2 (width + height) - 4] of a clockwise lap, one per cell, from (1, 1) on."""
    return np.repeat([0, 1, 2, 3], [width - 1, height - 1, width - 1, height - 1])


def wander(
    rng: np.random.Generator, is_open: np.ndarray, num_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """A random walk from a random room: its first cell (x, y) and directions [num_steps].

    It never turns back, which a map without dead ends allows.
    """
    height, width = is_open.shape
    cell = 1 + 2 * np.array([rng.integers(width // 2), rng.integers(height // 2)])
    start, directions = cell, np.empty(num_steps, dtype=np.int64)
    for i in range(num_steps):
        choices = [d for d in range(4) if _at(is_open, cell + STEPS[d])]
        if i:
            choices = [d for d in choices if d != (directions[i - 1] + 2) % 4]
        directions[i] = choices[rng.integers(len(choices))]
        cell = cell + STEPS[directions[i]]
    return start, directions


def smooth_walk(start: np.ndarray, directions: np.ndarray, times: np.ndarray, width: float) -> Walk:
    """The moving average of an agent that goes from cell to cell.

    That one starts at the middle of cell `start` at time 0, makes a step per unit of time and
    turns at once.

    Args:
        start: (x, y) of a cell.
        directions: [N] quarter turns.
        times: [T] float64, when to look, in steps.
        width: of the average, in steps.
    """
    elapsed = times[:, None] - np.arange(len(directions))  # [T, N]
    done = (_ramp_area(elapsed + width / 2) - _ramp_area(elapsed - width / 2)) / width
    positions = exact(done) @ STEPS[directions] + (start + 0.5)
    turns = (np.diff(directions) + 1) % 4 - 1  # -1, 0, 1 or 2
    turned = np.clip(elapsed[:, 1:] / width + 0.5, 0, 1)
    quarters = exact(turned) @ turns + directions[0]
    headings = np.rint(quarters * (HEADINGS // 4)).astype(np.int64) % HEADINGS
    return Walk(positions, headings)


def _ramp_area(x: np.ndarray) -> np.ndarray:
    """The integral of clip(x, 0, 1) from 0 to x."""
    inside = np.clip(x, 0, 1)
    return inside * inside / 2 + np.maximum(x - 1, 0)


# ---------------------------------------------------------------- videos


def make_lap(
    rng: np.random.Generator, num_frames: int = LAPS_FRAMES, size: int = IMAGE_SIZE
) -> Video:
    """A walk round a ring, in either direction, from anywhere on it."""
    (width, height), (shortest, longest) = RINGS[rng.integers(len(RINGS))]
    if rng.integers(2):
        width, height = height, width
    maze = paint(rng, ring_map(width, height))
    directions = ring_directions(width, height)
    period = int(rng.integers(shortest, longest + 1))
    if rng.integers(2):
        directions = (directions[::-1] + 2) % 4  # the other way round
    steps_per_frame = len(directions) / period
    # One of four laps is looked at: the moving average reaches into those beside it.
    frames = period + int(rng.integers(period)) + np.arange(period)
    walk = smooth_walk(
        np.array([1, 1]),
        np.tile(directions, 4),
        frames * steps_per_frame,
        TURN_FRAMES * steps_per_frame,
    )
    order = np.arange(num_frames) % period
    return Video(render(maze, walk, size)[order], walk.poses()[order], maze.walls, period)


def make_wander(
    rng: np.random.Generator, num_frames: int = MAZE_FRAMES, size: int = IMAGE_SIZE
) -> Video:
    """A walk through a maze of 3x3 to 4x4 rooms that chooses its way at crossings."""
    is_open = maze_map(rng, int(rng.integers(3, 5)), int(rng.integers(3, 5)))
    maze = paint(rng, is_open)
    start, directions = wander(rng, is_open, num_frames // FRAMES_PER_CELL + 6)
    times = 2 + np.arange(num_frames) / FRAMES_PER_CELL
    walk = smooth_walk(start, directions, times, TURN_FRAMES / FRAMES_PER_CELL)
    return Video(render(maze, walk, size), walk.poses(), maze.walls, 0)


@dataclass(frozen=True)
class World:
    """One of the data sets of this module."""

    make_video: Callable[..., Video]  # (rng, num_frames, size)
    num_frames: int  # T
    number: int  # tells the worlds' seeds apart


WORLDS: dict[str, World] = {
    "colour_mazes": World(make_wander, MAZE_FRAMES, 0),
    "maze_laps": World(make_lap, LAPS_FRAMES, 1),
}
PARTITIONS = {"train": 0, "test": 1}


def make_video(
    name: str, partition: str, index: int, *, size: int = IMAGE_SIZE, seed: int = 0
) -> Video:
    """Video `index` of a partition of the world `name`; it depends on these arguments alone."""
    world = WORLDS[name]
    rng = np.random.default_rng([seed, world.number, PARTITIONS[partition], index])
    return world.make_video(rng, world.num_frames, size)


def make_dataset(
    name: str,
    folder: Path,
    image_size: int = IMAGE_SIZE,
    *,
    num_train: int = 600,
    num_test: int = 100,
    seed: int = 0,
    num_workers: int | None = None,
) -> None:
    """Write a world's videos and how they came about.

    `<folder>/{train,test}/<i>.npy` are uint8 [T, image_size, image_size, 3];
    `<folder>/poses/{train,test}/<i>.npy` hold the poses and `<folder>/maps/{train,test}/<i>.npz`
    `walls` and `period`, all as in Video.

    Args:
        name: a key of WORLDS.
        num_workers: threads (None: one per processor); the bytes do not depend on it.
    """
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    def make(key: tuple[str, int]) -> None:
        _write_video(Path(folder), *key, make_video(name, *key, size=image_size, seed=seed))

    keys = [("train", i) for i in range(num_train)] + [("test", i) for i in range(num_test)]
    # Threads do: nearly all the time is spent in numpy, which lets the others run.
    with ThreadPoolExecutor(num_workers or len(os.sched_getaffinity(0))) as pool:
        for _ in tqdm(pool.map(make, keys), total=len(keys), desc=f"making {name}", unit="video"):
            pass


def _write_video(folder: Path, partition: str, index: int, video: Video) -> None:
    path = folder / partition / f"{index}.npy"
    with atomic_write(path) as file:
        np.save(file, video.frames)
    with atomic_write(pose_path(path)) as file:
        np.save(file, video.poses)
    with atomic_write(map_path(path)) as file:
        np.savez(file, walls=video.walls, period=video.period)
