"""FVMD's histograms of motion, of trackers whose tracks are known."""

import json

import numpy as np
import pytest
import torch

from helpers import call_main, make_folder_dataset, scripted
from improved_diffusion.data.metric_weights import sha256
from improved_diffusion.evaluation import metric_tables
from improved_diffusion.evaluation.measurements import Workshop
from improved_diffusion.evaluation.options import EvalConfig
from improved_diffusion.evaluation.tracks import TrackFeatures, motion_histogram
from improved_diffusion.frechet_video_distance import frechet_distance
from improved_diffusion.sampling.results import EvalDir
from improved_diffusion.script_util import config_from_args


class RedIsWhere(torch.nn.Module):
    """All points of a grid move to the right with the mean of red, a pixel for each of 255 levels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        red = 255 * x[0, 0].mean(dim=(1, 2))
        grid = torch.stack([torch.arange(25) % 5, torch.arange(25) // 5], dim=1).float()
        moved = torch.stack([red, torch.zeros_like(red)], dim=1)
        return (grid[None] + moved[:, None])[None]


class ThreeNumbers(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(0, 3, 4))


class Nowhere(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full([1, x.shape[2], 25, 2], float("nan"))


def features(file: str, **options) -> TrackFeatures:
    known = {"tracker_size": 8, "tracker_range": "unit"} | options
    return TrackFeatures(TrackFeatures.Options(file, **known))


def redder(levels) -> np.ndarray:
    """uint8 [T, 3, 16, 16] of these levels of red."""
    frames = np.zeros((len(levels), 3, 16, 16), np.uint8)
    frames[:, 0] = np.array(levels)[:, None, None]
    return frames


def test_the_histogram_of_an_even_motion_is_known(tmp_path):
    """Two pixels a frame to the right: ceil(log2(1 + 2)) of 8, of 25 points and 3, then 4 frames."""
    found = features(scripted(tmp_path, RedIsWhere()), tracker_frames=8).compute(
        redder(2 * np.arange(8))
    )
    velocity, acceleration = found.reshape(2, 2, 8)
    right = 6  # of the angles from the y axis on, in eighths of a turn
    np.testing.assert_allclose(velocity[:, right], [3 * 25 * 2 / 8, 4 * 25 * 2 / 8])
    assert velocity.sum() == pytest.approx(velocity[:, right].sum()) and not acceleration.any()


def test_the_histogram_of_a_jump_down_is_known_of_each_part_of_the_grid():
    """It goes in frame 2, by three pixels, in the upper left quarter alone, and stands still before and after."""
    tracks = np.zeros((5, 11, 11, 2))  # a frame, a row and a column more than fill tubes
    tracks[2:, :5, :5, 1] = 3
    velocity, acceleration = motion_histogram(tracks).reshape(2, 1, 2, 2, 8)
    down, up = 4, 7
    expected = np.zeros((1, 2, 2, 8))
    expected[0, 0, 0, down] = 25 * 2 / 8
    np.testing.assert_allclose(velocity, expected)
    expected[0, 0, 0, up] = 25 * 2 / 8
    np.testing.assert_allclose(acceleration, expected)


def test_long_vectors_count_as_the_longest_and_published_sizes_give_1024_numbers():
    tracks = np.zeros((16, 20, 20, 2))
    tracks[1:, ..., 0] = 1000
    found = motion_histogram(tracks)
    assert found.shape == (1024,)
    assert found.reshape(2, -1)[0].sum() == pytest.approx(400 * 8 / 8)


def test_segments_share_a_frame_and_count_alike(tmp_path):
    levels = np.cumsum([0, 1, 1, 1, 5, 5, 5, 7, 7])  # the last two fill no segment of four
    file = scripted(tmp_path, RedIsWhere())
    found = features(file, tracker_frames=4).compute(redder(levels))
    parts = [features(file, tracker_frames=4).compute(redder(levels[i : i + 4])) for i in (0, 3)]
    np.testing.assert_allclose(found, np.mean(parts, axis=0))
    assert (parts[0] != parts[1]).any()


def test_what_no_tracker_is_or_takes_is_refused(tmp_path):
    file, video = scripted(tmp_path, RedIsWhere()), redder(np.arange(16))
    with pytest.raises(ValueError, match="needs a tracker: name its file, --tracker"):
        TrackFeatures(TrackFeatures.Options()).settings()
    with pytest.raises(ValueError, match="say what it takes, with --tracker_size"):
        TrackFeatures(TrackFeatures.Options(file)).settings()
    with pytest.raises(ValueError, match="--tracker_frames 3: must be 4 or more"):
        features(file, tracker_frames=3)
    with pytest.raises(ValueError, match="16 frames are too short for --tracker_frames 17"):
        features(file, tracker_frames=17).compute(video)
    for network, told in (
        (ThreeNumbers(), r"returns \[3, 16\] for 16 frames, not \[1, 16, points, 2\]"),
        (Nowhere(), "returns places that are not finite"),
    ):
        with pytest.raises(ValueError, match=told):
            features(scripted(tmp_path, network)).compute(video)
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="broken.pt is neither a TorchScript nor"):
        features(str(broken)).compute(video)


def test_fvmd_is_the_distance_of_these_histograms_beside_that_of_true_videos(tmp_path, capsys):
    data = make_folder_dataset(tmp_path / "data", num_train=4, num_test=4, T=8, size=16)
    for path in sorted((tmp_path / "data").glob("*/*.npy")):
        speed = 1 + int(path.stem) + (2 if path.parent.name == "train" else 0)
        np.save(path, np.moveaxis(redder(speed * np.arange(8)), 1, -1))
    folder = EvalDir(tmp_path / "results" / "fast")
    stored = {"T": 8, "obs_length": 1, "observed_frames": [0], "dataset_partition": "test"}
    folder.write_configs({"image_size": 16, "dataset": str(data)}, stored | {"dataset": str(data)})
    samples = [redder((9 + 3 * video) * np.arange(8)) for video in range(4)]
    for video, frames in enumerate(samples):
        folder.save_sample(video, 0, frames)
    file = scripted(tmp_path, RedIsWhere())
    words = f"--eval_dir {folder.path} --modes fvmd --floor --tracker {file} --tracker_size 8"
    words += " --tracker_range unit --tracker_frames 8"
    call_main("video_eval_fvd.py", *words.split())
    of = features(file, tracker_frames=8).compute
    fake, true, other = (
        np.stack([of(video) for video in videos])
        for videos in (
            samples,
            [redder((1 + i) * np.arange(8)) for i in range(4)],
            [redder((3 + i) * np.arange(8)) for i in range(4)],
        )
    )
    (path,) = folder.path.glob("metrics_*.pkl")
    row = json.loads(path.with_suffix(".json").read_text())["metrics"]["fvmd"]
    assert metric_tables.read_table(path)["fvmd"][0] == pytest.approx(frechet_distance(fake, true))
    assert row["floor"]["value"] == pytest.approx(frechet_distance(true, other))
    assert row["floor"]["value"] < row["mean"]
    said = {"size": 8, "range": "unit", "frames": 8, "tracker_sha256": sha256(file)}
    assert row["settings"] == {"features": "tracks"} | said
    assert f"tracker_sha256 {sha256(file)}" in capsys.readouterr().out


def test_without_a_tracker_the_other_metrics_are_computed():
    values = {"eval_dir": ("x",), "modes": ("fvmd", "motion")}
    ready, failures = Workshop(config_from_args(EvalConfig, values)).metrics()
    assert list(ready) == ["motion"] and "--tracker" in failures["fvmd"]
