"""The metrics' values of one scored set: from the cache, computed where they are missing.

One video is in memory at a time. What is kept are each frame's or sample's values per sample, the
features of each video, and each distance between sets of features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from improved_diffusion.data.machine import default_device
from improved_diffusion.evaluation.cache import Cache, TruthCache, cache_name
from improved_diffusion.evaluation.intervals import HALVES, HalfSampled, half_sample
from improved_diffusion.evaluation.metrics import Measure
from improved_diffusion.evaluation.options import EvalConfig
from improved_diffusion.evaluation.scored_set import Clip, ScoredSet
from improved_diffusion.registry import (
    FEATURES,
    METRICS,
    SAMPLE_METRICS,
    VIDEO_METRICS,
)

# What keeps one metric from being computed, and the others not.
METRIC_ERRORS = (ValueError, FileNotFoundError)
# The only extractor before there was a choice: tables and caches do not name it.
FIRST_FEATURES = "i3d"
# To be raised when an extractor comes to compute something else: other runs' features are then not taken.
FEATURES_VERSION = 1

# A number of the videos chosen by their positions, int64 [m].
Statistic = Callable[[np.ndarray], float]


# ---------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Prepared:
    """A metric or an extractor, ready to compute.

    name: as registered. settings: all that its values depend on beside the videos; they stand beside
    the numbers. features: the extractor of a metric of whole videos, else None.
    """

    name: str
    measure: Any
    settings: dict[str, Any]
    features: Prepared | None = None

    @property
    def label(self) -> str:
        """What an extractor's results are called in the cache."""
        return "features" if self.name == FIRST_FEATURES else f"{self.name}_features"


class Workshop:
    """Makes the metrics that the options of an evaluation ask for, and each extractor once."""

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        every = (*config.metric_options, *config.feature_options)
        self._options = {type(options): options for options in every}
        self._device = default_device(config.device)
        self._extractors: dict[str, Prepared] = {}

    def metrics(self) -> tuple[dict[str, Prepared], dict[str, str]]:
        """The metrics by name, and why others of them cannot be computed."""
        ready: dict[str, Prepared] = {}
        failures: dict[str, str] = {}
        for name in self.config.modes:
            prepare = self._video_metric if name in VIDEO_METRICS else self._plain_metric
            try:
                ready[name] = prepare(name)
            except METRIC_ERRORS as error:
                failures[name] = str(error)
        return ready, failures

    def _make(self, kind: type[Measure], **more: Any) -> Measure:
        return kind(self._options[kind.Options], device=self._device, **more)

    def _plain_metric(self, name: str) -> Prepared:
        metric = self._make(METRICS[name])
        return Prepared(name, metric, metric.settings())

    def _video_metric(self, name: str) -> Prepared:
        kind = VIDEO_METRICS[name]
        features = self._extractor(kind.features or self.config.features)
        metric = self._make(kind, extractor=features.measure)
        own = metric.settings()
        for key in own.keys() & features.settings.keys():
            raise ValueError(f"its setting {key} is one of {features.name} too: rename one")
        return Prepared(name, metric, own | features.settings, features)

    def _extractor(self, name: str) -> Prepared:
        if name not in self._extractors:
            extractor = self._make(FEATURES[name])
            named = {} if name == FIRST_FEATURES else {"features": name}
            self._extractors[name] = Prepared(name, extractor, named | extractor.settings())
        return self._extractors[name]


# ---------------------------------------------------------------- what is computed


class Measurements:
    """Fills the cache of one scored set, and looks values up in it.

    `metrics` are those that are asked for and work; `failures` says why others do not: {name: reason}.
    """

    def __init__(
        self, scored: ScoredSet, metrics: dict[str, Prepared], cache: Cache, *, floor: bool
    ) -> None:
        self.scored, self.cache, self.truth_cache = scored, cache, TruthCache()
        self.metrics = dict(metrics)
        self.failures: dict[str, str] = {}
        self.floor_clips = scored.floor_clips if floor else []
        self.shared_floor_clips = scored.shared_floor_clips if floor else []

    def clips(self, position: int) -> list[Clip]:
        """What is read for the video at `position` of the list: truth, samples, and for the floor."""
        scored = self.scored
        floor = [
            clip
            for clips in (self.floor_clips, self.shared_floor_clips)
            for clip in clips[position : position + 1]
        ]
        return [scored.truth_clips[position], *scored.sample_clips[position], *floor]

    def compute(self, position: int) -> None:
        """Compute what the cache lacks of the video at `position` of the list."""
        truth, *others = self.clips(position)
        true_frames = truth.frames()
        self._keep_features(truth, true_frames, true=True)
        samples = self.scored.sample_clips[position]
        for clip in others:
            frames = clip.frames()
            self._keep_features(clip, frames, true=clip not in samples)
            if clip in samples:
                self._keep_values(clip, frames, position, true_frames)

    def give_up(self, failures: Iterable[Mapping[str, str]]) -> None:
        """Compute no more of the metrics that fail in another process: {name: reason} of each."""
        for name, reason in (item for others in failures for item in others.items()):
            self.metrics.pop(name, None)
            self.failures.setdefault(name, reason)

    def missing(self) -> list[int]:
        """Positions of the videos that nothing at all was computed for yet, by file names alone."""
        there = self.cache.labels()
        plain = [name for name, ready in self.metrics.items() if ready.features is None]
        positions = []
        for position, samples in enumerate(self.scored.sample_clips):
            needed = {f"{clip.label}_{name}" for clip in samples for name in plain}
            for features in self._extractors():
                needed |= {f"{clip.label}_{features.label}" for clip in self.clips(position)}
            if not needed <= there:
                positions.append(position)
        return positions

    def values(self, name: str, settings: dict[str, Any], *, kind: str = "") -> np.ndarray | None:
        """One metric's array, computed with `settings`; None where the cache lacks some of it.

        [videos, samples, predicted frames or columns], or [samples] of a metric of whole videos,
        which is computed from the features if it is asked for. kind: which of the three it is, "frames",
        "columns" or "videos", where it is not registered here.
        """
        scored, kind = self.scored, kind or _kind(name)
        if kind == "videos":
            truth = scored.truth_clips
            found = [self.distance(name, settings, s, truth) for s in scored.sample_sets]
            return None if None in found else np.array(found, dtype=np.float64)
        rows = []
        for position, samples in enumerate(scored.sample_clips):
            for clip in samples:
                file = self._values_name(f"{clip.label}_{name}", settings, clip, position, kind)
                row = self.cache.load(file)
                if row is None:
                    return None
                rows.append(row)
        return np.stack(rows).reshape(len(scored.videos), len(scored.samples), -1)

    def distance(
        self, name: str, settings: dict[str, Any], samples: Sequence[Clip], truth: Sequence[Clip]
    ) -> float | None:
        """A metric of whole videos between two sets of them; None where the cache lacks it."""
        sets = [_names(clips, settings) for clips in (samples, truth)]
        file = cache_name(f"distance_{name}", sets, settings)
        ready = self.metrics.get(name)
        if ready is not None and ready.settings == settings:
            features, true_features = (self._features(ready, clips) for clips in (samples, truth))
            if features is None or true_features is None:
                return None
            self._fill([name], file, ready.measure, features, true_features)
        value = self.cache.load(file)
        return None if value is None else float(value)

    def half_sampled(
        self,
        name: str,
        settings: dict[str, Any],
        sets: Sequence[Sequence[Clip]],
        truth: Sequence[Clip],
    ) -> HalfSampled | None:
        """The mean distance of `sets` of videos from `truth`, of all videos and of halves of them.

        Video i of each set and of the truth belong together. None for few videos, and where the
        cache lacks it.
        """
        names = [_names(clips, settings) for clips in (*sets, truth)]
        file = cache_name(f"halves_{name}", names, settings, HALVES)
        kept = self.cache.load(file)
        if kept is None:
            statistic = self._statistic(name, settings, sets, truth)
            found = None if statistic is None else half_sample(statistic, len(truth))
            if found is None:
                return None
            kept = np.array([found.value, *found.of_halves])
            self.cache.save(file, kept)
        return HalfSampled(float(kept[0]), kept[1:], len(truth))

    def _statistic(
        self,
        name: str,
        settings: dict[str, Any],
        sets: Sequence[Sequence[Clip]],
        truth: Sequence[Clip],
    ) -> Statistic | None:
        """The mean distance of `sets` of videos from `truth`, as a function of which of them count.

        None where it cannot be computed.
        """
        ready = self.metrics.get(name)
        if ready is None or ready.settings != settings:
            return None
        every = (self._features(ready, clips) for clips in (*sets, truth))
        found = [features for features in every if features is not None]
        if len(found) <= len(sets):
            return None
        *samples, real = found
        compute = ready.measure.compute
        return lambda chosen: float(np.mean([compute(s[chosen], real[chosen]) for s in samples]))

    # ------------------------------------------------------------ the cache

    def _extractors(self) -> list[Prepared]:
        """Each extractor that a metric needs, once."""
        found = {
            ready.features.name: ready.features for ready in self.metrics.values() if ready.features
        }
        return list(found.values())

    def _keep_features(self, clip: Clip, frames: np.ndarray, *, true: bool) -> None:
        """`true`: whether these are frames of the data set alone, which other runs may know."""
        for features in self._extractors():
            names = [name for name, ready in self.metrics.items() if ready.features is features]
            file = self._features_name(features, clip)
            known = cache_name(features.name, clip.digest, features.settings, FEATURES_VERSION)
            shared = true and features.measure.shared
            if shared:
                _copy(self.truth_cache, known, self.cache, file)
            self._fill(names, file, features.measure, frames)
            if shared:
                _copy(self.cache, file, self.truth_cache, known)

    def _keep_values(
        self, clip: Clip, frames: np.ndarray, position: int, true_frames: np.ndarray
    ) -> None:
        predicted = self.scored.predicted
        of_frames = [_chosen(each, predicted) for each in (frames, true_frames)]
        for ready in [ready for ready in self.metrics.values() if ready.features is None]:
            label, kind = f"{clip.label}_{ready.name}", _kind(ready.name)
            file = self._values_name(label, ready.settings, clip, position, kind)
            given: Sequence[Any] = of_frames
            if kind == "columns":
                given = frames, self.scored.true_video(position, true_frames)
            self._fill([ready.name], file, ready.measure, *given)

    def _fill(self, names: list[str], file: str, measure: Any, *given: Any) -> None:
        """Compute one result unless it is there; what prevents it is kept, the rest goes on."""
        if self.cache.load(file) is None:
            try:
                values = measure.compute(*given)
            except METRIC_ERRORS as error:
                for name in names:
                    self.metrics.pop(name, None)
                    self.failures[name] = str(error)
            else:
                self.cache.save(file, np.asarray(values))

    def _features(self, ready: Prepared, clips: Sequence[Clip]) -> np.ndarray | None:
        """The features [n, d] that a metric is computed from; None where one is not there."""
        assert ready.features is not None, f"{ready.name} is computed from no features"
        rows = [self.cache.load(self._features_name(ready.features, clip)) for clip in clips]
        return None if any(row is None for row in rows) else np.stack(rows)  # type: ignore[arg-type]

    def _features_name(self, features: Prepared, clip: Clip) -> str:
        return cache_name(f"{clip.label}_{features.label}", clip.digest, features.settings)

    def _values_name(
        self, label: str, settings: dict[str, Any], clip: Clip, position: int, kind: str
    ) -> str:
        scored, truth = self.scored, self.scored.truth_clips[position]
        key = [clip.digest, truth.digest, scored.predicted.tolist(), settings]
        if kind == "columns":
            key += [scored.test_set.name, scored.periods[position]]
        return cache_name(label, *key)


def _kind(name: str) -> str:
    """What a registered metric is of: "frames", "columns" (some numbers of a sample) or "videos"."""
    if name in VIDEO_METRICS:
        return "videos"
    return "columns" if name in SAMPLE_METRICS else "frames"


def _names(clips: Sequence[Clip], settings: dict[str, Any]) -> list[str]:
    """What tells a set of videos, and the settings of a distance, from others in the cache."""
    return [cache_name(f"{clip.label}_features", clip.digest, settings) for clip in clips]


def _copy(source: Cache, name: str, target: Cache, new_name: str) -> None:
    """Keep a result of `source`, if it has it, in `target` too."""
    values = source.load(name)
    if values is not None and target.load(new_name) is None:
        target.save(new_name, values)


def _chosen(frames: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Frames by sorted indices; without a copy where they are neighbours."""
    first, last = int(indices[0]), int(indices[-1])
    return frames[first : last + 1] if last - first + 1 == len(indices) else frames[indices]
