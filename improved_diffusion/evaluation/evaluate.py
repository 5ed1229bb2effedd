"""Scoring an evaluation directory: pair samples with truth, compute metrics, keep every result.

Results per video and sample are cached in files whose names hold a hash of all that they depend on,
so that nothing is computed twice and nothing stale survives a sample that was made again. The
table is put together from those. One video is in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from improved_diffusion.config import check_known
from improved_diffusion.data import paths
from improved_diffusion.data.metric_weights import find_alexnet, sha256
from improved_diffusion.data.video_datasets import VideoTestSet
from improved_diffusion.dist_util import array_task, default_device
from improved_diffusion.evaluation import metric_tables
from improved_diffusion.evaluation.metrics import METRICS
from improved_diffusion.evaluation.options import EvalConfig
from improved_diffusion.evaluation.scoring import Scoring
from improved_diffusion.frechet_video_distance import (
    frechet_distance,
    kernel_distance,
    video_features,
    weights_path,
)

logger = logging.getLogger(__name__)

DISTANCES = ("fvd", "kvd")
MODES = (*METRICS, *DISTANCES)
# What keeps one metric from being computed, and the others not.
METRIC_ERRORS = (ValueError, FileNotFoundError)


# ---------------------------------------------------------------- the cache


class Cache:
    """Arrays by name in `folders[0]`; those of the other folders are read too."""

    def __init__(self, folders: Sequence[Path]):
        self.folders = folders

    def load(self, name: str) -> np.ndarray | None:
        """A stored result, or None."""
        for folder in self.folders:
            try:
                return np.load(folder / name, allow_pickle=False)
            except (OSError, ValueError, EOFError):
                continue
        return None

    def save(self, name: str, values: np.ndarray) -> None:
        """Keep a result."""
        with paths.atomic_write(self.folders[0] / name) as file:
            np.save(file, values)

    def labels(self) -> set[str]:
        """The names without their hashes: what was computed at all, perhaps of other content."""
        files = [file for folder in self.folders for file in folder.glob("*.npy")]
        return {file.name.rpartition("_")[0] for file in files}


def cache_name(label: str, *key: Any) -> str:
    """A file name for a result that depends on `key` (plain values) alone."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return f"{label}_{digest[:24]}.npy"


def content_digest(frames: np.ndarray) -> str:
    """A hash of an array's type, shape and values."""
    digest = hashlib.sha256(f"{frames.dtype} {frames.shape}".encode())
    digest.update(np.ascontiguousarray(frames).data)
    return digest.hexdigest()


# ---------------------------------------------------------------- scoring


class Scorer:
    """Fills the cache of one evaluation directory, and makes its table of what is there.

    `settings` holds, for each metric that is asked for and works, all that its values depend on
    beside the videos; `failures` says why the others do not. Videos are known by their label:
    sample_<video>-<sample>, truth_<video>, floor_<video>.
    """

    def __init__(self, scoring: Scoring, config: EvalConfig, also: Sequence[Path] = ()):
        self.scoring, self.config = scoring, config
        folders = [scoring.eval_dir.path, *also]
        self.cache = Cache([paths.metrics_cache_dir(folder) for folder in folders])
        self.digests: dict[str, str] = {}
        self.settings: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, str] = {}
        for mode in config.modes:
            try:
                self.settings[mode] = metric_settings(mode, config)
            except METRIC_ERRORS as error:
                self._fail(mode, error)
        self.floor_set: VideoTestSet | None = None
        self.floor_videos: list[int] = []
        if config.floor:
            self.floor_set, self.floor_videos = scoring.floor_videos()

    def _fail(self, mode: str, error: Exception) -> None:
        self.settings.pop(mode, None)
        self.failures[mode] = str(error)

    # ------------------------------------------------------------ filling the cache

    def visit(self, position: int, *, compute: bool) -> None:
        """See what the video at `position` of the list holds, and compute what the cache lacks."""
        scoring = self.scoring
        video = scoring.videos[position]
        truth = scoring.read_truth(video)
        self._look(f"truth_{video:04d}", truth, compute)
        for sample in scoring.samples:
            frames = scoring.read_sample(video, sample)
            self._look(paths.sample_name(video, sample), frames, compute)
            for mode in [m for m in self.settings if m in METRICS and compute]:
                name = self._frames_name(mode, self.settings[mode], video, sample)
                pair = frames[scoring.predicted], truth[scoring.predicted]
                self._fill([mode], name, frame_metric(mode, self.config), *pair)
        if self.floor_set is not None and position < len(self.floor_videos):
            other = self.floor_videos[position]
            frames = self.floor_set.read(other, range(scoring.length))
            self._look(f"floor_{other:04d}", frames, compute)

    def _look(self, label: str, frames: np.ndarray, compute: bool) -> None:
        """Take down a video's hash, and see that its features are there."""
        self.digests[label] = content_digest(frames)
        modes = [mode for mode in self.settings if mode in DISTANCES]
        if modes and compute:
            name = self._features_name(label, self.settings[modes[0]])
            self._fill(modes, name, self._features, frames)

    def _features(self, frames: np.ndarray) -> np.ndarray:
        config = self.config
        return video_features(
            frames[None],
            backend=config.backend,
            resize=config.resize,
            weights=config.i3d_weights,
            device=default_device(config.device),
        )[0]

    def _fill(
        self, modes: list[str], name: str, function: Callable[..., np.ndarray], *arrays: np.ndarray
    ) -> None:
        """Compute one result unless it is there; what prevents it is kept, the rest goes on."""
        if self.cache.load(name) is None:
            try:
                values = function(*arrays)
            except METRIC_ERRORS as error:
                for mode in modes:
                    self._fail(mode, error)
            else:
                self.cache.save(name, values)

    def _frames_name(self, mode: str, settings: dict[str, Any], video: int, sample: int) -> str:
        label = paths.sample_name(video, sample)
        videos = self.digests[label], self.digests[f"truth_{video:04d}"]
        predicted = self.scoring.predicted.tolist()
        return cache_name(f"{label}_{mode}", *videos, predicted, settings)

    def _features_name(self, label: str, settings: dict[str, Any]) -> str:
        return cache_name(f"{label}_features", self.digests[label], settings)

    def missing(self) -> list[int]:
        """Positions of the videos that nothing at all was computed for yet, by file names alone."""
        there = self.cache.labels()
        frame_modes = [mode for mode in self.settings if mode in METRICS]
        positions = []
        for position, video in enumerate(self.scoring.videos):
            labels = [paths.sample_name(video, sample) for sample in self.scoring.samples]
            needed = {f"{label}_{mode}" for label in labels for mode in frame_modes}
            if any(mode in DISTANCES for mode in self.settings):
                labels += [f"truth_{video:04d}"]
                labels += [f"floor_{v:04d}" for v in self.floor_videos[position : position + 1]]
                needed |= {f"{label}_features" for label in labels}
            if not needed <= there:
                positions.append(position)
        return positions

    # ------------------------------------------------------------ the table

    def lookup(self, mode: str, settings: dict[str, Any]) -> np.ndarray | None:
        """One metric's array from the cache; None where some of it is not there.

        Distances that are asked for are computed from the features.
        """
        videos, samples = self.scoring.videos, self.scoring.samples
        if mode in DISTANCES:
            truth = [f"truth_{video:04d}" for video in videos]
            values = [
                self._distance(mode, settings, [paths.sample_name(v, s) for v in videos], truth)
                for s in samples
            ]
            return None if None in values else np.array(values, dtype=np.float64)
        rows = [
            self.cache.load(self._frames_name(mode, settings, video, sample))
            for video in videos
            for sample in samples
        ]
        if any(row is None for row in rows):
            return None
        return np.stack(rows).reshape(len(videos), len(samples), -1)  # type: ignore[arg-type]

    def _distance(
        self, mode: str, settings: dict[str, Any], labels_1: list[str], labels_2: list[str]
    ) -> float | None:
        """The distance between two sets of videos, by their labels."""
        sets = [[self._features_name(label, settings) for label in s] for s in (labels_1, labels_2)]
        name = cache_name(f"distance_{mode}", sets, settings)
        if mode in self.settings and self.settings[mode] == settings:
            rows_1, rows_2 = ([self.cache.load(file) for file in files] for files in sets)
            if any(row is None for row in rows_1 + rows_2):
                return None
            pair = np.stack(rows_1), np.stack(rows_2)  # type: ignore[arg-type]
            self._fill([mode], name, distance(mode, settings["backend"]), *pair)
        value = self.cache.load(name)
        return None if value is None else float(value)

    def write(self) -> bool:
        """Write the table; False where something asked for is not in the cache.

        Metrics computed earlier, with whatever settings, stay as long as they belong to the
        videos as they are now.
        """
        asked = {mode: self.lookup(mode, s) for mode, s in list(self.settings.items())}
        if any(asked[mode] is None for mode in self.settings):
            return False
        path = self.scoring.path
        with metric_tables.table_lock(path):
            before = metric_tables.read_info(path).get("metrics", {})
            settings = {mode: row.get("settings", {}) for mode, row in before.items()}
            settings |= self.settings
            found = {m: self.lookup(m, settings[m]) for m in MODES if m in settings}
            table = {mode: values for mode, values in found.items() if values is not None}
            rows = {
                mode: self._row(mode, values, settings[mode], before.get(mode, {}))
                for mode, values in table.items()
            }
            if table or path.exists():
                info = self.scoring.info() | {"metrics": rows}
                metric_tables.write_table(path, table, info)
        return True

    def _row(
        self, mode: str, values: np.ndarray, settings: dict[str, Any], before: Mapping[str, Any]
    ) -> dict[str, Any]:
        """A metric's summary; an earlier floor stays while it is about the same truth."""
        if mode in METRICS:
            return metric_tables.summarise(values) | {"settings": settings}
        mean, error = metric_tables.mean_and_error(values)
        row = {"n": len(self.scoring.videos), "mean": mean, "standard_error": error}
        truth = cache_name("truth", [self.digests[f"truth_{v:04d}"] for v in self.scoring.videos])
        floor = self._floor(mode, settings, truth)
        if floor is None and before.get("settings") == settings:
            floor = before.get("floor")
        kept = {"floor": floor} if floor and floor["truth"] == truth else {}
        return row | {"infinite": 0, "settings": settings} | kept

    def _floor(self, mode: str, settings: dict[str, Any], truth: str) -> dict[str, Any] | None:
        """The distance between true videos of both partitions, if it is asked for."""
        if self.floor_set is None or mode not in self.settings:
            return None
        n = len(self.floor_videos)
        labels = [f"truth_{video:04d}" for video in self.scoring.videos[:n]]
        others = [f"floor_{video:04d}" for video in self.floor_videos]
        value = self._distance(mode, settings, labels, others)
        partition = "train" if self.scoring.partition == "test" else "test"
        if value is None:
            return None
        return {"value": value, "n": n, "partition": partition, "truth": truth}


def metric_settings(mode: str, config: EvalConfig) -> dict[str, Any]:
    """All that a metric's values depend on beside the videos.

    Raises FileNotFoundError without weights.
    """
    if mode == "ssim":
        return {"data_range": config.ssim_data_range}
    if mode == "lpips":
        return {"weights_sha256": sha256(find_alexnet(config.lpips_weights))}
    if mode in DISTANCES:
        weights = weights_path(config.backend, config.i3d_weights)
        return {
            "backend": config.backend,
            "resize": config.resize,
            "weights_sha256": sha256(weights),
        }
    return {}


def frame_metric(mode: str, config: EvalConfig) -> Callable[..., np.ndarray]:
    """The function (samples, truth) -> [frames] that the options ask for."""
    if mode == "ssim":
        options: dict[str, Any] = {"data_range": config.ssim_data_range}
    elif mode == "lpips":
        options = {"device": default_device(config.device), "weights": config.lpips_weights}
    else:
        options = {}
    return lambda samples, truth: METRICS[mode](samples, truth, **options)


def distance(mode: str, backend: str) -> Callable[..., np.ndarray]:
    """The function (features, features) -> [] of fvd or kvd."""
    if mode == "fvd":
        return lambda a, b: np.array(frechet_distance(a, b, backend=backend))
    return lambda a, b: np.array(kernel_distance(a, b))


# ---------------------------------------------------------------- evaluation directories


@dataclass(frozen=True)
class Outcome:
    """Tables written, and why metrics are missing in them: {metric: message}."""

    tables: list[Path]
    failures: dict[str, str]

    def raise_failures(self) -> None:
        """Raise ValueError, in one line, where a metric could not be computed."""
        by_reason: dict[str, list[str]] = {}
        for mode, reason in self.failures.items():
            by_reason.setdefault(reason, []).append(mode)
        if by_reason:
            said = "; ".join(f"{', '.join(modes)}: {r}" for r, modes in by_reason.items())
            raise ValueError(f"not computed: {said}")


def evaluate(config: EvalConfig) -> Outcome:
    """Compute `config.modes` for each evaluation directory and write its table.

    The pickle is {metric: float64 array}: psnr, ssim, lpips [videos, samples, predicted frames],
    fvd and kvd [samples]; the .json beside it tells what they are of. A metric that cannot be
    computed does not keep the others from it. As an array task: only one batch of videos is
    computed, and the table is written by whichever task completes it.

    Raises ValueError or FileNotFoundError for a user's mistake, before anything is computed.
    """
    check_known("modes", config.modes, MODES)
    if config.floor and not set(config.modes) & set(DISTANCES):
        raise ValueError("--floor goes with --modes fvd or kvd: add one of them")
    folders = [Path(folder) for folder in dict.fromkeys(config.eval_dir)]
    scorings = [Scoring.resolve(config, folder) for folder in folders]
    if not config.allow_differences:
        infos = [scoring.info() for scoring in scorings]
        named = dict(zip(metric_tables.short_names(folders), infos, strict=True))
        metric_tables.check_comparable(named, allow=False)
    outcome = Outcome([], {})
    for folder, scoring in zip(folders, scorings, strict=True):
        scorer = Scorer(scoring, config, [other for other in folders if other != folder])
        if _score(scorer) and scoring.path.exists():
            outcome.tables.append(scoring.path)
        outcome.failures.update(scorer.failures)
    return outcome


def _score(scorer: Scorer) -> bool:
    """Do this process's part; whether all that was asked for, and works, is in the table now."""
    path, total = scorer.scoring.path, len(scorer.scoring.videos)
    size, task = scorer.config.batch_size, array_task()
    mine = range(total) if task is None else range(total)[task * size : (task + 1) * size]
    if not mine:
        logger.info("nothing to do: SLURM_ARRAY_TASK_ID=%d is past the last batch of videos", task)
        return False
    for position in tqdm(mine, unit="video", desc="scoring"):
        scorer.visit(position, compute=True)
    if task is not None:
        tasks = sorted({position // size for position in scorer.missing()})
        if tasks:
            logger.info("%s waits for --array=%s", path, ",".join(map(str, tasks)))
            return False
        for position in tqdm(sorted(set(range(total)) - set(mine)), unit="video", desc="checking"):
            scorer.visit(position, compute=False)
    if not scorer.write():
        logger.info("%s waits: some videos were made again since they were scored", path)
        return False
    return True


def run(config: EvalConfig) -> None:
    """`evaluate`, then print the tables; raises ValueError where a metric could not be computed."""
    outcome = evaluate(config)
    if outcome.tables:
        names = metric_tables.short_names([path.parent for path in outcome.tables])
        infos = dict(zip(names, map(metric_tables.read_info, outcome.tables), strict=True))
        metric_tables.check_comparable(infos, allow=config.allow_differences)
        print(metric_tables.format_tables(infos))
    outcome.raise_failures()


def format_table(path: Path) -> str:
    """The summary beside the pickle `path` as text."""
    return metric_tables.format_tables({path.parent.name: metric_tables.read_info(path)})
