import json
from pathlib import Path

import numpy as np
import pytest

from improved_diffusion.data.frame_masks import draw_frames

CASES = json.loads((Path(__file__).parent / "golden" / "masks.json").read_text())
DRAWS = 20_000
STD_OBSERVED = {300: 4.3, 60: 2.1, 40: 4.6}
STD_LATENT = {300: 5.4, 60: 2.7, 40: 5.3}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"T{case['T']}-K{case['max_frames']}")
def test_statistics_equal_the_published_sampler(case):
    rng = np.random.default_rng(0)
    T = case["T"]
    draws = [draw_frames(T, case["max_frames"], rng) for _ in range(DRAWS)]
    observed = np.array([len(observed) for observed, _ in draws])
    latent = np.array([len(latent) for _, latent in draws])
    span = np.array([latent[-1] - latent[0] for _, latent in draws])
    root = np.sqrt(DRAWS)
    assert abs(observed.mean() - case["mean_obs"]) < 5 * STD_OBSERVED[T] / root
    assert abs(latent.mean() - case["mean_latent"]) < 5 * STD_LATENT[T] / root
    assert abs((observed == 0).mean() - case["p_no_obs"]) < 5 * 0.5 / root
    assert abs(span.mean() - case["mean_latent_span"]) < 5 * span.std() / root
    total = np.bincount(observed + latent, minlength=len(case["hist_total"])) / DRAWS
    assert np.abs(total - case["hist_total"]).max() < 5 * 0.5 / root


@pytest.mark.parametrize("T, max_frames", [(1, 1), (1, 20), (3, 20), (20, 20), (21, 20), (500, 4)])
def test_frames_are_sorted_disjoint_inside_and_within_the_limit(T, max_frames):
    rng = np.random.default_rng(1)
    for _ in range(300):
        observed, latent = draw_frames(T, max_frames, rng)
        frames = np.concatenate([observed, latent])
        assert observed.dtype == latent.dtype == np.int64
        assert len(latent) > 0 and len(frames) <= max_frames
        assert len(np.unique(frames)) == len(frames)
        assert frames.min() >= 0 and frames.max() < T
        assert np.all(np.diff(observed) > 0) and np.all(np.diff(latent) > 0)


def test_a_short_video_is_used_up():
    rng = np.random.default_rng(2)
    for _ in range(100):
        observed, latent = draw_frames(7, 20, rng)
        assert len(observed) + len(latent) == 7


def test_the_generator_decides_alone():
    first, again, other = (draw_frames(300, 20, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_draw_costs_no_more_for_a_longer_video():
    class Counting:
        def __init__(self, seed):
            self.rng, self.draws = np.random.default_rng(seed), 0

        def __getattr__(self, name):
            self.draws += 1
            return getattr(self.rng, name)

    def draws(T):
        rngs = [Counting(seed) for seed in range(300)]
        for rng in rngs:
            draw_frames(T, 20, rng)
        return np.mean([rng.draws for rng in rngs])

    assert draws(100_000) < 1.5 * draws(300) < 60  # random numbers; a group of frames takes three


@pytest.mark.parametrize("T, max_frames", [(0, 5), (5, 0)])
def test_empty_videos_and_calls_are_refused(T, max_frames):
    with pytest.raises(ValueError, match="at least 1"):
        draw_frames(T, max_frames, np.random.default_rng(0))
