"""Scoring an evaluation directory: pair samples with truth, compute metrics, keep every result.

Results per video and sample are cached in files whose names hold a hash of all that they depend on,
so that nothing is computed twice and nothing stale survives a sample that was made again. The
pickled table is put together from those.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from improved_diffusion import paths
from improved_diffusion.config import EvalConfig
from improved_diffusion.metrics import METRICS
from improved_diffusion.results import EvalDir, load_video, write_json
from improved_diffusion.script_util import stored_dataset
from improved_diffusion.video_datasets import VideoTestSet, get_test_dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scoring:
    """What is scored: which videos and samples, against what, and which frames count."""

    eval_dir: EvalDir
    truth: VideoTestSet
    videos: list[int]
    num_samples: int
    T: int
    predicted: np.ndarray  # indices of the frames that were sampled and have truth

    @classmethod
    def resolve(cls, config: EvalConfig) -> Scoring:
        """Fill in from the evaluation directory what the options leave open.

        Raises ValueError or FileNotFoundError for a user's mistake.
        """
        eval_dir = EvalDir(config.eval_dir)
        samples = eval_dir.samples()
        stored = eval_dir.sample_config()

        def setting(name: str, given: object) -> object:
            if given is not None:
                return given
            if name not in stored:
                raise ValueError(
                    f"{eval_dir.sample_config_path} does not say {name}: give --{name}"
                )
            return stored[name]

        num_samples = config.num_samples or min(len(indices) for indices in samples.values())
        for video, indices in samples.items():
            if indices[:num_samples] != list(range(num_samples)):
                raise ValueError(
                    f"{eval_dir.path}: video {video} has samples {indices}, not the {num_samples} asked for: "
                    f"sample the others or give a smaller --num_samples"
                )
        T = int(setting("T", config.T))  # type: ignore[call-overload]
        truth = get_test_dataset(
            stored_dataset(str(setting("dataset", config.dataset)), eval_dir.model_config()),
            T=T,
            partition=str(setting("dataset_partition", config.dataset_partition)),
        )
        videos = sorted(samples)
        if videos[-1] >= len(truth):
            raise ValueError(
                f"{eval_dir.path}: video {videos[-1]} is not in {truth.name} ({len(truth)} videos)"
            )
        length = min([T, *(truth.length(video) for video in videos)])
        if length < T:
            logger.info("scoring the %d of %d frames that have truth", length, T)
        observed = stored.get("observed_frames", [])
        if config.obs_length is not None:
            observed = list(range(config.obs_length)) + [
                i for i in observed if i >= stored.get("obs_length", 0)
            ]
        elif "observed_frames" not in stored:
            raise ValueError(
                f"{eval_dir.sample_config_path} does not say obs_length: give --obs_length"
            )
        predicted = np.setdiff1d(np.arange(length), observed)
        if not len(predicted):
            raise ValueError(
                f"{eval_dir.path}: all {length} frames with truth are observed: nothing to score"
            )
        return cls(eval_dir, truth, videos, num_samples, T, predicted)

    @property
    def path(self) -> Path:
        """The pickle of this table."""
        return paths.metrics_path(self.eval_dir.path, len(self.videos), self.num_samples, self.T)


class FrameMetricCache:
    """One metric's values [predicted frames] of each (video, sample), kept on disk."""

    def __init__(self, scoring: Scoring, mode: str):
        self.scoring, self.mode = scoring, mode

    def path(self, video: int, sample: int, frames: np.ndarray, truth: np.ndarray) -> Path:
        """The file of one result; its name holds a hash of the sample, the truth and the frames."""
        digest = hashlib.sha256()
        for array in (frames, truth, self.scoring.predicted):
            digest.update(str((array.dtype, array.shape)).encode())
            digest.update(np.ascontiguousarray(array).data)
        name = f"{paths.sample_name(video, sample)}_{self.mode}_{digest.hexdigest()[:24]}.npy"
        return self.scoring.eval_dir.path / "metrics_cache" / name

    def load(self, path: Path) -> np.ndarray | None:
        """A stored result, or None."""
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None


def evaluate(config: EvalConfig) -> Path:
    """Compute `config.modes` and write the table; returns the pickle's path.

    The pickle is {metric: float64 [videos, samples, predicted frames]}; metrics computed earlier
    are kept in it as long as they belong to the samples as they are now. A readable .json beside
    it tells the indices of videos and samples, n, means and standard errors.
    """
    for mode in config.modes:
        if mode not in METRICS:
            raise ValueError(f"--modes {mode!r} is unknown: choose from {', '.join(METRICS)}")
    scoring = Scoring.resolve(config)
    caches = {mode: FrameMetricCache(scoring, mode) for mode in METRICS}
    rows: dict[str, list[np.ndarray | None]] = {mode: [] for mode in METRICS}
    keys = [(video, sample) for video in scoring.videos for sample in range(scoring.num_samples)]
    for video, sample in tqdm(keys, unit="video", desc="scoring"):
        frames = load_video(paths.sample_path(scoring.eval_dir.path, video, sample))[
            scoring.predicted
        ]
        truth = scoring.truth.read(video, scoring.predicted)
        for mode, cache in caches.items():
            path = cache.path(video, sample, frames, truth)
            values = cache.load(path)
            if values is None and mode in config.modes:
                values = METRICS[mode](frames, truth)
                with paths.atomic_write(path) as file:
                    np.save(file, values)
            rows[mode].append(values)
    table = {
        mode: np.stack(values).reshape(len(scoring.videos), scoring.num_samples, -1)  # type: ignore[arg-type]
        for mode, values in rows.items()
        if all(value is not None for value in values)
    }
    _write_table(scoring, table)
    return scoring.path


def _write_table(scoring: Scoring, table: dict[str, np.ndarray]) -> None:
    with paths.atomic_write(scoring.path) as file:
        pickle.dump(table, file)
    summary = {mode: summarise(values) for mode, values in table.items()}
    write_json(
        scoring.path.with_suffix(".json"),
        {
            "videos": scoring.videos,
            "samples": list(range(scoring.num_samples)),
            "frames": scoring.predicted.tolist(),
            "metrics": summary,
        },
    )
    logger.info("wrote %s", scoring.path)


def summarise(values: np.ndarray) -> dict[str, float | int]:
    """n videos, mean and standard error over videos of [videos, ...]; infinite values are counted apart."""
    finite = np.where(np.isfinite(values), values, np.nan)
    with np.errstate(invalid="ignore"):
        per_video = np.nanmean(finite.reshape(len(values), -1), axis=1)
    per_video = per_video[~np.isnan(per_video)]
    n = len(per_video)
    return {
        "n": n,
        "mean": float(per_video.mean()) if n else float("nan"),
        "standard_error": float(per_video.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan"),
        "infinite": int(np.isinf(values).sum()),
    }


def format_table(path: Path) -> str:
    """The summary beside the pickle `path` as text: n, mean and standard error per metric."""
    summary = json.loads(path.with_suffix(".json").read_text())["metrics"]
    lines = [f"{'metric':8} {'videos':>6} {'mean':>10} {'std. error':>11} {'infinite':>9}"]
    for mode, row in summary.items():
        lines.append(
            f"{mode:8} {row['n']:6d} {row['mean']:10.4f} {row['standard_error']:11.4f} {row['infinite']:9d}"
        )
    return "\n".join(lines)
