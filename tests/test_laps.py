import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from helpers import call_main, make_folder_dataset
from improved_diffusion.data.walks import map_path
from improved_diffusion.evaluation import gallery
from improved_diffusion.evaluation.laps import (
    LAPS,
    PREDICTIONS,
    LapPsnr,
    LapSsim,
    lap_numbers,
    mean_by_lap,
    predictions,
)
from improved_diffusion.evaluation.metrics import TrueVideo
from improved_diffusion.evaluation.options import EvalConfig, GifConfig
from improved_diffusion.evaluation.scored_set import ScoredSet
from improved_diffusion.sampling.results import EvalDir

T, OBS, PERIODS = 24, 6, (5, 6)


def repeating(period: int, num_frames: int = T, observed: int = OBS) -> TrueVideo:
    frames = np.random.default_rng(period).integers(0, 256, (period, 3, 8, 8), dtype=np.uint8)
    order = np.arange(num_frames) % period
    return TrueVideo(frames[order], np.arange(observed, num_frames), "maze_laps", period)


def by_prediction(metric, sample: np.ndarray, truth: TrueVideo) -> dict[str, list[float]]:
    """{prediction: a number per lap}."""
    values = metric().compute(sample, truth)
    assert len(values) == len(metric.columns)
    found = dict(zip(metric.columns, values, strict=True))
    return {name: [found[f"lap {lap}: {name}"] for lap in LAPS] for name in PREDICTIONS}


def test_laps_count_from_the_end_of_what_is_observed():
    assert lap_numbers(repeating(5, 20)).tolist() == [2] * 5 + [3] * 5 + [4] * 4


def test_videos_without_laps_are_refused():
    truth = repeating(5)
    with pytest.raises(ValueError, match="--obs_length 4: a lap of this video has 5 frames"):
        lap_numbers(dataclasses.replace(truth, predicted=np.arange(4, T)))
    with pytest.raises(ValueError, match="colour_mazes do not repeat.*can be scored on maze_laps"):
        lap_numbers(dataclasses.replace(truth, dataset="colour_mazes", period=0))
    with pytest.raises(ValueError, match="all observed frames are at the start"):
        lap_numbers(dataclasses.replace(truth, predicted=np.arange(OBS, T - 5)))


def test_columns_are_references_where_the_sample_changes_nothing():
    truth, rng = repeating(5), np.random.default_rng(1)
    samples = [rng.integers(0, 256, truth.frames.shape, dtype=np.uint8) for _ in range(2)]
    one, two = (LapPsnr().compute(sample, truth) for sample in samples)
    same = [name for name, a, b in zip(LapPsnr.columns, one, two, strict=True) if a == b]
    assert tuple(same) == LapPsnr.reference_columns and len(same) == 6


def test_a_lap_that_is_not_complete_has_no_mean():
    numbers = lap_numbers(repeating(5, 20))
    np.testing.assert_array_equal(mean_by_lap(np.arange(14.0), numbers, 5), [2.0, 7.0, np.nan])


def test_decibels_are_averaged_as_squared_errors():
    values = np.array([np.inf, 10.0, 20, 20, 20, 20])
    means = mean_by_lap(values, np.array([2, 2, 3, 3, 4, 4]), 2, decibels=True)
    np.testing.assert_allclose(means, [10 + 10 * np.log10(2), 20, 20])


@pytest.mark.parametrize("metric, best", [(LapPsnr, np.inf), (LapSsim, 1.0)])
@pytest.mark.parametrize("period", PERIODS)
def test_perfect_memory_is_perfect(metric, best, period):
    truth = repeating(period)
    found = by_prediction(metric, truth.frames, truth)
    for name in ("samples", "own last lap", "one period earlier"):
        assert found[name] == [best] * 3
    assert max(found["last observed frame"]) < 30


def test_the_last_observed_frame_is_repeated():
    truth = repeating(5)
    last, later = predictions(truth.frames, truth)["last observed frame"]
    assert last.shape == later.shape == (T - OBS, 3, 8, 8)
    assert (last == truth.frames[OBS - 1]).all() and (later == truth.frames[OBS:]).all()


@pytest.mark.parametrize("period", PERIODS)
def test_memory_that_fades_shows_lap_by_lap(period):
    """Noise that doubles from lap to lap costs 6 dB in each; within a video the laps agree less well."""
    rng = np.random.default_rng(1)
    truth = repeating(period)
    frames = np.clip(truth.frames, 100, 155)  # so that nothing is cut off
    truth = dataclasses.replace(truth, frames=frames)
    scale = np.array([0, 0, 4, 8, 16, 16])[lap_numbers(truth)][:, None, None, None]
    sample = frames.astype(int)
    sample[OBS:] += rng.choice([-1, 1], sample[OBS:].shape) * scale
    psnr = by_prediction(LapPsnr, sample.astype(np.uint8), truth)
    np.testing.assert_allclose(psnr["samples"], 20 * np.log10(255 / np.array([4, 8, 16])))
    ssim = by_prediction(LapSsim, sample.astype(np.uint8), truth)
    assert (np.diff(ssim["samples"]) < 0).all()
    assert psnr["own last lap"][0] == pytest.approx(psnr["samples"][0])  # the lap before is true
    assert psnr["own last lap"][1] < psnr["samples"][1] + 1


def test_a_video_that_is_wrong_may_agree_with_itself():
    truth = repeating(5)
    sample = truth.frames.copy()
    sample[OBS:] = np.roll(truth.frames, 2, axis=0)[:5][np.arange(T - OBS) % 5]
    found = by_prediction(LapPsnr, sample, truth)
    assert max(found["samples"]) < 20 and found["own last lap"][1:] == [np.inf, np.inf]


# ---------------------------------------------------------------- through the command


@pytest.fixture
def eval_dir(tmp_path, monkeypatch) -> EvalDir:
    """Samples of two videos that repeat themselves: a lap of truth, then noise."""
    monkeypatch.chdir(tmp_path)
    data = make_folder_dataset(tmp_path / "data", T=T, num_test=2)
    directory = EvalDir(tmp_path / "results")
    stored = {"T": T, "obs_length": OBS, "observed_frames": list(range(OBS))}
    dataset = {"dataset": str(data), "dataset_partition": "test"}
    directory.write_configs({"image_size": 32, "dataset": str(data)}, stored | dataset)
    for video, period in enumerate(PERIODS):
        path = data / f"test/{video}.npy"
        frames = np.load(path)[np.arange(T) % period]
        np.save(path, frames)
        map_path(path).parent.mkdir(parents=True, exist_ok=True)
        np.savez(map_path(path), period=period)
        frames[2 * OBS :] = 255 - frames[2 * OBS :]
        directory.save_sample(video, 0, frames.transpose(0, 3, 1, 2))
    return directory


def score(directory: EvalDir) -> tuple[dict, dict]:
    """The table, and the rows of the .json beside it."""
    words = ["--eval_dir", directory.path, "--modes", "psnr", "lap_psnr", "lap_ssim"]
    call_main("video_eval.py", *words)
    (path,) = directory.path.glob("metrics_*.pkl")
    rows = json.loads(path.with_suffix(".json").read_text())["metrics"]
    return pickle.loads(path.read_bytes()), rows


def test_laps_are_scored_like_any_metric(eval_dir, capsys):
    table, rows = score(eval_dir)
    assert table["lap_psnr"].shape == table["lap_ssim"].shape == (2, 1, len(LapPsnr.columns))
    columns, ssim = (
        {row.pop("name"): row for row in rows[m]["columns"]} for m in rows if m != "psnr"
    )
    assert tuple(columns) == LapPsnr.columns
    assert columns["lap 3: one period earlier"] == {
        "n": 0,
        "mean": None,
        "standard_error": None,
        "infinite": 2,
    }
    assert columns["lap 3: samples"]["n"] == 2 and columns["lap 3: samples"]["standard_error"] > 0
    assert ssim["lap 4: one period earlier"]["mean"] == 1
    assert ssim["lap 4: samples"]["mean"] < 0.9
    printed = capsys.readouterr().out
    assert "\nlap_psnr lap 2: last observed frame      2       1 " in printed


def test_a_data_set_without_periods_is_refused_in_one_line_and_the_rest_is_scored(eval_dir):
    for path in Path("data/maps/test").iterdir():
        path.unlink()
    with pytest.raises(ValueError) as told:
        score(eval_dir)
    said = str(told.value)
    assert said.startswith("not computed: lap_psnr, lap_ssim: the videos of data do not repeat")
    (path,) = eval_dir.path.glob("metrics_*.pkl")
    assert list(pickle.loads(path.read_bytes())) == ["psnr"]


def test_a_new_period_is_scored_anew(eval_dir):
    before, _ = score(eval_dir)
    np.savez(map_path(Path("data/test/0.npy")), period=4)
    after, _ = score(eval_dir)
    assert not np.array_equal(before["lap_ssim"][0], after["lap_ssim"][0], equal_nan=True)
    np.testing.assert_array_equal(before["lap_ssim"][1], after["lap_ssim"][1])


def test_a_period_is_counted_in_the_frames_that_are_read(eval_dir):
    data = Path("data").resolve()
    sampled = {"T": 12, "obs_length": 6, "observed_frames": list(range(6)), "dataset": str(data)}
    trained = {"image_size": 32, "dataset": str(data), "frame_stride": 2}
    strided = EvalDir("strided")
    strided.write_configs(trained, sampled | {"dataset_partition": "test"})
    for video in range(2):
        strided.save_sample(video, 0, np.zeros((12, 3, 32, 32), np.uint8))
    config = EvalConfig(eval_dir=("strided",))
    with pytest.raises(ValueError, match="--frame_stride 2: .*0.npy repeats itself after 5 frames"):
        ScoredSet.resolve(config, strided.path).periods  # noqa: B018
    np.savez(map_path(data / "test/0.npy"), period=4)
    assert ScoredSet.resolve(config, strided.path).periods == [2, 3]


def test_gifs_say_which_lap_a_frame_is_of_where_the_videos_shown_share_one(eval_dir, monkeypatch):
    notes = {}
    monkeypatch.setattr(gallery, "captioned", lambda grid, titles, said: notes.update(last=said))
    monkeypatch.setattr(gallery, "write_video", lambda *_, **__: None)

    def shown(**options) -> list[str]:
        folder = str(eval_dir.path)
        gallery.make_gallery(GifConfig(eval_dir=(folder,), grid=True, **options))
        return notes["last"]

    one = shown(num_videos=1, add_gt=True)
    assert one[:7] == [f"frame {i}, lap 1, observed" for i in range(6)] + ["frame 6, lap 2"]
    assert (one[10], one[11], one[16]) == ("frame 10, lap 2", "frame 11, lap 3", "frame 16, lap 4")
    assert shown(add_gt=True, every=3)[2] == "frame 6"  # laps of 5 and of 6 frames
    assert shown(num_videos=1)[6] == "frame 6"  # without the truth nobody looks
