"""Two built-in worlds that reward memory: walks through small mazes of coloured walls.

colour_mazes: an agent wanders through a maze without dead ends and comes back often.
maze_laps: an agent walks round a ring of corridors; frames t and t + period are the same bytes.

Lengths are in cells of the map, times in frames, headings in turns of 1/4096. Only operations that
every machine rounds alike are used (sums, products, quotients of float64; sines come from a rounded
table), so that a video of a given seed and index has the same bytes everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from improved_diffusion.data.paths import atomic_write

IMAGE_SIZE = 32
OPEN = -1  # what the map holds where there is no wall

LAPS_FRAMES = 240  # T of maze_laps: four laps of at most 60 frames
MAZE_FRAMES = 300  # T of colour_mazes
FRAMES_PER_CELL = 6  # how slowly the agent of colour_mazes walks
TURN_FRAMES = 12  # how long a quarter turn takes; the path is rounded over as many frames
# (outer sides of the ring in cells, shortest and longest period)
RINGS = (
    ((3, 3), (40, 54)),
    ((3, 4), (48, 60)),
    ((3, 5), (56, 60)),
    ((4, 4), (56, 60)),
)

HEADINGS = 4096  # in a full turn
FIELD_OF_VIEW = 1.0  # half the image's width over its distance from the eye: 90 degrees
EYE_HEIGHT, WALL_HEIGHT = 0.4, 0.8
SUPERSAMPLING = 3  # rays per pixel along each axis

COLOURS = np.array(
    [
        [225, 45, 40],  # red
        [245, 140, 25],  # orange
        [240, 225, 60],  # yellow
        [45, 175, 60],  # green
        [70, 215, 225],  # cyan
        [45, 75, 230],  # blue
        [210, 70, 205],  # magenta
        [240, 240, 240],  # white
    ],
    dtype=np.float64,
)
DARK_BRICK = 0.78  # brightness of every other brick
DARK_SIDE = 0.8  # brightness of walls that face east or west
FOG = 0.25  # things at distance d have brightness 1 / (1 + FOG d)

# (x, y) steps by quarter turn: east, south, west, north (y grows downwards, as in images).
STEPS = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])


@dataclass(frozen=True)
class Maze:
    """A map of square cells and the colours around it."""

    walls: np.ndarray  # int8 [Y, X]: index into COLOURS, or OPEN; the rim is all wall
    floor: np.ndarray  # [3] float64, in [0, 255]
    sky: np.ndarray  # [3] float64, in [0, 255]


@dataclass(frozen=True)
class Walk:
    """Where the agent is in each of T frames."""

    positions: np.ndarray  # [T, 2] float64 (x, y), cells
    headings: np.ndarray  # [T] int64 in [0, HEADINGS); 0 looks along x, a quarter later along y

    def poses(self) -> np.ndarray:
        """float32 [T, 3]: x, y in cells and the heading in radians."""
        radians = self.headings * (2 * np.pi / HEADINGS)
        return np.column_stack([self.positions, radians]).astype(np.float32)


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
    positions = _exact(done) @ STEPS[directions] + (start + 0.5)
    turns = (np.diff(directions) + 1) % 4 - 1  # -1, 0, 1 or 2
    turned = np.clip(elapsed[:, 1:] / width + 0.5, 0, 1)
    quarters = _exact(turned) @ turns + directions[0]
    headings = np.rint(quarters * (HEADINGS // 4)).astype(np.int64) % HEADINGS
    return Walk(positions, headings)


def _ramp_area(x: np.ndarray) -> np.ndarray:
    """The integral of clip(x, 0, 1) from 0 to x."""
    inside = np.clip(x, 0, 1)
    return inside * inside / 2 + np.maximum(x - 1, 0)


def _exact(x: np.ndarray) -> np.ndarray:
    """x in multiples of 2^-20, whose sums are exact in whatever order a machine adds."""
    return np.rint(x * 2.0**20) / 2.0**20


# ---------------------------------------------------------------- pictures


def render(maze: Maze, walk: Walk, size: int = IMAGE_SIZE) -> np.ndarray:
    """uint8 [T, size, size, 3]: what the agent sees."""
    batch = max(1, 32 * 32 * 16 // (size * size))  # frames that fit a processor's cache
    parts = [
        _render_frames(maze, walk.positions[i : i + batch], walk.headings[i : i + batch], size)
        for i in range(0, len(walk.positions), batch)
    ]
    return np.concatenate(parts)


def _heading_vectors() -> np.ndarray:
    """[HEADINGS, 2] unit vectors, rounded: sines differ in the last bit between machines."""
    angles = np.arange(HEADINGS) * (2 * np.pi / HEADINGS)
    return _exact(np.column_stack([np.cos(angles), np.sin(angles)]))


HEADING_VECTORS = _heading_vectors()


def _render_frames(
    maze: Maze, positions: np.ndarray, headings: np.ndarray, size: int
) -> np.ndarray:
    """uint8 [T, size, size, 3] for positions [T, 2] and headings [T]."""
    rays = size * SUPERSAMPLING
    offsets = (2 * np.arange(rays) + 1 - rays) / rays * FIELD_OF_VIEW  # [rays], left to right
    forward = HEADING_VECTORS[headings][:, None]  # [T, 1, 2]
    right = np.stack([-forward[..., 1], forward[..., 0]], axis=-1)
    directions = forward + right * offsets[:, None]  # [T, rays, 2]
    distance, along, colour = cast_rays(maze.walls, positions[:, None], directions)
    height = EYE_HEIGHT - offsets[:, None] * distance[:, None]  # [T, rows, rays], above the floor
    is_wall = (height >= 0) & (height < WALL_HEIGHT)
    # Bricks are half a cell wide, in two courses, the upper one shifted by half a brick.
    course = height >= WALL_HEIGHT / 2
    is_dark = (np.floor(along * 2)[:, None] % 2 == 1) ^ course
    light = _to_bytes(colour)[:, None]
    wall = np.where(is_dark[..., None], _to_bytes(colour * DARK_BRICK)[:, None], light)
    frames = np.where(is_wall[..., None], wall, _background(maze, offsets)[:, None])
    return _shrink(frames)


def cast_rays(
    walls: np.ndarray, origins: np.ndarray, directions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where rays first meet a wall.

    Args:
        walls: int8 [Y, X], as in Maze.
        origins: [..., 2] open places, cells.
        directions: [..., 2], of any length.

    Returns:
        (distance, along, colour): [...] lengths in units of the directions', [...] places along
        the wall in cells, and [..., 3] the shaded colours in [0, 255].
    """
    shape = np.broadcast_shapes(origins.shape, directions.shape)[:-1]
    distance, along = np.full(shape, np.inf), np.zeros(shape)
    hit = np.full(shape, OPEN, dtype=np.int8)
    from_side = np.zeros(shape, dtype=bool)
    for axis in (0, 1):
        grid = walls.T if axis == 0 else walls  # [along the axis, across]
        speed, across_speed = directions[..., axis], directions[..., 1 - axis]
        speed = np.where(speed == 0, 1e-30, speed)
        for line in range(1, grid.shape[0]):
            # The cell behind the line is a wall: the nearest such line is where the ray ends.
            time = (line - origins[..., axis]) / speed
            across = origins[..., 1 - axis] + time * across_speed
            inside = (time > 0) & (time < distance) & (across >= 0) & (across < grid.shape[1])
            column = np.where(inside, across, 0).astype(np.int64)
            beyond = np.where(speed > 0, grid[line][column], grid[line - 1][column])
            nearer = inside & (beyond != OPEN)
            distance, along = np.where(nearer, time, distance), np.where(nearer, across, along)
            hit, from_side = np.where(nearer, beyond, hit), np.where(nearer, axis == 0, from_side)
    shade = np.where(from_side, DARK_SIDE, 1.0) / (1 + FOG * distance)
    return distance, along, COLOURS[hit] * shade[..., None]


def _background(maze: Maze, offsets: np.ndarray) -> np.ndarray:
    """uint8 [rows, 3]: the sky above the horizon, the floor below it, darker when far away."""
    depth = EYE_HEIGHT / np.maximum(offsets, 1e-3)
    floor = maze.floor * (1 / (1 + FOG * depth))[:, None]
    return _to_bytes(np.where((offsets > 0)[:, None], floor, maze.sky))


def _to_bytes(colours: np.ndarray) -> np.ndarray:
    return np.rint(colours).astype(np.uint8)


def _shrink(frames: np.ndarray) -> np.ndarray:
    """The means of squares of rays: uint8 [T, n s, n s, 3] -> [T, n, n, 3]."""
    s = SUPERSAMPLING
    total = np.zeros((len(frames), *(n // s for n in frames.shape[1:3]), 3), dtype=np.uint16)
    for i in range(s * s):
        total += frames[:, i // s :: s, i % s :: s]
    return ((total + s * s // 2) // (s * s)).astype(np.uint8)


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
    with atomic_write(folder / partition / f"{index}.npy") as file:
        np.save(file, video.frames)
    with atomic_write(folder / "poses" / partition / f"{index}.npy") as file:
        np.save(file, video.poses)
    with atomic_write(folder / "maps" / partition / f"{index}.npz") as file:
        np.savez(file, walls=video.walls, period=video.period)
