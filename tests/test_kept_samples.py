"""Nothing wrong is kept: unfinished videos, other weights, other truth, failed runs, mistakes."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from improved_diffusion.data import machine, paths
from improved_diffusion.evaluation import evaluate, nll
from improved_diffusion.evaluation.options import EvalConfig, NllConfig
from improved_diffusion.sampling import keeper, lpips_util, optimal_schedule, video_sampling
from improved_diffusion.sampling.options import SampleConfig, ScheduleConfig
from improved_diffusion.sampling.results import EvalDir, Partial
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


def stop_after(monkeypatch, stage: int) -> None:
    """Kill the next run when it has made so many inference steps of its first batch."""
    original = video_sampling.VideoSampler.sample

    def dying(self, *args):
        for made, frames in original(self, *args):
            yield made, frames
            if made + 1 == stage:
                raise KeyboardInterrupt

    monkeypatch.setattr(video_sampling.VideoSampler, "sample", dying)


def keep_always(monkeypatch) -> None:
    """Unfinished videos are kept after every inference step, however long that takes."""
    monkeypatch.setattr(keeper, "time", SimpleNamespace(perf_counter=lambda: 0.0))


def test_videos_that_another_run_advances_meanwhile_are_whole(checkpoint, monkeypatch):
    """Two runs on one folder: while the first makes a batch, the second brings videos 2 and 3 on."""
    whole = sample(checkpoint, eval_dir="whole")
    keep_always(monkeypatch)
    make_batch = video_sampling.SamplingRun._make_batch
    partials = {}
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            sample(checkpoint, eval_dir="ahead", indices=(2,))
    ahead = EvalDir("ahead/autoreg_4_2_12_2").load_partial(2, 0)
    assert ahead.stages == 3

    def meanwhile(self, *args):
        yield from make_batch(self, *args)
        if not partials:
            partials[2] = ahead
            self.eval_dir.save_partial(2, 0, ahead)

    monkeypatch.setattr(video_sampling.SamplingRun, "_make_batch", meanwhile)
    made = sample(checkpoint, eval_dir="shared", batch_size=2)
    assert partials
    for video in range(4):
        np.testing.assert_array_equal(load(made, video), load(whole, video))
    assert not (made.path / "partial").exists()


def test_videos_that_another_run_finishes_meanwhile_are_left_alone(checkpoint, monkeypatch):
    make_batch, batches = video_sampling.SamplingRun._make_batch, []

    def meanwhile(self, stage, partials):
        batches.append([job.video for job in partials])
        yield from make_batch(self, stage, partials)
        if len(batches) == 1:
            self.eval_dir.save_sample(3, 0, np.full((T, 3, SIZE, SIZE), 9, np.uint8))

    monkeypatch.setattr(video_sampling.SamplingRun, "_make_batch", meanwhile)
    made = sample(checkpoint, batch_size=2)
    assert batches == [[0, 1], [2]] and (load(made, 3) == 9).all()


def test_a_frame_that_was_never_made_is_not_saved(checkpoint, monkeypatch):
    """What is kept claims more inference steps than its frames were made in."""
    keep_always(monkeypatch)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            sample(checkpoint, indices=(0,))
    folder = EvalDir("results/autoreg_4_2_12_2")
    kept = folder.load_partial(0, 0)
    assert kept.stages == 2 and list(np.flatnonzero(kept.made)) == list(range(6))
    for stages in (3, 5):
        folder.save_partial(0, 0, Partial(stages, kept.frames, kept.made))
        with pytest.raises(ValueError, match=r"video 0 sample 0: the frames \[6.*never made"):
            sample(checkpoint, indices=(0,))
    assert not (folder.path / "samples").exists()


def test_what_is_kept_of_other_data_is_not_gone_on_with(checkpoint, monkeypatch, caplog):
    keep_always(monkeypatch)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            sample(checkpoint, indices=(0,))
    np.save("data/test/0.npy", 255 - np.load("data/test/0.npy"))
    made = sample(checkpoint, indices=(0,))
    assert "does not fit: from its start" in caplog.text
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
        patch.setattr(EvalDir, "save_partial", failing)
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
    made.save_partial(0, 0, Partial(3, frames, np.ones(T, bool)))
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
