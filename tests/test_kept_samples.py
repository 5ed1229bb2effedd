"""Nothing wrong is kept: unfinished videos, other weights, other truth, failed runs, mistakes."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from improved_diffusion.data import machine, paths
from improved_diffusion.evaluation import evaluate, nll
from improved_diffusion.evaluation.options import EvalConfig, NllConfig
from improved_diffusion.inference_utils import InferenceStrategyBase
from improved_diffusion.registry import STRATEGIES
from improved_diffusion.sampling import keeper, lpips_util, optimal_schedule, video_sampling
from improved_diffusion.sampling.options import SampleConfig, ScheduleConfig
from improved_diffusion.sampling.plan import Job, VideoPlan
from improved_diffusion.sampling.results import EvalDir, KeptStep
from improved_diffusion.sampling.unfinished_video import UnfinishedVideo
from toy_runs import OBSERVED, SIZE, T, load, make_toy, sample, toy_options

SEARCH = ScheduleConfig(num_videos=2, num_timesteps=2)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_toy(tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def score(eval_dir: EvalDir, **options) -> dict[str, np.ndarray]:
    config = EvalConfig((str(eval_dir.path),), modes=("psnr",), device="cpu", **options)
    outcome = evaluate.evaluate(config)
    outcome.raise_failures()
    return np.load(outcome.tables[0], allow_pickle=True)


# ---------------------------------------------------------------- unfinished videos


def stop_after(monkeypatch, steps: int) -> None:
    """Kill the next run when it has kept so many inference steps."""
    original, kept = keeper.Keeper.keep, []

    def dying(self, video, step):
        original(self, video, step)
        kept.append(step)
        if len(kept) == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(keeper.Keeper, "keep", dying)


def sample_and_stop_after(steps: int, monkeypatch, checkpoint: Path, **options) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(KeyboardInterrupt):
            sample(checkpoint, **options)


def test_videos_that_another_run_advances_meanwhile_are_whole(checkpoint, monkeypatch):
    """Two runs on one folder: while the first is at work, the second brings videos 1 and 2 on."""
    whole = sample(checkpoint, eval_dir="whole")
    sample_and_stop_after(3, monkeypatch, checkpoint, eval_dir="ahead", indices=(2,))
    sample_and_stop_after(3, monkeypatch, checkpoint, eval_dir="ahead", indices=(1,))
    ahead = EvalDir("ahead/autoreg_4_2_12_2")
    assert ahead.kept_stages(2, 0) == ahead.kept_stages(1, 0) == {0, 1, 2}
    keep, met = keeper.Keeper.keep, []

    def meanwhile(self, video, step):
        keep(self, video, step)
        if not met:
            met.append(step)
            for other, stage in ((1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)):
                self.eval_dir.save_step(other, 0, stage, ahead.load_step(other, 0, stage))

    monkeypatch.setattr(keeper.Keeper, "keep", meanwhile)
    made = sample(checkpoint, eval_dir="shared", batch_size=2)
    assert met
    for video in range(4):
        np.testing.assert_array_equal(load(made, video), load(whole, video))
    assert not (made.path / "partial").exists()


def test_videos_that_another_run_finishes_meanwhile_are_left_alone(checkpoint, monkeypatch):
    opened, original = [], keeper.Keeper.open

    def open_and_meet(self, job):
        opened.append(job.video)
        if len(opened) == 1:
            task = self.task
            self.eval_dir.write_configs(task.model.config, task.stored(), task.ignored())
            self.eval_dir.save_sample(3, 0, np.full((T, 3, SIZE, SIZE), 9, np.uint8))
        return original(self, job)

    monkeypatch.setattr(keeper.Keeper, "open", open_and_meet)
    made = sample(checkpoint, batch_size=2)
    assert opened == [0, 1, 2] and (load(made, 3) == 9).all()


class EndsEarly(InferenceStrategyBase):
    """says that it is done while the last frames are missing."""

    def is_done(self):
        return max(self._done_frames) + 3 >= self._video_length

    def next_indices(self):
        return [max(self._done_frames)], self._next_block()


def test_a_frame_that_was_never_made_is_not_saved(checkpoint, monkeypatch):
    monkeypatch.setitem(STRATEGIES._entries, "ends-early", (EndsEarly, ""))
    words = r"video 0 sample 0: the frames \[10, 11\] were never made: the strategy ends before"
    with pytest.raises(ValueError, match=words):
        sample(checkpoint, indices=(0,), inference_mode="ends-early")
    assert not list(Path("results").glob("*/samples"))


def test_a_frame_that_was_never_made_is_not_observed():
    plan = VideoPlan("autoreg", 6, 1, 4, 2)
    video = UnfinishedVideo(Job(0, 0), plan, np.ones((1, 3, 2, 2), np.uint8))
    (first,) = video.ready
    video.finish(first, np.full((2, 3, 2, 2), 7, np.uint8))
    (second,) = video.ready
    assert second.observed == [1, 2] and (video.observed_frames(second) == 7).all()
    video.made[2] = False
    with pytest.raises(ValueError, match=r"video 0 sample 0: the frames \[2\] were never made"):
        video.observed_frames(second)
    with pytest.raises(ValueError, match="2 frames are to be put in, not"):
        video.finish(second, np.ones((1, 3, 2, 2), np.uint8))


@pytest.mark.parametrize("fault", ["missing", "damaged", "other frames"])
def test_what_does_not_fit_is_made_again_and_what_fits_is_gone_on_with(
    checkpoint, monkeypatch, caplog, fault
):
    whole = sample(checkpoint, eval_dir="whole", indices=(0,))
    sample_and_stop_after(4, monkeypatch, checkpoint, indices=(0,))
    folder = EvalDir("results/autoreg_4_2_12_2")
    path = paths.step_path(folder.path, 0, 0, 2)
    if fault == "missing":
        path.unlink()
    elif fault == "damaged":
        path.write_bytes(path.read_bytes()[:100])
    else:
        folder.save_step(0, 0, 2, folder.load_step(0, 0, 1))
    made, original = [], keeper.Keeper.keep

    def counting(self, video, step):
        original(self, video, step)
        made.append(step.stage)

    monkeypatch.setattr(keeper.Keeper, "keep", counting)
    np.testing.assert_array_equal(load(sample(checkpoint, indices=(0,)), 0), load(whole, 0))
    # What comes after the gap was made of the same frames; after a step that does not fit, nothing counts.
    assert made == ([2, 3] if fault == "other frames" else [2])
    assert ("does not fit: from inference step 2 on" in caplog.text) == (fault == "other frames")


def test_a_killed_run_loses_at_most_the_steps_in_work(checkpoint, monkeypatch):
    sample_and_stop_after(7, monkeypatch, checkpoint, batch_size=3)
    folder = EvalDir("results/autoreg_4_2_12_2")
    assert [len(folder.kept_stages(video, 0)) for video in range(4)] == [3, 2, 2, 0]


def test_what_an_earlier_version_has_kept_is_begun_again_and_said(checkpoint, caplog):
    caplog.set_level("INFO")
    whole = sample(checkpoint, eval_dir="whole", indices=(0,))
    made = sample(checkpoint, indices=(1,))
    (made.path / "partial").mkdir()
    old = made.path / "partial/sample_0000-0.npz"
    np.savez(old, stages=3, frames=np.zeros((T, 3, SIZE, SIZE), np.uint8), made=np.ones(T, bool))
    np.testing.assert_array_equal(load(sample(checkpoint, indices=(0,)), 0), load(whole, 0))
    assert f"{old} was kept by an earlier version: that video is begun again" in caplog.text
    assert not old.parent.exists()


def test_what_is_kept_of_other_data_is_not_gone_on_with(checkpoint, monkeypatch, caplog):
    sample_and_stop_after(2, monkeypatch, checkpoint, indices=(0,))
    np.save("data/test/0.npy", 255 - np.load("data/test/0.npy"))
    made = sample(checkpoint, indices=(0,))
    assert "video 0 sample 0 does not fit: from inference step 0 on" in caplog.text
    np.testing.assert_array_equal(load(made, 0), load(sample(checkpoint, eval_dir="b"), 0))


# ---------------------------------------------------------------- the same weights, files, truth


def test_samples_of_other_weights_of_the_same_step_are_refused(checkpoint, tmp_path):
    made = sample(checkpoint, indices=(0,))
    before = files(made.path)
    make_toy(tmp_path, gain=0.6)
    with pytest.raises(ValueError, match="samples made with weights_sha256 .*, not .*--eval_dir"):
        sample(checkpoint)
    assert files(made.path) == before
    (made.path / "samples/sample_0000-0.npy").unlink()
    assert sample(checkpoint, indices=(0,)).has_sample(0, 0), "nothing of the other is left"


def test_another_clip_of_the_same_name_is_refused_and_a_moved_one_is_not(checkpoint, tmp_path):
    clip = np.random.default_rng(0).integers(0, 255, (4, SIZE, SIZE, 3)).astype(np.uint8)
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "walk.npy", clip if folder != "c" else clip[::-1])
    sample(checkpoint, obs_video="a/walk.npy")
    sample(checkpoint, obs_video="b/walk.npy", num_samples=2)
    with pytest.raises(ValueError, match="made with obs_video_sha256 .*--eval_dir"):
        sample(checkpoint, obs_video="c/walk.npy", num_samples=3)


def test_another_optimal_schedule_is_refused(checkpoint):
    options = SampleConfig(**toy_options(checkpoint))
    path = optimal_schedule.find_schedule(options, SEARCH)
    made = sample(checkpoint, indices=(0,), optimal=True)
    schedule = torch.load(path, weights_only=True)
    last = max(schedule)
    schedule[last] = [0, 1] if sorted(schedule[last]) != [0, 1] else [0, 2]
    torch.save(schedule, path)
    with pytest.raises(ValueError, match="made with schedule_sha256 .*--eval_dir"):
        sample(checkpoint, indices=(1,), optimal=True)
    assert made.samples() == {0: [0]}


def mean_colour(frames, *, device="cpu", weights=None):
    return np.asarray(frames).mean((2, 3))


def test_another_file_of_lpips_is_refused_where_a_strategy_looks_through_it(
    checkpoint, tmp_path, monkeypatch
):
    weights = tmp_path / "alexnet.pth"
    weights.write_bytes(b"first")
    monkeypatch.setitem(lpips_util.EMBEDDINGS, "lpips", mean_colour)
    monkeypatch.setitem(lpips_util.EMBEDDING_WEIGHTS, "lpips", lambda: weights)
    sample(checkpoint, indices=(0,), inference_mode="adaptive-autoreg")
    sample(checkpoint, indices=(0,))
    weights.write_bytes(b"second")
    sample(checkpoint, indices=(1,))
    with pytest.raises(ValueError, match="made with embedding_sha256 .*--eval_dir"):
        sample(checkpoint, indices=(1,), inference_mode="adaptive-autoreg")


def test_a_folder_made_before_there_were_hashes_goes_on_with_one_warning(checkpoint, caplog):
    made = sample(checkpoint, indices=(0,))
    stored = json.loads(made.sample_config_path.read_text())
    del stored["weights_sha256"]
    made.sample_config_path.write_text(json.dumps(stored))
    sample(checkpoint, indices=(1,))
    warnings = [r.message for r in caplog.records if "earlier version" in r.message]
    assert set(made.samples()) == {0, 1} and warnings and "by the same weights" in warnings[0]
    assert len(warnings) == 1


def bound(checkpoint: Path, **options) -> nll.VideoBounds:
    return nll.bound_dataset(NllConfig(**toy_options(checkpoint, **options)))


def test_bounds_of_other_weights_are_refused(checkpoint, tmp_path):
    bound(checkpoint, indices=(0,))
    make_toy(tmp_path, gain=0.6)
    with pytest.raises(ValueError, match="bounds made with weights_sha256 .*--eval_dir"):
        bound(checkpoint, indices=(1,))


def test_bounds_of_a_data_set_that_has_changed_are_refused(checkpoint):
    bound(checkpoint, indices=(0,))
    np.save("data/test/0.npy", 255 - np.load("data/test/0.npy"))
    with pytest.raises(ValueError, match="bounds of another video 0 than .* has now.*--eval_dir"):
        bound(checkpoint, indices=(0, 1))
    assert bound(checkpoint, indices=(1,)).videos == [1]


def test_bounds_that_another_run_has_made_meanwhile_with_another_seed_are_found(
    checkpoint, monkeypatch
):
    original, quicker = nll.StepBound.__call__, []

    def slow(self, *args):
        if self.seed == 9 and not quicker:
            quicker.append(bound(checkpoint, indices=(0,)))
        return original(self, *args)

    monkeypatch.setattr(nll.StepBound, "__call__", slow)
    with pytest.raises(ValueError, match="holds bounds made with seed 0, not 9"):
        bound(checkpoint, indices=(0,), seed=9)
    stored = json.loads((quicker[0].eval_dir / "elbo_config.json").read_text())
    assert stored["seed"] == 0 and quicker[0].bits_per_dim[0] == bound(checkpoint).bits_per_dim[0]


def test_samples_of_which_nothing_says_what_made_them_are_not_added_to(checkpoint):
    made = sample(checkpoint, indices=(0,))
    made.sample_config_path.unlink()
    with pytest.raises(ValueError, match="no sample_config.json that says .*--eval_dir"):
        sample(checkpoint, indices=(1,), seed=7)
    assert set(made.samples()) == {0}


def test_samples_of_other_weights_do_not_count_as_made(checkpoint, tmp_path):
    sample(checkpoint, indices=(0,))
    make_toy(tmp_path, gain=0.6)
    with pytest.raises(ValueError, match="weights_sha256"):
        sample(checkpoint, indices=(0,), status=True)


def test_scores_against_other_videos_are_refused_and_change_no_table(checkpoint):
    made = sample(checkpoint)
    score(made)
    before = files(made.path)
    with pytest.raises(ValueError, match="video 0.*partition train.*--dataset_partition"):
        score(made, dataset_partition="train", num_samples=1)
    np.save("data/test/-1.npy", np.load("data/train/0.npy"))  # sorts before 1.npy
    Path("data/test/0.npy").rename("data/test/9.npy")
    with pytest.raises(ValueError, match="continue another video than that of data"):
        score(made)
    changed = {name for name, content in files(made.path).items() if before.get(name) != content}
    assert not {name for name in changed if not name.startswith("metrics_cache")}


def test_without_hashes_the_observed_frames_tell_other_videos(checkpoint, caplog):
    made = sample(checkpoint)
    for path in (made.path / "truth").iterdir():
        path.unlink()
    score(made)
    with pytest.raises(ValueError, match="sample_0000-0 observes other frames than video 0"):
        score(made, dataset_partition="train")
    assert "cannot be checked" not in caplog.text


def test_with_neither_it_is_said_that_the_truth_could_not_be_checked(checkpoint, caplog):
    made = sample(checkpoint, obs_length=0)
    score(made)
    assert "cannot be checked" not in caplog.text
    for path in (made.path / "truth").iterdir():
        path.unlink()
    score(made)
    assert "does not say what 4 of 4 samples continue: it cannot be checked" in caplog.text


def test_samples_of_a_data_set_that_has_changed_are_not_added_to(checkpoint):
    sample(checkpoint, indices=(0,))
    np.save("data/test/0.npy", 255 - np.load("data/test/0.npy"))
    with pytest.raises(ValueError, match="another video 0 than .* has now.*--eval_dir"):
        sample(checkpoint, indices=(0,), num_samples=2)


# ---------------------------------------------------------------- runs that fail


@pytest.mark.parametrize(
    "options, words",
    [
        ({"inference_mode": "adaptive-autoreg"}, "AlexNet|lpips|alexnet"),
        ({"device": "cuda:77"}, "--device cuda:77 cannot be used here"),
        ({"optimal": True}, "optimal_schedule.pt"),
        ({"obs_length": 12, "T": 20}, "12 frames|--obs_length"),
        ({"inference_mode": "parallel-hierarchy-2", "step_size": 1}, "^--step_size 1"),
        ({"guidance": 2.0, "guidance_interval": (0.1, 0.2)}, "^--guidance_interval 0.1 0.2: none"),
        (
            {"spacing": "rho7", "timestep_respacing": "9"},
            "^--spacing rho7 with --timestep_respacing '9': give a number from 2 to the 3",
        ),
    ],
)
def test_a_run_that_fails_leaves_no_folder(checkpoint, monkeypatch, options, words):
    monkeypatch.setenv("METRIC_WEIGHTS_DIR", "nowhere")
    monkeypatch.setenv("TORCH_HOME", "nowhere")
    if "T" in options:
        options = options | {"obs_length": 13}
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        sample(checkpoint, **options)
    assert not Path("results").exists()


def test_weights_that_do_not_fit_leave_no_folder(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["gain"] = torch.zeros(2)
    torch.save(content, checkpoint)
    for run in (sample, bound):
        with pytest.raises(ValueError, match="the weights do not fit"):
            run(checkpoint)
        assert not Path("results").exists()


def test_the_options_of_a_run_that_came_to_nothing_bind_nobody(checkpoint, monkeypatch):
    def failing(*args, **kwargs):
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(EvalDir, "save_sample", failing)
        patch.setattr(EvalDir, "save_step", failing)
        with pytest.raises(OSError, match="no room"):
            sample(checkpoint, seed=1)
    made = sample(checkpoint, seed=2, indices=(0,))
    assert made.sample_config()["seed"] == 2
    with pytest.raises(ValueError, match="seed 2, not 1"):
        sample(checkpoint, seed=1)


# ---------------------------------------------------------------- optimal schedules


def search(checkpoint: Path, changes: dict | None = None, **options) -> Path:
    config = SampleConfig(**toy_options(checkpoint, **options))
    return optimal_schedule.find_schedule(config, dataclasses.replace(SEARCH, **(changes or {})))


@pytest.mark.parametrize(
    "mode, words", [("gibbs", "samples frames again"), ("really-independent", "no room")]
)
def test_a_schedule_that_could_not_be_sampled_with_is_not_searched(checkpoint, mode, words):
    with pytest.raises(ValueError, match=f"--inference_mode {mode} .*{words}"):
        search(checkpoint, inference_mode=mode)
    assert not Path("results").exists()


def test_a_search_from_the_nearest_of_few_frames_ends(checkpoint):
    path = search(checkpoint, {"start_from": "nearest"}, obs_length=1, max_frames=4, T=5)
    assert torch.load(path, weights_only=True)[0] == [0]
    sample(checkpoint, obs_length=1, max_frames=4, T=5, optimal=True)


def test_a_search_goes_on_with_its_own_options_alone(checkpoint):
    path = search(checkpoint)
    assert search(checkpoint) == path
    for changes, words in (
        ({"num_videos": 1}, "num_videos 2, not 1"),
        ({"start_from": "nearest"}, "start_from nothing, not nearest"),
    ):
        with pytest.raises(ValueError, match=f"steps of a search made with {words}"):
            search(checkpoint, changes)
    with pytest.raises(ValueError, match="made with seed 0, not 3"):
        search(checkpoint, seed=3)
    for video in Path("data/train").iterdir():
        np.save(video, 255 - np.load(video))
    with pytest.raises(ValueError, match="made with videos_sha256"):
        search(checkpoint)


@pytest.mark.parametrize("fault", ["missing", "future", "too many"])
def test_the_last_step_of_a_schedule_is_checked_before_the_first_is_sampled(checkpoint, fault):
    path = search(checkpoint)
    schedule = torch.load(path, weights_only=True)
    last = max(schedule)
    if fault == "missing":
        del schedule[last]
    else:
        schedule[last] = [T - 1] if fault == "future" else list(range(6))
    torch.save(schedule, path)
    with pytest.raises(ValueError, match=f"step {last}"):
        sample(checkpoint, optimal=True)
    assert not (path.parent / "sample_config.json").exists()


# ---------------------------------------------------------------- options and input


@pytest.mark.parametrize(
    "options, words",
    [
        ({"T": 0}, "--T 0: must be at least 1"),
        ({"max_frames": 0}, "--max_frames 0: must be at least 1"),
        ({"eta": 3.0, "use_ddim": True}, "--eta 3.0: must be from 0 to 1"),
        ({"eta": -1.0, "use_ddim": True}, "--eta -1.0: must be from 0 to 1"),
        ({"eta": float("nan"), "use_ddim": True}, "--eta nan: must be from 0 to 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused_and_do_not_mean_the_default(options, words):
    with pytest.raises(ValueError, match=words):
        SampleConfig(**toy_options(Path("a/b/c/d"), **options))


def test_a_clip_is_read_at_the_frame_rate_that_was_trained_on(checkpoint, tmp_path):
    clip = np.random.default_rng(0).integers(0, 255, (9, SIZE, SIZE, 3)).astype(np.uint8)
    np.save("walk.npy", clip)
    make_toy(tmp_path, frame_stride=3)
    made = sample(checkpoint, obs_video="walk.npy", obs_length=3, T=8)
    np.testing.assert_array_equal(load(made, 0)[:3], clip[::3].transpose(0, 3, 1, 2))
    make_toy(tmp_path, fps=5)
    with pytest.raises(ValueError, match="walk.npy: has no frame rate"):
        sample(checkpoint, obs_video="walk.npy", eval_dir="b", T=8)


def test_a_device_that_is_not_there_is_one_line():
    with pytest.raises(ValueError, match="^--device cuda:77 cannot be used here [^\n]*$"):
        machine.default_device("cuda:77")


def test_every_rank_reports_its_own_speed(checkpoint, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(video_sampling.dist_util, "is_main", lambda: False)
    sample(checkpoint)
    (said,) = re.findall(r"sampled (\d+) frames in .*: ([\d.]+) frames/s", caplog.text)
    assert int(said[0]) == 4 * (T - OBSERVED) and float(said[1]) > 0


def test_a_sample_of_another_length_or_size_is_made_again(checkpoint, caplog):
    made = sample(checkpoint)
    whole = load(made, 1)
    for frames in (whole[:-1], whole[..., :16]):
        np.save(made.path / "samples/sample_0001-0.npy", frames)
        sample(checkpoint)
        np.testing.assert_array_equal(load(made, 1), whole)
    assert caplog.text.count("sample_0001-0.npy holds [") >= 2


def test_the_samplers_own_eval_dir_leads_to_the_folders_below(checkpoint):
    sample(checkpoint)
    sample(checkpoint, inference_mode="independent")
    below = "results/autoreg_4_2_12_2 .*results/independent_4_2_12_2"
    with pytest.raises(FileNotFoundError, match=f"--eval_dir {below}"):
        score(EvalDir("results"))


def test_what_a_killed_process_left_behind_is_removed_by_the_next_run(checkpoint):
    made = sample(checkpoint)
    before = files(made.path)
    gone, running = 2**22 + 1, 1  # no system has so many processes; the first one never ends
    host = paths._host()
    for folder in ("samples", "partial", "metrics_cache"):
        (made.path / folder).mkdir(exist_ok=True)
        (made.path / folder / f".sample_0000-0.npy.{host}_{gone}_ab12_x_3.tmp").write_bytes(b"half")
    (made.path / f".sample_config.json.{host}_{gone}_abcdefgh.tmp").write_bytes(b"half")
    alive = made.path / f".sample_config.json.{host}_{running}_abcdefgh.tmp"
    alive.write_bytes(b"half")
    frames = load(made, 0)
    made.save_step(0, 0, 2, KeptStep(np.arange(2), frames[:2], ""))
    (made.path / "partial/sample_0000-0" / f".step_0001.npz.{host}_{gone}_ab12_x_3.tmp").touch()
    np.save(made.path / "metrics_cache/sample_0009-0_psnr_0123.npy", np.zeros(3))
    sample(checkpoint)
    assert files(made.path) == before | {alive.name: b"half"}


def test_a_sample_made_again_takes_what_was_computed_of_the_old_one_with_it(checkpoint):
    made = sample(checkpoint)
    score(made)
    assert list(made.path.glob("metrics_cache/sample_0001-0_*"))
    made.save_sample(1, 0, load(made, 1))
    assert not list(made.path.glob("metrics_cache/sample_0001-0_*"))
    assert list(made.path.glob("metrics_cache/sample_0000-0_*"))


def test_ranks_share_out_the_videos_that_are_scored(checkpoint, monkeypatch):
    """Each of two ranks, one after the other, computes every second video; rank 0 writes the table."""
    from improved_diffusion.evaluation.measurements import Measurements

    alone = score(sample(checkpoint))
    made = sample(checkpoint, eval_dir="shared")
    computed, original = [], Measurements.compute

    def counting(self, position):
        computed.append((evaluate.dist_util.rank(), position))
        original(self, position)

    monkeypatch.setattr(Measurements, "compute", counting)
    monkeypatch.setattr(evaluate.dist_util, "world_size", lambda: 2)
    for rank in (1, 0):
        monkeypatch.setattr(evaluate.dist_util, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(evaluate.dist_util, "is_main", lambda rank=rank: rank == 0)
        monkeypatch.setattr(evaluate.dist_util, "gather_objects", lambda value, **_: [value])
        monkeypatch.setattr(evaluate.dist_util, "broadcast_object", lambda value, **_: value)
        config = EvalConfig((str(made.path),), modes=("psnr",), device="cpu")
        written = evaluate.evaluate(config).tables
        assert bool(written) == (rank == 0)
    assert sorted(computed) == [(0, 0), (0, 2), (1, 1), (1, 3)]
    np.testing.assert_array_equal(np.load(written[0], allow_pickle=True)["psnr"], alone["psnr"])


def test_a_folder_that_another_run_removes_meanwhile_is_no_error(tmp_path, monkeypatch):
    listings, original = [], Path.glob

    def removed_meanwhile(self, pattern):
        listings.append(pattern)
        if len(listings) == 1:
            raise FileNotFoundError(2, "No such file or directory", "partial/sample_0001-0")
        return original(self, pattern)

    (tmp_path / "samples").mkdir()
    np.save(tmp_path / "samples/sample_0000-0.npy", np.zeros(1))
    monkeypatch.setattr(Path, "glob", removed_meanwhile)
    assert EvalDir(tmp_path).is_begun() and len(listings) == 2
