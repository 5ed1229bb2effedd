"""Distances between sets of videos: known answers, and how often their intervals hold them."""

import dataclasses

import numpy as np
import pytest

from improved_diffusion.evaluation import intervals
from improved_diffusion.evaluation.comparison import Difference, format_differences
from improved_diffusion.evaluation.intervals import (
    Interval,
    half_sample,
    mean_interval,
)
from improved_diffusion.frechet_video_distance import (
    extrapolated_frechet_distance,
    frechet_distance,
    jedi_distance,
    kernel_distance,
)

# Two Gaussians of d dimensions: N(0, 1) and N(SHIFT, SCALE^2).
D, SHIFT, SCALE = 4, 0.5, 1.3
FRECHET = D * (SHIFT**2 + (SCALE - 1) ** 2)


def gaussians(rng, n: int) -> tuple[np.ndarray, np.ndarray]:
    return SHIFT + SCALE * rng.standard_normal((n, D)), rng.standard_normal((n, D))


def kernel_mmd() -> float:
    """The squared discrepancy of both Gaussians with the kernel (x.y / d + 1)^3, from their moments."""

    def mean_kernel(one, two):
        first = [mean_vector(*one), mean_vector(*two)]
        second = [second_moments(*one), second_moments(*two)]
        third = [third_moments(*one), third_moments(*two)]
        powers = [(a * b).sum() / D**k for k, (a, b) in enumerate([first, second, third], start=1)]
        return 1 + 3 * powers[0] + 3 * powers[1] + powers[2]

    samples, truth = (SHIFT, SCALE), (0.0, 1.0)
    return (
        mean_kernel(samples, samples) + mean_kernel(truth, truth) - 2 * mean_kernel(samples, truth)
    )


def mean_vector(shift, scale):
    return np.full(D, shift)


def second_moments(shift, scale):
    return scale**2 * np.eye(D) + shift**2


def third_moments(shift, scale):
    m, unit = mean_vector(shift, scale), scale**2 * np.eye(D)
    symmetric = (
        np.einsum("i,jk->ijk", m, unit)
        + np.einsum("j,ik->ijk", m, unit)
        + np.einsum("k,ij->ijk", m, unit)
    )
    return symmetric + shift**3


def coverage(distance, target: float, *, n: int, trials: int, interval=None) -> float:
    """The share of seeded sets of n videos whose interval holds `target`."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(trials):
        samples, truth = gaussians(rng, n)

        def statistic(chosen, samples=samples, truth=truth):
            return distance(samples[chosen], truth[chosen])

        found = interval(statistic, n) if interval else half_sample(statistic, n).interval()
        hits += found.low <= target <= found.high
    return hits / trials


# ---------------------------------------------------------------- distances with known answers


def test_the_extrapolated_distance_loses_the_bias_of_few_videos():
    rng = np.random.default_rng(0)
    sets = [gaussians(rng, 40) for _ in range(100)]
    plain = np.mean([frechet_distance(*pair) for pair in sets])
    extrapolated = np.mean([extrapolated_frechet_distance(*pair) for pair in sets])
    assert plain > 1.3 * FRECHET
    assert extrapolated == pytest.approx(FRECHET, rel=0.1)


def test_the_extrapolation_is_a_line_through_halves():
    """Where the distance is exactly a + b / n the line finds a, for odd n too."""
    features = np.random.default_rng(0).standard_normal((11, 3))
    moved = features + 2  # the covariances are equal: no bias
    assert extrapolated_frechet_distance(moved, features) == pytest.approx(12)
    with pytest.raises(ValueError, match="11 and 10 videos: .* as many of both"):
        extrapolated_frechet_distance(moved, features[:10])
    with pytest.raises(ValueError, match="4 or more"):
        extrapolated_frechet_distance(moved[:3], features[:3])


def test_jedis_distance_is_that_of_second_moments():
    """With the kernel (x.y)^2 the feature space is that of products of two coordinates."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 5)), rng.standard_normal((9, 5)) + 1
    expected = 100 * ((x.T @ x / 7 - y.T @ y / 9) ** 2).sum() / 5**2
    assert jedi_distance(x, y) == pytest.approx(expected) and expected > 1
    assert jedi_distance(x, x) == pytest.approx(0, abs=1e-9)


# ---------------------------------------------------------------- intervals


@pytest.fixture
def few_halves(monkeypatch):
    """Enough for a share of hits, in seconds."""
    monkeypatch.setattr(intervals, "HALVES", 50)


def test_intervals_hold_the_known_kernel_distance(few_halves):
    assert coverage(kernel_distance, kernel_mmd(), n=32, trials=40) >= 0.85


def test_intervals_hold_the_known_distance_of_infinitely_many_videos(few_halves):
    assert coverage(extrapolated_frechet_distance, FRECHET, n=32, trials=12) >= 0.8


def test_intervals_of_the_frechet_distance_hold_its_mean_at_this_n(few_halves):
    rng = np.random.default_rng(7)
    mean = np.mean([frechet_distance(*gaussians(rng, 16)) for _ in range(300)])
    assert coverage(frechet_distance, mean, n=16, trials=20) >= 0.85
    assert mean > 1.5 * FRECHET


@pytest.mark.slow
def test_how_often_intervals_hold_the_known_distance():
    """The figures of docs/distances.md."""
    assert coverage(kernel_distance, kernel_mmd(), n=32, trials=100) >= 0.9
    assert coverage(extrapolated_frechet_distance, FRECHET, n=32, trials=40) >= 0.9


def test_resampling_with_replacement_would_tell_equal_sets_apart():
    """A video that is drawn twice is very like itself; between halves there is no such pair."""
    rng, missed, held = np.random.default_rng(0), 0, 0
    for _ in range(10):
        one, two = rng.standard_normal((2, 16, D))
        drawn = rng.integers(0, 16, (40, 16))
        low = np.quantile([kernel_distance(one[i], two[i]) for i in drawn], 0.025)
        missed += low > 0
        held += (
            half_sample(lambda i, x=one, y=two: kernel_distance(x[i], y[i]), 16).interval().low < 0
        )
    assert missed >= 8 and held >= 9


def test_an_interval_is_wide_enough_but_not_wider_than_a_known_error():
    """Of a mean the standard error is known: s / sqrt(n)."""
    values = np.random.default_rng(0).standard_normal(50)
    found = half_sample(lambda chosen: values[chosen].mean(), 50).interval()
    exact = mean_interval(values)
    assert found.value == pytest.approx(exact.value) == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(exact.high - exact.low, rel=0.15)
    assert found.at_half == pytest.approx(values.mean(), abs=0.05)
    again = half_sample(lambda chosen: values[chosen].mean(), 50).interval()
    assert found == again, "seeded"


def test_an_interval_is_written_to_two_digits_of_its_width():
    assert f"{Interval(0.24783, -2.5621, 3.0581):+}" == "+0.2 [-2.6, +3.1]"
    assert f"{Interval(592.71, 480.34, 705.08)}" == "593 [480, 705]"
    assert f"{Interval(-0.0009867, -0.008362, 0.006388)}" == "-0.0010 [-0.0084, 0.0064]"
    assert f"{Interval(0.0, 0.0, 0.0):+}" == "+0 [+0, +0]"


def test_halves_repeat_no_video_and_few_videos_have_no_interval():
    seen = []

    def statistic(chosen):
        seen.append(chosen)
        return float(len(set(chosen)))

    assert half_sample(statistic, 7) is None and not seen
    found = half_sample(statistic, 9).interval()
    assert found.at_half == 4 and found.value == 9
    assert len({tuple(chosen) for chosen in seen}) > 50
    assert mean_interval(np.ones(1)) is None


# ---------------------------------------------------------------- differences


def paired_difference(rng, n: int, worse: float) -> Interval:
    """Of two strategies whose samples of one video resemble each other."""
    truth, shared = rng.standard_normal((n, D)), rng.standard_normal((n, D))
    one, two = (shared + 0.5 * rng.standard_normal((n, D)) + shift for shift in (0.5, 0.5 + worse))
    of_one, of_two = (
        half_sample(lambda i, x=x: frechet_distance(x[i], truth[i]), n) for x in (one, two)
    )
    return (of_two - of_one).interval()


def test_equal_strategies_are_seldom_told_apart_and_unequal_ones_are(few_halves):
    rng = np.random.default_rng(0)
    equal = [paired_difference(rng, 16, 0.0).holds_zero for _ in range(20)]
    assert np.mean(equal) >= 0.9
    unequal = [paired_difference(rng, 16, 1.0).holds_zero for _ in range(5)]
    assert not any(unequal)


def test_a_difference_is_that_of_the_same_halves():
    """So it is what one gets from the difference itself, and of other videos there is none."""
    first, other = np.random.default_rng(0).standard_normal((2, 12))
    of_first, of_other = (half_sample(lambda i, x=x: x[i].mean() ** 2, 12) for x in (first, other))
    at_once = half_sample(lambda i: other[i].mean() ** 2 - first[i].mean() ** 2, 12)
    found, expected = (of_other - of_first).interval(), at_once.interval()
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected))
    with pytest.raises(ValueError, match="12 and 11 videos are not of the same halves"):
        of_first - half_sample(lambda i: first[i].mean(), 11)


@pytest.mark.parametrize(
    "metric, low, high, verdict",
    [
        ("fvd", -3.0, 1.0, "not told apart"),
        ("fvd", -3.0, -1.0, "better"),
        ("fvd", 1.0, 3.0, "worse"),
        ("psnr", 1.0, 3.0, "better"),
        ("psnr", -3.0, -1.0, "worse"),
        ("psnr", 0.0, 3.0, "not told apart"),
        ("lpips", np.nan, np.nan, "not told apart"),
        ("lap_psnr", 1.0, 3.0, "better"),
        ("lap_ssim", -3.0, -1.0, "worse"),
        ("lap_lpips", 1.0, 3.0, "worse"),
        ("place_jumps", -3.0, -1.0, "better"),
        ("place_lpips", 1.0, 3.0, "worse"),
        ("place_returns", 1.0, 3.0, "differs"),
        ("place_returns", -1.0, 3.0, "not told apart"),
    ],
)
def test_better_is_said_only_where_zero_is_outside(metric, low, high, verdict):
    found = Difference(metric, "a", "b", 16, Interval((low + high) / 2, low, high))
    assert found.verdict == verdict
    assert format_differences([found]).endswith(f"(16 videos, paired): {verdict}")
