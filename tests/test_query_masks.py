"""Frame masks beyond the published ones: filled items, inference steps, and mixtures."""

import pickle

import numpy as np
import pytest

from improved_diffusion.config import TrainConfig, flat_options, from_options
from improved_diffusion.data import query_masks
from improved_diffusion.data.frame_masks import create_mask_distribution, draw_frames
from improved_diffusion.data.video_datasets import get_train_dataset
from improved_diffusion.inference_utils import create_strategy
from improved_diffusion.registry import MASK_DISTRIBUTIONS, STRATEGIES

SIZES = [(T, K) for T in (1, 2, 3, 5, 6, 7, 12, 31) for K in (1, 2, 3, 6, 7, 8, 20)]
ONCE_EACH = [name for name, strategy in STRATEGIES.items() if not strategy.samples_frame_twice]


def rng(seed=0):
    return np.random.default_rng(seed)


def within(share, expected, draws, sigmas=5):
    """Whether a share of so many draws is the expected one, by the binomial's deviation."""
    return abs(share - expected) <= sigmas * np.sqrt(expected * (1 - expected) / draws)


def draws(name, T, max_frames, number, options=None, seed=0):
    draw, generator = create_mask_distribution(name, options), rng(seed)
    return [draw(T, max_frames, generator) for _ in range(number)]


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", list(MASK_DISTRIBUTIONS))
@pytest.mark.parametrize("T, max_frames", SIZES)
def test_frames_are_sorted_disjoint_inside_and_within_the_limit(name, T, max_frames):
    for observed, latent in draws(name, T, max_frames, 40):
        frames = np.concatenate([observed, latent])
        assert observed.dtype == latent.dtype == np.int64
        assert len(latent) > 0 and len(frames) <= max_frames
        assert len(np.unique(frames)) == len(frames)
        assert frames.min() >= 0 and frames.max() < T
        assert np.all(np.diff(observed) > 0) and np.all(np.diff(latent) > 0)


@pytest.mark.parametrize("name", list(MASK_DISTRIBUTIONS))
def test_the_generator_decides_alone_whatever_was_drawn_before(name):
    def texts(seed):
        return [str(pair) for pair in draws(name, 30, 6, 20, seed=seed)]

    first = texts(1)
    texts(2)
    query_masks.make_schedule.cache_clear()
    assert texts(1) == first != texts(2)


@pytest.mark.parametrize("name", ["filled", "queries", "mixed"])
def test_empty_videos_and_calls_are_refused(name):
    for T, max_frames in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            draws(name, T, max_frames, 1)


@pytest.mark.parametrize("name", list(MASK_DISTRIBUTIONS))
def test_workers_can_be_given_it(name):
    draw = create_mask_distribution(name)
    copy = pickle.loads(pickle.dumps(draw))
    assert str(copy(30, 6, rng(3))) == str(draw(30, 6, rng(3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unconditional_share": 1.5}, "--unconditional_share 1.5: must be from 0 to 1"),
        ({"query_schedules": 0}, "--query_schedules 0: must be from 1"),
        ({"share_published": -1.0}, "none may be negative"),
        ({"share_published": 0, "share_filled": 0, "share_queries": 0}, "not all 0"),
        ({"no_such": 1}, "no --mask_distribution has an option no_such"),
    ],
)
def test_wrong_options_are_told_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        create_mask_distribution("mixed", options)


def test_a_runs_options_hold_those_of_its_distribution_and_no_others():
    stored = flat_options(
        from_options(
            TrainConfig, {"dataset": "x", "mask_distribution": "filled", "query_schedules": 2}
        )
    )
    assert stored["unconditional_share"] == 0.1 and "query_schedules" not in stored
    assert from_options(TrainConfig, stored).mask_options.unconditional_share == 0.1
    assert "unconditional_share" not in flat_options(TrainConfig(dataset="x"))


# ---------------------------------------------------------------- filled


@pytest.mark.parametrize("T, max_frames", SIZES)
def test_a_filled_item_is_full(T, max_frames):
    for observed, latent in draws("filled", T, max_frames, 40):
        assert len(observed) + len(latent) == min(T, max_frames)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_stated_share_of_filled_items_observes_nothing(share):
    items = draws("filled", 60, 8, 3000, {"unconditional_share": share})
    nothing = np.mean([len(observed) == 0 for observed, _ in items])
    assert within(nothing, share, len(items))


def test_a_filled_group_is_at_most_half_an_item():
    """With one observed and one latent group at least, neither role has more than all but one."""
    items = draws("filled", 300, 8, 2000, {"unconditional_share": 0.0})
    first_two = [(len(observed), len(latent)) for observed, latent in items]
    assert all(min(pair) >= 1 for pair in first_two)
    # A group of all 8 frames, which the published groups may have, would leave none for the other.
    assert max(max(pair) for pair in first_two) <= 7
    assert max(len(observed) for observed, _ in items) > 4  # several groups together may have more


def test_every_frame_of_the_window_comes_up():
    seen = np.zeros(12, int)
    for observed, latent in draws("filled", 12, 4, 1500):
        seen[np.concatenate([observed, latent])] += 1
    assert seen.min() > 0.5 * seen.mean()


# ---------------------------------------------------------------- queries


def all_steps(mode, T, max_frames):
    """Every (observed, latent) of a strategy at any legal sizes with videos of at most T frames."""
    found = set()
    for length in range(1, T + 1):
        for num_obs in range(length):
            for step_size in range(1, max_frames):
                sizes = length, num_obs, max_frames, step_size
                try:
                    steps = list(STRATEGIES[mode](*sizes))
                except ValueError:  # illegal sizes
                    continue
                found |= {(tuple(sorted(o)), tuple(sorted(la))) for o, la in steps}
    return found


@pytest.mark.parametrize("T, max_frames", [(1, 2), (3, 2), (6, 3), (8, 4), (9, 8), (7, 20)])
def test_every_query_is_a_step_of_some_strategy(T, max_frames):
    """Against all steps of the strategies that do not look at the frames, by brute force."""
    plain = [mode for mode in ONCE_EACH if not STRATEGIES[mode].is_adaptive]
    known = set().union(*(all_steps(mode, T, max_frames) for mode in plain))
    classes = query_masks.strategies_for(T, max_frames)
    for number in range(512):  # those of adaptive ones are held to their classes below
        schedule = query_masks.make_schedule(classes, number, T, max_frames)
        if schedule.strategy.is_adaptive:
            known |= {(tuple(observed), tuple(latent)) for observed, latent in schedule.steps}
    for observed, latent in draws("queries", T, max_frames, 300):
        first = min([*observed, *latent])
        shifted = [(tuple(observed - by), tuple(latent - by)) for by in range(first + 1)]
        assert known.intersection(shifted)


@pytest.mark.parametrize("T, max_frames", [(2, 2), (9, 2), (9, 3), (30, 7), (30, 8), (100, 20)])
def test_schedules_are_those_of_the_classes_that_sample(T, max_frames):
    classes = query_masks.strategies_for(T, max_frames)
    names = {strategy: mode for mode, strategy in STRATEGIES.items()}
    for number in range(4 * len(classes)):
        schedule = query_masks.make_schedule(classes, number, T, max_frames)
        mode, steps = names[schedule.strategy], schedule.steps
        sizes = dict(
            zip(("video_length", "num_obs", "max_frames", "step_size"), schedule[1:5], strict=True)
        )
        assert 1 <= schedule.video_length <= T and schedule.max_frames == max_frames
        if schedule.strategy.is_adaptive:
            assert_steps_of_the_adaptive(mode, sizes, steps)
            continue
        expected = list(create_strategy(mode, **sizes))
        assert [(o.tolist(), la.tolist()) for o, la in steps] == [
            (sorted(o), sorted(la)) for o, la in expected
        ]


def assert_steps_of_the_adaptive(mode, sizes, steps):
    """The latents of the strategy with any videos; as many observed frames, all of them done."""
    strategy = create_strategy(mode, options={"distance": "l2"}, **sizes)
    strategy.set_videos(rng().normal(size=(1, sizes["video_length"], 3, 2, 2)))
    done = set(range(sizes["num_obs"]))
    for (observed, latent), (expected_observed, expected_latent) in zip(
        steps, strategy, strict=True
    ):
        assert latent.tolist() == sorted(expected_latent[0])
        assert len(observed) == len(expected_observed[0]) and set(observed.tolist()) <= done
        done |= set(latent.tolist())
    assert len(done) == sizes["video_length"]


def test_all_strategies_but_gibbs_take_part_where_the_sizes_allow():
    every = {STRATEGIES[mode] for mode in ONCE_EACH}
    assert STRATEGIES["gibbs"] not in every
    assert set(query_masks.strategies_for(300, 20)) == every
    few = {strategy.__name__ for strategy in query_masks.strategies_for(300, 2)}
    assert "Autoregressive" in few and "Hierarchy" not in few
    assert query_masks.strategies_for(300, 1) == ()


def test_strategies_come_up_alike():
    """Each drawn item's schedule is of a uniform number, and the strategies take turns in them."""
    classes = query_masks.strategies_for(40, 8)
    turns = [query_masks.make_schedule(classes, number, 40, 8).strategy for number in range(512)]
    counts = [turns.count(strategy) for strategy in classes]
    assert max(counts) - min(counts) <= 1
    nothing = np.mean([len(observed) == 0 for observed, _ in draws("queries", 40, 8, 4000)])
    steps = [query_masks.make_schedule(classes, n, 40, 8).steps for n in range(512)]
    expected = np.mean([np.mean([len(observed) == 0 for observed, _ in s]) for s in steps])
    assert within(nothing, expected, 4000)


def test_a_draw_makes_no_schedule_again_and_few_are_kept():
    draw, generator = create_mask_distribution("queries", {"query_schedules": 64}), rng()
    for number in range(64):
        query_masks.make_schedule(query_masks.strategies_for(100, 20), number, 100, 20)
    before = query_masks.make_schedule.cache_info()
    for _ in range(500):
        draw(100, 20, generator)
    after = query_masks.make_schedule.cache_info()
    assert after.misses == before.misses and after.currsize <= query_masks.MAX_SCHEDULES


# ---------------------------------------------------------------- mixed


def test_each_part_of_a_mixture_has_its_share(monkeypatch):
    taken = []
    monkeypatch.setattr(query_masks, "draw_frames", lambda *a: taken.append("p") or draw_frames(*a))
    for name in ("Filled", "Queries"):
        call = getattr(query_masks, name).__call__

        def noted(self, *args, name=name, call=call):
            taken.append(name[0].lower())
            return call(self, *args)

        monkeypatch.setattr(getattr(query_masks, name), "__call__", noted)
    options = {"share_published": 1.0, "share_filled": 2.0, "share_queries": 1.0}
    draws("mixed", 30, 6, 3000, options)
    for part, share in (("p", 0.25), ("f", 0.5), ("q", 0.25)):
        assert within(taken.count(part) / 3000, share, 3000)


def test_a_part_without_a_share_is_never_drawn():
    only_filled = {"share_published": 0.0, "share_filled": 1.0, "share_queries": 0.0}
    items = draws("mixed", 60, 8, 500, only_filled | {"unconditional_share": 0.0})
    assert all(len(observed) + len(latent) == 8 and len(observed) for observed, latent in items)


# ---------------------------------------------------------------- in training items


@pytest.mark.parametrize("name", ["filled", "queries", "mixed"])
def test_items_hold_what_the_distribution_draws(tmp_path, name):
    from helpers import make_folder_dataset

    folder = make_folder_dataset(tmp_path / "data", T=12)
    data = get_train_dataset(
        str(folder),
        T=10,
        max_frames=4,
        mask_distribution=name,
        mask_options={"unconditional_share": 0.0},
    )
    draw = create_mask_distribution(name, {"unconditional_share": 0.0})
    for index in range(3):
        item = data[5, index]
        observed, latent = draw(10, 4, rng([0, 5, index]))
        real = len(observed) + len(latent)
        assert item["frame_indices"][:real].tolist() == [*observed, *latent]
        assert item["obs_mask"].flatten().tolist() == [1.0] * len(observed) + [0.0] * (
            4 - len(observed)
        )
        assert item["latent_mask"].sum() == len(latent)
