"""What guidance does to samples: their distance to the truth, and how much they differ from each other."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np

from improved_diffusion.data import paths
from improved_diffusion.evaluation.metric_tables import mean_and_error
from improved_diffusion.evaluation.metrics import FrameMetric
from improved_diffusion.registry import FRAME_METRICS
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.sampling.plan import Task, chosen_batches
from improved_diffusion.sampling.results import load_video
from improved_diffusion.sampling.video_sampling import sample_dataset
from improved_diffusion.study.markdown import markdown_table
from improved_diffusion.study.options import GuidanceSweepConfig

logger = logging.getLogger(__name__)


def guidance_sweep(sampling: SampleConfig, config: GuidanceSweepConfig) -> str:
    """Sample the same videos at every weight, and return a table in Markdown.

    A row per reference and weight, the unguided one once: psnr and lpips to the truth, and lpips between
    two samples of one video, means over videos with their standard errors. Samples that exist are taken
    as they are. Raises ValueError or FileNotFoundError for a user's mistake.
    """
    if sampling.num_samples < 2:
        raise ValueError(
            f"--num_samples {sampling.num_samples}: give 2, whose difference is measured"
        )
    metrics = {name: FRAME_METRICS[name]() for name in ("psnr", "lpips")}
    for metric in metrics.values():
        metric.settings()  # which raises where there are no weights
    rows = []
    for options in _ways(sampling, config):
        scores = _scores(options, metrics)
        shown = options.guidance_against if options.is_guided else "-"
        rows.append([f"{options.guidance:g}", shown, *(_format(values) for values in scores)])
        logger.info(" ".join(rows[-1]))
    heads = ["guidance", "against", "psnr", "lpips", "lpips between samples"]
    return markdown_table(heads, rows)


def _ways(sampling: SampleConfig, config: GuidanceSweepConfig) -> list[SampleConfig]:
    """The options of each row; an --eval_dir holds a folder of each.

    Raises ValueError for those that cannot be, before any is sampled.
    """
    ways = []
    for against, weight in itertools.product(config.against, config.weights):
        if weight == 1 and against != config.against[0]:
            continue  # the same samples
        way: dict[str, Any] = {"guidance": weight}
        if weight != 1:
            way |= {"guidance_against": against, "guidance_interval": config.guidance_interval}
        options = dataclasses.replace(sampling, **way)
        if sampling.eval_dir is not None:
            own = options.guidance_suffix(Path(options.guidance_against).stem) or "_unguided"
            options = dataclasses.replace(options, eval_dir=str(Path(sampling.eval_dir) / own[1:]))
        ways.append(options)
    return ways


def _scores(options: SampleConfig, metrics: dict[str, FrameMetric]) -> list[np.ndarray]:
    """psnr, lpips, and lpips between the first two samples, [videos] each, of the sampled frames."""
    eval_dir, task = sample_dataset(options), Task.resolve(options)
    observed = set(task.plan.observed_from_data)
    sampled = [frame for frame in range(task.plan.T) if frame not in observed]
    source = task.source()
    rows = []
    jobs = [job for batch in chosen_batches(task.options, len(source)) for job in batch]
    for video in sorted({job.video for job in jobs}):  # others may be there, of other commands
        truth = source.read(video, sampled)
        first, second = (
            load_video(paths.sample_path(eval_dir.path, video, sample))[sampled]
            for sample in (0, 1)
        )
        pairs = [("psnr", first, truth), ("psnr", second, truth)]
        pairs += [("lpips", first, truth), ("lpips", second, truth), ("lpips", first, second)]
        values = [metrics[name].compute(a, b).mean() for name, a, b in pairs]
        rows.append([(values[0] + values[1]) / 2, (values[2] + values[3]) / 2, values[4]])
    return list(np.array(rows).T)


def _format(values: np.ndarray) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.3f}" + ("" if error is None else f" ± {error:.3f}")
