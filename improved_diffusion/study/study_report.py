"""The report of a study (study.py): tables with n and standard errors, from what its commands wrote.

Nothing that the scripts measure is computed again. Only the classes of frames are new: the scores
of those frames whose true pose returns to a place seen before tell of long-range coherence.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from improved_diffusion.data import paths
from improved_diffusion.data.video_datasets import get_test_dataset
from improved_diffusion.data.walks import far_apart, load_poses, near_poses
from improved_diffusion.evaluation import metric_tables
from improved_diffusion.evaluation.comparison import find_differences
from improved_diffusion.evaluation.metric_tables import ScoreTable
from improved_diffusion.registry import METRICS, VIDEO_METRICS
from improved_diffusion.sampling.results import EvalDir
from improved_diffusion.sampling.trained_model import stored_dataset
from improved_diffusion.study.markdown import markdown_table
from improved_diffusion.study.options import StudyConfig
from improved_diffusion.study.study import Cell, cells, command_time, commands, eval_dir, reference

logger = logging.getLogger(__name__)

HAS_POSES = ("memory_mazes",)


# ---------------------------------------------------------------- long-range coherence


def frame_classes(poses: np.ndarray, obs_length: int) -> dict[str, np.ndarray]:
    """{class: bool [T]} of the frames from `obs_length` on, by the true poses [T, 3].

    A frame returns to an earlier one that is near it and more than GAP_FRAMES before it:
        returns to observed: to one of the first `obs_length` frames;
        returns to sampled: to later ones alone;
        new: to none.

    It cannot tell everything: the network is not told the actions, so a sampled walk may leave the
    true one, and is then scored against another place than it shows. A sample can be coherent in
    itself and still score badly here; that the strategies differ is what counts.
    """
    index = np.arange(len(poses))
    returns = near_poses(poses) & far_apart(len(poses))
    to_observed = returns[:, :obs_length].any(axis=1)
    to_sampled = returns[:, obs_length:].any(axis=1) & ~to_observed
    sampled = index >= obs_length
    return {
        "returns to observed": sampled & to_observed,
        "returns to sampled": sampled & to_sampled,
        "new": sampled & ~to_observed & ~to_sampled,
    }


def class_masks(config: StudyConfig, info: dict[str, Any], folder: Path) -> dict[str, np.ndarray]:
    """{class: bool [videos, 1, frames]} for the table of an evaluation directory.

    info: what the table's .json says. Raises FileNotFoundError where the poses are missing.
    """
    spec = stored_dataset(config.dataset, EvalDir(folder).model_config())
    files = get_test_dataset(spec, T=config.T).files
    rows = []
    for video in info["videos"]:
        poses = load_poses(files.paths[video])[:: spec.frame_rate.stride][: config.T]
        rows.append(frame_classes(poses, config.obs_length))
    frames = info["frames"]
    return {name: np.stack([row[name][frames] for row in rows])[:, None] for name in rows[0]}


# ---------------------------------------------------------------- the report


def read_tables(config: StudyConfig) -> dict[Cell, ScoreTable]:
    """The tables of all cells, empty where there is none yet."""
    return {
        cell: metric_tables.read_scores(
            paths.metrics_path(eval_dir(config, cell), config.num_videos, 1, config.T)
        )
        for cell in cells(config)
    }


def write_report(config: StudyConfig) -> Path:
    """Write `<out>/tables.md` from all that is there; returns its path. Gaps are shown as "-"."""
    tables = read_tables(config)
    parts = [
        f"# {config.dataset}",
        f"{config.num_videos} test videos of {config.T} frames, the first {config.obs_length} "
        f"observed, {config.max_frames} frames in one network call, {config.step_size} of them "
        "sampled. Mean ± standard error over videos; of distances, [95 % interval]; in round "
        "brackets the difference, paired over videos, from the first strategy of the same sampler or, "
        "for DDPM, from the same strategy with the solver. Seconds are those of the sampling "
        "command, its start included.",
        score_table(config, tables),
        coherence_table(config, tables) if config.dataset in HAS_POSES else "",
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


def score_table(config: StudyConfig, tables: dict[Cell, ScoreTable]) -> str:
    """All frames' scores, a row per cell, as markdown; the last row is of real videos."""
    bound = f"chain of {config.elbo_respacing or 'all'} timesteps"
    heads = [*_heads(config.modes), f"bits/dim ({bound})", "s/video"]
    rows = [
        [
            cell.folder,
            cell.name,
            *(_score(tables, cell, mode) for mode in config.modes),
            _bits(config, cell),
            command_time(config, cell.sampled_by, per=config.num_videos),
        ]
        for cell in tables
    ]
    floors = [_floor(tables, mode) for mode in config.modes]
    if any(floors):
        numbers = [floor or "-" for floor in floors]
        rows.append(["true videos", "real against real", *numbers, "-", "-"])
    return markdown_table(["sampler", "strategy", *heads], rows)


def coherence_table(config: StudyConfig, tables: dict[Cell, ScoreTable]) -> str:
    """The scores of the classes of frames of `frame_classes`, a row per class and cell, as markdown."""
    modes = [mode for mode in config.modes if mode not in VIDEO_METRICS]
    rows = []
    for cell, (_, info) in tables.items():
        masks = class_masks(config, info, eval_dir(config, cell)) if info else {}
        for name, mask in masks.items():
            counts = [str(mask.sum()), str(mask.any(axis=(1, 2)).sum())]
            values = [_score(tables, cell, mode, mask) for mode in modes]
            rows.append([name, cell.folder, cell.name, *counts, *values])
    heads = ["true pose", "sampler", "strategy", "frames", "videos", *_heads(modes)]
    # Rows of one class stand together.
    return markdown_table(heads, sorted(rows, key=lambda row: row[0])) if rows else ""


def _heads(modes: Sequence[str]) -> list[str]:
    units = [METRICS[mode].unit for mode in modes]
    return [
        f"{mode.upper()} ({unit})" if unit else mode.upper()
        for mode, unit in zip(modes, units, strict=True)
    ]


def _score(
    tables: dict[Cell, ScoreTable], cell: Cell, mode: str, mask: np.ndarray | None = None
) -> str:
    """One metric of one cell, over the frames of `mask` (None: all)."""
    values, info = tables[cell]
    if mode not in values:
        return "-"
    other = reference(list(tables), cell)
    pair = tables[other], tables[cell]
    if mode in VIDEO_METRICS:
        shown = metric_tables.plus_minus(info["metrics"][mode])
        return shown + ("" if other == cell else _distance_difference(mode, *pair))

    def summary(found: np.ndarray) -> dict[str, Any]:
        return metric_tables.summarise(found if mask is None else np.where(mask, found, np.nan))

    shown = metric_tables.plus_minus(summary(values[mode]))
    if shown == "-" or other == cell or mode not in tables[other].values:
        return shown
    with np.errstate(invalid="ignore"):  # two perfect frames: inf - inf is left out
        difference = values[mode] - tables[other].values[mode]
    return f"{shown} ({metric_tables.plus_minus(summary(difference), sign='+')})"


def _distance_difference(mode: str, first: ScoreTable, other: ScoreTable) -> str:
    """That of a distance with its interval, in brackets; empty where there is none."""
    found = {d.metric: d for d in find_differences({"first": first, "other": other})}
    return f" ({found[mode].interval:+})" if mode in found else ""


def _floor(tables: dict[Cell, ScoreTable], mode: str) -> str:
    """The distance between true videos that stands in the first table that has one."""
    for _, info in tables.values():
        floor = info.get("metrics", {}).get(mode, {}).get("floor")
        if floor:
            return f"{floor['value']:.4g} (n = {floor['n']})"
    return ""


def _bits(config: StudyConfig, cell: Cell) -> str:
    """The bound of one cell in bits per dimension, and its difference as in `_score`."""
    bounds = video_bounds(config, cell)
    if not bounds:
        return "-"
    shown = _bits_summary(list(bounds.values()))
    other = reference(cells(config), cell)
    others = {} if other == cell else video_bounds(config, other)
    shared = bounds.keys() & others.keys()
    if shared:
        shown += f" ({_bits_summary([bounds[v] - others[v] for v in shared], sign='+')})"
    return f"{shown}, n = {len(bounds)}"


def _bits_summary(bits: list[float], sign: str = "") -> str:
    mean, error = metric_tables.mean_and_error(np.array(bits))
    return metric_tables.plus_minus({"mean": mean, "standard_error": error}, sign)


def video_bounds(config: StudyConfig, cell: Cell) -> dict[str, float]:
    """{file of a video's bounds: bits per dimension of its frames that are not observed}."""
    folder = eval_dir(config, cell)
    files = sorted((folder / "elbos").glob("elbo_*.npy"))
    if not files:
        return {}
    size = stored_dataset(config.dataset, EvalDir(folder).model_config()).image_size
    dimensions = (config.T - config.obs_length) * 3 * size**2
    return {file.name: float(metric_tables.load_elbo(file).sum()) / dimensions for file in files}
