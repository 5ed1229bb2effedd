"""A study of inference strategies at small scale: which frames to condition on, by documented commands.

The study is a table of commands, each one of the project's scripts with its options. They run one
after the other, in processes of their own, so that one that is killed or out of memory takes no other
along and its time is what a user would see. What each took is kept in `<out>/steps/<name>.json`, a file
of its own, so that several processes can work on different commands. study_report.py reads what the
scripts have written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from improved_diffusion.config import defaults
from improved_diffusion.data import paths
from improved_diffusion.data.checkpoints import load_weights
from improved_diffusion.data.metric_weights import sha256
from improved_diffusion.dist_util import array_task
from improved_diffusion.evaluation.options import EvalConfig, as_words
from improved_diffusion.inference_utils import create_strategy
from improved_diffusion.registry import STRATEGIES, VIDEO_METRICS
from improved_diffusion.sampling.results import read_json, write_json
from improved_diffusion.study.commands import command_line
from improved_diffusion.study.options import StudyConfig

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoints/pretrained/{dataset}/ema_0.999_latest.pt"
PRESETS: dict[str, dict[str, Any]] = {
    "memory_mazes": {
        "obs_length": 36, "T": 150, "max_frames": 10, "step_size": 5, "num_videos": 8,
        "optimal": False,
    },
    "bouncy_balls": {
        "obs_length": 10, "T": 100, "max_frames": 8, "step_size": 4, "num_videos": 16,
        "optimal": True,
    },
}  # fmt: skip
SOLVER = "dpmpp2m"
RECORDS = "steps"  # the folder below `out`, by its name in the first studies
# One timestep, the chain's middle: about 50,000 calls for bouncy_balls, an hour of one core.
OPTIMAL_MODE, OPTIMAL_VIDEOS, OPTIMAL_TIMESTEPS = "autoreg", 10, 1
# Files small enough to be committed.
GIF_OPTIONS = ("--num_videos", "2", "--width", "64", "--every", "2", "--fps", "8")


def resolve(config: StudyConfig) -> StudyConfig:
    """The options with the data set's preset where they were left open.

    All other functions here take such resolved options. Raises ValueError for an unknown data set or
    metric, and for strategies that cannot work with these sizes or do not sample each frame once.
    """
    if config.dataset not in PRESETS:
        raise ValueError(f"{config.dataset!r} has no study: choose from {', '.join(PRESETS)}")
    preset = PRESETS[config.dataset] | {
        "checkpoint": CHECKPOINT.format(dataset=config.dataset),
        "out": f"results/study/{config.dataset}",
    }
    left_open = {key: v for key, v in preset.items() if getattr(config, key) in (None, "", -1)}
    config = dataclasses.replace(config, **left_open)
    for mode in dict.fromkeys(cell.strategy for cell in cells(config)):
        strategy = create_strategy(
            mode,
            video_length=config.T,
            num_obs=config.obs_length,
            max_frames=config.max_frames,
            step_size=config.step_size,
        )
        if strategy.is_goal_directed or strategy.samples_frame_twice:
            raise ValueError(f"--strategies {mode}: does not sample every later frame, once each")
    return config


# ---------------------------------------------------------------- the commands


class Cell(NamedTuple):
    """One way of sampling the test videos."""

    sampler: str
    timesteps: int
    strategy: str
    optimal: bool = False

    @property
    def folder(self) -> str:
        """The folder below `out` of all strategies with this sampler."""
        return f"{self.sampler}_{self.timesteps}"

    @property
    def name(self) -> str:
        return f"{self.strategy}_optimal" if self.optimal else self.strategy

    @property
    def sampled_by(self) -> str:
        """The name of the command that samples it."""
        return f"sample.{self.folder}.{self.name}"


@dataclass(frozen=True)
class Command:
    """One of scripts/ with its options, and a file that it writes."""

    name: str
    script: str
    words: tuple[str, ...]
    result: Path

    @property
    def line(self) -> str:
        """As a user types it."""
        return command_line(self.script, self.words)


# Runs one of scripts/ with its options; raises ValueError where that fails.
RunScript = Callable[[str, Sequence[str]], None]


def cells(config: StudyConfig) -> list[Cell]:
    """All that is sampled: every strategy with the solver, some with DDPM."""
    strategies, with_ddpm = (
        [name.strip() for name in names.split(",") if name.strip()]
        for names in (config.strategies, config.ddpm_strategies)
    )
    found = [Cell(SOLVER, config.solver_steps, name) for name in strategies]
    if config.optimal:
        found.append(Cell(SOLVER, config.solver_steps, OPTIMAL_MODE, optimal=True))
    return found + [Cell("ddpm", config.ddpm_steps, name) for name in with_ddpm]


def reference(of: Sequence[Cell], cell: Cell) -> Cell:
    """The cell that differences are taken from: for DDPM the same strategy with the solver.

    For the solver, and where the solver has not sampled that strategy, it is the sampler's first.
    """
    with_solver = (c for c in of if c.sampler == SOLVER and c.name == cell.name)
    first = next(c for c in of if c.folder == cell.folder)
    return first if cell.sampler == SOLVER else next(with_solver, first)


def eval_dir(config: StudyConfig, cell: Cell) -> Path:
    """The evaluation directory of one cell."""
    strategy = STRATEGIES[cell.strategy]
    name = paths.inference_mode_str(
        cell.strategy,
        (config.max_frames, config.step_size, config.T, config.obs_length),
        optimal=cell.optimal,
        options=strategy.folder_suffix(strategy.Options()),
    )
    return Path(config.out) / cell.folder / name


def commands(config: StudyConfig) -> list[Command]:
    """The commands of the study in an order in which each finds what it needs.

    The optimal schedule, whose search takes longest, comes last with all that needs it.
    """
    plain, optimal = ([c for c in cells(config) if c.optimal == which] for which in (False, True))
    schedules = [_schedule_command(config, cell) for cell in optimal]
    return _commands_of(config, plain) + schedules + _commands_of(config, optimal)


def _commands_of(config: StudyConfig, chosen: list[Cell]) -> list[Command]:
    """Sampling, scores, bounds and pictures of some cells."""
    with_solver = [cell for cell in chosen if cell.sampler == SOLVER]
    return [
        *(_sample_command(config, cell) for cell in chosen),
        *_score_commands(config, chosen),
        *(_bound_command(config, cell) for cell in with_solver if config.elbo_videos),
        *_picture_commands(config, chosen),
    ]


def _strategy_options(config: StudyConfig, cell: Cell) -> tuple[str, ...]:
    """What the scripts that drive a strategy share."""
    return (
        config.checkpoint,
        *("--inference_mode", cell.strategy, "--T", str(config.T)),
        *("--obs_length", str(config.obs_length), "--max_frames", str(config.max_frames)),
        *("--step_size", str(config.step_size), "--seed", str(config.seed)),
        *("--eval_dir", str(Path(config.out) / cell.folder)),
        *_device_options(config),
    )


def _device_options(config: StudyConfig) -> tuple[str, ...]:
    return ("--device", config.device) if config.device else ()


def _schedule_command(config: StudyConfig, cell: Cell) -> Command:
    options = (
        *_strategy_options(config, cell),
        *("--num_videos", str(OPTIMAL_VIDEOS), "--num_timesteps", str(OPTIMAL_TIMESTEPS)),
    )
    result = paths.optimal_schedule_path(eval_dir(config, cell))
    return Command(f"schedule.{cell.strategy}", "video_optimal_schedule.py", options, result)


def _sample_command(config: StudyConfig, cell: Cell) -> Command:
    options = (
        *_strategy_options(config, cell),
        *("--sampler", cell.sampler, "--timestep_respacing", str(cell.timesteps)),
        *("--subset_size", str(config.num_videos)),
        *(("--optimal",) if cell.optimal else ()),
    )
    return Command(cell.sampled_by, "video_sample.py", options, eval_dir(config, cell) / "samples")


def _bound_command(config: StudyConfig, cell: Cell) -> Command:
    options = (
        *_strategy_options(config, cell),
        *("--subset_size", str(config.elbo_videos)),
        *(("--timestep_respacing", config.elbo_respacing) if config.elbo_respacing else ()),
        *(("--optimal",) if cell.optimal else ()),
    )
    return Command(f"bound.{cell.name}", "video_nll.py", options, eval_dir(config, cell) / "elbos")


def _score_commands(config: StudyConfig, chosen: list[Cell]) -> Iterator[Command]:
    """One command per table, so that the truth's features are computed once for all strategies."""
    frame_modes = [mode for mode in config.modes if mode not in VIDEO_METRICS]
    video_modes = [mode for mode in config.modes if mode in VIDEO_METRICS]
    for name, dirs in _tables(config, chosen).items():
        result = paths.metrics_path(dirs[-1], config.num_videos, 1, config.T)
        shared = (
            *("--eval_dir", *map(str, dirs), *_device_options(config), *_metric_words(config)),
            "--modes",
        )
        if frame_modes:
            yield Command(f"scores.{name}", "video_eval.py", (*shared, *frame_modes), result)
        if video_modes:
            options = (*shared, *video_modes, "--floor")
            yield Command(f"fvd.{name}", "video_eval_fvd.py", options, result)


def _metric_words(config: StudyConfig) -> tuple[str, ...]:
    """The options of metrics that differ from their defaults."""
    first = defaults(EvalConfig)["features"]
    features = () if config.features == first else ("--features", config.features)
    return (*features, *as_words((*config.metric_options, *config.feature_options)))


def _picture_commands(config: StudyConfig, chosen: list[Cell]) -> Iterator[Command]:
    for name, dirs in _tables(config, chosen).items():
        shared = ("--eval_dir", *map(str, dirs), "--out")
        picture, grid, page = (
            Path(config.out) / f"{name}.{kind}" for kind in ("png", "gif", "html")
        )
        yield Command(f"plot.{name}", "video_plot.py", (*shared, str(picture)), picture)
        options = (*shared, str(grid), "--grid", "--add_gt", *GIF_OPTIONS)
        yield Command(f"gif.{name}", "video_make_gif.py", options, grid)
        yield Command(f"report.{name}", "video_report.py", (*shared, str(page)), page)


def _tables(config: StudyConfig, chosen: list[Cell]) -> dict[str, list[Path]]:
    """{name: evaluation directories to show together}, a table per sampler.

    Optimal schedules stand in a table of their own, beside the sampler's first strategy.
    """
    found: dict[str, list[Path]] = {}
    for cell in chosen:
        name = f"{cell.folder}.optimal" if cell.optimal else cell.folder
        first = [eval_dir(config, reference(cells(config), cell))] if cell.optimal else []
        dirs = found.setdefault(name, first)
        dirs.append(eval_dir(config, cell))
    return found


# ---------------------------------------------------------------- running them


def chosen_commands(config: StudyConfig, only: Sequence[str]) -> list[Command]:
    """The commands whose names match one of the patterns `only` (none: all).

    Raises ValueError for a pattern that matches nothing.
    """
    known = commands(config)
    for pattern in only:
        if not fnmatch.filter([command.name for command in known], pattern):
            raise ValueError(f"--only {pattern!r} matches no command: --list shows their names")
    return [c for c in known if not only or any(fnmatch.fnmatch(c.name, p) for p in only)]


def run(config: StudyConfig, only: Sequence[str] = (), *, run_script: RunScript) -> None:
    """Run the chosen commands that are not done.

    One is done if it ended well with the same options, and its result is there. Raises ValueError
    or FileNotFoundError for a user's mistake (results of another checkpoint or of more videos in
    `out` among them) and where a command fails.
    """
    if array_task() is not None:
        raise ValueError(
            "SLURM_ARRAY_TASK_ID would make every command do a part only: unset it, and spread the "
            "study with --only"
        )
    chosen = chosen_commands(config, only)
    trained_on = load_weights(config.checkpoint).config.get("dataset")
    if trained_on != config.dataset:
        raise ValueError(
            f"{config.checkpoint} was trained on {trained_on}, not on {config.dataset}: give the "
            "other study, or another --checkpoint"
        )
    checkpoint = sha256(Path(config.checkpoint))
    _check_folder(config, checkpoint)
    for command in chosen:
        record = _record(config, command.name)
        finished = record.get("finished") and command.result.exists()
        if finished and record["command"] == command.line:
            logger.info("%s is done", command.name)
            continue
        if not finished and record.get("finished", True):  # never begun, or its result is gone
            record = {"sittings": 0, "seconds": []}
        # Otherwise it goes on from what is there, of fewer videos it may be: times add up.
        record = record | {"command": command.line, "checkpoint_sha256": checkpoint}
        with _timed(_record_path(config, command.name), record):
            run_script(command.script, command.words)


def _check_folder(config: StudyConfig, checkpoint: str) -> None:
    """Refuse a folder whose results would be mixed up with those to come."""
    for path in sorted(Path(config.out, RECORDS).glob("*.json")):
        if read_json(path).get("checkpoint_sha256") != checkpoint:
            raise ValueError(
                f"{path}: made with another checkpoint than {config.checkpoint}: give another --out"
            )
    for cell in cells(config):
        folder = eval_dir(config, cell)
        names = [paths.parse_sample_name(path.name) for path in (folder / "samples").glob("*")]
        if len({name[0] for name in names if name}) > config.num_videos:
            raise ValueError(
                f"{folder}: has samples of more than {config.num_videos} videos: give "
                "--num_videos as before, or another --out"
            )


@contextlib.contextmanager
def _timed(path: Path, record: dict[str, Any]) -> Iterator[None]:
    """Keep the time of the block in the record at `path`, which is right even if this process is killed."""
    record = record | {"sittings": record["sittings"] + 1, "finished": False}
    write_json(path, record)
    began = time.monotonic()
    try:
        yield
        record["finished"] = True
    finally:
        record["seconds"] = [*record["seconds"], time.monotonic() - began]
        write_json(path, record)


def _record_path(config: StudyConfig, command_name: str) -> Path:
    return Path(config.out) / RECORDS / f"{command_name}.json"


def _record(config: StudyConfig, command_name: str) -> dict[str, Any]:
    path = _record_path(config, command_name)
    return read_json(path) if path.exists() else {}


def command_time(config: StudyConfig, command_name: str, *, per: int = 1) -> str:
    """The seconds that a finished command took, divided by `per`; "-" for any other.

    With a ">" where the time of a killed sitting is not known.
    """
    record = _record(config, command_name)
    if not record.get("finished"):
        return "-"
    sign = ">" if len(record["seconds"]) < record["sittings"] else ""
    return f"{sign}{sum(record['seconds']) / per:.1f}"


def listing(config: StudyConfig, only: Sequence[str] = ()) -> str:
    """The chosen commands, a line each: name, seconds taken, command."""
    chosen = chosen_commands(config, only)
    width = max(len(command.name) for command in chosen)
    return "\n".join(
        f"{command.name:{width}} {command_time(config, command.name):>9} {command.line}"
        for command in chosen
    )
