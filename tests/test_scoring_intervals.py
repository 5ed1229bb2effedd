"""Tables with intervals and differences, features of the truth for all runs, rows that stay."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t

from helpers import call_main, make_folder_dataset
from improved_diffusion.evaluation import intervals, metric_tables
from improved_diffusion.evaluation.comparison import video_differences
from improved_diffusion.evaluation.evaluate import Outcome, evaluate
from improved_diffusion.evaluation.metrics import (
    FeatureExtractor,
    FrameMetric,
    SampleMetric,
    VideoMetric,
)
from improved_diffusion.evaluation.options import EvalConfig
from improved_diffusion.frechet_video_distance import frechet_distance
from improved_diffusion.registry import FEATURES, FRAME_METRICS, SAMPLE_METRICS, VIDEO_METRICS
from improved_diffusion.sampling.results import EvalDir
from improved_diffusion.script_util import config_from_args

T, OBSERVED, NUM_VIDEOS = 10, 2, 9


class Colour(FeatureExtractor):
    """mean of each colour."""

    shared = True
    calls: list[bytes] = []

    def compute(self, video):
        self.calls.append(video.tobytes())
        return video.mean(axis=(0, 2, 3))


@pytest.fixture(autouse=True)
def colour(monkeypatch):
    monkeypatch.setattr(intervals, "HALVES", 30)
    monkeypatch.setattr(Colour, "calls", [])
    FEATURES["colour"] = Colour
    yield
    del FEATURES["colour"]


@pytest.fixture
def folders(tmp_path) -> list[EvalDir]:
    """Two evaluation directories: a little noise on the truth, and the truth made much darker."""
    data = make_folder_dataset(tmp_path / "data", num_train=NUM_VIDEOS, num_test=NUM_VIDEOS, T=T)
    return [make_eval_dir(data, name) for name in ("near", "dark")]


def make_eval_dir(data: Path, name: str, num_videos: int = NUM_VIDEOS) -> EvalDir:
    directory = EvalDir(data.parent / "results" / name)
    stored = {"T": T, "obs_length": OBSERVED, "observed_frames": list(range(OBSERVED))}
    dataset = {"dataset": str(data), "dataset_partition": "test"}
    directory.write_configs({"image_size": 32, "dataset": str(data)}, stored | dataset)
    for video in range(num_videos):
        directory.save_sample(video, 0, sampled(data, name, video))
    return directory


def truth(data: Path, video: int) -> np.ndarray:
    return np.load(data / f"test/{video}.npy").transpose(0, 3, 1, 2)


def sampled(data: Path, name: str, video: int) -> np.ndarray:
    frames = truth(data, video).astype(int)
    levels = np.random.default_rng(video).integers(-5, 6, (3, 1, 1))
    frames[OBSERVED:] = frames[OBSERVED:] // 2 if name == "dark" else frames[OBSERVED:] + levels
    return np.clip(frames, 0, 255).astype(np.uint8)


def score(*folders: EvalDir, modes=("fvd",), **options) -> Outcome:
    paths = tuple(str(folder.path) for folder in folders)
    values = {"eval_dir": paths, "modes": modes, "features": "colour"} | options
    result = evaluate(config_from_args(EvalConfig, values))
    result.raise_failures()
    return result


def info(folder: EvalDir) -> dict:
    (path,) = folder.path.glob("metrics_*.json")
    return json.loads(path.read_text())


# ---------------------------------------------------------------- intervals and differences


def test_a_table_says_and_prints_the_interval_beside_the_value(folders, tmp_path, capsys):
    score(folders[0], floor=True)
    row = info(folders[0])["metrics"]["fvd"]
    assert row["interval"]["low"] < row["mean"] < row["interval"]["high"]
    fake, real = (
        np.stack([video.mean(axis=(0, 2, 3)) for video in videos])
        for videos in (
            [sampled(tmp_path / "data", "near", v) for v in range(NUM_VIDEOS)],
            [truth(tmp_path / "data", v) for v in range(NUM_VIDEOS)],
        )
    )
    assert row["mean"] == pytest.approx(frechet_distance(fake, real)), "it is the value itself"
    sampled_halves = intervals.half_sample(lambda i: frechet_distance(fake[i], real[i]), NUM_VIDEOS)
    expected = sampled_halves.interval()
    assert row["interval"]["low"] == pytest.approx(expected.low)
    assert row["interval"]["at_half"] == pytest.approx(expected.at_half)
    floor = row["floor"]
    assert floor["interval"]["low"] < floor["value"] < floor["interval"]["high"]
    assert floor["shared_interval"]["low"] < floor["shared"] < floor["shared_interval"]["high"]
    shown = metric_tables.format_tables({"near": info(folders[0])})
    low, high = row["interval"]["low"], row["interval"]["high"]
    assert "95 % interval" in shown and f"[{low:.6g}, {high:.6g}]" in shown
    assert f"fvd of half as many videos: {expected.at_half:.6g} on average" in shown
    assert shown.count("[") == 3


def test_an_interval_is_computed_once_and_stays_while_it_is_true(folders, tmp_path, monkeypatch):
    score(folders[0])
    before = info(folders[0])["metrics"]["fvd"]["interval"]
    monkeypatch.setattr("improved_diffusion.evaluation.measurements.half_sample", lambda *_: None)
    score(folders[0])
    score(folders[0], modes=("psnr",))
    assert info(folders[0])["metrics"]["fvd"]["interval"] == before
    folders[0].save_sample(0, 0, sampled(tmp_path / "data", "dark", 0))
    score(folders[0])
    assert "interval" not in info(folders[0])["metrics"]["fvd"]


def test_few_videos_have_no_interval(tmp_path, folders):
    few = make_eval_dir(tmp_path / "data", "few", num_videos=7)
    score(few)
    row = info(few)["metrics"]["fvd"]
    assert set(row) == {"n", "mean", "standard_error", "infinite", "settings"}
    assert "interval" not in metric_tables.format_tables({"few": info(few)})


def test_strategies_are_compared_in_pairs(folders, capsys):
    found = {d.metric: d for d in score(*folders, modes=("fvd", "psnr", "ssim")).differences}
    assert {d.first + d.other for d in found.values()} == {"neardark"}
    assert found["fvd"].verdict == found["psnr"].verdict == "worse"
    near, dark = (
        metric_tables.read_table(next(folder.path.glob("*.pkl")))["ssim"].mean(axis=(1, 2))
        for folder in folders
    )
    exact = intervals.mean_interval(dark - near)
    assert found["ssim"].interval.low == pytest.approx(exact.low)
    assert found["ssim"].interval.high == pytest.approx(exact.high)
    fvd = [info(folder)["metrics"]["fvd"] for folder in folders]
    assert found["fvd"].interval.value == pytest.approx(fvd[1]["mean"] - fvd[0]["mean"])
    near_halves, dark_halves = (np.array(row["interval"]["of_halves"]) for row in fvd)
    spread = (dark_halves - near_halves).std(ddof=1) * np.sqrt(4 / 5)  # halves of 4 of 9 videos
    width = found["fvd"].interval.high - found["fvd"].interval.value
    assert width == pytest.approx(t.ppf(0.975, NUM_VIDEOS - 1) * spread), "paired by halves"
    (turned,) = score(*folders[::-1]).differences
    assert turned.interval.value == pytest.approx(-found["fvd"].interval.value)
    assert turned.verdict == "better"
    words = [word for folder in folders for word in ("--eval_dir", str(folder.path))]
    call_main("video_eval.py", "--eval_dir", words[1], words[3], "--modes", "psnr")
    assert "psnr: dark minus near: -" in capsys.readouterr().out


def test_a_strategy_does_not_differ_from_itself(folders, tmp_path):
    again = make_eval_dir(tmp_path / "data", "near")
    other = EvalDir(again.path.rename(tmp_path / "results" / "again"))
    folders[0] = make_eval_dir(tmp_path / "data", "near")
    for found in score(folders[0], other, modes=("fvd", "psnr")).differences:
        assert found.interval.value == 0 and found.verdict == "not told apart"


def test_perfect_frames_are_left_out_of_differences():
    first = np.array([[[20.0, np.inf]], [[np.inf, np.inf]], [[30.0, 40.0]]])
    other = np.array([[[23.0, 30.0]], [[np.inf, 30.0]], [[31.0, 43.0]]])
    np.testing.assert_array_equal(video_differences(first, other), [3.0, 2.0])


def test_sets_of_other_videos_are_not_paired(folders, tmp_path):
    few = make_eval_dir(tmp_path / "data", "few", num_videos=8)
    assert score(folders[0], few, allow_differences=True).differences == []


# ---------------------------------------------------------------- features of the truth


def test_features_of_the_truth_are_computed_once_for_all_runs(folders, tmp_path):
    for folder in folders:
        score(folder, floor=True)
    true = {truth(tmp_path / "data", video).tobytes() for video in range(NUM_VIDEOS)}
    assert sum(video in true for video in Colour.calls) == NUM_VIDEOS
    assert len(Colour.calls) == len(set(Colour.calls))
    kept = list((tmp_path / "truth-features").glob("colour_*.npy"))
    assert len(kept) == 3 * NUM_VIDEOS  # truth, the other partition, and this with frames shared
    before = info(folders[1])
    for path in [*kept, *(folders[1].path / "metrics_cache").iterdir()]:
        path.unlink()
    score(folders[1], floor=True)
    assert info(folders[1]) == before, "what was taken from another run is what is computed"


def test_another_truth_has_other_features(folders, tmp_path):
    score(folders[0])
    path = tmp_path / "data/test/0.npy"
    frames = np.load(path)
    frames[OBSERVED:] = 255 - frames[OBSERVED:]
    np.save(path, frames)
    score(folders[1])
    assert np.moveaxis(frames, -1, 1).tobytes() in Colour.calls


def test_extractors_that_do_not_say_all_they_depend_on_share_nothing(
    folders, tmp_path, monkeypatch
):
    monkeypatch.setattr(Colour, "shared", False)
    score(folders[0])
    assert not (tmp_path / "truth-features").exists()


def test_a_folder_that_cannot_be_written_keeps_nobody_from_scoring(
    folders, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("METRIC_CACHE_DIR", str(tmp_path / "file"))
    score(folders[0])
    assert "are not kept for other runs" in caplog.text


# ---------------------------------------------------------------- rows of other processes


class Red(FrameMetric):
    """mean of red."""

    def compute(self, samples, truth):
        return samples[:, 0].mean(axis=(1, 2)).astype(float)


class Ends(SampleMetric):
    """of the last frame."""

    columns = ("red", "red of the truth")
    reference_columns = ("red of the truth",)

    def compute(self, sample, truth):
        return np.array([video[-1, 0].mean() for video in (sample, truth.frames)])


class Centres(VideoMetric):
    """distance of the means."""

    def compute(self, samples, truth):
        return float(abs(samples.mean(axis=0) - truth.mean(axis=0)).sum())


def test_metrics_that_only_another_process_knows_stay_as_they_stand(folders, tmp_path):
    """And those of several columns are compared by column, where it says something of the samples."""
    FRAME_METRICS["red"], VIDEO_METRICS["centres"], SAMPLE_METRICS["ends"] = Red, Centres, Ends
    try:
        score(folders[0], modes=("red", "centres", "ends", "psnr"), floor=True)
        (of_ends,) = score(*folders, modes=("ends",)).differences
        assert of_ends.verdict == "differs", "neither more nor less red is better"
    finally:
        del FRAME_METRICS["red"], VIDEO_METRICS["centres"], SAMPLE_METRICS["ends"]
    assert of_ends.column == "red" and of_ends.interval.high < 0
    (path,) = folders[0].path.glob("*.pkl")
    before, rows = metric_tables.read_table(path), info(folders[0])["metrics"]
    score(folders[0], modes=("ssim",))
    after = metric_tables.read_table(path)
    assert set(after) == {"psnr", "ssim", "red", "centres", "ends"}
    for name in ("red", "centres", "ends"):
        np.testing.assert_array_equal(after[name], before[name])
        assert info(folders[0])["metrics"][name] == rows[name]
    folders[0].save_sample(0, 0, sampled(tmp_path / "data", "dark", 0))
    score(folders[0], modes=("ssim",))
    assert set(metric_tables.read_table(path)) == {"ssim"}, "of samples that are no more"
