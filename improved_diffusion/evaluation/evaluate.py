"""Scoring evaluation directories: compute metrics, write a table for each, print them side by side."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from improved_diffusion import dist_util
from improved_diffusion.data import paths
from improved_diffusion.evaluation import metric_tables, wandb_log
from improved_diffusion.evaluation.cache import Cache
from improved_diffusion.evaluation.comparison import (
    Difference,
    find_differences,
    format_differences,
)
from improved_diffusion.evaluation.measurements import Measurements, Workshop
from improved_diffusion.evaluation.options import EvalConfig
from improved_diffusion.evaluation.scored_set import ScoredSet
from improved_diffusion.evaluation.table import write_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """Tables written, why metrics are missing in them: {metric: message}, and how they differ.

    differences: of every further directory from the first; none until all tables are written.
    """

    tables: list[Path]
    failures: dict[str, str]
    differences: list[Difference] = field(default_factory=list)

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

    The pickle is {metric: float64 array}: metrics of frames [videos, samples, predicted frames],
    of samples [videos, samples, columns], of whole videos [samples]; the .json beside it tells what
    they are of. A metric that cannot be computed does not keep the others from it. As an array task:
    only one batch of videos is computed, and the table is written by whichever task completes it.
    Ranks share the videos out, and rank 0 writes the table.

    Raises ValueError or FileNotFoundError for a user's mistake, before anything is computed.
    """
    folders = [Path(folder) for folder in dict.fromkeys(config.eval_dir)]
    sets = [ScoredSet.resolve(config, folder) for folder in folders]
    if not config.allow_differences:
        infos = [scored.info() for scored in sets]
        named = dict(zip(metric_tables.short_names(folders), infos, strict=True))
        metric_tables.check_comparable(named, allow=False)
    metrics, failures = Workshop(config).metrics()
    if dist_util.is_main():
        for scored in sets:
            scored.eval_dir.clean_up()
    outcome = Outcome([], failures)
    done: dict[Path, Measurements] = {}
    for folder, scored in zip(folders, sets, strict=True):
        others = [other for other in folders if other != folder]
        cache = Cache([paths.metrics_cache_dir(each) for each in (folder, *others)])
        measured = Measurements(scored, metrics, cache, floor=config.floor)
        if _score(measured, config.batch_size) and scored.path.exists():
            outcome.tables.append(scored.path)
            done[folder] = measured
        outcome.failures.update(measured.failures)
    if dist_util.is_main() and len(done) == len(folders):
        outcome.differences.extend(find_differences(_comparable_tables(done)))
    return outcome


def _comparable_tables(done: Mapping[Path, Measurements]) -> dict[str, metric_tables.ScoreTable]:
    """{name: what was asked for of a table}, of the first and of those that have the same truth."""
    names = metric_tables.short_names(list(done))
    truths = [[clip.digest for clip in m.scored.truth_clips] for m in done.values()]
    found = {}
    for name, measured, truth in zip(names, done.values(), truths, strict=True):
        if truth == truths[0]:
            values, info = metric_tables.read_scores(measured.scored.path)
            asked = {metric: values[metric] for metric in measured.metrics}
            found[name] = metric_tables.ScoreTable(asked, info)
    return found


def _score(measured: Measurements, batch_size: int) -> bool:
    """Do this process's part; whether all that was asked for, and works, is in the table now.

    batch_size: videos per array task.
    """
    task = dist_util.array_task()
    mine = range(len(measured.scored.videos))
    if task is not None:
        mine = mine[task * batch_size : (task + 1) * batch_size]
    if not mine:
        logger.info("nothing to do: SLURM_ARRAY_TASK_ID=%d is past the last batch of videos", task)
        return False
    own = mine[dist_util.rank() :: dist_util.world_size()]
    for position in tqdm(own, unit="video", desc="scoring", disable=not dist_util.is_main()):
        measured.compute(position)
    measured.give_up(dist_util.gather_objects(measured.failures, what="the metrics that fail"))
    written = dist_util.is_main() and _write(measured, set(own), batch_size)
    return dist_util.broadcast_object(written, what="the table")


def _write(measured: Measurements, own: set[int], batch_size: int) -> bool:
    """Write the table if every video is scored; `own` are those that this process has read."""
    path, total, task = measured.scored.path, len(measured.scored.videos), dist_util.array_task()
    if task is not None:
        tasks = sorted({position // batch_size for position in measured.missing()})
        if tasks:
            logger.info("%s waits for --array=%s", path, ",".join(map(str, tasks)))
            return False
    _read_again(measured, sorted(set(range(total)) - own))
    if not write_table(measured):
        logger.info("%s waits: some videos were made again since they were scored", path)
        return False
    return True


def _read_again(measured: Measurements, positions: list[int]) -> None:
    """Read the videos that other processes have scored, to see that they are what was scored.

    The table would do it by itself: here it is shown, for it takes a while.
    """
    for position in tqdm(positions, unit="video", desc="checking", disable=not positions):
        for clip in measured.clips(position):
            clip.frames()


def run(config: EvalConfig) -> None:
    """`evaluate`, then print the tables, and log them if that is asked for.

    Raises ValueError where a metric could not be computed.
    """
    if config.log_to_wandb:
        for folder in config.eval_dir:  # told before anything is computed
            wandb_log.run_of(Path(folder))
    outcome = evaluate(config)
    if outcome.tables and dist_util.is_main():
        names = metric_tables.short_names([path.parent for path in outcome.tables])
        infos = dict(zip(names, map(metric_tables.read_info, outcome.tables), strict=True))
        metric_tables.check_comparable(infos, allow=config.allow_differences)
        print(metric_tables.format_tables(infos))
        if outcome.differences:
            print(format_differences(outcome.differences))
        if config.log_to_wandb:
            wandb_log.log_to_wandb(outcome.tables)
    outcome.raise_failures()


def format_table(path: Path) -> str:
    """The summary beside the pickle `path` as text."""
    return metric_tables.format_tables({path.parent.name: metric_tables.read_info(path)})
