"""The walker alone: rendering needs the simulator, which the tests do without."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "datasets" / "memory_mazes.py"
LAYOUT = np.array([list(row) for row in ["*****", "*  P*", "* * *", "*G* *", "*****"]])


@pytest.fixture(scope="module")
def mazes():
    return runpy.run_path(str(SCRIPT))


def test_free_cells_count_from_the_lower_left_corner_inside(mazes):
    assert mazes["free_cells"](LAYOUT) == {(0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0)}


def test_shortest_paths_lead_round_the_walls(mazes):
    paths = mazes["shortest_paths"](mazes["free_cells"](LAYOUT), (0, 0))
    assert paths[(2, 0)] == [(0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0)]
    assert paths[(0, 0)] == []


def test_a_walker_sees_the_whole_maze_and_comes_back(mazes):
    free = {(x, y) for x in range(7) for y in range(7) if x % 2 == 0 or y % 2 == 0}
    walker = mazes["Walker"](free, np.random.default_rng(0))
    position, angle, cells = np.array([0.5, 0.5]), 0.0, []
    for _ in range(3000):
        heading = np.array([np.cos(angle), np.sin(angle)])
        forward, turn = walker.act(position, heading)
        assert 0 <= forward <= 1 and -1 <= turn <= 1
        angle += 0.5 * turn
        moved = position + 0.3 * forward * heading
        if (int(moved[0]), int(moved[1])) in free and (moved > 0).all():
            position = moved
        cells.append((int(position[0]), int(position[1])))
    assert len(set(cells)) > 0.9 * len(free)
    assert len(set(cells[1500:])) > 0.5 * len(free)


def test_without_the_simulator_the_error_says_what_to_install(mazes, monkeypatch):
    monkeypatch.setitem(sys.modules, "dm_control", None)
    with pytest.raises(ValueError, match=r"pip install -e \.\[mazes\]"):
        mazes["make_environment"](np.random.RandomState(0))


def test_a_finished_data_set_is_not_rendered_again(mazes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for partition in ("train", "test"):
        (tmp_path / "datasets/memory_mazes" / partition).mkdir(parents=True)
        (tmp_path / "datasets/memory_mazes" / partition / "0.npy").touch()
    before = sorted(tmp_path.rglob("*"))
    mazes["main"](["--num_train", "1", "--num_test", "1"])
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match="memory_mazes: exists with fewer videos; remove it"):
        mazes["main"](["--num_train", "2", "--num_test", "1"])


def test_an_interrupted_rendering_goes_on_and_keeps_poses_beside(mazes, tmp_path, monkeypatch):
    rendered = []

    def render(seed, num_frames):
        rendered.append(seed)
        return np.zeros((num_frames, 2, 2, 3), np.uint8), np.ones((num_frames, 3), np.float32)

    monkeypatch.setitem(mazes["write_walk"].__globals__, "render_walk", render)
    jobs = mazes["walk_jobs"](7, 2, 1)
    for job in (jobs[0], *jobs):
        mazes["write_walk"](job, tmp_path, 4)
    assert rendered == [(7, 0, 0), (7, 0, 1), (7, 1, 0)]
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.npy"))
    videos = ["test/0.npy", "train/0.npy", "train/1.npy"]
    assert names == sorted([*videos, *(f"poses/{name}" for name in videos)])
    assert np.load(tmp_path / "poses/test/0.npy").shape == (4, 3)


def test_a_set_made_with_another_seed_is_not_taken_for_this_ones(mazes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "datasets/memory_mazes"
    for partition in ("train", "test"):
        (folder / partition).mkdir(parents=True)
        (folder / partition / "0.npy").touch()
    (folder / "source.txt").write_text("seed 3")
    with pytest.raises(ValueError, match="memory_mazes: was made with seed 3; remove it"):
        mazes["main"](["--num_train", "1", "--num_test", "1"])
    mazes["main"](["--num_train", "1", "--num_test", "1", "--seed", "3"])


def test_walks_of_an_interrupted_larger_run_are_left_out(mazes, tmp_path):
    for name in ("train/0.npy", "train/1.npy", "poses/train/0.npy", "poses/train/1.npy"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    mazes["_keep_only"](tmp_path, {"train/0.npy"})
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.npy"))
    assert left == ["poses/train/0.npy", "train/0.npy"]


def test_a_walk_has_its_seed_whatever_the_number_of_walks(mazes):
    few, many = mazes["walk_jobs"](0, 1, 1), mazes["walk_jobs"](0, 5, 5)
    assert set(few) < set(many) and len(set(many)) == 10
    assert not {seed for _, seed in mazes["walk_jobs"](1, 5, 5)} & {seed for _, seed in many}
