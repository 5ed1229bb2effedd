"""recall-autoreg: which past moments look like now, and what is observed of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from improved_diffusion.data import frame_selection as select
from improved_diffusion.data.frame_distances import FrameDistances
from improved_diffusion.inference_utils import create_strategy, inference_strategies

T, PERIOD = 48, 12


def lap_videos(batch=1, period=PERIOD, seed=0):
    """[B, T, 3, 4, 4] videos that repeat themselves, with a little noise on each frame."""
    rng = np.random.default_rng(seed)
    laps = rng.uniform(-1, 1, (batch, period, 3, 4, 4))
    noise = 0.01 * rng.standard_normal((batch, T, 3, 4, 4))
    return (laps[:, np.arange(T) % period] + noise).astype(np.float32)


def make(max_frames=8, step_size=3, obs_length=PERIOD + 4, *, embed=None, **options):
    return create_strategy(
        "recall-autoreg",
        video_length=T,
        num_obs=obs_length,
        max_frames=max_frames,
        step_size=step_size,
        options={"distance": "l2", "recall_gap": 6} | options,
        embed=embed,
    )


def steps(strategy, videos):
    strategy.set_videos(videos)
    return list(strategy)


# ---------------------------------------------------------------- the pure functions


def moment_distances(embeddings, window):
    distances = FrameDistances(len(embeddings))
    distances.add(range(len(embeddings)), embeddings)
    return select.moment_distances(distances, window)


def test_moments_differ_by_the_mean_over_their_frames():
    embeddings = np.array([[0.0], [1.0], [5.0], [0.0], [2.0]])
    np.testing.assert_allclose(moment_distances(embeddings, 1), [4, 1, 9, 4, 0])
    # Frames (t-1, t) against (0, 2), the last two.
    distances = moment_distances(embeddings, 2)
    # Frame 0 has nothing before it: it is compared with the last frame alone.
    np.testing.assert_allclose(distances, [4, 0.5, (1 + 9) / 2, (25 + 4) / 2, 0])
    np.testing.assert_allclose(moment_distances(embeddings[:1], 3), [0])


def test_the_window_tells_moments_apart_that_one_frame_does_not():
    """The same place is passed in both directions: only the frames before say which."""
    there_and_back = np.array([[0.0], [1], [2], [3], [2], [1], [0], [7], [7], [1], [2]])
    one, two = (moment_distances(there_and_back, window) for window in (1, 2))
    assert one[2] == one[4] == 0 and two[2] == 0 < two[4]


@pytest.mark.parametrize(
    ("gap", "count", "expected"),
    [
        (1, 1, [6]),
        (2, 2, [5, 3]),
        (4, 1, [3]),
        (4, 2, [3]),
        (3, 2, [4, 1]),
        (7, 1, [0]),
        (8, 1, []),
        (9, 3, []),
    ],
)
def test_moments_keep_the_gap(gap, count, expected):
    # Nearer and nearer towards the last frame, which is frame 7.
    distances = np.array([9.0, 8, 7, 6, 5, 4, 3, 0])
    assert select.similar_moments(distances, gap, count) == expected


def test_the_earlier_of_two_equal_moments_counts():
    distances = np.array([4, 2, 1, 5, 1, 5, 5, 0])
    assert select.similar_moments(distances, 1, 2) == [2, 4]


@pytest.mark.parametrize(
    ("moments", "recent", "places", "expected"),
    [
        ([10], [38, 39], 5, [11, 12, 13, 38, 39]),
        ([10, 20], [38, 39], 6, [11, 12, 21, 22, 38, 39]),
        ([20, 10], [38, 39], 5, [11, 21, 22, 38, 39]),  # the first moment gets what is left over
        ([10, 11], [38, 39], 6, [11, 12, 13, 37, 38, 39]),  # frame 12 follows both
        ([], [38, 39], 4, [36, 37, 38, 39]),
        ([37], [38, 39], 5, [35, 36, 37, 38, 39]),  # nothing that is not recent follows
        ([10], [38, 39], 2, [38, 39]),
        ([10], [37, 38, 39], 2, [38, 39]),
        ([], [0], 4, [0]),
    ],
)
def test_places_are_shared_among_the_moments(moments, recent, places, expected):
    assert select.recalled_frames(moments, recent, places) == expected


# ---------------------------------------------------------------- the strategy


@pytest.mark.parametrize("as_tensor", [False, True])
def test_it_recalls_what_followed_one_period_earlier(as_tensor):
    videos = lap_videos(batch=2)
    videos = torch.from_numpy(videos) if as_tensor else videos
    for observed, latent in steps(make(), videos):
        for video in range(2):
            first = latent[video][0]
            recent = {first - 2, first - 1}
            followed = sorted(set(observed[video]) - recent)
            assert recent < set(observed[video]) and latent[0] == latent[1]
            assert followed[0] % PERIOD == first % PERIOD
            assert followed == list(range(followed[0], followed[0] + 3))


def test_each_video_recalls_by_what_it_shows_itself():
    videos = np.concatenate([lap_videos(period=10), lap_videos(period=14)])
    observed, latent = steps(make(obs_length=20), videos)[0]
    assert observed == [[10, 11, 12, 18, 19], [6, 7, 8, 18, 19]] and latent[0] == [20, 21, 22]


def test_moments_can_be_those_alone_that_real_frames_follow():
    videos = lap_videos()
    for observed, latent in steps(make(obs_length=PERIOD + 4, recall_from="observed"), videos):
        first = latent[0][0]
        followed = [frame for frame in observed[0] if frame < first - 2]
        assert followed[0] % PERIOD == first % PERIOD and followed[0] < PERIOD + 4
    videos[:] = videos[:, :1]  # every moment looks like now
    observed, latent = steps(make(obs_length=0, recall_from="observed"), videos)[-1]
    assert observed[0] == list(range(latent[0][0] - 5, latent[0][0]))  # nothing is real: as autoreg


def test_several_moments_come_from_several_laps():
    options = {"recall_moments": 2, "recall_recent": 1}
    for observed, latent in steps(make(obs_length=2 * PERIOD + 4, **options), lap_videos()):
        first = latent[0][0]
        followed = [frame for frame in observed[0] if frame < first - 1]
        starts = [frame for frame in followed if frame % PERIOD == first % PERIOD]
        assert len(starts) == 2 and len(followed) == 4


@pytest.mark.parametrize("obs_length", [0, 1, 4])
def test_with_too_little_past_it_does_what_autoreg_does(obs_length):
    videos = lap_videos()
    sizes = dict(video_length=T, num_obs=obs_length, max_frames=8, step_size=3)
    recalling = steps(make(obs_length=obs_length, recall_gap=T), videos)
    plain = list(create_strategy("autoreg", **sizes))
    assert [(o, latent) for (o,), (latent,) in recalling] == plain


@pytest.mark.parametrize("max_frames, step_size", [(2, 1), (4, 3), (9, 1), (20, 10)])
def test_every_size_gives_sound_steps_that_fill_the_network(max_frames, step_size):
    done = set(range(5))
    videos = lap_videos()
    for (observed,), (latent,) in steps(make(max_frames, step_size, 5, recall_moments=3), videos):
        assert len(observed) == min(len(done), max_frames - step_size) and set(observed) <= done
        done.update(latent)
    assert done == set(range(T))


def test_each_done_frame_is_embedded_once():
    seen = []

    def embed(frames):
        seen.append(len(frames))
        return frames.reshape(len(frames), -1)

    steps(make(embed=embed, distance="lpips"), lap_videos(batch=2))
    # Those observed, then three per step and video; the last step's are never asked for.
    assert seen[0] == 2 * (PERIOD + 4) and set(seen[1:]) == {6}
    assert sum(seen) < 2 * T


@pytest.mark.parametrize("name", ["recent", "window", "gap", "moments"])
def test_options_are_refused_below_one(name):
    with pytest.raises(ValueError, match=f"--recall_{name} 0: must be at least 1"):
        make(**{f"recall_{name}": 0})


def test_options_that_are_not_the_default_name_the_folder():
    strategy = inference_strategies["recall-autoreg"]
    plain = strategy.Options(distance="l2")
    other = strategy.Options(recall_recent=4, recall_moments=3)
    assert strategy.folder_suffix(plain) == ""
    assert strategy.folder_suffix(other) == "_recent4_moments3"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"recall_recent": 1}, [4, 5, 6, 7, 15]),
        ({"recall_recent": 3}, [4, 5, 13, 14, 15]),
        ({"recall_gap": 16}, [11, 12, 13, 14, 15]),
    ],
)
def test_options_change_what_is_observed(options, expected):
    (observed,), _ = steps(make(**options), lap_videos())[0]
    assert observed == expected


def late_samples(follow):
    """Where steps recall from, modulo the period, when each step's samples are a frame late."""
    videos, offsets = lap_videos(), []
    smooth = np.linspace(0, 1, PERIOD, endpoint=False)[np.arange(T) % PERIOD]
    videos[:] = np.sin(2 * np.pi * (smooth[:, None] + np.arange(16) / 16)).reshape(T, 1, 4, 4)
    strategy = make(obs_length=2 * PERIOD, recall_recent=1, recall_follow=follow, recall_window=1)
    strategy.set_videos(videos)
    for (observed,), (latent,) in strategy:
        offsets.append((latent[0] - observed[0]) % PERIOD)
        lag = 0.6 * len(offsets)
        phases = (np.array(latent) - lag) / PERIOD
        videos[0, latent] = np.sin(2 * np.pi * (phases[:, None] + np.arange(16) / 16)).reshape(
            -1, 1, 4, 4
        )
        strategy.set_videos(videos)
    return offsets


def test_a_recalled_moment_is_followed_when_samples_come_late():
    assert late_samples(1.0)[:3] == [0, 1, 1]
    assert late_samples(0.01)[:3] == [0, 0, 0]


@pytest.mark.parametrize("follow", [0, 1.1])
def test_the_factor_of_following_has_a_range(follow):
    with pytest.raises(ValueError, match="--recall_follow .*: must be above 0, at most 1"):
        make(recall_follow=follow)


def test_a_moment_is_not_followed_where_the_way_is_another():
    """Two stretches begin alike and differ then: the second one is recalled once it is seen."""
    rng = np.random.default_rng(0)
    frames = rng.uniform(-1, 1, (T, 3, 4, 4)).astype(np.float32)
    frames[12:14] = frames[2:4]  # 2 3 4 5 ... against 2 3 14 15 ...
    frames[26:36] = frames[12:22]
    strategy = make(6, 2, 28, recall_window=2, recall_recent=1)
    observed = [o[0] for o, _ in steps(strategy, frames[None])]
    assert observed[0][0] == 4 and observed[1][0] == 16


def test_it_is_offered_by_name_and_documented():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert "recall-autoreg" in inference_strategies and "`recall-autoreg`" in readme
