"""Inference steps that wait for no other: which they are, and that values do not depend on who makes them."""

import itertools
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import run_script
from improved_diffusion import dist_util
from improved_diffusion.data import machine
from improved_diffusion.data.frame_distances import FrameDistances
from improved_diffusion.data.step_order import ordered_steps, rounds_of
from improved_diffusion.inference_utils import create_strategy
from improved_diffusion.registry import STRATEGIES
from improved_diffusion.sampling import batch_size, keeper, rank_team, video_sampler, video_sampling
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.sampling.plan import Job, VideoPlan
from improved_diffusion.sampling.unfinished_video import UnfinishedVideo
from test_inference_utils import PLAIN_MODES, legal_sizes
from toy_runs import load, make_toy, sample, toy_options

PARALLEL = ("parallel-hierarchy-2", "parallel-hierarchy-3", "parallel-hierarchy-4")


@pytest.fixture
def checkpoint(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_toy(tmp_path)


def steps_of(mode, T, obs_length, max_frames, step_size):
    sizes = dict(video_length=T, num_obs=obs_length, max_frames=max_frames, step_size=step_size)
    return list(ordered_steps(create_strategy(mode, **sizes)))


# ---------------------------------------------------------------- which steps wait for which


def test_a_step_waits_for_what_it_observes_and_what_it_would_overwrite():
    steps = [
        ([0], [1, 2]),  # 0
        ([0], [3]),  # 1: reads nothing that 0 samples
        ([2, 3], [4]),  # 2
        ([0], [5]),  # 3
        ([4], [2]),  # 4: samples again what 0 has sampled and 2 has observed
        ([2], [6]),  # 5: observes what 4 has sampled, not 0
    ]
    assert [set(step.after) for step in ordered_steps(steps)] == [
        set(), set(), {0, 1}, set(), {0, 2}, {4}
    ]  # fmt: skip
    assert rounds_of(ordered_steps(steps)) == [3, 1, 1, 1]


@settings(max_examples=300, deadline=None)
@given(sizes=legal_sizes(PLAIN_MODES, 40), seed=st.integers(0, 2**32))
def test_in_any_order_that_keeps_to_it_every_step_observes_the_same_frames(sizes, seed):
    steps, rng = steps_of(*sizes), random.Random(seed)
    start = {frame: ("data", frame) for frame in range(sizes[1])}

    def run(order):
        content, seen = dict(start), {}
        for step in order:
            seen[step.stage] = tuple(content[frame] for frame in step.observed)
            content |= {f: ("step", step.stage, f) for f in step.latent}
        return seen, content

    order, waiting, made = [], list(steps), set()
    while waiting:
        step = rng.choice([step for step in waiting if step.after <= made])
        waiting.remove(step)
        made.add(step.stage)
        order.append(step)
    assert run(order) == run(steps)


@pytest.mark.parametrize(
    ("mode", "steps", "rounds"),
    [
        ("autoreg", 97, 97),
        ("hierarchy-2", 97, 97),
        ("independent", 97, 1),
        ("parallel-hierarchy-2", 97, 3),
        ("parallel-hierarchy-3", 97, 5),
        ("parallel-hierarchy-4", 98, 7),
        ("end-to-start", 97, 97),
    ],
)
def test_a_thousand_frames_take_so_many_rounds(mode, steps, rounds):
    found = steps_of(mode, 1000, 36, 20, 10)
    assert (len(found), len(rounds_of(found))) == (steps, rounds)


@pytest.mark.parametrize("mode", PARALLEL)
@pytest.mark.parametrize("obs_length", [0, 1, 36])
def test_blocks_between_others_see_both_neighbours(mode, obs_length):
    steps = steps_of(mode, 400, obs_length, 20, 10)
    last = rounds_of(steps)[-1]
    assert last > 5
    for step in steps[-last:]:
        assert {step.latent[0] - 1, min(step.latent[-1] + 1, 399)} <= {*step.observed, *step.latent}
        assert len(step.observed) + len(step.latent) == 20


@pytest.mark.parametrize("mode", PARALLEL)
def test_the_first_round_spreads_over_the_whole_video(mode):
    first = steps_of(mode, 400, 36, 20, 10)[0]
    plain = next(
        create_strategy("hierarchy-2", video_length=400, num_obs=36, max_frames=20, step_size=10)
    )
    assert (first.observed, first.latent) == plain
    assert steps_of(mode, 400, 0, 20, 10)[0].latent[-1] == 399


def test_end_to_start_is_anchored_on_the_first_frames():
    steps = steps_of("end-to-start", 14, 4, 6, 3)
    assert [(s.observed, s.latent) for s in steps] == [
        ([1, 2, 3], [11, 12, 13]),
        ([2, 3, 11], [8, 9, 10]),
        ([2, 3, 8], [5, 6, 7]),
        ([2, 3, 5], [4]),
    ]


# ---------------------------------------------------------------- distances


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_distances_are_those_of_all_pairs_and_each_is_computed_once(convert, monkeypatch):
    rng, computed = np.random.default_rng(0), []
    vectors = rng.normal(size=(9, 5))
    from improved_diffusion.data import frame_distances

    original = frame_distances._squared_norms

    def counting(differences):
        computed.append(len(differences))
        return original(differences)

    monkeypatch.setattr(frame_distances, "_squared_norms", counting)
    monkeypatch.setattr(
        frame_distances, "NUMBERS_AT_ONCE", {"array": 10, "tensor": 10}
    )  # two frames at once
    found, order = FrameDistances(9), [4, 0, 8, 2, 7, 1, 3, 6, 5]
    for begin in (0, 3, 6):
        new = order[begin : begin + 3]
        found.add(new, convert(vectors[new]))
        known = found.frames
        assert known == sorted(order[: begin + 3])
        for frame in (4, *new):
            expected = ((vectors[known] - vectors[frame]) ** 2).sum(1)
            np.testing.assert_allclose(found.row(frame), expected)
            assert found.row(frame)[known.index(frame)] == 0
    assert max(computed) == 2
    assert sum(computed) == 9 + 2 * 3 + 3 * 6 + 3 * 9  # frame 4's, and those of new frames


# ---------------------------------------------------------------- the same values


def calls(caplog) -> list[int]:
    found = [int(n) for n in re.findall(r"(\d+) network calls", caplog.text)]
    caplog.clear()
    return found


@pytest.mark.parametrize("mode", [*PARALLEL, "independent", "gibbs", "adaptive-autoreg"])
def test_a_sample_does_not_depend_on_the_batch_size(checkpoint, mode):
    options = {"inference_mode": mode, "indices": (0, 1), "num_samples": 2, "T": 20}
    if mode.startswith("adaptive"):
        options["strategy_options"] = {"distance": "l2"}
    alone = sample(checkpoint, batch_size=1, eval_dir="1", **options)
    for size in (3, 16):
        together = sample(checkpoint, batch_size=size, eval_dir=str(size), **options)
        for video, index in itertools.product((0, 1), (0, 1)):
            np.testing.assert_array_equal(load(together, video, index), load(alone, video, index))


def test_a_round_is_one_call_per_timestep(checkpoint, caplog):
    caplog.set_level("INFO")
    options = {"inference_mode": "parallel-hierarchy-2", "T": 36, "indices": (0,)}
    timesteps, blocks = 3, 16  # of two frames, beside the first level's
    sample(checkpoint, batch_size=8, eval_dir="a", **options)
    assert calls(caplog) == [timesteps * (1 + 2)]
    sample(checkpoint, batch_size=1, eval_dir="b", **options)
    assert calls(caplog) == [timesteps * (1 + blocks)]


def test_videos_at_different_steps_share_calls(checkpoint, caplog, monkeypatch):
    """Video 1 is half done: then it and video 0 take no more calls than video 0 does alone."""
    caplog.set_level("INFO")
    whole = sample(checkpoint, eval_dir="whole", indices=(0, 1), T=36)
    (once,) = calls(caplog)
    original, kept = keeper.Keeper.keep, []

    def dying(self, video, step):
        original(self, video, step)
        kept.append(step)
        if len(kept) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(keeper.Keeper, "keep", dying)
        sample(checkpoint, indices=(1,), T=36)
    caplog.clear()
    made = sample(checkpoint, indices=(0, 1), T=36)
    assert calls(caplog) == [once]
    for video in (0, 1):
        np.testing.assert_array_equal(load(made, video), load(whole, video))


def test_no_more_videos_are_in_work_than_twice_a_round(checkpoint):
    plan = VideoPlan("autoreg", 12, 2, 4, 2)
    opened, finished = [], []

    def videos():
        for number in range(20):
            opened.append(number)
            yield UnfinishedVideo(Job(number, 0), plan, np.zeros((2, 3, 2, 2), np.uint8))

    class Blank:
        round_size = 3

        def sample(self, trajectories):
            assert 1 <= len(trajectories) <= 3
            return [
                np.ones((len(t.indices) - len(t.observed), 3, 2, 2), np.uint8) for t in trajectories
            ]

    for video, _ in video_sampler.make_videos(videos(), Blank()):
        assert len(opened) - len(finished) <= 6
        if not video.ready:
            finished.append(video.job.video)
            assert video.whole().min(axis=(1, 2, 3)).tolist() == [0, 0] + [1] * 10
    assert sorted(finished) == list(range(20))


# ---------------------------------------------------------------- ranks


class Ranks:
    """Collectives between threads, one a rank."""

    def __init__(self, monkeypatch, size: int):
        self.size, self.boxes = size, [None] * size
        self.barrier, self.local = threading.Barrier(size, timeout=60), threading.local()
        monkeypatch.setattr(dist_util, "world_size", lambda: size)
        monkeypatch.setattr(dist_util, "rank", lambda: self.local.rank)
        monkeypatch.setattr(dist_util, "is_main", lambda: self.local.rank == 0)
        monkeypatch.setattr(dist_util, "gather_objects", self.gather)
        monkeypatch.setattr(dist_util, "broadcast_object", lambda v, what="": self.gather(v)[0])

    def gather(self, value, what=""):
        self.boxes[self.local.rank] = value
        self.barrier.wait()
        values = list(self.boxes)
        self.barrier.wait()
        return values

    def run(self, work):
        outcomes = [None] * self.size

        def one(rank):
            self.local.rank = rank
            outcomes[rank] = work()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert None not in outcomes
        return outcomes


@pytest.mark.parametrize("num_videos", [1, 4, 5])
def test_ranks_share_the_blocks_of_what_does_not_divide(
    checkpoint, monkeypatch, caplog, num_videos
):
    caplog.set_level("INFO")
    options = {"inference_mode": "parallel-hierarchy-2", "T": 96, "indices": (0, 1, 2)}
    options |= {"num_samples": 2, "batch_size": 2}
    whole = sample(checkpoint, eval_dir="whole", **options)
    caplog.clear()
    if num_videos < 4:
        options |= {"indices": (2,), "num_samples": 1}
    elif num_videos == 4:
        options |= {"indices": (0, 1)}
    else:
        sample(checkpoint, eval_dir="shared", **options | {"indices": (0,), "num_samples": 1})
        caplog.clear()
    with monkeypatch.context() as patch:
        Ranks(patch, 4).run(lambda: sample(checkpoint, eval_dir="shared", **options))
    made = video_sampling.EvalDir(f"shared/{whole.path.name}")
    for video, samples in made.samples().items():
        for index in samples:
            np.testing.assert_array_equal(load(made, video, index), load(whole, video, index))
    frames = [int(n) for n in re.findall(r"sampled (\d+) frames", caplog.text)]
    assert len(frames) == 4 and min(frames) > 0.8 * max(frames), "all ranks are at work alike"
    assert sum(frames) == num_videos * (96 - 2)


def test_videos_are_dealt_out_where_nothing_runs_side_by_side(monkeypatch):
    jobs = [Job(video, 0) for video in range(6)]
    monkeypatch.setattr(dist_util, "world_size", lambda: 4)
    monkeypatch.setattr(dist_util, "rank", lambda: 1)
    assert rank_team.split_jobs(jobs, VideoPlan("autoreg", 30, 2, 4, 2)) == ([], [jobs[1], jobs[5]])
    shared = rank_team.split_jobs(jobs, VideoPlan("parallel-hierarchy-2", 30, 2, 4, 2))
    assert shared == (jobs[:2], [jobs[3]])


@pytest.mark.slow
def test_two_processes_share_one_video(checkpoint, tmp_path):
    alone = sample(checkpoint, eval_dir="alone", indices=(1,), inference_mode="independent")
    launcher = (Path(sys.executable).parent / "mpiexec", "-n", "2")
    words = "--inference_mode independent --step_size 2 --obs_length 2 --indices 1 --eval_dir both"
    here = Path(__file__).parent
    code = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]; import toy_runs\n"
    (tmp_path / "sample.py").write_text(
        code
        + "from scripts.video_sample import main; from improved_diffusion.script_util import run_main\n"
        "run_main(main)\n"
    )
    done = run_script(
        tmp_path / "sample.py", checkpoint, *words.split(), launcher=launcher, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("sampled ") == 2
    made = video_sampling.EvalDir(f"both/{alone.path.name}")
    np.testing.assert_array_equal(load(made, 1), load(alone, 1))


# ---------------------------------------------------------------- memory


def test_out_of_memory_halves_the_batch_and_changes_no_value(checkpoint, monkeypatch, caplog):
    whole = sample(checkpoint, eval_dir="whole")
    original = video_sampler.VideoSampler._sample_at_once
    tried = []

    def small(self, trajectories):
        tried.append(len(trajectories))
        if len(trajectories) > 1:
            original(self, trajectories[:1])  # some work, which is lost
            raise torch.OutOfMemoryError("no room for 1 TB")
        return original(self, trajectories)

    monkeypatch.setattr(video_sampler.VideoSampler, "_sample_at_once", small)
    made = sample(checkpoint, eval_dir="small")
    assert tried[:5] == [4, 2, 1, 1, 1] and set(tried[5:]) == {1}
    for video in range(4):
        np.testing.assert_array_equal(load(made, video), load(whole, video))
    assert caplog.text.count("out of memory with 4 trajectories at once: going on with 2") == 1
    assert caplog.text.count("out of memory") == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("other")])
def test_what_cannot_be_halved_is_raised(checkpoint, monkeypatch, error):
    def failing(self, trajectories):
        raise error

    monkeypatch.setattr(video_sampler.VideoSampler, "_sample_at_once", failing)
    with pytest.raises(type(error), match=str(error)):
        sample(checkpoint, batch_size=1 if str(error) == "no room" else 8)


@pytest.mark.parametrize(
    ("free", "most", "size"), [(10_000, 100, 40), (10_000, 8, 8), (100, 100, 1), (None, 100, 8)]
)
def test_the_batch_is_what_fits_the_free_memory(monkeypatch, caplog, free, most, size):
    caplog.set_level("INFO")
    monkeypatch.setattr(machine, "free_memory_bytes", lambda device: free)
    peaks = iter([1000, 1600])  # 200 a trajectory
    monkeypatch.setattr(machine, "peak_memory_bytes", lambda device, work: next(peaks))
    found = batch_size.fitting_batch_size(None, "cpu", (4, 3, 8, 8), most)
    assert found == size
    assert caplog.text.count("--batch_size auto: ") == 1


MEASURE_MEMORY = """
import torch
from improved_diffusion.data import machine
device = torch.device("cpu")
before = machine.peak_memory_bytes(device, lambda: None)
peak = machine.peak_memory_bytes(device, lambda: torch.zeros(50_000_000))
print(before, peak, machine.free_memory_bytes(device))
"""


@pytest.mark.slow
def test_memory_is_measured_on_this_machine():
    """In a process of its own: memory that earlier work has freed may stay with the process."""
    done = subprocess.run([sys.executable, "-c", MEASURE_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "None" in done.stdout:
        pytest.skip("this system does not say")
    before, peak, free = map(int, done.stdout.split())
    assert 0.15e9 < peak - before < 0.3e9
    assert free > 0


def test_auto_makes_the_same_samples(checkpoint, caplog):
    caplog.set_level("INFO")
    whole = sample(checkpoint, eval_dir="whole")
    made = sample(checkpoint, eval_dir="auto", batch_size=None)
    assert caplog.text.count("--batch_size auto: ") == 1
    for video in range(4):
        np.testing.assert_array_equal(load(made, video), load(whole, video))


def test_auto_is_refused_for_an_array_task(checkpoint, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    with pytest.raises(ValueError, match="^--batch_size auto: an array task needs a number"):
        sample(checkpoint, batch_size=None)
    assert not Path("results").exists()


def test_auto_is_a_word_of_the_command_line():
    from improved_diffusion.script_util import config_from_args
    from scripts.video_sample import create_argparser

    def parsed(*words):
        args = create_argparser().parse_args(["x.pt", "--inference_mode", "autoreg", *words])
        return config_from_args(SampleConfig, args).batch_size

    assert parsed("--batch_size", "auto") is None and parsed("--batch_size", "3") == 3
    assert parsed() == 8
    with pytest.raises(SystemExit):
        parsed("--batch_size", "some")


@pytest.mark.parametrize("mode", [*PARALLEL, "end-to-start"])
def test_new_orders_make_whole_videos_from_nothing_observed(checkpoint, mode):
    assert mode in STRATEGIES
    made = sample(checkpoint, inference_mode=mode, obs_length=0, indices=(0,), T=20)
    assert load(made, 0).shape[0] == 20
    assert SampleConfig(**toy_options(checkpoint, inference_mode=mode)).strategy_options is not None
