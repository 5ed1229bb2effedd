"""Array jobs, killed jobs, one's own clips, strategies that look at frames, optimal schedules."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from helpers import ROOT, make_checkpoint, make_folder_dataset, run_script
from improved_diffusion.data import paths
from improved_diffusion.sampling import optimal_schedule
from improved_diffusion.sampling.options import SampleConfig, ScheduleConfig
from improved_diffusion.sampling.unfinished_video import UnfinishedVideo
from test_video_sampling import assert_same_video, checkpoint, load, sample  # noqa: F401


def test_status_lists_what_is_missing_and_the_array_tasks_that_make_it(checkpoint, capsys):  # noqa: F811
    sample(checkpoint, indices=(0, 1))
    sample(checkpoint, indices=None, batch_size=2, status=True)
    assert capsys.readouterr().out.splitlines()[:3] == [
        "missing: video 2 sample 0",
        "missing: video 3 sample 0",
        "--array=1",
    ]
    sample(checkpoint, indices=(0, 1), status=True)
    assert capsys.readouterr().out.startswith("2 of 2 videos")


@pytest.mark.slow
def test_ranks_split_the_videos(checkpoint, tmp_path):  # noqa: F811
    mpiexec = Path(sys.executable).parent / "mpiexec"
    done = run_script(
        "video_sample.py", checkpoint, "--inference_mode", "autoreg", "--step_size", "2",
        "--obs_length", "6", "--batch_size", "1", cwd=tmp_path, launcher=(mpiexec, "-n", "2"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("results/**/samples/*.npy"))) == 4
    alone = sample(checkpoint, obs_length=6, indices=(3,), eval_dir="alone")
    (together,) = tmp_path.glob("results/**/sample_0003-0.npy")
    assert_same_video(np.load(together), load(alone, 3))


@pytest.mark.slow
def test_a_killed_job_goes_on_at_its_inference_step(checkpoint, tmp_path, monkeypatch):  # noqa: F811
    whole = sample(checkpoint, indices=(0,), obs_length=1, eval_dir="whole")
    command = [
        sys.executable, str(ROOT / "scripts/video_sample.py"), str(checkpoint), "--inference_mode",
        "autoreg", "--step_size", "2", "--obs_length", "1", "--indices", "0", "--eval_dir", "killed",
    ]  # fmt: skip
    folder = tmp_path / "killed/autoreg_4_2_8_1"
    job = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while not paths.step_path(folder, 0, 0, 1).exists():
        assert time.time() < deadline and job.poll() is None, "no partial result appeared"
        time.sleep(0.005)
    job.send_signal(signal.SIGKILL)
    job.wait()
    stages, original = [], UnfinishedVideo.observed_frames

    def counting(self, step):
        stages.append(step.stage)
        return original(self, step)

    monkeypatch.setattr(UnfinishedVideo, "observed_frames", counting)
    eval_dir = sample(checkpoint, indices=(0,), obs_length=1, eval_dir="killed")
    assert stages and stages[0] > 1, f"started again at stage {stages[:1]}"
    np.testing.assert_array_equal(load(eval_dir, 0), load(whole, 0))
    assert not (folder / "partial").exists()


def test_a_clip_of_ones_own_is_observed(checkpoint, tmp_path):  # noqa: F811
    clip = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3)).astype(np.uint8)
    np.save(tmp_path / "walk.npy", clip)
    eval_dir = sample(checkpoint, indices=None, obs_video=str(tmp_path / "walk.npy"))
    assert eval_dir.path.name == "clip-walk_autoreg_4_2_8_4"
    np.testing.assert_array_equal(load(eval_dir, 0)[:4], clip[:4].transpose(0, 3, 1, 2))
    with pytest.raises(ValueError, match="6 frames, --obs_length asks for 7"):
        sample(checkpoint, indices=None, obs_length=7, obs_video=str(tmp_path / "walk.npy"))


@pytest.mark.slow
def test_gibbs_sweeps_name_the_folder_and_refine_frames(checkpoint):  # noqa: F811
    options = {"indices": (0,), "inference_mode": "gibbs"}
    one = sample(checkpoint, **options)
    two = sample(checkpoint, strategy_options={"gibbs_sweeps": 2}, **options)
    assert one.path.name == "gibbs_sweeps1_4_2_8_4" and two.path.name == "gibbs_sweeps2_4_2_8_4"
    plain = sample(checkpoint, indices=(0,))
    assert (load(one, 0)[4:] != load(plain, 0)[4:]).mean() > 0.1


def test_adaptive_strategies_choose_frames_for_each_video(checkpoint):  # noqa: F811
    l2 = {"distance": "l2"}
    options = {"inference_mode": "adaptive-autoreg", "strategy_options": l2, "obs_length": 5}
    together = sample(checkpoint, batch_size=2, eval_dir="a", **options)
    alone = sample(checkpoint, batch_size=1, eval_dir="b", **options)
    assert_same_video(load(together, 2), load(alone, 2))
    with pytest.raises(ValueError, match="adaptive"):
        sample(checkpoint, just_visualise=True, **options)


class TestOptimalSchedule:
    @pytest.fixture
    def options(self, checkpoint) -> SampleConfig:  # noqa: F811
        return SampleConfig(
            checkpoint_path=str(checkpoint),
            inference_mode="autoreg",
            step_size=2,
            obs_length=4,
            T=8,
        )

    search = ScheduleConfig(num_videos=2, num_timesteps=2)

    @pytest.mark.slow
    def test_is_searched_by_array_tasks_and_used(self, options, checkpoint, monkeypatch):  # noqa: F811
        import torch

        paths_found = []
        for task in ("0", "1", "2"):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
            paths_found.append(optimal_schedule.find_schedule(options, self.search))
            assert paths_found[-1].exists() == (task != "0")
        monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
        schedule = torch.load(paths_found[0], weights_only=True)
        assert set(schedule) == {0, 1}
        assert all(len(frames) == 2 for frames in schedule.values())
        eval_dir = sample(checkpoint, indices=(0,), optimal=True)
        assert eval_dir.path == paths_found[0].parent
        assert load(eval_dir, 0).shape[0] == 8

    @pytest.mark.slow
    def test_reads_copies_of_the_training_videos_where_asked(self, options, tmp_path):
        options = dataclasses.replace(options, cache_dir=str(tmp_path / "cache"))
        optimal_schedule.find_schedule(options, self.search)
        copied = sorted(path.name for path in (tmp_path / "cache").rglob("train/*.npy"))
        assert len(copied) == self.search.num_videos

    def test_averages_over_the_middles_of_equal_parts_of_the_chain(self):
        chain = SimpleNamespace(diffusion=SimpleNamespace(num_timesteps=100))
        error = optimal_schedule.DenoisingError(
            chain, np.zeros((2, 8, 3, 4, 4), np.uint8),
            num_timesteps=4, batch_size=1, seed=0, device="cpu",
        )  # fmt: skip
        assert error.rows == [(v, t) for v in range(2) for t in (12, 37, 62, 87)]

    def test_takes_the_frames_with_the_least_error_and_resumes(self, tmp_path):
        wanted = {2, 5}
        calls = []

        def error(step, observed, latent):
            calls.append(tuple(observed))
            return -len(wanted & set(observed)) + 0.01 * sum(observed)

        path = tmp_path / "step.json"
        arguments = (3, range(6), [6, 7], 2, path)
        assert optimal_schedule.search_step(error, *arguments, start_from="nothing") == [2, 5]
        assert len(calls) == 6 + 5
        optimal_schedule.search_step(error, *arguments, start_from="nothing")
        assert len(calls) == 11
        path.write_text('{"observed": [5]}')
        assert optimal_schedule.search_step(error, *arguments, start_from="nothing") == [2, 5]
        assert len(calls) == 11 + 5

    def test_starts_from_the_nearest_frames_where_asked(self, tmp_path):
        found = optimal_schedule.search_step(
            lambda step, observed, latent: float(sum(observed)),
            0, range(6), [6, 7], 4, tmp_path / "step.json", start_from="nearest",
        )  # fmt: skip
        assert found == [0, 1, 4, 5]

    def test_a_missing_schedule_is_named(self, checkpoint):  # noqa: F811
        with pytest.raises((ValueError, FileNotFoundError), match="optimal_schedule.pt"):
            sample(checkpoint, optimal=True)


@pytest.mark.slow
def test_memory_of_a_long_video_is_that_of_its_bytes(tmp_path):
    """Sampling 600 frames takes no more memory than 40 do, beyond the frames themselves."""
    data = make_folder_dataset(tmp_path / "data", num_test=1)
    path = make_checkpoint(tmp_path / "checkpoints/a/model_000001.pt", data, diffusion_steps=1)
    peaks = {}
    for T in (40, 600):
        done = run_script(
            "video_sample.py", path, "--inference_mode", "autoreg", "--step_size", 3, "--T", T,
            "--obs_length", 4, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        peaks[T] = float(done.stderr.split("peak memory ")[-1].split()[0])
    assert peaks[600] - peaks[40] < 0.05
