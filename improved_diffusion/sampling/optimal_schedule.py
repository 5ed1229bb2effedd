"""Greedy search for the frames that each inference step had best observe.

Source: FDM (arXiv 2205.11495), section 4 ("optimized" schemes): for each step, add the frame that
lowers the network's denoising error on the step's latent frames most, until the places are full.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from improved_diffusion.config import DiffusionConfig
from improved_diffusion.data import paths
from improved_diffusion.data.checkpoints import WeightsFile, load_weights
from improved_diffusion.data.rng_util import make_generator, randn
from improved_diffusion.data.video_datasets import get_test_dataset
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.inference_utils import InferenceStrategyBase
from improved_diffusion.losses import masked_mean
from improved_diffusion.sampling.options import SampleConfig, ScheduleConfig
from improved_diffusion.sampling.results import read_json, write_json
from improved_diffusion.sampling.video_sampling import SampleSettings
from improved_diffusion.script_util import (
    array_task,
    build_model,
    choose_videos,
    config_from_args,
    create_diffusion,
    default_device,
    stored_dataset,
)

logger = logging.getLogger(__name__)


def plan_steps(strategy: InferenceStrategyBase) -> dict[int, tuple[list[int], list[int]]]:
    """{step: (frames that exist before it, latent frames)} of the steps that can observe any."""
    done = set(strategy.observed_from_data)
    plan = {}
    for step, (_, latent) in enumerate(strategy):
        if done:
            plan[step] = (sorted(done), list(latent))
        done.update(latent)
    return plan


class DenoisingError:
    """The mean squared error of the predicted noise on latent frames, given observed ones.

    Averaged over training videos, uint8 [n, T, 3, H, W], and an even grid of timesteps: the middles
    of equal parts of the chain. (Its very first timestep would outweigh all others: there the noise
    can hardly be told from its absence, whatever is observed.) The noise of a video, step and
    timestep is always the same, so that candidates differ in nothing else.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        diffusion: GaussianDiffusion,
        videos: np.ndarray,
        *,
        num_timesteps: int,
        batch_size: int,
        seed: int,
        device: str,
    ):
        self.model, self.diffusion, self.videos = model, diffusion, videos
        self.batch_size, self.seed, self.device = batch_size, seed, device
        parts = np.linspace(0, diffusion.num_timesteps, num_timesteps, endpoint=False)
        grid = (parts + diffusion.num_timesteps / num_timesteps / 2).astype(int)
        self.rows = [(video, int(t)) for video in range(len(videos)) for t in grid]

    @torch.inference_mode()
    def __call__(self, step: int, observed: Sequence[int], latent: Sequence[int]) -> float:
        """The error in inference step `step`."""
        total = 0.0
        for start in range(0, len(self.rows), self.batch_size):
            rows = self.rows[start : start + self.batch_size]
            total += float(self._errors(step, list(observed), list(latent), rows).sum())
        return total / len(self.rows)

    def _errors(
        self, step: int, observed: list[int], latent: list[int], rows: list[tuple[int, int]]
    ) -> torch.Tensor:
        indices = observed + latent
        frames = self.videos[[video for video, _ in rows]][:, indices]
        x0 = torch.from_numpy(frames).to(self.device).float() / 127.5 - 1
        t = torch.tensor([t for _, t in rows], device=self.device)
        mask = torch.zeros(len(rows), len(indices), 1, 1, 1, device=self.device)
        mask[:, len(observed) :] = 1
        generators = [make_generator(self.seed, video, step, timestep) for video, timestep in rows]
        noise = torch.zeros_like(x0)
        shape = (len(rows), len(latent), *x0.shape[2:])
        noise[:, len(observed) :] = randn(shape, generators, self.device)
        x_t = self.diffusion.q_sample(x0, t, noise)
        out = self.diffusion.p_mean_variance(
            self.model,
            x_t,
            t,
            clip_denoised=False,
            model_kwargs={
                "x0": x0,
                "obs_mask": 1 - mask,
                "latent_mask": mask,
                "frame_indices": torch.tensor(indices, device=self.device).expand(len(rows), -1),
            },
        )
        eps = self.diffusion.predict_eps_from_xstart(x_t, t, out["pred_xstart"])
        return masked_mean((eps - noise) ** 2, mask) * len(indices) / len(latent)


def search_step(
    error: DenoisingError,
    step: int,
    candidates: Sequence[int],
    latent: Sequence[int],
    places: int,
    path: Path,
    *,
    start_from: str,
) -> list[int]:
    """The frames that step `step` had best observe, at most `places`; resumed from `path`.

    start_from: "nothing", or "nearest": half of the places start with the frames nearest to the
    latent ones. Each frame that is added is kept in the file at once.
    """
    if path.exists():
        chosen = list(read_json(path)["observed"])
    elif start_from == "nearest":
        nearest = sorted(candidates, key=lambda f: (min(abs(f - frame) for frame in latent), f))
        chosen = nearest[: places // 2]
    else:
        chosen = []
    places = min(places, len(candidates))
    while len(chosen) < places:
        left = [frame for frame in candidates if frame not in chosen]
        bar = tqdm(left, desc=f"step {step}, frame {len(chosen) + 1} of {places}", leave=False)
        errors = [error(step, sorted([*chosen, frame]), latent) for frame in bar]
        best = int(np.argmin(errors))
        chosen.append(left[best])
        logger.info("step %d: observe %d, error %.5f", step, left[best], errors[best])
        write_json(path, {"observed": chosen, "error": errors[best]})
    return sorted(chosen)


def find_schedule(options: SampleConfig, search: ScheduleConfig) -> Path:
    """Search all steps, or the one of SLURM_ARRAY_TASK_ID; returns the schedule's path.

    The file {step: frames} appears when the last step is found, by whichever task finds it. Raises
    ValueError for a user's mistake.
    """
    weights = load_weights(options.checkpoint_path)
    settings = SampleSettings.resolve(options, weights.config, weights.step)
    eval_dir = dataclasses.replace(
        settings, options=dataclasses.replace(options, optimal=True)
    ).eval_dir
    strategy = settings.strategy()
    if strategy.is_adaptive:
        raise ValueError(f"--inference_mode {options.inference_mode} chooses its own frames")
    plan = plan_steps(strategy)
    task = array_task()
    if task is not None and task not in plan:
        logger.info("nothing to do: there is no step SLURM_ARRAY_TASK_ID=%d to search", task)
    error = _denoising_error(settings, weights, search)
    for step in plan if task is None else set(plan) & {task}:
        candidates, latent = plan[step]
        search_step(
            error,
            step,
            candidates,
            latent,
            settings.max_frames - options.step_size,
            paths.schedule_step_path(eval_dir, step),
            start_from=search.start_from,
        )
    return _merge(eval_dir, plan, settings.max_frames - options.step_size)


def _denoising_error(
    settings: SampleSettings, weights: WeightsFile, search: ScheduleConfig
) -> DenoisingError:
    options = settings.options
    spec = stored_dataset(settings.dataset, settings.model_config)
    train_set = get_test_dataset(spec, T=settings.T, partition="train", cache_dir=options.cache_dir)
    number = min(search.num_videos, len(train_set))
    videos = [
        train_set.read(index, range(settings.T))
        for index in choose_videos(len(train_set), indices=None, subset_size=number)
    ]
    device = default_device(options.device)
    return DenoisingError(
        build_model(weights, options.checkpoint_path, device, compile=options.compile),
        create_diffusion(config_from_args(DiffusionConfig, weights.config)),
        np.stack(videos),
        num_timesteps=search.num_timesteps,
        batch_size=options.batch_size,
        seed=options.seed,
        device=device,
    )


def _merge(eval_dir: Path, plan: dict[int, tuple[list[int], list[int]]], places: int) -> Path:
    """Write the schedule once every step is found."""
    path = paths.optimal_schedule_path(eval_dir)
    found = {}
    for step, (candidates, _) in plan.items():
        step_path = paths.schedule_step_path(eval_dir, step)
        observed = read_json(step_path)["observed"] if step_path.exists() else []
        if len(observed) < min(places, len(candidates)):
            logger.info("%s waits for step %d", path, step)
            return path
        found[step] = sorted(observed)
    with paths.atomic_write(path) as file:
        torch.save(found, file)
    logger.info("wrote %s", path)
    return path
