"""Bounds on the likelihood of test videos, inference step by inference step.

For each step of a strategy: the variational bound on the step's latent frames given its observed
ones, all of them frames of the test video (DDPM, arXiv 2006.11239, Eq. 5; FDM, arXiv 2205.11495,
section 4). A strategy that samples each frame once factorises the video's likelihood, so the sum
over its steps bounds that of all its latent frames.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from improved_diffusion import dist_util
from improved_diffusion.data import paths
from improved_diffusion.data.file_lock import file_lock
from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.data.rng_util import make_generator, randn
from improved_diffusion.data.video_datasets import VideoTestSet
from improved_diffusion.evaluation.metric_tables import load_elbo, mean_and_error
from improved_diffusion.evaluation.options import NllConfig
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.sampling.options import DEFAULT_BATCH_SIZE
from improved_diffusion.sampling.plan import OneClip, Task, VideoPlan, chosen_batches, own_jobs
from improved_diffusion.sampling.results import EvalDir, check_same, truth_of, write_json
from improved_diffusion.training.validation import stratified_timesteps

logger = logging.getLogger(__name__)

# The options that a bound depends on, beside the strategy's own: they must not differ within one folder.
DECISIVE = (
    "checkpoint_step dataset dataset_partition T max_frames inference_mode step_size obs_length "
    "optimal timestep_respacing seed tf32"
).split()


class StepBound:
    """The variational bound on latent frames given observed ones, over a whole chain.

    The noise of a video, step and timestep is always the same.

    Args:
        denoiser: of the chain.
        seed: of the noise.
        batch_size: timesteps that go through the network at once; it changes no result beyond
            rounding.
        device: of the network.
        stratified: estimate the sum over all timesteps from those of `stratified_timesteps`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        seed: int,
        batch_size: int,
        device: str,
        stratified: bool = False,
    ) -> None:
        assert isinstance(denoiser.diffusion, SpacedDiffusion)
        self.denoiser, self.trained_timesteps = denoiser, denoiser.diffusion.timestep_map
        self.seed, self.batch_size, self.device = seed, batch_size, device
        self.stratified = stratified

    @torch.inference_mode()
    def __call__(
        self,
        frames: np.ndarray,
        frame_indices: Sequence[int],
        num_observed: int,
        key: tuple[int, int],
    ) -> float:
        """The bound in bits, over all timesteps and the prior, or its estimate.

        Args:
            frames: uint8 [K, 3, H, W], the observed ones first.
            frame_indices: [K], their positions in the video.
            num_observed: how many are observed.
            key: (video, step), which the noise depends on beside the seed and the timestep.
        """
        indices = np.asarray(frame_indices)[None]
        batch = FrameBatch.from_uint8(frames[None], indices, num_observed, self.device)

        def noise(t: Tensor) -> Tensor:
            drawn = torch.zeros(len(t), *batch.frames.shape[1:], device=self.device)
            trained = self.trained_timesteps[t.numpy()]
            generators = [make_generator(self.seed, *key, int(step)) for step in trained]
            shape = drawn[:, num_observed:].shape
            drawn[:, num_observed:] = randn(shape, generators, self.device)
            return drawn

        timesteps, weights = self._timesteps(key)
        return self.denoiser.bound(
            batch, timesteps, noise, weights=weights, batch_size=self.batch_size
        )

    def _timesteps(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The timesteps, int64 [n], whose terms are summed, and the factors [n] on these."""
        total = len(self.trained_timesteps)
        if not self.stratified:
            return torch.arange(total), torch.ones(total)
        trained = self.denoiser.diffusion.config.diffusion_steps
        # The noise has the numbers of trained timesteps there: these draws depend on none of it.
        drawn, sizes = stratified_timesteps(total, make_generator(self.seed, *key, trained))
        return torch.tensor(drawn), torch.tensor(sizes)


def video_bounds(
    bound: StepBound,
    plan: VideoPlan,
    frames: np.ndarray,
    video: int,
    partial: Path,
    claimed: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> np.ndarray:
    """The bounds of all steps of one video, float64 [steps] in bits.

    frames: uint8 [T, 3, H, W]. Adaptive strategies choose by these true frames. What is done is
    kept in the file `partial`, written within `claimed()`, and goes on from there.
    """
    kept = _kept(partial)
    done = [] if kept is None else list(kept)
    for step in plan.steps_of(frames):
        if step.stage < len(done):
            continue
        indices = [*step.observed, *step.latent]
        done.append(bound(frames[indices], indices, len(step.observed), (video, step.stage)))
        try:
            with claimed():
                _save(partial, done)
        except OSError as error:  # it only saves making them again
            logger.warning("unfinished bounds are not kept: %s", error)
    return np.array(done, dtype=np.float64)


def _save(path: Path, bits: Sequence[float] | np.ndarray) -> None:
    with paths.atomic_write(path) as file:
        np.save(file, np.asarray(bits, dtype=np.float64))


def _kept(path: Path) -> np.ndarray | None:
    """The bounds in a file; None where there are none, or, with a warning, none to be read."""
    try:
        return load_elbo(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s; making it again", error)
        return None


# ---------------------------------------------------------------- test sets


@dataclass(frozen=True)
class VideoBounds:
    """Bounds of videos [videos], or their estimates, in bits per dimension of their latent frames."""

    eval_dir: Path
    videos: list[int]
    bits_per_dim: np.ndarray
    timesteps: tuple[int, int]  # of the chain that is bounded, and of the trained one
    stratified: bool


def format_bounds(bounds: VideoBounds) -> str:
    """The mean bound as text; that of a respaced chain is called so."""
    if not bounds.videos:
        return f"no video was chosen for {bounds.eval_dir / 'elbos'}"
    kept, trained = bounds.timesteps
    chain = f"the chain of all {trained} timesteps"
    if kept != trained:
        chain = (
            f"the chain respaced to {kept} of {trained} timesteps, not an estimate of the full one"
        )
    mean, error = mean_and_error(bounds.bits_per_dim)
    shown = "" if error is None else f" +- {error:.4f} (standard error)"
    what = "an unbiased estimate of the bound" if bounds.stratified else "the bound"
    return f"{mean:.4f}{shown} bits/dim over {len(bounds.videos)} videos: {what} of {chain}"


def bound_dataset(options: NllConfig) -> VideoBounds:
    """Bound the videos that `options` choose; those that are done are skipped.

    Writes elbos/elbo_<video>.npy, float64 [steps] in bits. Returns the bounds of the chosen videos
    (as an array task: of its batch). Raises ValueError or FileNotFoundError for a user's mistake,
    before anything is written.
    """
    task = Task.resolve(options)
    strategy = task.plan.strategy()
    if strategy.samples_frame_twice:
        raise ValueError(
            f"--inference_mode {options.inference_mode} samples frames more than once, so its steps "
            "bound no likelihood: choose another"
        )
    source = task.source()
    videos = _chosen_videos(task, source)
    process = task.model.process(options.timestep_respacing)
    if videos:
        task.model.network  # noqa: B018  weights that do not fit are told before anything is written
        task.plan.check(task.model.image_size)
        _check_config(task, stratified=options.stratified)
        _check_truth(task, source, videos)
    if dist_util.is_main():
        EvalDir(task.eval_dir).clean_up()
    missing = [v for v in videos if _kept(paths.elbo_path(task.eval_dir, v)) is None]
    missing = dist_util.broadcast_object(missing)  # a quick rank may have made some already
    if missing:
        mine = missing[dist_util.rank() :: dist_util.world_size()]
        _bound_videos(task, source, mine, stratified=options.stratified)
        dist_util.barrier()
    bits = [load_elbo(paths.elbo_path(task.eval_dir, video)).sum() for video in videos]
    num_latent = task.plan.T - len(strategy.observed_from_data)
    dimensions = num_latent * 3 * task.model.image_size**2
    chain = process.num_timesteps, process.config.diffusion_steps
    return VideoBounds(
        task.eval_dir, videos, np.array(bits) / dimensions, chain, options.stratified
    )


def _chosen_videos(task: Task, source: VideoTestSet | OneClip) -> list[int]:
    """This process's videos. Raises ValueError where one has fewer than T frames."""
    T = task.plan.T
    videos = [job.video for job in own_jobs(chosen_batches(task.options, len(source)))]
    for video in videos:
        if source.length(video) < T:
            raise ValueError(
                f"video {video} has {source.length(video)} frames, the bound needs all {T}: give a "
                "smaller --T, or other videos with --indices"
            )
    return videos


def _check_truth(task: Task, source: VideoTestSet | OneClip, videos: list[int]) -> None:
    """See that bounds that are there are of the videos as they are now. Raises ValueError."""
    eval_dir = EvalDir(task.eval_dir)
    for video in videos[dist_util.rank() :: dist_util.world_size()]:
        if eval_dir.truth(video) is not None and not isinstance(source, OneClip):
            truth = truth_of(source.read(video, range(task.plan.T)))
            eval_dir.check_truth(video, truth, task.dataset)


@contextlib.contextmanager
def _claimed(task: Task, video: int, truth: dict[str, Any], *, stratified: bool) -> Iterator[None]:
    """Around writing bounds of a video: what they are made from is stored or compared, alone."""
    eval_dir = EvalDir(task.eval_dir)
    with file_lock(paths.elbo_config_path(eval_dir.path)):
        values = _check_config(task, stratified=stratified)
        if values is not None:
            write_json(paths.elbo_config_path(eval_dir.path), values)
            if not eval_dir.model_config_path.exists():
                write_json(eval_dir.model_config_path, task.model.config)
        if not task.options.obs_video:  # a clip has a hash among the options
            eval_dir.save_truth(video, truth)
        yield


def _check_config(task: Task, *, stratified: bool) -> dict[str, Any] | None:
    """See that bounds that are there are of the same kind; where there are none, what to store of these.

    Raises ValueError naming the first option that differs.
    """
    eval_dir = EvalDir(task.eval_dir)
    stored = task.stored()
    decisive = (*DECISIVE, *vars(task.plan.options), *task.hashes())
    values = {name: stored[name] for name in decisive}
    values["stratified"] = stratified
    patterns = ("elbos/elbo_*.npy", "partial/elbo_*.npy")
    begun = any(paths.files_of(eval_dir.path, pattern) for pattern in patterns)
    if begun and (before := eval_dir.bound_config()):
        kept = {"stratified": False} | before  # the first versions knew no other
        check_same(f"{eval_dir.path / 'elbos'} holds bounds", kept, values)
        return None
    return values


def _bound_videos(
    task: Task, source: VideoTestSet | OneClip, videos: list[int], *, stratified: bool
) -> None:
    """Write the bounds of some videos."""
    options = task.options
    bound = StepBound(
        task.model.denoiser(options.timestep_respacing),
        seed=options.seed,
        batch_size=options.batch_size or DEFAULT_BATCH_SIZE,
        device=task.model.device,
        stratified=stratified,
    )
    for video in tqdm(videos, unit="video", disable=not dist_util.is_main()):
        frames = source.read(video, range(task.plan.T))
        claimed = functools.partial(_claimed, task, video, truth_of(frames), stratified=stratified)
        partial = paths.elbo_partial_path(task.eval_dir, video)
        bits = video_bounds(bound, task.plan, frames, video, partial, claimed)
        with claimed():
            _save(paths.elbo_path(task.eval_dir, video), bits)
        partial.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others are not finished yet
            partial.parent.rmdir()
    logger.info("bounded %d videos into %s", len(videos), task.eval_dir / "elbos")
