"""Pictures of mazes of coloured walls, by ray casting in numpy.

Only operations that every machine rounds alike are used (sums, products, quotients of float64; sines
come from a rounded table), so that a picture has the same bytes everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

OPEN = -1  # what the map holds where there is no wall
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


def exact(x: np.ndarray) -> np.ndarray:
    """x in multiples of 2^-20, whose sums are exact in whatever order a machine adds."""
    return np.rint(x * 2.0**20) / 2.0**20


def render(maze: Maze, walk: Walk, size: int) -> np.ndarray:
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
    return exact(np.column_stack([np.cos(angles), np.sin(angles)]))


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
