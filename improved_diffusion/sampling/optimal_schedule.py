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

from improved_diffusion import dist_util
from improved_diffusion.data import paths
from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.data.rng_util import make_generator, randn
from improved_diffusion.data.video_datasets import choose_videos
from improved_diffusion.inference_utils import InferenceStrategyBase
from improved_diffusion.losses import masked_mean
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.sampling.options import DEFAULT_BATCH_SIZE, SampleConfig, ScheduleConfig
from improved_diffusion.sampling.plan import Task, evaluation_dir
from improved_diffusion.sampling.results import (
    EvalDir,
    check_same,
    content_digest,
    read_json,
    write_json,
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
        denoiser: Denoiser,
        videos: np.ndarray,
        *,
        num_timesteps: int,
        batch_size: int,
        seed: int,
        device: str,
    ):
        self.denoiser, self.videos, self.device = denoiser, videos, device
        self.batch_size, self.seed = batch_size, seed
        chain = denoiser.diffusion.num_timesteps
        parts = np.linspace(0, chain, num_timesteps, endpoint=False)
        grid = (parts + chain / num_timesteps / 2).astype(int)
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
        indices = np.array([observed + latent] * len(rows))
        frames = self.videos[[video for video, _ in rows]][:, indices[0]]
        batch = FrameBatch.from_uint8(frames, indices, len(observed), self.device)
        t = torch.tensor([t for _, t in rows], device=self.device)
        generators = [make_generator(self.seed, video, step, timestep) for video, timestep in rows]
        noise = torch.zeros_like(batch.frames)
        latents = noise[:, len(observed) :]
        latents.copy_(randn(latents.shape, generators, self.device))
        x_t = self.denoiser.diffusion.q_sample(batch.frames, t, noise)
        xstart = self.denoiser.denoise(x_t, t, batch)
        eps = self.denoiser.diffusion.predict_eps_from_xstart(x_t, t, xstart)
        error = masked_mean((eps - noise) ** 2, batch.latent_mask)
        return error * indices.shape[1] / len(latent)


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
        chosen = _found(path, candidates)
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
    if not path.exists():  # there was nothing to choose
        write_json(path, {"observed": chosen, "error": error(step, sorted(chosen), latent)})
    return sorted(chosen)


def _found(path: Path, candidates: Sequence[int]) -> list[int]:
    """The frames in the file of a step. Raises ValueError naming it where they cannot be."""
    observed = read_json(path).get("observed")
    if not isinstance(observed, list) or not set(observed) <= set(candidates):
        raise ValueError(f"{path}: {observed} are no frames that the step can observe: delete it")
    return observed


def find_schedule(options: SampleConfig, search: ScheduleConfig) -> Path:
    """Search all steps, or the one of SLURM_ARRAY_TASK_ID; returns the schedule's path.

    The file {step: frames} appears when the last step is found, by whichever task finds it. Raises
    ValueError for a user's mistake.
    """
    task = Task.resolve(options)
    plan, places = _searchable(task)
    # The folder in which --optimal will look.
    sizes = task.model.step, task.plan.T, task.plan.max_frames, task.reference_identity
    eval_dir = evaluation_dir(dataclasses.replace(options, optimal=True), *sizes)
    array_task = dist_util.array_task()
    if array_task is not None and array_task not in plan:
        logger.info("nothing to do: there is no step SLURM_ARRAY_TASK_ID=%d to search", array_task)
    EvalDir(eval_dir).clean_up()
    error = _denoising_error(task, search)
    _record(task, search, error.videos, eval_dir)
    for step in plan if array_task is None else set(plan) & {array_task}:
        candidates, latent = plan[step]
        path = paths.schedule_step_path(eval_dir, step)
        search_step(error, step, candidates, latent, places, path, start_from=search.start_from)
    return _merge(eval_dir, plan, places)


def _searchable(task: Task) -> tuple[dict[int, tuple[list[int], list[int]]], int]:
    """(`plan_steps`, frames that a step observes at most).

    Raises ValueError for a strategy that could not sample with the schedule that is found.
    """
    strategy, mode = task.plan.strategy(), task.options.inference_mode
    if strategy.is_adaptive:
        raise ValueError(f"--inference_mode {mode} chooses its own frames")
    if strategy.samples_frame_twice:
        raise ValueError(
            f"--inference_mode {mode} samples frames again, which a schedule could make it observe "
            "at the same time: choose another"
        )
    plan = plan_steps(strategy)
    places = task.plan.max_frames - task.options.step_size
    if any(len(latent) + min(places, len(c)) > task.plan.max_frames for c, latent in plan.values()):
        raise ValueError(
            f"--inference_mode {mode} leaves no room for observed frames within --max_frames "
            f"{task.plan.max_frames}: there is nothing to search"
        )
    return plan, places


def _record(task: Task, search: ScheduleConfig, videos: np.ndarray, eval_dir: Path) -> None:
    """Keep the options of the search beside what it finds, or see that they are the same.

    Raises ValueError naming the first that differs.
    """
    now = vars(search) | task.hashes() | {"seed": task.options.seed, "dataset": task.dataset}
    now["videos_sha256"] = content_digest(videos)
    path = paths.schedule_search_path(eval_dir)
    if any(path.parent.glob("step_*.json")):
        before = read_json(path) if path.exists() else {}
        check_same(f"{path.parent} holds steps of a search", before, now)
        if not before:
            logger.warning("%s does not say how its steps were searched: going on", path.parent)
        return
    write_json(path, now)


def _denoising_error(task: Task, search: ScheduleConfig) -> DenoisingError:
    train_set = task.videos("train")
    number = min(search.num_videos, len(train_set))
    chosen = choose_videos(len(train_set), indices=None, subset_size=number)
    return DenoisingError(
        task.model.denoiser(clip_denoised=False),
        np.stack([train_set.read(index, range(task.plan.T)) for index in chosen]),
        num_timesteps=search.num_timesteps,
        batch_size=task.options.batch_size or DEFAULT_BATCH_SIZE,
        seed=task.options.seed,
        device=task.model.device,
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
