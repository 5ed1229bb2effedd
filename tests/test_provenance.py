"""What sampling records of each video, and what is derived from the stored options where it did not."""

import runpy
import shlex

import numpy as np
import pytest

import toy_runs
from helpers import ROOT
from improved_diffusion.data import machine, paths
from improved_diffusion.registry import SAMPLERS
from improved_diffusion.sampling import provenance
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.sampling.results import EvalDir, write_json
from improved_diffusion.script_util import config_from_args


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return toy_runs.make_toy(tmp_path)


def test_the_record_of_a_sample_is_its_schedule_seconds_and_version(checkpoint):
    made = toy_runs.sample(checkpoint, inference_mode="hierarchy-2", indices=(0, 2))
    record = made.record(2, 0)
    assert record["version"] == machine.code_version() and 0 < record["seconds"] < 100
    observed, latent = record["schedule"][0]
    assert observed and set(observed) <= set(range(toy_runs.OBSERVED))
    everything = sorted(frame for _, latent in record["schedule"] for frame in latent)
    assert everything == list(range(toy_runs.OBSERVED, toy_runs.T))
    assert provenance.recorded_schedule(made, 2, 0) == provenance.planned_schedule(made)
    assert provenance.seconds_per_video(made)[1] == 2
    assert provenance.versions(made) == [record["version"]]


def test_adaptive_strategies_record_what_each_video_observed(checkpoint):
    options = {"inference_mode": "adaptive-autoreg", "strategy_options": {"distance": "l2"}}
    made = toy_runs.sample(checkpoint, indices=(0, 1, 2), **options)
    alone = toy_runs.sample(
        checkpoint, indices=(2,), eval_dir=str(made.path.parent / "x"), **options
    )
    together = [made.record(video, 0)["schedule"] for video in range(3)]
    assert together[2] == alone.record(2, 0)["schedule"]
    assert together[0] != together[2], "videos that look different observe different frames"
    assert provenance.planned_schedule(made) is None
    assert provenance.latent_counts(made) == [len(latent) for _, latent in together[0]]


def test_a_video_of_several_sittings_has_its_schedule_and_no_seconds(checkpoint, monkeypatch):
    whole = toy_runs.sample(checkpoint, indices=(0,), eval_dir="whole")
    ddpm, calls = SAMPLERS["ddpm"], iter(range(2))

    def interrupted(*args, **options):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return ddpm(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(SAMPLERS._entries, "ddpm", (interrupted, ""))
        toy_runs.sample(checkpoint, indices=(0,), eval_dir="parts")
    parts = toy_runs.sample(checkpoint, indices=(0,), eval_dir="parts")
    assert parts.record(0, 0)["schedule"] == whole.record(0, 0)["schedule"]
    assert parts.record(0, 0)["seconds"] is None and whole.record(0, 0)["seconds"] is not None
    assert provenance.seconds_per_video(parts) is None


def test_the_derived_command_makes_the_same_samples(checkpoint):
    options = {"sampler": "dpmpp2m", "timestep_respacing": "2", "seed": 3, "clip_denoised": False}
    gibbs = {"inference_mode": "gibbs", "strategy_options": {"gibbs_sweeps": 2}}
    made = toy_runs.sample(checkpoint, indices=(1, 3), num_samples=2, **options, **gibbs)
    python, script, *words = shlex.split(provenance.sample_command(made))
    assert (python, script) == ("python", "scripts/video_sample.py")
    parser = runpy.run_path(str(ROOT / script))["create_argparser"]()
    again = config_from_args(SampleConfig, parser.parse_args(words))
    asked = SampleConfig(
        **toy_runs.toy_options(checkpoint, indices=(1, 3), num_samples=2, **options, **gibbs)
    )
    differing = {
        name: (getattr(again, name), value)
        for name, value in vars(asked).items()
        if getattr(again, name) != value and name not in ("device", "T", "max_frames")
    }
    assert differing == {}
    stored = made.sample_config()
    assert (again.T, again.max_frames) == (stored["T"], stored["max_frames"])


def test_options_that_say_too_little_lead_to_nothing_and_no_error(tmp_path):
    eval_dir = EvalDir(tmp_path)
    assert provenance.planned_schedule(eval_dir) is None
    assert provenance.sample_command(eval_dir) is None
    write_json(eval_dir.sample_config_path, {"inference_mode": "unheard-of", "T": 9})
    assert provenance.planned_schedule(eval_dir) is None
    assert provenance.latent_counts(eval_dir) is None
    eval_dir.save_sample(0, 0, np.zeros((1, 3, 2, 2), np.uint8))
    assert provenance.seconds_per_video(eval_dir) is None and provenance.versions(eval_dir) == []
    assert paths.record_path(tmp_path, 0, 0).name == "sample_0000-0.json"
