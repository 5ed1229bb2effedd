"""Inference strategies: golden schedules, properties over many sizes, refusals."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golden_fill import array
from improved_diffusion.data import frame_selection
from improved_diffusion.data.frame_distances import FrameDistances
from improved_diffusion.inference_utils import (
    InferenceStrategyBase,
    create_strategy,
    inference_strategies,
    load_optimal_schedule,
)

GOLDEN = Path(__file__).parent / "golden"
SCHEDULES = json.loads((GOLDEN / "schedules.json").read_text())
ADAPTIVE_SCHEDULES = json.loads((GOLDEN / "adaptive.json").read_text())
MODES = list(inference_strategies)
ADAPTIVE_MODES = [mode for mode in MODES if inference_strategies[mode].is_adaptive]
PLAIN_MODES = [mode for mode in MODES if mode not in ADAPTIVE_MODES]
L2 = {"distance": "l2"}


def make(mode, T, obs_length, max_frames, step_size, **options):
    return create_strategy(
        mode,
        video_length=T,
        num_obs=obs_length,
        max_frames=max_frames,
        step_size=step_size,
        **options,
    )


def case_name(case):
    sizes = (case[key] for key in ("mode", "T", "obs_length", "max_frames", "step_size"))
    return "-".join(map(str, sizes))


def golden_strategy(case, **options):
    sizes = (case[key] for key in ("mode", "T", "obs_length", "max_frames", "step_size"))
    return make(*sizes, **options)


# The class in README.md's section on new inference modes, unchanged.
# fmt: off
class Autoregressive(InferenceStrategyBase):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

    def next_indices(self):
        obs_frame_indices = sorted(self._done_frames)[-(self._max_T - self._step_size):]
        first_idx = obs_frame_indices[-1] + 1
        latent_frame_indices = list(range(first_idx, min(first_idx + self._step_size, self._video_length)))
        return obs_frame_indices, latent_frame_indices
# fmt: on


@pytest.mark.parametrize("case", SCHEDULES, ids=case_name)
def test_steps_equal_golden(case):
    steps = [[sorted(observed), sorted(latent)] for observed, latent in golden_strategy(case)]
    assert steps == case["steps"]


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("case", ADAPTIVE_SCHEDULES, ids=case_name)
def test_adaptive_steps_equal_golden(case, as_tensor):
    videos = array(case["video_tag"], [case["B"], case["T"], *case["frame_shape"]])
    strategy = golden_strategy(case, options={"distance": case["distance"]})
    strategy.set_videos(torch.from_numpy(videos) if as_tensor else videos)
    assert [list(step) for step in strategy] == case["steps"]


def test_long_range_has_two_names():
    assert inference_strategies["mixed-autoreg-independent"] is inference_strategies["long-range"]


@pytest.mark.parametrize("sizes", [(300, 36, 20, 10), (60, 10, 10, 3), (40, 0, 10, 5)], ids=str)
def test_readme_class_equals_autoreg(sizes):
    steps = list(Autoregressive(*sizes))
    assert steps == list(make("autoreg", *sizes))
    assert len(steps) > 3


def test_attributes_follow_the_iteration():
    strategy = Autoregressive(12, 4, 6, 3)
    assert (strategy._video_length, strategy._num_obs, strategy._step_size) == (12, 4, 3)
    assert strategy._max_T == strategy._max_frames == 6
    assert (strategy._obs_frames, strategy._done_frames) == ([0, 1, 2, 3], {0, 1, 2, 3})
    assert next(strategy) == ([1, 2, 3], [4, 5, 6])
    assert strategy._done_frames == set(range(7))
    assert (strategy._obs_frames, strategy._current_step) == ([0, 1, 2, 3], 1)
    with pytest.raises(AttributeError):
        strategy._max_frames = 7


def test_unconditional_first_step_samples_the_observed_frames():
    strategy = make("independent", 30, 0, 6, 4)
    assert next(strategy) == ([], [0, 1, 2, 3, 4, 5])
    assert strategy._obs_frames == [0, 1, 2, 3, 4, 5]
    assert strategy.observed_from_data == []
    assert next(strategy) == ([4, 5], [6, 7, 8, 9])
    assert list(make("autoreg", 3, 0, 6, 4)) == [([], [0, 1, 2])]


# Legal sizes: each mode's smallest step, and the frames its goals take.
@st.composite
def legal_sizes(draw, modes, max_T):
    mode = draw(st.sampled_from(modes))
    goals = 5 if mode.startswith("goal") else 0
    least = 2 if "hierarchy" in mode else 1
    T = draw(st.integers(1 + goals, max_T))
    obs_length = draw(st.integers(0, T - goals - 1))
    max_frames = draw(st.integers(least + 1 + goals, max_T))
    step_size = draw(st.integers(least, max_frames - goals - 1))
    return mode, T, obs_length, max_frames, step_size


@settings(max_examples=2500, deadline=None)
@given(sizes=legal_sizes(PLAIN_MODES, 50))
def test_every_frame_is_sampled_by_sound_steps(sizes):
    mode, T, _, max_frames, _ = sizes
    strategy = make(*sizes)
    given_frames = set(strategy.observed_from_data)
    done, num_sampled = set(given_frames), 0
    for observed, latent in itertools.islice(strategy, 2 * T + 1):
        assert latent
        assert len({*observed, *latent}) == len(observed) + len(latent) <= max_frames
        assert done.issuperset(observed)
        assert given_frames.isdisjoint(latent)
        if strategy.is_goal_directed:
            assert set(range(T - 5, T)).issubset(observed)
        done.update(latent)
        num_sampled += len(latent)
    assert done == set(range(T))
    num_visits = 2 if mode == "gibbs" else 1
    assert num_sampled == num_visits * (T - len(given_frames))
    assert next(strategy, None) is None


@settings(max_examples=300, deadline=None)
@given(sizes=legal_sizes(ADAPTIVE_MODES, 32))
def test_adaptive_modes_take_the_latent_frames_of_the_plain_ones(sizes):
    mode, T, _, max_frames, step_size = sizes
    strategy = make(*sizes, options=L2)
    strategy.set_videos(array("adaptive", [2, T, 3, 2, 2]))
    plain_mode = mode.removeprefix("adaptive-").removeprefix("recall-")
    plain = list(make(plain_mode, *sizes[1:]))
    for (observed, latent), (plain_observed, plain_latent) in zip(strategy, plain, strict=True):
        assert latent == [plain_latent, plain_latent]
        for frames in observed:
            assert len(plain_observed) <= len(frames) <= max_frames - len(plain_latent)


@settings(max_examples=300, deadline=None)
@given(num_frames=st.integers(1, 40), count=st.integers(0, 40))
def test_spread_replaces_repeated_frames_by_the_nearest_unused(num_frames, count):
    chosen = []
    for target in np.linspace(0, num_frames - 0.001, count).astype(int):
        unused = [frame for frame in range(num_frames) if frame not in chosen]
        if unused:
            chosen.append(min(unused, key=lambda frame: (abs(frame - target), frame)))
    assert frame_selection.spread(num_frames, count) == sorted(chosen)


def test_exp_past_observes_powers_of_two_then_recent_frames():
    assert next(make("exp-past", 60, 36, 20, 10)) == (
        [20, 27, 28, 29, 30, 31, 32, 33, 34, 35],
        list(range(36, 46)),
    )
    assert next(make("exp-past", 60, 36, 5, 2)) == ([32, 34, 35], [36, 37])


def test_exp_past_finishes_when_step_does_not_divide():
    assert [latent for _, latent in make("exp-past", 20, 5, 10, 7)] == [
        list(range(5, 12)),
        list(range(12, 19)),
        [19],
    ]


def test_goal_directed_observes_the_last_frames_inside_the_limit():
    strategy = make("goal-directed-autoreg", 30, 4, 12, 4)
    assert strategy.observed_from_data == [0, 1, 2, 3, 25, 26, 27, 28, 29]
    assert next(strategy) == ([1, 2, 3, 25, 26, 27, 28, 29], [4, 5, 6, 7])
    first = next(make("goal-directed-hierarchy-2", 30, 4, 12, 4))
    assert first == ([0, 1, 3, 25, 26, 27, 28, 29], [4, 10, 17, 24])


def test_goal_directed_without_observed_frames_starts_from_the_goal():
    steps = list(make("goal-directed-autoreg", 20, 0, 9, 3))
    assert steps[0] == ([15, 16, 17, 18, 19], [0, 1, 2, 3])
    assert steps[1] == ([3, 15, 16, 17, 18, 19], [4, 5, 6])


def test_gibbs_refines_blocks_given_both_sides():
    strategy = make("gibbs", 16, 4, 8, 4, options={"gibbs_sweeps": 2})
    assert strategy.samples_frame_twice
    steps = list(strategy)
    assert steps[:3] == list(make("autoreg", 16, 4, 8, 4))
    sweep = [
        ([2, 3, 8, 9], [4, 5, 6, 7]),
        ([6, 7, 12, 13], [8, 9, 10, 11]),
        ([10, 11], [12, 13, 14, 15]),
    ]
    assert steps[3:] == sweep * 2


def test_gibbs_with_one_place_observes_the_frame_before_the_end():
    assert list(make("gibbs", 6, 2, 3, 2))[-1] == ([3], [4, 5])


def test_adaptive_hierarchy_always_observes_the_nearest_frames():
    T, obs_length = 60, 12
    strategy = make("adaptive-hierarchy-2", T, obs_length, 14, 6, options=L2)
    strategy.set_videos(array("nearest", [1, T, 3, 4, 4]))
    done = set(range(obs_length))
    for (observed,), (latent,) in strategy:
        before, between, after = frame_selection.split_around(done, latent)
        assert {*between, *before[-2:], *after[:1]} <= set(observed)
        done.update(latent)


def test_farthest_points_on_a_line():
    line = FrameDistances(10)
    line.add(range(10), np.arange(10.0)[:, None])
    assert frame_selection.farthest_points(line, [9], 3) == [0, 4, 9]  # 4 and 5 tie
    assert frame_selection.farthest_points(line, [3, 4], 1) == [3]
    assert frame_selection.farthest_points(line, [0], 99) == list(range(10))


def test_each_done_frame_is_embedded_once_as_it_was_sampled():
    T, seen = 16, []

    def embed(frames):
        seen.extend(frames[:, 0, 0, 0].tolist())
        return frames.reshape(len(frames), -1)

    videos = np.zeros((2, T, 3, 2, 2), np.float32)
    videos[:, :4] = np.arange(8).reshape(2, 4, 1, 1, 1)
    strategy = make("adaptive-autoreg", T, 4, 6, 3, embed=embed)
    strategy.set_videos(videos)
    for step, (_, latent) in enumerate(strategy):
        videos = videos.copy()
        videos[:, latent[0]] = 100 + step
        strategy.set_videos(videos)
    assert seen == [*range(8), *[100.0] * 6, *[101.0] * 6, *[102.0] * 6]


def test_lpips_and_l2_differ_by_the_embedding_alone():
    videos = array("embed", [1, 30, 3, 2, 2])
    steps = []
    for distance, embed in (
        ("l2", None),
        ("lpips", lambda frames: 3 * frames.reshape(len(frames), -1)),
        ("lpips", lambda frames: frames[:, 0, 0, :1]),
    ):
        options = {"distance": distance}
        strategy = make("adaptive-autoreg", 30, 10, 8, 4, options=options, embed=embed)
        strategy.set_videos(torch.from_numpy(videos).to(torch.float64))
        steps.append(list(strategy))
    assert steps[0] == steps[1] != steps[2]


@pytest.mark.parametrize(
    ("mode", "sizes", "message"),
    [
        ("autoreg", (300, 36, 20, 20), "--step_size 20 .* autoreg .*: it must be from 1 to 19"),
        ("autoreg", (300, 36, 20, 0), "--step_size 0 .* from 1 to 19"),
        ("autoreg", (300, 300, 20, 5), "--obs_length 300 .* --T 300 .* from 0 to 299"),
        ("autoreg", (300, -1, 20, 5), "--obs_length -1 .* from 0 to 299"),
        ("autoreg", (0, 0, 20, 5), "--T 0 .* at least 1"),
        ("autoreg", (300, 36, 1, 1), "--max_frames 1 .* at least 2"),
        ("really-independent", (300, 36, 20, 0), "--step_size 0 "),
        ("hierarchy-2", (300, 36, 20, 1), "--step_size 1 .* hierarchy-2 .* from 2 to 19"),
        ("hierarchy-5", (300, 36, 2, 1), "--max_frames 2 .* hierarchy-5 .* at least 3"),
        ("adaptive-hierarchy-3", (300, 36, 20, 1), "--step_size 1 .* from 2 to 19"),
        ("goal-directed-autoreg", (300, 36, 20, 15), "--step_size 15 .* from 1 to 14"),
        ("goal-directed-autoreg", (300, 295, 20, 5), "--obs_length 295 .* from 0 to 294"),
        ("goal-directed-autoreg", (5, 0, 20, 5), "--T 5 .* at least 6"),
        ("goal-directed-hierarchy-2", (300, 36, 7, 2), "--max_frames 7 .* at least 8"),
    ],
)
def test_illegal_sizes_are_refused_with_the_legal_range(mode, sizes, message):
    with pytest.raises(ValueError, match=message) as error:
        make(mode, *sizes)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        inference_strategies[mode].validate(*sizes)


def test_really_independent_ignores_the_step_size():
    expected = list(make("really-independent", 60, 10, 10, 5))
    assert list(make("really-independent", 60, 10, 10, 36)) == expected


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="--inference_mode 'autoregg' is unknown: .*autoreg, .*"):
        make("autoregg", 30, 4, 8, 4)
    with pytest.raises(ValueError, match="--distance 'l1' is unknown: choose from lpips, l2"):
        make("adaptive-autoreg", 30, 4, 8, 4, options={"distance": "l1"})
    for sweeps in (0, 1001):
        with pytest.raises(ValueError, match=f"--gibbs_sweeps {sweeps}: must be from 1 to 1000"):
            make("gibbs", 30, 4, 8, 4, options={"gibbs_sweeps": sweeps})


def test_options_reach_the_modes_that_take_them():
    options = {"gibbs_sweeps": 3, "distance": "l2"}
    assert len(list(make("autoreg", 30, 10, 10, 5, options=options))) == 4
    assert len(list(make("gibbs", 30, 10, 10, 5, options=options))) == 4 + 3 * 4
    videos = np.zeros((1, 30, 3, 2, 2))
    make("adaptive-autoreg", 30, 10, 10, 5, options=options).set_videos(videos)
    gibbs = inference_strategies["gibbs"]
    assert len(list(gibbs(30, 10, 10, 5, options=gibbs.Options(gibbs_sweeps=2)))) == 4 + 2 * 4
    with pytest.raises(
        ValueError, match="no --inference_mode has an option sweeps: .*gibbs_sweeps"
    ):
        make("gibbs", 30, 10, 10, 5, options={"sweeps": 3})
    with pytest.raises(TypeError, match="sweeps"):
        make("gibbs", 30, 10, 10, 5, sweeps=3)


def test_adaptive_modes_refuse_missing_or_wrong_videos():
    with pytest.raises(ValueError, match="--distance lpips needs an embedding"):
        make("adaptive-autoreg", 30, 4, 8, 4).set_videos(np.zeros((1, 30, 3, 2, 2)))
    strategy = make("adaptive-autoreg", 30, 4, 8, 4, options=L2)
    with pytest.raises(ValueError, match="call set_videos before the first step"):
        next(strategy)
    for shape in ((1, 29, 3, 2, 2), (30, 3, 2, 2)):
        with pytest.raises(ValueError, match=r"not \[B, 30, 3, H, W\]"):
            strategy.set_videos(np.zeros(shape))
    strategy.set_videos(np.full((1, 30, 3, 2, 2), np.nan))
    with pytest.raises(ValueError, match=r"embeddings are \[4, 12\] or not finite"):
        next(strategy)


def planted(observed, latent, **attributes):
    """A strategy on 10 frames, 4 observed, at most 6 at once, that always takes this step."""
    methods = {"next_indices": lambda self: (observed, latent), **attributes}
    return type("Planted", (InferenceStrategyBase,), methods)(10, 4, 6, 3)


@pytest.mark.parametrize(
    ("observed", "latent", "fault"),
    [
        ([0, 1], [], "samples no frame"),
        ([0, 1, 2, 3], [4, 5, 6], "takes 7 frames, above --max_frames 6"),
        ([0, 1], [4, 4], r"uses frames \[4\] twice"),
        ([0, 0], [4], r"uses frames \[0\] twice"),
        ([0, -1], [4], r"uses frames \[-1\], outside a video of --T 10"),
        ([3], [9, 10], r"uses frames \[10\], outside a video of --T 10"),
        ([3, 5], [4], r"observes frames \[5\], neither observed nor sampled"),
        ([0], [3, 4], r"samples frames \[3\] again"),
    ],
)
def test_a_bad_step_is_refused(observed, latent, fault):
    with pytest.raises(ValueError, match=f"Planted, step 0: {fault}"):
        next(planted(observed, latent))


def test_a_strategy_that_makes_no_progress_is_refused():
    with pytest.raises(ValueError, match=r"step 1: samples frames \[4\] again"):
        list(planted([3], [4]))
    with pytest.raises(ValueError, match="step 10011: is one step too many"):
        for _ in planted([3], [4], is_done=lambda self: False):
            pass


def test_a_class_that_overrides_is_done_may_refine_but_not_what_is_given():
    strategy = planted([3], [4], is_done=lambda self: self._current_step >= 5)
    assert strategy.samples_frame_twice
    assert list(strategy) == [([3], [4])] * 5
    with pytest.raises(ValueError, match=r"samples frames \[2\] again"):
        next(planted([3], [2], is_done=lambda self: False))


def test_next_indices_must_be_defined():
    with pytest.raises(NotImplementedError, match="InferenceStrategyBase must define"):
        next(InferenceStrategyBase(10, 4, 6, 3))


@pytest.mark.parametrize("mode", [mode for mode in PLAIN_MODES if mode != "really-independent"])
def test_an_optimal_schedule_replaces_the_observed_frames(mode, tmp_path):
    path = tmp_path / "optimal_schedule.pt"
    latents = [latent for _, latent in make(mode, 40, 6, 12, 5)]
    torch.save({step: [1, 0, 4] for step in range(len(latents))}, path)
    steps = list(make(mode, 40, 6, 12, 5, optimal_schedule_path=path))
    assert steps == [([1, 0, 4], latent) for latent in latents]


def test_an_unconditional_first_step_needs_no_schedule_entry(tmp_path):
    path = tmp_path / "optimal_schedule.pt"
    torch.save({step: torch.tensor([2]) for step in range(1, 10)}, path)
    steps = list(make("autoreg", 12, 0, 6, 3, optimal_schedule_path=path))
    assert steps == [([], [0, 1, 2, 3, 4, 5]), ([2], [6, 7, 8]), ([2], [9, 10, 11])]


def test_a_bad_optimal_schedule_is_refused(tmp_path):
    path = tmp_path / "optimal_schedule.pt"
    options = {"optimal_schedule_path": path}
    with pytest.raises(FileNotFoundError, match="optimal_schedule.pt: no optimal schedule there"):
        make("autoreg", 30, 4, 8, 4, **options)
    for content in (b"", b"no such thing"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="optimal_schedule.pt: not a schedule"):
            load_optimal_schedule(path)
    for content in ([1, 2], {"a": [1]}, {0: 1}, {0: Path("x")}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="optimal_schedule.pt: not a schedule") as error:
            load_optimal_schedule(path)
        assert "\n" not in str(error.value)
    torch.save({0: [3]}, path)
    with pytest.raises(ValueError, match="optimal_schedule.pt: no entry for step 1 of autoreg"):
        list(make("autoreg", 30, 4, 8, 4, **options))
    torch.save({0: [9]}, path)
    with pytest.raises(ValueError, match=r"optimal_schedule.pt, step 0: observes frames \[9\]"):
        list(make("autoreg", 30, 4, 8, 4, **options))
    with pytest.raises(ValueError, match="--optimal: adaptive-autoreg chooses its own frames"):
        make("adaptive-autoreg", 30, 4, 8, 4, **options)


def test_the_module_imports_no_heavy_package():
    code = (
        "import sys, improved_diffusion.inference_utils as module\n"
        "list(module.create_strategy('hierarchy-2', video_length=30, num_obs=4, max_frames=8, "
        "step_size=4))\n"
        "print([name for name in ('torch', 'lpips', 'tensorflow', 'wandb') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
