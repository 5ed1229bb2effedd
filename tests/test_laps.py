import numpy as np
import pytest

from improved_diffusion.evaluation.laps import (
    lap_numbers,
    mean_and_error,
    mean_by_lap,
    measure_laps,
    predictions,
)
from improved_diffusion.registry import FRAME_METRICS

T, OBS, PERIODS = 24, 6, (5, 6)
NUMPY_METRICS = {name: FRAME_METRICS[name]() for name in ("psnr", "ssim")}


@pytest.fixture
def truth():
    rng = np.random.default_rng(0)
    videos = [rng.integers(0, 256, (period, 3, 8, 8)) for period in PERIODS]
    return np.stack([v[np.arange(T) % len(v)] for v in videos]).astype(np.uint8)


def test_laps_count_from_the_end_of_what_is_observed():
    numbers = lap_numbers(20, 6, 5)
    assert numbers.tolist() == [0] * 6 + [2] * 5 + [3] * 5 + [4] * 4


@pytest.mark.parametrize("period", [7, 0])
def test_less_than_a_lap_observed_is_refused(period):
    with pytest.raises(ValueError, match="--obs_length 6: a lap of this video has"):
        lap_numbers(20, 6, period)


def test_a_lap_that_is_not_complete_has_no_mean():
    numbers = lap_numbers(20, 6, 5)
    means = mean_by_lap(np.arange(20.0), numbers, 5)
    np.testing.assert_array_equal(means, [8.0, 13.0, np.nan])


def test_decibels_are_averaged_as_squared_errors():
    values = np.array([np.inf, 10.0, 20, 20, 20, 20])
    means = mean_by_lap(values, np.array([2, 2, 3, 3, 4, 4]), 2, decibels=True)
    np.testing.assert_allclose(means, [10 + 10 * np.log10(2), 20, 20])


def test_perfect_memory_is_perfect(truth):
    for metric, best in (("psnr", np.inf), ("ssim", 1.0)):
        table = measure_laps(
            truth, truth, PERIODS, obs_length=OBS, metrics={metric: NUMPY_METRICS[metric]}
        )
        for name in ("samples", "own last lap", "one period earlier"):
            np.testing.assert_array_equal(table[name][metric], np.full((2, 3), best))
        assert (table["last observed frame"][metric] < 30).all()


def test_the_last_observed_frame_is_repeated(truth):
    last, later = predictions(truth[0], truth[0], OBS, PERIODS[0])["last observed frame"]
    assert last.shape == later.shape == (T - OBS, 3, 8, 8)
    assert (last == truth[0, OBS - 1]).all() and (later == truth[0, OBS:]).all()


def test_memory_that_fades_shows_lap_by_lap(truth):
    """Noise that doubles from lap to lap costs 6 dB in each; within a video the laps agree less well."""
    rng = np.random.default_rng(1)
    truth = np.clip(truth, 100, 155)  # so that nothing is cut off
    samples = truth.astype(float)
    for video, period in enumerate(PERIODS):
        scale = np.array([0, 0, 4, 8, 16, 16.0])[lap_numbers(T, OBS, period)]
        noise = rng.choice([-1.0, 1.0], samples.shape[1:])
        samples[video] += noise * scale[:, None, None, None]
    samples = samples.astype(np.uint8)
    table = measure_laps(samples, truth, PERIODS, obs_length=OBS, metrics=NUMPY_METRICS)
    psnr = table["samples"]["psnr"]
    np.testing.assert_allclose(psnr, np.tile(20 * np.log10(255 / np.array([4, 8, 16])), (2, 1)))
    assert (np.diff(table["samples"]["ssim"], axis=1) < 0).all()
    own = table["own last lap"]["psnr"]
    np.testing.assert_allclose(own[:, 0], psnr[:, 0])  # the lap before was observed
    assert (own[:, 1] < psnr[:, 1] + 1).all()


def test_a_video_that_is_wrong_may_agree_with_itself(truth):
    samples = truth.copy()
    for video, period in enumerate(PERIODS):
        samples[video, OBS:] = np.roll(truth[video], 2, axis=0)[:period][
            np.arange(T - OBS) % period
        ]
    table = measure_laps(samples, truth, PERIODS, obs_length=OBS, metrics=NUMPY_METRICS)
    assert (table["samples"]["psnr"] < 20).all()
    assert np.isinf(table["own last lap"]["psnr"][:, 1:]).all()


def test_short_videos_have_no_later_laps_and_do_not_count():
    values = np.array([[1.0, 4.0, np.nan], [3.0, np.nan, np.nan], [5.0, 8.0, np.nan]])
    mean, error, count = mean_and_error(values)
    np.testing.assert_allclose(mean, [3.0, 6.0, np.nan])
    np.testing.assert_allclose(error, [2 / np.sqrt(3), np.sqrt(8) / np.sqrt(2), np.nan])
    assert count.tolist() == [3, 2, 0]
    mean, error, _ = mean_and_error(np.full((2, 1), np.inf))
    assert np.isinf(mean) and np.isnan(error)


def test_videos_that_do_not_belong_together_are_refused(truth):
    for samples, periods in ((truth[:, 1:], PERIODS), (truth, PERIODS[:1])):
        with pytest.raises(ValueError, match="do not fit together"):
            measure_laps(samples, truth, periods, obs_length=OBS, metrics=NUMPY_METRICS)
