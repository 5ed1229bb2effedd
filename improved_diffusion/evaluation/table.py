"""The table of one scored set, made of its measurements and of what an earlier table says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from improved_diffusion.data.file_lock import file_lock
from improved_diffusion.evaluation import metric_tables
from improved_diffusion.evaluation.cache import cache_name
from improved_diffusion.evaluation.intervals import LEVEL, HalfSampled
from improved_diffusion.evaluation.measurements import Measurements
from improved_diffusion.evaluation.options import METRICS
from improved_diffusion.registry import SAMPLE_METRICS, VIDEO_METRICS


def write_table(measured: Measurements) -> bool:
    """Write the table; False where something asked for is not in the cache.

    Metrics computed earlier, with whatever settings, stay as long as they belong to the videos as
    they are now.
    """
    asked = {
        name: measured.values(name, ready.settings)
        for name, ready in list(measured.metrics.items())
    }
    for name, ready in measured.metrics.items():  # what takes long, before others have to wait
        values = asked[name]
        if values is None:
            return False
        _row(measured, name, values, ready.settings, {})
    path = measured.scored.path
    with file_lock(path):
        before = metric_tables.read_info(path).get("metrics", {})
        settings = {name: row.get("settings", {}) for name, row in before.items()}
        settings |= {name: ready.settings for name, ready in measured.metrics.items()}
        found = {m: measured.values(m, settings[m]) for m in METRICS if m in settings}
        table = {name: values for name, values in found.items() if values is not None}
        rows = {
            name: _row(measured, name, values, settings[name], before.get(name, {}))
            for name, values in table.items()
        }
        foreign = _foreign(measured, before)
        table, rows = table | foreign, rows | {name: before[name] for name in foreign}
        if table or path.exists():
            metric_tables.write_table(path, table, measured.scored.info() | {"metrics": rows})
    return True


def _foreign(measured: Measurements, before: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The metrics of the table that this process does not know: they stay as they stand.

    As others do, as long as they belong to the videos as they are now: the cache tells.
    """
    names = [name for name in before if name not in METRICS]
    arrays = metric_tables.read_table(measured.scored.path) if names else {}
    kept = {}
    for name in names:
        if name not in arrays:
            continue
        of_sample = "columns" if "columns" in before[name] else "frames"
        kind = "videos" if arrays[name].ndim == 1 else of_sample
        if measured.values(name, before[name].get("settings", {}), kind=kind) is not None:
            kept[name] = arrays[name]
    return kept


def _row(
    measured: Measurements,
    name: str,
    values: np.ndarray,
    settings: dict[str, Any],
    before: Mapping[str, Any],
) -> dict[str, Any]:
    """A metric's summary; an earlier floor stays while it is about the same truth."""
    if name in SAMPLE_METRICS:
        names = SAMPLE_METRICS[name].columns
        columns = [
            {"name": column} | metric_tables.summarise(values[..., i])
            for i, column in enumerate(names)
        ]
        return {"columns": columns, "settings": settings}
    if name not in VIDEO_METRICS:
        return metric_tables.summarise(values) | {"settings": settings}
    mean, error = metric_tables.mean_and_error(values)
    scored = measured.scored
    row: dict[str, Any] = {"n": len(scored.videos), "mean": mean, "standard_error": error}
    found = measured.half_sampled(name, settings, scored.sample_sets, scored.truth_clips)
    row |= _interval(found)
    if found is not None:  # so that other tables can be compared with this one in pairs
        row["interval"]["of_halves"] = found.of_halves.tolist()
    truth = cache_name("truth", [clip.digest for clip in scored.truth_clips])
    floor = _floor(measured, name, settings, truth)
    if floor is None and before.get("settings") == settings:
        floor = before.get("floor")
    kept = {"floor": floor} if floor and floor["truth"] == truth else {}
    return row | {"infinite": 0, "settings": settings} | kept


def _floor(
    measured: Measurements, name: str, settings: dict[str, Any], truth: str
) -> dict[str, Any] | None:
    """The distances between true videos of both partitions, if they are asked for.

    "value": between the videos as they are. "shared": where those of the other partition begin with
    the observed frames of their counterparts, as samples do.
    """
    n = len(measured.floor_clips)
    if not n or name not in measured.metrics:
        return None
    real = measured.scored.truth_clips[:n]
    value = measured.distance(name, settings, real, measured.floor_clips)
    if value is None:
        return None
    floor = {"value": value, "n": n, "partition": measured.scored.other, "truth": truth}
    floor |= _interval(measured.half_sampled(name, settings, [real], measured.floor_clips))
    if measured.shared_floor_clips:
        shared = measured.distance(name, settings, real, measured.shared_floor_clips)
        if shared is not None:
            floor["shared"] = shared
        found = measured.half_sampled(name, settings, [real], measured.shared_floor_clips)
        floor |= _interval(found, "shared_interval")
    return floor


def _interval(sampled: HalfSampled | None, key: str = "interval") -> dict[str, Any]:
    """What a row says of an interval; nothing where there is none."""
    if sampled is None:
        return {}
    found = sampled.interval()
    said = {"level": LEVEL, "low": found.low, "high": found.high, "at_half": found.at_half}
    return {key: said}
