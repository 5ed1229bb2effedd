"""The report of a study (study.py): tables with n, standard errors and intervals of differences.

Nothing that the scripts measure is computed again: all comes from the tables that they wrote.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from improved_diffusion.data import paths
from improved_diffusion.evaluation import metric_tables
from improved_diffusion.evaluation.comparison import Difference, find_differences
from improved_diffusion.evaluation.intervals import mean_interval
from improved_diffusion.evaluation.metric_tables import ScoreTable
from improved_diffusion.evaluation.plots import axis_label
from improved_diffusion.registry import SAMPLE_METRICS
from improved_diffusion.sampling.results import EvalDir
from improved_diffusion.sampling.trained_model import stored_dataset
from improved_diffusion.study.arms import Arm, arms
from improved_diffusion.study.markdown import markdown_table
from improved_diffusion.study.options import StudyConfig
from improved_diffusion.study.study import command_time, commands, eval_dir, table_path

logger = logging.getLogger(__name__)

NO_STRATEGY = "-"  # stands for one where a row is of the true videos alone
# {(metric, column, evaluation directory): its difference from the first strategy}
Differences = Mapping[tuple[str, str, str], Difference]


def write_report(config: StudyConfig) -> Path:
    """Write `<out>/tables.md` from all that is there; returns its path. Gaps are shown as "-"."""
    tables = {arm: metric_tables.read_scores(table_path(config, arm)) for arm in arms(config)}
    differences = differences_of(tables)
    infos = {arm: table.info for arm, table in tables.items()}
    several = [mode for mode in config.modes if mode in SAMPLE_METRICS]
    parts = [
        f"# {Path(config.out).name}",
        _said_of_all(config),
        score_table(config, infos, differences),
        *(column_table(mode, infos, differences, config.num_videos) for mode in several),
        "## Commands\n\n```bash\n"
        + "\n".join(
            f"{command.line}  # {command_time(config, command.name)} s"
            for command in commands(config)
        )
        + "\n```",
    ]
    path = Path(config.out) / "tables.md"
    with paths.atomic_write(path) as file:
        file.write(("\n\n".join(filter(None, parts)) + "\n").encode())
    logger.info("wrote %s", path)
    return path


def _said_of_all(config: StudyConfig) -> str:
    samples = "one sample" if config.num_samples == 1 else f"{config.num_samples} samples"
    return (
        f"{config.num_videos} test videos of {config.T} frames, the first {config.obs_length} "
        f"observed, {samples} of each; {config.max_frames} frames in one network "
        f"call, {config.step_size} of them sampled; {config.sampler} with {config.timesteps} "
        f"timesteps, {config.spacing}. Mean ± standard error over videos; of distances, [95 % "
        "interval]; in round brackets the difference from the first strategy, paired over videos, "
        "with its 95 % interval. Seconds are those of the sampling command, its start included, for "
        "each sample."
    )


def differences_of(tables: Mapping[Arm, ScoreTable]) -> Differences:
    """The differences of all other tables that are there from the first strategy's."""
    ready = {arm.folder: table for arm, table in tables.items() if table.values}
    if next(iter(tables)).folder not in ready:
        return {}
    return {(each.metric, each.column, each.other): each for each in find_differences(ready)}


def score_table(
    config: StudyConfig, infos: Mapping[Arm, Mapping[str, Any]], differences: Differences
) -> str:
    """Metrics of one number, bounds and seconds, a row per strategy; the last row is of real videos."""
    modes = [mode for mode in config.modes if mode not in SAMPLE_METRICS]
    made = config.num_videos * config.num_samples
    rows = [
        [
            arm.name,
            *(_score(info, mode, differences, arm) for mode in modes),
            *([_bits(config, arm)] if config.bound_videos else []),
            command_time(config, arm.sampled_by, per=made),
        ]
        for arm, info in infos.items()
    ]
    floors = [_floor(infos, mode) for mode in modes]
    if any(floors):
        rest = ["-"] * (len(rows[0]) - 1 - len(modes))
        rows.append(["real against real", *(floor or "-" for floor in floors), *rest])
    bits = ["bits/dim (estimate)"] if config.bound_videos else []
    return markdown_table(["strategy", *map(axis_label, modes), *bits, "s/sample"], rows)


def _score(info: Mapping[str, Any], mode: str, differences: Differences, arm: Arm) -> str:
    """A metric of one number, with its difference from the first strategy."""
    row = info.get("metrics", {}).get(mode)
    if row is None:
        return "-"
    return metric_tables.plus_minus(row) + _difference(differences.get((mode, "", arm.folder)))


def _difference(found: Difference | None, row: Mapping[str, Any] | None = None) -> str:
    """The difference and its interval in brackets, after a space; empty where there is none.

    With the number of videos where that is not the row's.
    """
    if found is None:
        return ""
    return f" ({found.interval:+}{'' if row is None else _other_n(found.n, row['n'])})"


def _other_n(n: int, usual: int) -> str:
    return "" if n == usual else f", n = {n}"


def column_table(
    mode: str,
    infos: Mapping[Arm, Mapping[str, Any]],
    differences: Differences,
    num_videos: int,
) -> str:
    """A metric that gives several numbers of each sample; "" where no table holds it.

    Its columns are called "lap 2: samples": a row per strategy and word after the colon, and those of the
    true videos alone, which all strategies share, once.
    """
    held = {
        a: i["metrics"][mode]["columns"] for a, i in infos.items() if mode in i.get("metrics", {})
    }
    if not held:
        return ""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for arm, columns in held.items():
        for column in columns:
            head, _, what = column["name"].rpartition(": ")
            if column["name"] in SAMPLE_METRICS[mode].reference_columns:
                name, shown = NO_STRATEGY, _column_number(column, num_videos)
            else:
                found = differences.get((mode, column["name"], arm.folder))
                shown = _column_number(column, num_videos) + _difference(found, column)
                name = arm.name
            rows.setdefault((name, what), {}).setdefault(head, shown)
    heads = list(next(iter(rows.values())))
    ordered = sorted(rows.items(), key=lambda item: item[0][0] == NO_STRATEGY)
    lines = [[*names, *(cells.get(head, "-") for head in heads)] for names, cells in ordered]
    titles = (f"{axis_label(mode)} {head}".rstrip() for head in heads)
    return markdown_table(["strategy", "of", *titles], lines)


def _column_number(row: Mapping[str, Any], num_videos: int) -> str:
    """Mean and standard error, of how many videos if not of all; "inf" where each of them has that."""
    if row["mean"] is None and row["infinite"]:
        return "inf"
    return metric_tables.plus_minus(row) + _other_n(row["n"], num_videos)


def _floor(infos: Mapping[Arm, Mapping[str, Any]], mode: str) -> str:
    """The distance between true videos that begin alike, as samples and their truth do."""
    for info in infos.values():
        floor = info.get("metrics", {}).get(mode, {}).get("floor")
        if floor:
            return f"{metric_tables.like_for_like(floor):.4g} (n = {floor['n']})"
    return ""


# ---------------------------------------------------------------- bounds


def _bits(config: StudyConfig, arm: Arm) -> str:
    """The bound of one strategy in bits per dimension, and its difference from the first one's."""
    bounds = video_bounds(config, arm)
    if not bounds:
        return "-"
    mean, error = metric_tables.mean_and_error(np.array(list(bounds.values())))
    shown = metric_tables.plus_minus({"mean": mean, "standard_error": error})
    first = arms(config)[0]
    others = {} if first == arm else video_bounds(config, first)
    shared = [bounds[file] - others[file] for file in bounds if file in others]
    found = mean_interval(np.array(shared))
    return f"{shown}{'' if found is None else f' ({found:+})'}, n = {len(bounds)}"


def video_bounds(config: StudyConfig, arm: Arm) -> dict[str, float]:
    """{file of a video's bounds: bits per dimension of its frames that are not observed}."""
    folder = eval_dir(config, arm)
    files = sorted((folder / "elbos").glob("elbo_*.npy"))
    if not files:
        return {}
    size = stored_dataset(config.dataset, EvalDir(folder).model_config()).image_size
    dimensions = (config.T - config.obs_length) * 3 * size**2
    return {file.name: float(metric_tables.load_elbo(file).sum()) / dimensions for file in files}
