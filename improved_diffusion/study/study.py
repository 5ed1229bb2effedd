"""A study of inference strategies: which frames to observe, by documented commands.

The study is a table of commands, each one of the project's scripts with its options. They run one
after the other, in processes of their own, so that one that is killed or out of memory takes no other
along and its time is what a user would see. What each took is kept in `<out>/steps/<name>.json`, a file
of its own, so that several processes can work on different commands. study_report.py reads what the
scripts have written.
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from improved_diffusion.config import defaults
from improved_diffusion.data import paths
from improved_diffusion.data.checkpoints import load_weights
from improved_diffusion.data.metric_weights import sha256
from improved_diffusion.dist_util import array_task
from improved_diffusion.evaluation.options import EvalConfig, as_words
from improved_diffusion.registry import VIDEO_METRICS
from improved_diffusion.sampling.results import read_json, write_json
from improved_diffusion.study.arms import Arm, arms
from improved_diffusion.study.commands import command_line
from improved_diffusion.study.options import StudyConfig

logger = logging.getLogger(__name__)

RECORDS = "steps"  # the folder below `out`, by its name in the first studies
# Files small enough to be committed.
GIF_OPTIONS = ("--num_videos", "2", "--width", "64", "--every", "2", "--fps", "8")
PICTURES = ("curves.png", "videos.gif", "report.html")
REPORT_OPTIONS = ("--num_videos", "4", "--num_samples", "1", "--max_mb", "3")


@dataclass(frozen=True)
class Command:
    """One of scripts/ with its options, and a file that it writes."""

    name: str
    script: str
    words: tuple[str, ...]
    result: Path
    shows: bool = False  # what the others made, whatever that is by now: run anew each time

    @property
    def line(self) -> str:
        """As a user types it."""
        return command_line(self.script, self.words)


# Runs one of scripts/ with its options; raises ValueError where that fails.
RunScript = Callable[[str, Sequence[str]], None]


def eval_dir(config: StudyConfig, arm: Arm) -> Path:
    """The evaluation directory of one arm."""
    return Path(config.out) / arm.folder


def commands(config: StudyConfig) -> list[Command]:
    """The commands of a study whose options are resolved, each after those that it needs."""
    chosen = arms(config)
    return [
        *(_sample_command(config, arm) for arm in chosen),
        *_score_commands(config, chosen),
        *(_bound_command(config, arm) for arm in chosen if config.bound_videos),
        *_picture_commands(config, chosen),
    ]


def _strategy_options(config: StudyConfig, arm: Arm) -> tuple[str, ...]:
    """What the scripts that drive a strategy share."""
    return (
        config.checkpoint,
        *("--inference_mode", *arm.words, "--T", str(config.T)),
        *("--obs_length", str(config.obs_length), "--max_frames", str(config.max_frames)),
        *("--step_size", str(config.step_size), "--seed", str(config.seed)),
        *("--eval_dir", config.out),
        *_device_options(config),
    )


def _device_options(config: StudyConfig) -> tuple[str, ...]:
    return ("--device", config.device) if config.device else ()


def _sample_command(config: StudyConfig, arm: Arm) -> Command:
    options = (
        *_strategy_options(config, arm),
        *("--sampler", config.sampler, "--timestep_respacing", str(config.timesteps)),
        *("--spacing", config.spacing, "--subset_size", str(config.num_videos)),
        *("--num_samples", str(config.num_samples)),
    )
    return Command(arm.sampled_by, "video_sample.py", options, eval_dir(config, arm) / "samples")


def _bound_command(config: StudyConfig, arm: Arm) -> Command:
    options = (
        *_strategy_options(config, arm),
        *("--subset_size", str(config.bound_videos), "--stratified"),
    )
    return Command(f"bound.{arm.name}", "video_nll.py", options, eval_dir(config, arm) / "elbos")


def _score_commands(config: StudyConfig, chosen: Sequence[Arm]) -> Iterator[Command]:
    """A command for all strategies, so that the truth's features are computed once."""
    dirs = [eval_dir(config, arm) for arm in chosen]
    result = table_path(config, chosen[-1])
    shared = (
        *("--eval_dir", *map(str, dirs), *_device_options(config), *_metric_words(config)),
        "--modes",
    )
    of_videos = [mode for mode in config.modes if mode in VIDEO_METRICS]
    of_frames = [mode for mode in config.modes if mode not in VIDEO_METRICS]
    if of_frames:
        yield Command("scores", "video_eval.py", (*shared, *of_frames), result)
    if of_videos:
        yield Command("fvd", "video_eval_fvd.py", (*shared, *of_videos, "--floor"), result)


def table_path(config: StudyConfig, arm: Arm) -> Path:
    """The table of one arm's metrics."""
    return paths.metrics_path(
        eval_dir(config, arm), config.num_videos, config.num_samples, config.T
    )


def _metric_words(config: StudyConfig) -> tuple[str, ...]:
    """The options of metrics that differ from their defaults."""
    first = defaults(EvalConfig)["features"]
    features = () if config.features == first else ("--features", config.features)
    return (*features, *as_words((*config.metric_options, *config.feature_options)))


def _picture_commands(config: StudyConfig, chosen: Sequence[Arm]) -> Iterator[Command]:
    shared = ("--eval_dir", *(str(eval_dir(config, arm)) for arm in chosen), "--out")
    picture, grid, page = (Path(config.out) / name for name in PICTURES)
    yield Command("plot", "video_plot.py", (*shared, str(picture)), picture, shows=True)
    words = (*shared, str(grid), "--grid", "--add_gt", *GIF_OPTIONS)
    yield Command("gif", "video_make_gif.py", words, grid, shows=True)
    words = (*shared, str(page), *REPORT_OPTIONS)
    yield Command("report", "video_report.py", words, page, shows=True)


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

    One is done if it ended well with the same options, and its result is there; pictures of results
    are made anew. Raises ValueError
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
            f"{config.checkpoint} was trained on {trained_on}, not on {config.dataset}: give another "
            "--checkpoint, or the study of that data set"
        )
    checkpoint = sha256(Path(config.checkpoint))
    _check_folder(config, checkpoint)
    for command in chosen:
        record = _record(config, command.name)
        finished = record.get("finished") and command.result.exists()
        if finished and record["command"] == command.line and not command.shows:
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
    for arm in arms(config):
        folder = eval_dir(config, arm)
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
