"""How far samplers with few network calls end from where the probability flow leads.

The first inference step of some test videos is sampled from one noise with every sampler and spacing.
Errors are distances from the solution with very many calls.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.data.rng_util import make_generator, randn
from improved_diffusion.registry import SAMPLERS
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.sampling.plan import Task, chosen_batches
from improved_diffusion.study.benchmark_cases import network_calls
from improved_diffusion.study.markdown import markdown_table
from improved_diffusion.study.options import SolverConfig

logger = logging.getLogger(__name__)

REFERENCE = "unipc"  # the one of the highest order
GREY_LEVELS = 127.5  # in a unit of the network's frames, which are in [-1, 1]


def solver_errors(sampling: SampleConfig, config: SolverConfig) -> str:
    """A table in Markdown, whose rows are logged as soon as they are there.

    A row per sampler and spacing, a column per number of calls: root mean square over the latent
    frames' pixels, in grey levels of 255. Raises ValueError or FileNotFoundError for a user's mistake.
    """
    task = Task.resolve(sampling)
    step = first_step(task)
    exact = solution(task, step, (REFERENCE, "time", config.reference_calls))
    rows = []
    for sampler in config.samplers:
        for spacing in config.spacings:
            ways = [(sampler, spacing, calls) for calls in config.calls]
            errors = [rms(solution(task, step, way) - exact) for way in ways]
            rows.append([sampler, spacing, *(f"{GREY_LEVELS * e:.2f}" for e in errors)])
            logger.info(" ".join(rows[-1]))
    return markdown_table(["sampler", "spacing", *map(str, config.calls)], rows)


class FirstStep(NamedTuple):
    """The first inference step of some videos: its frames, what names each trajectory, and its noise."""

    batch: FrameBatch
    names: list[tuple[int, ...]]
    noise: Tensor


def first_step(task: Task) -> FirstStep:
    """That of the first batch of videos, named and with noise as sampling has them.

    Raises ValueError for a strategy that chooses frames by what they look like.
    """
    strategy = task.plan.strategy()
    if strategy.is_adaptive:
        raise ValueError(f"--inference_mode {task.plan.mode} looks at the frames: choose another")
    observed, latent = next(iter(strategy))
    source = task.source()
    jobs = chosen_batches(task.options, len(source))[0]
    indices = [*observed, *latent]
    frames = np.stack([source.read(job.video, indices) for job in jobs])
    batch = FrameBatch.from_uint8(frames, np.array([indices]), len(observed), task.model.device)
    names: list[tuple[int, ...]] = [(task.options.seed, *job, 0) for job in jobs]
    generators = [make_generator(*name) for name in names]
    return FirstStep(batch, names, randn(batch.frames.shape, generators, batch.device))


@torch.inference_mode()
def solution(task: Task, step: FirstStep, way: tuple[str, str, int]) -> Tensor:
    """The latent frames, flat. way: sampler, spacing, and the most network calls it may make."""
    batch, names, noise = step
    sampler, spacing, calls = way
    timesteps = max(n for n in range(1, calls + 1) if network_calls(sampler, n) <= calls)
    options = dataclasses.replace(task.options, timestep_respacing=str(timesteps), spacing=spacing)
    denoiser = dataclasses.replace(task, options=options).denoiser()
    denoiser = denoiser.for_trajectories(batch, names)
    with denoiser.autocast():
        frames = SAMPLERS[sampler](denoiser, batch, noise=noise)
    return frames[batch.latent_mask.expand_as(frames) > 0]


def rms(difference: Tensor) -> float:
    """The root mean square."""
    return float(difference.double().square().mean().sqrt())
