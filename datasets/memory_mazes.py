"""Render first-person walks through 3-D mazes: the data set memory_mazes.

They have the form of GQN-Mazes (300 frames of 64x64) and, since about a third of the goals are
places seen before, they need long memory. Where the walker was is kept in poses/: float32 [T, 3],
its place (x, y) in cells and its heading in radians. The simulator is memory-maze (Pasukonis et
al. 2022, arXiv 2210.13383), from pip install -e .[mazes]; it draws with MUJOCO_GL=egl (default) or
osmesa.
"""

from __future__ import annotations

import argparse
import functools
import logging
import multiprocessing
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from improved_diffusion import dist_util
from improved_diffusion.data.dataset_conversion import SOURCE_FILE
from improved_diffusion.data.paths import atomic_write
from improved_diffusion.registry import DATASETS
from improved_diffusion.script_util import run_main

logger = logging.getLogger(__name__)

Cell = tuple[int, int]  # (x to the right, y up) from the corner inside the outer wall
Job = tuple[str, tuple[int, int, int]]  # (the file's name in the data set, the walk's seed)

INNER_CELLS = 7  # side of the maze
CELL_SIZE = 2.0  # metres
STEPS_PER_SECOND = 5.0
MIN_FREE_CELLS = 25  # a maze with fewer is one bare room
GOAL_DISTANCES = range(3, 9)  # cells on the shortest path
REVISIT = 0.33  # share of goals that were visited before
LOOK_ROUND = 0.3  # share of goals at which to stop and turn


def free_cells(layout: np.ndarray) -> set[Cell]:
    """The cells of a maze that can be walked on; layout: [rows, columns] characters with walls."""
    height = len(layout)
    return {
        (x - 1, height - 2 - row)
        for row, column in enumerate(layout)
        for x, character in enumerate(column)
        if character in " PG"
    }


def shortest_paths(free: set[Cell], start: Cell) -> dict[Cell, list[Cell]]:
    """{goal: the cells of a shortest path from `start` to it, without `start`}."""
    paths: dict[Cell, list[Cell]] = {start: []}
    queue = deque([start])
    while queue:
        x, y = cell = queue.popleft()
        for step in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
            if step in free and step not in paths:
                paths[step] = [*paths[cell], step]
                queue.append(step)
    return paths


class Walker:
    """Walks along shortest paths to random goals and sometimes stops to look round."""

    def __init__(self, free: set[Cell], rng: np.random.Generator) -> None:
        self.free = free
        self.rng = rng
        self.path: list[Cell] = []
        self.visited: set[Cell] = set()
        self.turns_left = 0
        self.spin = 0.0

    def act(self, position: np.ndarray, heading: np.ndarray) -> tuple[float, float]:
        """(forward in [0, 1], turn in [-1, 1], to the left) for a place in cells, a unit vector."""
        cell = (int(position[0]), int(position[1]))
        self.visited.add(cell)
        while self.path and np.linalg.norm(np.add(self.path[0], 0.5) - position) < 0.3:
            self.path.pop(0)
        if not self.path and self.turns_left == 0:
            self._choose_goal(cell)
        if self.turns_left > 0 or not self.path:
            self.turns_left = max(0, self.turns_left - 1)
            return 0.0, self.spin
        way = np.add(self.path[0], 0.5) - position
        angle = np.arctan2(heading[0] * way[1] - heading[1] * way[0], heading @ way)
        turn = np.clip(2 * angle, -1, 1) + 0.08 * self.rng.normal()
        return float(np.clip(1.3 - 1.6 * abs(angle), 0, 1)), float(np.clip(turn, -1, 1))

    def _choose_goal(self, cell: Cell) -> None:
        paths = {goal: path for goal, path in shortest_paths(self.free, cell).items() if path}
        near = {goal for goal, path in paths.items() if len(path) in GOAL_DISTANCES} or set(paths)
        wanted = near & self.visited if self.rng.random() < REVISIT else near - self.visited
        goals = sorted(wanted or near)
        if goals:
            self.path = paths[goals[self.rng.integers(len(goals))]]
        self.spin = float(self.rng.choice([-0.4, 0.4]))
        if self.rng.random() < LOOK_ROUND:
            self.turns_left = int(self.rng.integers(4, 13))


def make_environment(random: np.random.RandomState) -> tuple[Any, Any]:
    """(environment, maze arena) of random textures; the arena's maze is drawn at each reset.

    Raises ValueError where the simulator is not installed.
    """
    try:
        from dm_control import composer
        from dm_control.locomotion.arenas import labmaze_textures
        from labmaze import assets
        from memory_maze import maze
        from memory_maze.wrappers import AgentPositionWrapper
    except ImportError as error:
        raise ValueError(f"{error}: install the simulator: pip install -e .[mazes]") from None

    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns at every reset
    style = f"style_{random.randint(1, 6):02d}"
    floors = sorted(assets.get_floor_texture_paths(style))
    random.shuffle(floors)
    side = INNER_CELLS + 2
    arena = maze.MazeWithTargetsArena(
        x_cells=side,
        y_cells=side,
        xy_scale=CELL_SIZE,
        z_height=1.5,
        max_rooms=4,
        room_min_size=3,
        room_max_size=3,
        spawns_per_room=1,
        targets_per_room=1,
        floor_textures=maze.FixedFloorTexture(style, floors[:3]),
        wall_textures={c: labmaze_textures.WallTextures(style) for c in "*0123456789"},
        skybox_texture=labmaze_textures.SkyBox(style=f"sky_{random.randint(1, 4):02d}"),
        random_seed=random.randint(1, 2**31 - 1),
    )
    task = maze.MemoryMazeTask(
        walker=maze.RollingBallWithFriction(camera_height=0.3),
        maze_arena=arena,
        n_targets=1,
        target_radius=0.3,
        target_height_above_ground=-5.0,  # out of sight
        enable_global_task_observables=True,
        control_timestep=1 / STEPS_PER_SECOND,
        camera_resolution=DATASETS["memory_mazes"].image_size,
    )
    environment = composer.Environment(
        task=task, time_limit=1e6, random_state=random, strip_singleton_obs_buffer_dim=True
    )
    return AgentPositionWrapper(environment, CELL_SIZE, side, side), arena


def render_walk(seed: Sequence[int], num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """One walk, which depends on `seed` alone.

    Returns: its frames, uint8 [num_frames, 64, 64, 3], and poses, float32 [num_frames, 3].
    """
    rng = np.random.default_rng(seed)
    environment, arena = make_environment(np.random.RandomState(rng.integers(2**31)))
    free: set[Cell] = set()
    while len(free) < MIN_FREE_CELLS:
        step = environment.reset()
        free = free_cells(arena.maze.entity_layer)
    walker = Walker(free, rng)
    frames, poses = [], []
    for _ in range(num_frames):
        seen = step.observation
        frames.append(np.array(seen["walker/egocentric_camera"], dtype=np.uint8))
        heading = np.array(seen["agent_dir"])
        place = np.array(seen["agent_pos"])
        poses.append([*place, np.arctan2(heading[1], heading[0])])
        forward, turn = walker.act(place, heading / np.linalg.norm(heading))
        step = environment.step(np.array([-forward, -turn]))
    environment.close()
    return np.stack(frames), np.array(poses, dtype=np.float32)


def walk_jobs(seed: int, num_train: int, num_test: int) -> list[Job]:
    """All walks of the data set: a walk's seed does not depend on how many there are."""
    return [
        (f"{partition}/{i}.npy", (seed, stream, i))
        for stream, partition, number in ((0, "train", num_train), (1, "test", num_test))
        for i in range(number)
    ]


def write_walk(job: Job, folder: Path, num_frames: int) -> None:
    """Render one walk into `folder`, if it is not there from an interrupted run."""
    name, seed = job
    if not (folder / name).exists():
        frames, poses = render_walk(seed, num_frames)
        for path, array in ((folder / "poses" / name, poses), (folder / name, frames)):
            with atomic_write(path) as file:
                np.save(file, array)


def _keep_only(folder: Path, names: set[str]) -> None:
    """Remove walks that an interrupted run of more videos has left beside those of these names."""
    for path in list(folder.rglob("*.npy")):
        name = path.relative_to(folder).as_posix().removeprefix("poses/")
        if name not in names:
            path.unlink()


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the options and render; an interrupted run goes on where it stopped."""
    from tqdm import tqdm

    spec = DATASETS["memory_mazes"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_train", type=int, default=500, help="training videos [500]")
    parser.add_argument("--num_test", type=int, default=100, help="test videos [100]")
    parser.add_argument(
        "--num_workers", type=int, default=-1, help="processes that render [one per core]"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the mazes and the walks [0]")
    args = parser.parse_args(argv)
    if args.num_train < 1 or args.num_test < 1:
        raise ValueError("--num_train and --num_test must be at least 1")
    jobs = walk_jobs(args.seed, args.num_train, args.num_test)
    source = f"seed {args.seed}"
    if spec.root.exists():
        told = spec.root / SOURCE_FILE  # which earlier versions did not write
        said = told.read_text() if told.exists() else source
        if said != source:
            raise ValueError(f"{spec.root}: was made with {said}; remove it to make another")
        if not all((spec.root / name).exists() for name, _ in jobs):
            raise ValueError(f"{spec.root}: exists with fewer videos; remove it to render more")
        logger.info("%s exists: nothing to do; remove it to render it again", spec.root)
        return
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])
    unfinished = spec.root.with_name(f"{spec.root.name}.seed{args.seed}.partial")
    # Fresh processes: a graphics context does not survive a fork, and the simulator leaks memory.
    context = multiprocessing.get_context("spawn")
    num_workers = args.num_workers if args.num_workers > 0 else dist_util.cores()
    write = functools.partial(write_walk, folder=unfinished, num_frames=spec.T)
    with context.Pool(num_workers, maxtasksperchild=20) as pool:
        walks = pool.imap_unordered(write, jobs)
        for _ in tqdm(walks, desc=f"rendering {spec.name}", total=len(jobs), unit="video"):
            pass
    _keep_only(unfinished, {name for name, _ in jobs})
    (unfinished / SOURCE_FILE).write_text(source)
    os.rename(unfinished, spec.root)
    print(spec.root)


if __name__ == "__main__":
    run_main(main)
