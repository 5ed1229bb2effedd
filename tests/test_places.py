"""Coherence by place: what the metrics make of a judge's word, and the pose network itself."""

import numpy as np
import pytest
import torch

from helpers import call_main
from improved_diffusion.data import ray_mazes
from improved_diffusion.data.dataset_files import VideoFiles
from improved_diffusion.data.walks import (
    far_apart,
    load_poses,
    near_poses,
    relative_poses,
    within,
)
from improved_diffusion.evaluation import places, pose_network
from improved_diffusion.evaluation.metrics import TrueVideo
from improved_diffusion.evaluation.places import PlaceJumps, PlaceLpips, PlaceReturns, best_matches
from improved_diffusion.evaluation.pose_network import (
    Comparison,
    PoseJudge,
    PoseNetwork,
    Walks,
    load_pose_network,
    save_pose_network,
)
from improved_diffusion.evaluation.pose_training import calibrate, choose_frames, pose_loss
from improved_diffusion.registry import DATASETS
from improved_diffusion.sampling.results import EvalDir

KNOWN = Walks(("maze_laps",), step=0.25, turn=0.25)


class ExactJudge(PoseJudge):
    """Reads poses off the frames, where `picture` has written them."""

    def __init__(self) -> None:
        super().__init__(PoseNetwork(), KNOWN)

    def compare(self, frames, first, second):
        poses = frames[:, :, 0, 0] * np.array([0.1, 0.1, np.pi / 100])
        relative = relative_poses(poses)[first, second].astype(np.float32)
        same, overlap = within(relative) - 0.5, within(relative, 1.5, np.pi / 4) - 0.5
        nearness = -np.abs(relative).sum(axis=1)
        return Comparison(np.where(same > 0, 10 + nearness, -1), overlap, relative)


def picture(poses: list[tuple[float, float, float]]) -> np.ndarray:
    """uint8 [T, 3, 8, 8] that show where they were taken: x, y in tenths, heading in parts of pi."""
    values = np.array(poses) * [10, 10, 100]
    return np.broadcast_to(values.round()[:, :, None, None], (len(poses), 3, 8, 8)).astype(np.uint8)


@pytest.fixture
def score(monkeypatch):
    """(metric, sample, truth's frames, observed) -> its two numbers, told by the exact judge."""
    monkeypatch.setattr(places.PlaceMetric, "_judge", lambda self: ExactJudge())

    def compute(metric, sample, truth, observed=0, dataset="maze_laps"):
        predicted = np.arange(observed, len(sample))
        return metric().compute(sample, TrueVideo(truth, predicted, dataset, 0)).tolist()

    return compute


def line(start: float, stop: float) -> list[tuple[float, float, float]]:
    """A walk along x, 0.2 cells a frame."""
    number = round(abs(stop - start) / 0.2)
    return [(x, 1.0, 0.0) for x in np.linspace(start, stop, number, endpoint=False)]


# ---------------------------------------------------------------- poses


def test_a_relative_pose_leads_from_one_pose_to_the_other():
    poses = np.random.default_rng(0).uniform(-3, 3, (5, 3))
    ahead, aside, turn = np.moveaxis(relative_poses(poses), -1, 0)
    x, y, heading = poses.T[:, :, None]
    np.testing.assert_allclose(x + ahead * np.cos(heading) - aside * np.sin(heading), x.T + 0 * x)
    np.testing.assert_allclose(y + ahead * np.sin(heading) + aside * np.cos(heading), y.T + 0 * y)
    np.testing.assert_allclose(np.cos(heading + turn), np.cos(heading.T) + 0 * x)
    assert (np.abs(turn) <= np.pi).all()


def test_near_poses_share_a_place_and_a_heading_modulo_a_turn():
    pose = np.array([1.0, 1.0, np.radians(179)])
    others = [
        ([1.0, 1.0, np.radians(-179)], True),  # two degrees away
        ([1.0, 1.0, np.radians(179) + 6 * np.pi], True),
        ([1.49, 1.0, np.radians(179)], True),
        ([1.0, 1.51, np.radians(179)], False),
        ([1.0, 1.0, np.radians(158)], False),
    ]
    near = near_poses(np.array([pose, *(other for other, _ in others)]))
    assert near[0, 0] and near[0, 1:].tolist() == [expected for _, expected in others]
    np.testing.assert_array_equal(near, near.T)


def test_frames_are_far_apart_when_one_is_much_earlier():
    later, earlier = np.nonzero(far_apart(30))
    assert (later - earlier).min() == 21 and len(later) == 45


# ---------------------------------------------------------------- metrics


def test_the_share_of_impossible_steps_is_counted(score):
    truth = picture(line(0, 4))
    sample = picture([*line(0, 1.2), *line(3, 4), *line(0, 1.8)])  # two cuts in 20 frames
    assert score(PlaceJumps, sample, truth) == pytest.approx([200 / 19, 0])
    assert score(PlaceJumps, sample, truth, observed=8) == pytest.approx([100 / 12, 0])


def test_a_turn_that_is_too_large_is_a_jump(score):
    turned = picture([(1, 1, 0.1), (1, 1, 0.24), (1, 1, 0.44)])  # parts of pi, in one step
    assert score(PlaceJumps, turned, turned) == [50, 50]


def test_the_share_of_frames_that_come_back_is_counted(score):
    there_and_on = picture(line(0, 12))
    there_again = picture([*line(0, 6), *line(0, 6)])
    assert score(PlaceReturns, there_again, there_and_on) == [50, 0]
    # Its second half is sampled, and all of it returns.
    assert score(PlaceReturns, there_again, there_and_on, observed=30) == [100, 0]


def test_looking_back_is_not_coming_back(score):
    back = [(x, y, 1.0) for x, y, _ in line(6, 0)]
    sample = picture([*line(0, 6), *back])
    assert score(PlaceReturns, sample, sample) == [0, 0]


def test_lpips_compares_a_frame_with_the_one_from_the_nearest_pose(score, monkeypatch):
    seen = []

    def difference(self, frames, others):
        seen.append((frames[:, 0, 0, 0], others[:, 0, 0, 0]))
        return abs(frames.astype(float) - others).mean(axis=(1, 2, 3))

    monkeypatch.setattr(places.Lpips, "compute", difference)
    sample = picture([*line(0, 6), *line(0, 6)])
    assert score(PlaceLpips, sample, picture(line(0, 12)), observed=30) == pytest.approx(
        [0, np.nan], nan_ok=True
    )
    ((later, earlier),) = seen
    np.testing.assert_array_equal(later, earlier)
    assert len(later) == 30
    sample[30:, 1] += 2  # the same place, which looks otherwise now: y is 0.2 further
    ours, _ = score(PlaceLpips, sample, sample, observed=30)
    assert ours == pytest.approx(2 / 3)


def test_a_data_set_that_the_network_does_not_know_is_refused(score):
    frames = picture(line(0, 4))
    with pytest.raises(ValueError, match="knows maze_laps, not bouncy_balls.*train_pose_network"):
        score(PlaceJumps, frames, frames, dataset="bouncy_balls")


# ---------------------------------------------------------------- the network


@pytest.fixture
def judge() -> PoseJudge:
    torch.manual_seed(0)
    return PoseJudge(PoseNetwork(), KNOWN)


def test_pairs_are_compared_alike_in_batches_of_any_size(judge, monkeypatch):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (9, 3, 32, 32), dtype=np.uint8)
    first, second = rng.integers(9, size=(2, 50))
    whole = judge.compare(frames, first, second)
    monkeypatch.setattr(pose_network, "PAIRS_CHUNK", 7)
    parts = judge.compare(frames, first, second)
    for name in ("same", "overlap", "relative"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), atol=1e-6)
    assert judge.compare(frames, first[:0], second[:0]).relative.shape == (0, 3)


def test_larger_frames_are_averaged_and_smaller_ones_refused(judge):
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    pair = np.array([0]), np.array([1])
    small = judge.compare(frames, *pair)
    large = judge.compare(frames.repeat(2, axis=2).repeat(2, axis=3), *pair)
    np.testing.assert_allclose(large.relative, small.relative, atol=1e-5)
    with pytest.raises(ValueError, match="at least 32x32 pixels, not 16x16"):
        judge.compare(frames[:, :, ::2, ::2], *pair)


def test_a_stored_network_is_the_one_that_was_saved(judge, tmp_path):
    path = tmp_path / "pose.pt"
    save_pose_network(path, judge.network, KNOWN)
    loaded = load_pose_network(path)
    assert loaded.walks == KNOWN
    for name, value in judge.network.state_dict().items():
        torch.testing.assert_close(loaded.network.state_dict()[name], value.half().float())
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="pose.pt is no pose network"):
        load_pose_network(path)
    with pytest.raises(FileNotFoundError, match="train_pose_network.py"):
        load_pose_network(tmp_path / "missing.pt")


def test_training_frames_are_neighbours_and_returns():
    x = np.concatenate([np.arange(40), np.arange(40)]) * 0.2
    walk = np.stack([x, 0 * x, 0 * x], axis=1)  # the same way twice
    anchors, after, soon, others = choose_frames(walk, np.random.default_rng(0)).reshape(4, -1)
    assert (after == anchors + 1).all() and (soon > anchors).all()
    assert (np.abs(others - anchors) > 20).all() and (np.abs(x[others] - x[anchors]) < 0.51).all()


def test_the_loss_is_least_for_the_truth():
    poses = np.array([[0.0, 0, 0], [0.1, 0, 0], [1.0, 0, 0.1], [9.0, 0, 0]])
    relative = torch.from_numpy(relative_poses(poses)).float()
    same, overlap = within(relative.numpy()), within(relative.numpy(), 1.5, np.pi / 4)
    logits = torch.from_numpy(np.stack([same, overlap], axis=-1) * 40.0 - 20.0).float()
    told = torch.cat([logits, relative], dim=-1)
    assert pose_loss(told, relative).item() < 1e-6
    for part in range(5):
        wrong = told.clone()
        wrong[0, 1, part] = -20 if part < 2 else 3
        assert pose_loss(wrong, relative).item() > 0.1
    told[0, 3, 2:] = 7  # frames that do not overlap have no relative pose
    assert pose_loss(told, relative).item() < 1e-6


# ---------------------------------------------------------------- through the commands


@pytest.fixture
def mazes(tmp_path, monkeypatch):
    """The folder of maze_laps with two training videos and one test video."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    folder = tmp_path / "datasets/maze_laps_32"
    ray_mazes.make_dataset("maze_laps", folder, num_train=2, num_test=1)
    return folder


def test_the_training_command_writes_a_network_and_tells_its_accuracy(mazes, capsys):
    words = "--dataset maze_laps --batch_size 2 --device cpu".split()
    call_main("train_pose_network.py", *words, "--updates", 2)
    trained = capsys.readouterr().out
    assert "maze_laps" in trained and "true, found %" in trained
    stored = load_pose_network("pose_network.pt").walks
    steps = [np.diff(load_poses(path)[:, :2], axis=0) for path in (mazes / "train").iterdir()]
    assert stored.datasets == ("maze_laps",)
    assert stored.step == pytest.approx(max(np.hypot(*step.T).max() for step in steps))
    call_main("train_pose_network.py", *words, "--updates", 0)
    assert capsys.readouterr().out == trained
    for path in (mazes / "poses/train").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="poses"):
        call_main("train_pose_network.py", *words, "--updates", 2)


def test_as_many_frames_return_as_do_in_truth(mazes, judge):
    """Even an untrained network says so of videos that its threshold was set on."""
    sets = [("maze_laps", VideoFiles(DATASETS["maze_laps"], "train"))]
    calibrate(judge, sets)
    said, true = [], []
    for path in sets[0][1].paths:
        frames, poses = np.load(path).transpose(0, 3, 1, 2), load_poses(path)
        said.append(best_matches(judge, frames, np.arange(len(frames)))[0] > 0)
        true.append((near_poses(poses) & far_apart(len(poses))).any(axis=1))
    assert 0.5 < np.mean(true) < 0.95
    assert np.mean(said) == pytest.approx(np.mean(true), abs=0.01)


def test_the_network_of_the_repository_knows_a_walk_from_a_shuffled_one(mazes):
    frames = np.load(mazes / "test/0.npy").transpose(0, 3, 1, 2)
    directory = EvalDir("results")
    stored = {"T": 240, "obs_length": 60, "observed_frames": list(range(60))}
    dataset = {"dataset": "maze_laps", "dataset_partition": "test"}
    directory.write_configs({"image_size": 32, "dataset": "maze_laps"}, stored | dataset)
    sample = frames.copy()
    sample[60:] = np.random.default_rng(0).permutation(frames[60:])
    directory.save_sample(0, 0, sample)
    words = "--modes place_jumps place_returns --device cpu".split()
    call_main("video_eval.py", "--eval_dir", directory.path, *words)
    (path,) = directory.path.glob("metrics_*.pkl")
    table = np.load(path, allow_pickle=True)
    shuffled, true = table["place_jumps"][0, 0]
    assert true < 2 and shuffled > 60
    assert table["place_returns"][0, 0].min() > 90  # a shuffled lap is seen again, too
