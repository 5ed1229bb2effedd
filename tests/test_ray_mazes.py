import hashlib
import threading

import numpy as np
import pytest

from improved_diffusion.data import ray_casting, ray_mazes
from improved_diffusion.data.dataset_files import dataset_spec, prepare_dataset
from improved_diffusion.data.ray_casting import OPEN, Maze, Walk
from improved_diffusion.data.ray_mazes import make_dataset, make_video
from improved_diffusion.data.video_datasets import get_test_dataset
from improved_diffusion.registry import DATASETS

WORLDS = ("colour_mazes", "maze_laps")
# Of the bytes of video 0, training and test, at 32x32: every machine makes the same ones.
SHA256 = {
    ("colour_mazes", "train"): "7c3af54a5f29b1c03f8c536f8a91c2ca6f3fd62b0c0d67241cd4d271dae33090",
    ("colour_mazes", "test"): "7010008ed298acbfee9a8195f9d1fe5c139449c44f4c7cbc6dbd07536a6e3bb5",
    ("maze_laps", "train"): "335c9c0a4bbeb105f01c3c58526633278d0258625c3c7b1794d91639a2b3c86a",
    ("maze_laps", "test"): "f9de98d38ff7cf1dc6e9c04d40a6bf224f4b1f1d76810122fd8962e52bcbf8dd",
}


@pytest.fixture(scope="module")
def laps():
    return [make_video("maze_laps", "test", i) for i in range(6)]


@pytest.fixture(scope="module")
def wanders():
    return [make_video("colour_mazes", "test", i) for i in range(3)]


def distances_to_walls(video):
    """[T]: from the agent to the nearest point of any wall, in cells."""
    ys, xs = np.nonzero(video.walls != OPEN)
    gaps = []
    for place, low in ((video.poses[:, :1], xs), (video.poses[:, 1:2], ys)):
        gaps.append(np.maximum(np.maximum(low - place, place - low - 1), 0))
    return np.hypot(*gaps).min(axis=1)


@pytest.mark.parametrize("name, partition", SHA256)
def test_bytes_are_those_of_every_other_machine(name, partition):
    digest = hashlib.sha256(make_video(name, partition, 0).frames).hexdigest()
    assert digest == SHA256[name, partition]


def test_rounded_sines_are_far_from_where_rounding_tips_over():
    angles = np.arange(ray_casting.HEADINGS) * (2 * np.pi / ray_casting.HEADINGS)
    for values in (np.cos(angles), np.sin(angles)):
        fraction = values * 2.0**20 % 1
        assert np.abs(fraction - 0.5).min() > 1e-6


def test_frames_a_period_apart_are_the_same_bytes(laps):
    for video in laps:
        period = video.period
        assert 40 <= period < 60 and len(video.frames) == 240 >= 4 * period
        np.testing.assert_array_equal(video.frames[period:], video.frames[:-period])
        np.testing.assert_array_equal(video.poses[period:], video.poses[:-period])
        shorter = [n for n in range(1, period) if (video.frames[n:] == video.frames[:-n]).all()]
        assert not shorter


def test_the_last_frame_of_a_lap_leads_on_to_the_first(laps):
    """A period of floats that only nearly closes would jump there."""
    for video in laps:
        places = video.poses[: video.period + 1, :2]
        steps = np.hypot(*np.diff(places, axis=0).T)
        assert abs(steps[-1] - steps[:-1].max()) < 0.1 and steps.max() < 0.27


def test_rings_of_several_sizes_and_both_directions():
    turns, shapes = set(), set()
    for i in range(12):
        video = make_video("maze_laps", "train", i, size=8)
        headings = np.unwrap(video.poses[: video.period + 1, 2].astype(np.float64))
        turns.add(round((headings[-1] - headings[0]) / (2 * np.pi)))
        shapes.add(video.walls.shape)
    assert turns == {-1, 1} and len(shapes) >= 3


@pytest.mark.parametrize("world", ["laps", "wanders"])
def test_neighbouring_frames_help(world, request):
    frames = np.stack([v.frames for v in request.getfixturevalue(world)]) / 127.5 - 1
    change = ((frames[:, 1:] - frames[:, :-1]) ** 2).mean()
    assert change < 0.05 < 0.15 < frames.var()


@pytest.mark.parametrize("world", ["laps", "wanders"])
def test_the_agent_stays_away_from_walls_and_walks_evenly(world, request):
    for video in request.getfixturevalue(world):
        assert distances_to_walls(video).min() > 0.2
        assert np.hypot(*np.diff(video.poses[:, :2], axis=0).T).max() < 0.3
        turn = np.abs((np.diff(video.poses[:, 2]) + np.pi) % (2 * np.pi) - np.pi)
        assert turn.max() < 0.3


def test_the_wanderer_comes_back_often(wanders):
    for video in wanders:
        cells = np.floor(video.poses[:, :2]).astype(int)
        arrivals = cells[1:][(np.diff(cells, axis=0) != 0).any(axis=1)]
        assert len(np.unique(arrivals, axis=0)) < 0.6 * len(arrivals)


def test_mazes_are_connected_have_loops_and_no_dead_ends():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        is_open = ray_mazes.maze_map(rng, 3 + seed % 2, 4)
        reached = np.zeros_like(is_open)
        reached[1, 1] = True
        for _ in range(is_open.size):
            grown = reached.copy()
            for axis in (0, 1):
                for shift in (-1, 1):
                    grown |= np.roll(reached, shift, axis)
            reached = grown & is_open
        assert (reached == is_open).all() and not is_open[[0, -1]].any()
        ways = sum(np.roll(is_open, shift, axis) for axis in (0, 1) for shift in (-1, 1))
        assert ways[is_open].min() >= 2


def test_pictures_show_walls_where_they_are():
    """Looking along a corridor at a wall four cells away, with walls of two colours beside it."""
    walls = np.full((3, 6), 0, dtype=np.int8)  # red
    walls[1, 1:5] = OPEN
    walls[0], walls[2] = 3, 5  # green on the left (north), blue on the right
    grey = np.array([50.0, 50.0, 50.0])
    maze = Maze(walls, floor=grey, sky=4 * grey)
    walk = Walk(np.array([[1.0, 1.5]]), np.array([0]))
    (picture,) = ray_casting.render(maze, walk, 32).astype(int)
    assert (picture[:8, 16] == 200).all() and (picture[-8:, 16] <= 50).all()
    assert picture[16, 16].argmax() == 0 and picture[16, 2].argmax() == 1
    assert picture[16, 29].argmax() == 2
    # A wall 0.8 high in the distance 4 takes 0.8 / 4 of half the height of the image.
    is_red = (picture[:, 16].argmax(axis=1) == 0) & (np.ptp(picture[:, 16], axis=1) > 20)
    assert is_red.sum() == pytest.approx(0.8 / 4 * 16, abs=1)
    assert not np.array_equal(picture[16, 2], picture[12, 2])  # bricks


def test_rays_meet_the_first_wall_at_the_right_distance():
    walls = np.full((5, 5), 1, dtype=np.int8)
    walls[1:4, 1:4] = OPEN
    directions = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [1.0, 0.5], [0.5, -1.0]])
    distance, along, _ = ray_casting.cast_rays(walls, np.array([2.5, 2.5]), directions)
    np.testing.assert_allclose(distance, 1.5)
    np.testing.assert_allclose(along, [2.5, 2.5, 2.5, 3.25, 3.25])


def test_a_larger_image_shows_the_same(laps):
    large = make_video("maze_laps", "test", 0, size=64)
    halved = large.frames[:60].astype(float).reshape(60, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    error = np.abs(halved - laps[0].frames[:60])
    assert error.mean() < 4 and large.period == laps[0].period
    np.testing.assert_array_equal(large.poses, laps[0].poses)


def test_files_do_not_depend_on_the_number_of_workers(tmp_path):
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        make_dataset("maze_laps", folder, 8, num_train=3, num_test=2, num_workers=workers)
    one, three = (sorted(tmp_path.glob(f"{n}/**/*.np?")) for n in (1, 3))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in three] and len(one) == 15
    assert np.load(tmp_path / "1/train/2.npy").shape == (240, 8, 8, 3)
    assert np.load(tmp_path / "1/poses/test/1.npy").shape == (240, 3)
    kept = np.load(tmp_path / "1/maps/test/1.npz")
    video = make_video("maze_laps", "test", 1, size=8)
    assert kept["period"] == video.period and np.array_equal(kept["walls"], video.walls)


def test_training_and_test_videos_have_seeds_of_their_own():
    videos = [
        make_video(*key, size=8) for key in (("maze_laps", "train", 0), ("maze_laps", "test", 0))
    ]
    videos.append(make_video("maze_laps", "train", 0, size=8, seed=1))
    digests = {video.frames.tobytes() for video in videos}
    assert len(digests) == 3


@pytest.fixture
def few_videos(tmp_path, monkeypatch):
    """Data sets of three videos, below a folder of their own; the names of those that were made."""
    make_video, made = ray_mazes.make_video, []

    def only_few(name, partition, index, **options):
        made.append((name, options["size"]))
        return make_video(name, partition, index, **options)

    monkeypatch.setattr(ray_mazes, "make_video", only_few)
    monkeypatch.setitem(make_dataset.__kwdefaults__, "num_train", 2)
    monkeypatch.setitem(make_dataset.__kwdefaults__, "num_test", 1)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    return made


@pytest.mark.parametrize("name", WORLDS)
def test_worlds_are_made_on_first_use_at_the_size_that_is_wanted(few_videos, name):
    assert DATASETS[name].T == ray_mazes.WORLDS[name].num_frames
    for size in (32, 64):
        videos = get_test_dataset(name, T=5, image_size=size)
        assert videos.read(0).shape == (5, 3, size, size)
        assert dataset_spec(name, image_size=size).root.name == f"{name}_{size}"
    assert few_videos == [(name, 32)] * 3 + [(name, 64)] * 3


def test_one_of_several_makes_the_videos_and_the_others_wait(few_videos):
    spec = dataset_spec("maze_laps")
    threads = [threading.Thread(target=prepare_dataset, args=(spec,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(few_videos) == 3 and len(list((spec.root / "train").iterdir())) == 2
