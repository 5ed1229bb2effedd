"""The comparisons of samplers and of guidance: what stands in their tables, and what they refuse."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import call_main, make_checkpoint
from improved_diffusion.data.rng_util import make_generator
from improved_diffusion.evaluation.metrics import FrameMetric, Psnr
from improved_diffusion.registry import FRAME_METRICS
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.sampling.plan import Task
from improved_diffusion.study import guidance_sweep as sweep
from improved_diffusion.study.guidance_sweep import guidance_sweep
from improved_diffusion.study.options import GuidanceSweepConfig, SolverConfig
from improved_diffusion.study.solver_errors import first_step, solver_errors
from test_video_sampling import checkpoint, load, sample  # noqa: F401


class GreyDifference(FrameMetric):
    """How far the mean levels of two frames are apart."""

    def compute(self, samples, truth):
        return abs(samples.mean(axis=(1, 2, 3)) - truth.mean(axis=(1, 2, 3)))


def options(checkpoint, **more):  # noqa: F811
    base = {"step_size": 2, "obs_length": 4, "T": 6, "indices": (0, 2), "device": "cpu"}
    return SampleConfig(str(checkpoint), "autoreg", **(base | more))


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]


@pytest.mark.slow
def test_errors_shrink_with_calls_and_are_none_where_the_solution_is_asked_for(
    tmp_path,
    checkpoint,  # noqa: F811
):
    longer = make_checkpoint(checkpoint, tmp_path / "data", diffusion_steps=60)
    config = SolverConfig(
        samplers=("unipc", "heun"), spacings=("time", "logsnr"), calls=(4, 16), reference_calls=16
    )
    header, _, *rows = cells(solver_errors(options(longer), config))
    assert header == ["sampler", "spacing", "4", "16"]
    assert [row[:2] for row in rows] == [
        [sampler, spacing] for sampler in config.samplers for spacing in config.spacings
    ]
    assert rows[0][3] == "0.00" and float(rows[0][2]) > 0
    assert float(rows[1][3]) < float(rows[1][2])


def test_the_compared_step_begins_with_the_noise_and_the_frames_of_sampling(checkpoint, tmp_path):  # noqa: F811
    task = Task.resolve(options(checkpoint))
    batch, _, noise = first_step(task)
    assert batch.frame_indices.tolist() == [[2, 3, 4, 5]]
    truth = np.load(tmp_path / "data/test/2.npy")[2].transpose(2, 0, 1)
    np.testing.assert_allclose(batch.frames[1, 0], truth / 127.5 - 1, atol=1e-6)
    assert torch.equal(noise[1], torch.randn(4, 3, 32, 32, generator=make_generator(0, 2, 0, 0)))


def test_strategies_that_look_at_frames_and_impossible_calls_are_refused(checkpoint):  # noqa: F811
    with pytest.raises(ValueError, match="adaptive-autoreg looks at the frames"):
        first_step(Task.resolve(SampleConfig(str(checkpoint), "adaptive-autoreg", obs_length=4)))
    with pytest.raises(ValueError, match="--calls"):
        SolverConfig(calls=(1, 4))


@pytest.mark.slow
def test_the_sweep_measures_what_it_has_sampled(checkpoint, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(
        FRAME_METRICS, "_entries", FRAME_METRICS._entries | {"lpips": (GreyDifference, "")}
    )
    sampling = options(checkpoint, num_samples=2, eval_dir="swept")
    config = GuidanceSweepConfig(weights=(1.0, 2.0), against=("nothing", "subset"))
    header, _, *rows = cells(guidance_sweep(sampling, config))
    held = sorted(folder.name for folder in Path("swept").iterdir())
    assert held == ["g2-nothing", "g2-subset", "unguided"]
    assert [row[:2] for row in rows] == [["1", "-"], ["2", "nothing"], ["2", "subset"]]
    found = sample(checkpoint, num_samples=2, T=6)
    between = [
        GreyDifference().compute(load(found, video, 0)[4:], load(found, video, 1)[4:]).mean()
        for video in (0, 2)
    ]
    truth = [np.load(tmp_path / f"data/test/{v}.npy").transpose(0, 3, 1, 2)[4:6] for v in (0, 2)]
    psnr = [
        Psnr().compute(load(found, video, index)[4:], frames).mean()
        for video, frames in zip((0, 2), truth, strict=True)
        for index in (0, 1)
    ]
    assert rows[0][2].split(" ± ")[0] == f"{np.mean(psnr):.3f}"
    assert rows[0][4].split(" ± ")[0] == f"{np.mean(between):.3f}"
    fewer = dataclasses.replace(sampling, indices=(2,))  # of those that are there
    *_, again, _, _ = cells(guidance_sweep(fewer, config))
    assert again[4] == f"{between[1]:.3f}"
    with pytest.raises(ValueError, match="--num_samples 1"):
        guidance_sweep(options(checkpoint), config)


def test_the_interval_of_the_sweep_holds_for_what_is_guided(checkpoint, monkeypatch):  # noqa: F811
    monkeypatch.setattr(
        FRAME_METRICS, "_entries", FRAME_METRICS._entries | {"lpips": (GreyDifference, "")}
    )
    sampled = []
    monkeypatch.setattr(sweep, "_scores", lambda way, _: sampled.append(way) or [np.ones(2)] * 3)
    words = "--inference_mode autoreg --num_samples 2 --against nothing --weights 1 2".split()
    call_main("video_compare_guidance.py", checkpoint, *words, "--guidance_interval", 0.1, 5)
    assert [(way.guidance, way.guidance_interval) for way in sampled] == [(1, None), (2, (0.1, 5))]
    config = GuidanceSweepConfig(weights=(1.0, 2.0), guidance_interval=(5.0, 0.1))
    with pytest.raises(ValueError, match="--guidance_interval 5 0.1: .* the lower first"):
        guidance_sweep(options(checkpoint, num_samples=2), config)
    assert len(sampled) == 2, "nothing is sampled before all is checked"
