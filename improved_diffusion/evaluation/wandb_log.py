"""An evaluation at wandb: its tables and some videos, in the run that trained the checkpoint."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from improved_diffusion.data import paths
from improved_diffusion.evaluation import metric_tables
from improved_diffusion.evaluation.gallery import make_gallery
from improved_diffusion.evaluation.options import GifConfig
from improved_diffusion.logger import WandbRun
from improved_diffusion.sampling.results import EvalDir

logger = logging.getLogger(__name__)

COLUMNS = ("strategy", "metric", "n", "samples", "mean", "standard error", "settings")
SHOWN_VIDEOS = 4


def run_of(folder: Path) -> str:
    """The run that an evaluation directory's checkpoint is of, by the checkpoint's folder.

    Raises ValueError where it does not say its checkpoint.
    """
    eval_dir = EvalDir(folder)
    checkpoint = eval_dir.sample_config().get("checkpoint_path")
    if not checkpoint:
        raise ValueError(
            f"--log_to_wandb: {eval_dir.sample_config_path} does not say checkpoint_path, so the run is "
            "not known: leave it out"
        )
    return paths.checkpoint_dir_subset(checkpoint)


def log_to_wandb(tables: Sequence[Path]) -> None:
    """Log tables of metrics, and a gif of the samples beside each, to their runs.

    Names at wandb: eval/<checkpoint>/<strategy>/<metric>, .../videos, and one table eval/<checkpoint>.
    Whatever fails at wandb is told and stops nothing.
    """
    if os.environ.get("WANDB_MODE") == "disabled":
        logger.warning("--log_to_wandb: nothing is logged, since WANDB_MODE=disabled")
        return
    runs: dict[str, list[Path]] = {}
    for table in tables:
        runs.setdefault(run_of(table.parent), []).append(table)
    for run_id, of_run in runs.items():
        with tempfile.TemporaryDirectory() as videos:
            run = WandbRun(run_id, {})
            for checkpoint in dict.fromkeys(_checkpoint(table) for table in of_run):
                chosen = [table for table in of_run if _checkpoint(table) == checkpoint]
                _log_checkpoint(run, checkpoint, chosen, Path(videos))
            run.finish()


def _checkpoint(table: Path) -> str:
    """The folder of the checkpoint with its sampler, as under results/."""
    return table.resolve().parent.parent.name


def _log_checkpoint(run: WandbRun, checkpoint: str, tables: list[Path], videos: Path) -> None:
    rows: list[list[Any]] = []
    for table in tables:
        strategy, info = table.resolve().parent.name, metric_tables.read_info(table)
        numbers = {}
        for label, row in metric_tables.labelled_rows(info):
            numbers[f"eval/{checkpoint}/{strategy}/{label}"] = row["mean"]
            of_metric = info["metrics"][label.partition(" ")[0]]
            settings = json.dumps(of_metric.get("settings", {}), sort_keys=True)
            shown = row["n"], len(info["samples"]), row["mean"], row["standard_error"]
            rows.append([strategy, label, *shown, settings])
        run.log({name: value for name, value in numbers.items() if value is not None}, None)
        path = _gif(table.parent, videos / f"{checkpoint}_{strategy}.gif")
        if path:
            run.log_videos([str(path)], None, f"eval/{checkpoint}/{strategy}/videos")
    run.log_table(f"eval/{checkpoint}", COLUMNS, rows)


def _gif(folder: Path, path: Path) -> Path | None:
    """The first videos beside the truth; None, and told, where that cannot be made."""
    config = GifConfig(
        eval_dir=(str(folder),), grid=True, add_gt=True, num_videos=SHOWN_VIDEOS, out=str(path)
    )
    try:
        (written,) = make_gallery(config)
    except (ValueError, OSError) as error:
        logger.warning("--log_to_wandb: no videos of %s: %s", folder, error)
        return None
    return written
