"""What evaluation leaves on disk, and what is read from it: tables, their summaries, bounds.

A table is a pickle {metric: array}; the .json beside it says what its rows and columns are. No
torch here.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from improved_diffusion.data.metric_weights import NumpyUnpickler
from improved_diffusion.data.paths import atomic_write
from improved_diffusion.evaluation.intervals import Interval
from improved_diffusion.sampling.results import read_json, write_json

logger = logging.getLogger(__name__)

# What two tables must share for their numbers to be comparable, beside the metrics' settings.
COMPARED = ("dataset", "dataset_partition", "T", "videos", "samples", "frames")


# ---------------------------------------------------------------- files


class TableUnpickler(NumpyUnpickler):
    """Reads plain containers of numpy arrays, as any numpy and pickle protocol writes them."""

    ALLOWED = NumpyUnpickler.ALLOWED | {
        (f"numpy.{core}.{name}", function): np.empty(0).__reduce_ex__(protocol)[0]
        for core in ("core", "_core")
        for name, function, protocol in (
            ("multiarray", "_reconstruct", 2),
            ("numeric", "_frombuffer", 5),
        )
    }


def read_table(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a table; nothing but numbers is accepted, no code of the file is run.

    Raises FileNotFoundError where there is none, ValueError naming the file for anything else.
    """
    with open(path, "rb") as file:
        try:
            table = TableUnpickler(file).load()
        except Exception as error:  # a broken pickle raises anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{path} is no table of metrics ({reason}): delete it") from None
    if not isinstance(table, dict) or not all(
        isinstance(name, str) and isinstance(values, np.ndarray) and values.dtype.kind in "fiu"
        for name, values in table.items()
    ):
        raise ValueError(f"{path} is no table {{metric: array of numbers}}: delete it")
    return table


class ScoreTable(NamedTuple):
    """{metric: values} of a table, and what the .json beside it says; both are empty where there is none."""

    values: dict[str, np.ndarray]
    info: dict[str, Any]


def read_scores(path: Path | None) -> ScoreTable:
    """The table `path` with its .json. Raises ValueError as `read_table`."""
    if path is None or not path.exists():
        return ScoreTable({}, {})
    return ScoreTable(read_table(path), read_info(path))


def write_table(path: Path, table: Mapping[str, np.ndarray], info: Mapping[str, Any]) -> None:
    """Write the pickle and the .json beside it, each atomically."""
    with atomic_write(path) as file:
        pickle.dump(dict(table), file, protocol=4)
    write_json(path.with_suffix(".json"), info)
    logger.info("wrote %s", path)


def read_info(path: Path) -> dict[str, Any]:
    """The .json beside the table `path`; empty where there is none."""
    path = path.with_suffix(".json")
    return read_json(path) if path.exists() else {}


def load_elbo(path: Path) -> np.ndarray:
    """The variational bounds of one video, float64 [steps] in bits.

    Raises FileNotFoundError where there are none, ValueError naming the file for anything else.
    """
    try:
        bits = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it and run again") from None
    if bits.dtype != np.float64 or bits.ndim != 1 or not np.isfinite(bits).all():
        raise ValueError(f"{path} does not hold finite float64 [steps]: delete it and run again")
    return bits


# ---------------------------------------------------------------- summaries


def mean_and_error(values: np.ndarray) -> tuple[float | None, float | None]:
    """Mean and standard error of numbers [n]; None where n is too small for it."""
    n = len(values)
    mean = float(values.mean()) if n else None
    return mean, float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None


def summarise(values: np.ndarray) -> dict[str, Any]:
    """n videos, mean and standard error over videos of [videos, samples, frames].

    Infinite values are counted, and left out of the means.
    """
    finite = np.isfinite(values)
    axes = tuple(range(1, values.ndim))
    count = finite.sum(axis=axes)
    sums = np.where(finite, values, 0).sum(axis=axes)
    per_video = sums[count > 0] / count[count > 0]
    mean, error = mean_and_error(per_video)
    infinite = int(np.isinf(values).sum())
    return {"n": len(per_video), "mean": mean, "standard_error": error, "infinite": infinite}


def frame_curve(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over videos of each column of [videos, ..., columns].

    Samples of a video are averaged first; values that are not finite are left out. Both are
    [columns], NaN where there are too few videos.
    """
    means, errors = [], []
    for column in np.moveaxis(values, -1, 0):
        row = summarise(column)
        means.append(row["mean"])
        errors.append(row["standard_error"])
    return np.array(means, dtype=np.float64), np.array(errors, dtype=np.float64)


# ---------------------------------------------------------------- comparing


def short_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names where they are all different, else their paths."""
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def check_comparable(infos: Mapping[str, Mapping[str, Any]], *, allow: bool) -> None:
    """See that tables (their infos by name) score the same things in the same way.

    Raises ValueError that names each difference; `allow` makes it a warning. FVD above all depends
    on the number of videos, their length, the network and the resize.
    """
    found = differences(infos)
    if found and not allow:
        raise ValueError(
            f"these tables cannot be compared: {'; '.join(found)}: evaluate the same videos in the "
            "same way, or go on with --allow_differences"
        )
    for difference in found:
        logger.warning("the tables compared here differ: %s", difference)


def differences(infos: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """In words, what tables do not share with the first one, or settings of a metric with its first one."""
    found = []
    (first_name, first), *others = infos.items()
    for name, info in others:
        pairs = {key: (first_name, first.get(key), info.get(key)) for key in COMPARED}
        for mode, row in sorted(info.get("metrics", {}).items()):
            holder = next(h for h, i in infos.items() if mode in i.get("metrics", {}))
            one, other = infos[holder]["metrics"][mode].get("settings", {}), row.get("settings", {})
            for key in sorted(one.keys() | other.keys()):
                pairs[f"{mode} {key}"] = holder, one.get(key), other.get(key)
        for key, (holder, value, own) in pairs.items():
            if value != own:
                shown = f"{_in_short(value)} and {_in_short(own)}"
                found.append(f"{holder} and {name} differ in {key} ({shown})")
    return found


def like_for_like(floor: Mapping[str, Any]) -> float:
    """The distance between true videos that begin alike, as samples and their truth do, if it is known."""
    return floor.get("shared", floor["value"])


def _in_short(value: Any) -> str:
    """A value for a message: of a list its length and ends."""
    if isinstance(value, list) and len(value) > 3:
        return f"{len(value)}: {value[0]} ... {value[-1]}"
    return str(value)


def format_tables(infos: Mapping[str, Mapping[str, Any]]) -> str:
    """Summaries as text, a row for each metric (and column) of each table, then how they were computed.

    infos: {name: content of a table's .json}; the names are shown where there are several.
    """
    rows = [
        (name, label, len(info["samples"]), row)
        for name, info in infos.items()
        for label, row in labelled_rows(info)
    ]
    width = max(map(len, infos)) + 2 if len(infos) > 1 else 0
    label_width = max(8, *(len(label) for _, label, _, _ in rows)) if rows else 8
    header = (
        f"{'metric':{label_width}} {'videos':>6} {'samples':>7} {'mean':>10} {'std. error':>11}"
    )
    intervals = "  95 % interval" if any("interval" in row for *_, row in rows) else ""
    lines = [f"{'':{width}}{header} {'infinite':>9}{intervals}"]
    for name, label, samples, row in rows:
        numbers = f"{_number(row['mean']):>10} {_number(row['standard_error']):>11}"
        lines.append(
            f"{name if width else '':{width}}{label:{label_width}} {row['n']:6d} {samples:7d} "
            f"{numbers} {row['infinite']:9d} {_range(row)}".rstrip()
        )
    metrics = [item for info in infos.values() for item in info["metrics"].items()]
    notes = [note for mode, row in metrics for note in how_computed(mode, row)]
    notes += [
        f"{name} {label} of half as many videos: {_number(row['interval']['at_half'])} on average"
        for name, label, _, row in rows
        if "interval" in row
    ]
    return "\n".join(lines + list(dict.fromkeys(notes)))


def _range(row: Mapping[str, Any], key: str = "interval") -> str:
    """The 95 % interval of a row, with a space before it; empty where it has none."""
    found = row.get(key)
    return f" [{_number(found['low'])}, {_number(found['high'])}]" if found else ""


def labelled_rows(info: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(metric, its summary), one for each column of those that have several."""
    for mode, row in info["metrics"].items():
        if "columns" in row:
            yield from ((f"{mode} {column['name']}", column) for column in row["columns"])
        else:
            yield mode, row


def plus_minus(row: Mapping[str, Any], sign: str = "") -> str:
    """A summary's mean and standard error, this with two digits and both to the same place.

    Of a distance between sets of videos that has one, the 95 % interval stands in the place of the
    error: "593 [480, 705]". sign: "+" to show it of positive numbers, too. "-" where there is no mean.
    """
    mean, error = row["mean"], row["standard_error"]
    if mean is None:
        return "-"
    if "interval" in row:
        return f"{Interval(mean, row['interval']['low'], row['interval']['high']):{sign}}"
    if not error:
        return f"{mean:{sign}.4g}"
    places = max(0, 1 - int(np.floor(np.log10(error))))
    return f"{mean:{sign}.{places}f} ± {error:.{places}f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def how_computed(mode: str, row: Mapping[str, Any]) -> Iterator[str]:
    """How a metric was computed, and what it is between true videos."""
    if row.get("settings"):
        yield f"{mode}: " + ", ".join(f"{key} {value}" for key, value in row["settings"].items())
    if "floor" in row:
        floor = row["floor"]
        yield (
            f"{mode} real against real: {_number(floor['value'])}{_range(floor)} between "
            f"{floor['n']} true videos and {floor['n']} of the {floor['partition']} partition"
        )
        if "shared" in floor:
            yield (
                f"{mode} real against real, observed frames shared: {_number(floor['shared'])}"
                f"{_range(floor, 'shared_interval')} between the same, which begin alike, as samples "
                "and their truth do"
            )
