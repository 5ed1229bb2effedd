"""What several ways to train have learnt after equal updates or equal time.

Each run is one of video_train.py, made by the same function. Every so many updates it is asked to
denoise the same inference steps on test videos, with the same noise, at several noise levels: how
well frames are predicted where sampling decides their layout (high noise) and their detail (low).
What was measured is kept in `<out>/<run>.json`, and goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import io
import logging
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from improved_diffusion.config import DataConfig, DiffusionConfig, ModelConfig, flat_options
from improved_diffusion.data import paths
from improved_diffusion.data.machine import default_device
from improved_diffusion.data.metric_weights import sha256
from improved_diffusion.evaluation.line_styles import line_style
from improved_diffusion.registry import STRATEGIES, VIDEO_METRICS
from improved_diffusion.sampling.results import read_json, write_json
from improved_diffusion.sampling.trained_model import TrainedModel
from improved_diffusion.script_util import add_arguments, config_from_args, parse_with_config
from improved_diffusion.study.held_out import BOUND, LEVELS, held_out_errors
from improved_diffusion.study.markdown import markdown_table
from improved_diffusion.study.options import ComparisonConfig
from improved_diffusion.study.study import RunScript
from improved_diffusion.training.options import LaunchConfig, TrainConfig
from improved_diffusion.training.runs import IDENTITY
from improved_diffusion.training.start import resolve_train_options, train_run

logger = logging.getLogger(__name__)

SOLVER = "dpmpp2m"
EXTENT = ("T", "max_frames", "image_size", "dataset")  # what all runs must share
LIMITS = (*IDENTITY, "max_steps")  # options that differ between sittings of one run


@dataclass(frozen=True)
class Recipe:
    """One way to train: a name, and the options of its run."""

    name: str
    train: TrainConfig
    data: DataConfig
    model: ModelConfig
    diffusion: DiffusionConfig

    def stored(self) -> dict[str, Any]:
        """The options that make its numbers what they are."""
        flat = flat_options(self.train, self.data, self.model, self.diffusion)
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in flat.items()
            if key not in LIMITS
        }

    def beginning(self) -> dict[str, str]:
        """What tells the weights that it begins with from others; nothing for random ones."""
        file = self.train.resume_checkpoint
        return {"resume_checkpoint_sha256": sha256(file)} if file else {}


def compare(config: ComparisonConfig, run_script: RunScript) -> str:
    """Train and measure what is missing; write errors.csv, errors.png and samples' scores.

    Those that other processes measured in `out` stand beside them, so that each may have its share of
    the runs. Returns the table of the last measurements as text. Raises ValueError for runs that cannot be
    compared, for results of other options in `out`, and where training was interrupted; what
    training and the scripts raise.
    """
    found = recipes(config)
    records = {recipe.name: _train_and_measure(config, recipe) for recipe in found}
    records |= _measured_elsewhere(config, found)
    _write_csv(records, Path(config.out) / "errors.csv")
    _draw(records, Path(config.out) / "errors.png", by_time=config.seconds > 0)
    if config.num_videos:
        for script, words in sample_commands(config, found):
            run_script(script, words)
    return format_table(records)


def recipes(config: ComparisonConfig) -> list[Recipe]:
    """The runs to compare.

    Raises ValueError for one that has no name or whose name another has, and for runs of different
    videos or sizes, whose errors do not compare.
    """
    if not config.runs:
        raise ValueError('--runs is empty: give runs as "name: options of video_train.py"')
    found: dict[str, Recipe] = {}
    for text in config.runs:
        name, colon, words = text.partition(":")
        if not colon or not re.fullmatch(r"[\w.-]+", name) or name in found:
            raise ValueError(f'--runs {text!r}: give each run a name of its own, "name: options"')
        found[name] = _recipe(config, name, shlex.split(f"{config.common} {words}"))
    extents = {name: [recipe.stored()[key] for key in EXTENT] for name, recipe in found.items()}
    first = next(iter(found))
    for name, extent in extents.items():
        if extent != extents[first]:
            raise ValueError(
                f"--runs: {name} has {', '.join(EXTENT)} {extent}, {first} has {extents[first]}: "
                "their errors do not compare"
            )
    return list(found.values())


def parse_recipe(name: str, words: Sequence[str]) -> Recipe:
    """The run that video_train.py would make of these words, --config FILE among them.

    Argparse ends the process where they are wrong; raises what resolving them raises.
    """
    parser = argparse.ArgumentParser(prog=name)
    add_arguments(parser, TrainConfig, DataConfig, ModelConfig, DiffusionConfig, LaunchConfig)
    args = parse_with_config(parser, words)
    data, diffusion = config_from_args(DataConfig, args), config_from_args(DiffusionConfig, args)
    train, model = config_from_args(TrainConfig, args), config_from_args(ModelConfig, args)
    train, model, _ = resolve_train_options(train, data, model)
    return Recipe(name, train, data, model, diffusion)


def _recipe(config: ComparisonConfig, name: str, words: Sequence[str]) -> Recipe:
    recipe = parse_recipe(name, words)
    if recipe.train.resume_id:
        raise ValueError(f"--runs {name}: is named after itself: leave out --resume_id")
    train = dataclasses.replace(
        recipe.train,
        resume_id=f"{Path(config.out).name}/{name}",
        save_latest_only=True,
        sample_interval=0,
    )
    return dataclasses.replace(recipe, train=train)


# ---------------------------------------------------------------- training and measuring


def _train_and_measure(config: ComparisonConfig, recipe: Recipe) -> list[dict[str, float]]:
    """The measurements of one run, oldest first; trains until it has had its updates or its time.

    The seconds are those of training, with starting the run anew after each measurement.
    """
    path = Path(config.out) / f"{recipe.name}.json"
    made_with = {"options": recipe.stored() | recipe.beginning(), **_measured_with(config)}
    kept = read_json(path) if path.exists() else {"rows": [], **made_with}
    differing = [key for key in made_with if kept.get(key) != made_with[key]]
    if differing:
        raise ValueError(f"{path}: made with other {differing[0]}: give another --out")
    rows = kept["rows"]
    _claim(path, recipe, kept)
    while not rows or (
        rows[-1]["updates"] < config.updates and not 0 < config.seconds <= rows[-1]["seconds"]
    ):
        done = rows[-1] if rows else {"updates": 0, "seconds": 0.0}
        limit = min(int(done["updates"]) + config.every, config.updates)
        seconds = _train_until(recipe, limit)
        row = {
            "updates": limit,
            "seconds": done["seconds"] + seconds,
            **_measure(config, recipe, limit),
        }
        rows.append(row)
        write_json(path, {"rows": rows, **made_with})
        logger.info("%s", format_table({recipe.name: rows}))
    return rows


def _claim(path: Path, recipe: Recipe, kept: dict[str, Any]) -> None:
    """Say in `path` that the run's folder is this comparison's, before the first update.

    Raises ValueError where there is a run already, of which nothing was measured here: it may be at
    any update.
    """
    if path.exists():
        return
    folder = Path(paths.run_dir(recipe.train.resume_id))
    if folder.exists():
        raise ValueError(
            f"{folder} holds a run that {path} says nothing of: remove it, or give an --out whose last "
            "part no other comparison has"
        )
    write_json(path, kept)


def _measured_with(config: ComparisonConfig) -> dict[str, Any]:
    """The options that decide what is measured."""
    return {key: getattr(config, key) for key in ("queries", "average", "seed")}


def _measured_elsewhere(
    config: ComparisonConfig, found: Sequence[Recipe]
) -> dict[str, list[dict[str, float]]]:
    """The measurements in `out` of other runs than these that compare with them."""
    others = {}
    for path in sorted(Path(config.out).glob("*.json")):
        kept, own = read_json(path), found[0].stored()
        wanted = _measured_with(config) | {"options": {key: own[key] for key in EXTENT}}
        options = kept.get("options", {})
        has = {**kept, "options": {key: options.get(key) for key in EXTENT}}
        compares = all(has.get(key) == value for key, value in wanted.items())
        if compares and path.stem not in [recipe.name for recipe in found]:
            others[path.stem] = kept["rows"]
    return others


def _train_until(recipe: Recipe, updates: int) -> float:
    """Train the run to its update of that number, or its own end; the seconds that it took."""
    began = time.perf_counter()
    train = dataclasses.replace(recipe.train, max_steps=updates)
    if train_run(train, recipe.data, recipe.model, recipe.diffusion):
        raise ValueError("training was interrupted: start again, and it goes on from there")
    return time.perf_counter() - began


def checkpoint_path(config: ComparisonConfig, recipe: Recipe) -> str:
    """The newest checkpoint of a run, of the kind that is measured."""
    rate = recipe.train.ema_rates[0]
    kind = paths.ema_kind(rate) if config.average else "model"
    return paths.checkpoint_path(paths.run_dir(recipe.train.resume_id), kind, None)


def _measure(config: ComparisonConfig, recipe: Recipe, limit: int) -> dict[str, float]:
    """What `held_out_errors` finds of a run's newest checkpoint, of no more updates than `limit`."""
    device = default_device(config.device)
    model = TrainedModel.load(checkpoint_path(config, recipe), device)
    if model.step > limit:
        raise ValueError(
            f"{checkpoint_path(config, recipe)} has made {model.step} updates, not {limit}: remove its "
            "folder and the file of its measurements, and start again"
        )
    return held_out_errors(
        model.denoiser(), recipe, config.queries, seed=config.seed, device=device
    )


# ---------------------------------------------------------------- samples


def sample_commands(
    config: ComparisonConfig, found: Sequence[Recipe]
) -> Iterator[tuple[str, list[str]]]:
    """The commands that sample test videos of full length with each run, score them, and draw drift."""
    folders = [
        str(sample_folder(config, recipe, mode)) for recipe in found for mode in config.strategies
    ]
    device = ["--device", config.device] if config.device else []
    for recipe in found:
        for mode in config.strategies:
            yield "video_sample.py", [*_sample_words(config, recipe, mode), *device]
    frame_modes, video_modes = (
        [mode for mode in config.modes if (mode in VIDEO_METRICS) == of_videos]
        for of_videos in (False, True)
    )
    for script, modes in (("video_eval.py", frame_modes), ("video_eval_fvd.py", video_modes)):
        if modes:
            yield script, ["--eval_dir", *folders, "--modes", *modes, *device]
    if frame_modes:
        picture = str(Path(config.out) / "drift.png")
        yield "video_plot.py", ["--eval_dir", *folders, "--out", picture]


def _sample_words(config: ComparisonConfig, recipe: Recipe, mode: str) -> list[str]:
    sizes = _sizes(recipe)
    return [
        checkpoint_path(config, recipe),
        *("--inference_mode", mode, "--sampler", SOLVER),
        *("--timestep_respacing", str(config.timesteps), "--subset_size", str(config.num_videos)),
        *("--seed", str(config.seed), "--eval_dir", str(Path(config.out) / recipe.name)),
        *(word for name, value in sizes.items() for word in (f"--{name}", str(value))),
    ]


def _sizes(recipe: Recipe) -> dict[str, int]:
    """Half of a network call is observed, half is sampled, over the longest videos."""
    half = recipe.train.max_frames // 2
    T = recipe.train.T
    return {"max_frames": 2 * half, "step_size": half, "T": T, "obs_length": min(half, T - 1)}


def sample_folder(config: ComparisonConfig, recipe: Recipe, mode: str) -> Path:
    """The evaluation directory of a run's samples with one strategy."""
    strategy = STRATEGIES[mode]
    max_frames, step_size, T, obs_length = _sizes(recipe).values()
    own = strategy.folder_suffix(strategy.Options())
    name = paths.inference_mode_str(mode, (max_frames, step_size, T, obs_length), options=own)
    return Path(config.out) / recipe.name / name


# ---------------------------------------------------------------- what came of it


def _write_csv(records: dict[str, list[dict[str, float]]], path: Path) -> None:
    """All measurements, a row each: run, updates, seconds, error per log SNR, bits/dim."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["run", "updates", "seconds", *map(str, LEVELS), BOUND])
    for name, rows in records.items():
        for row in rows:
            columns = ("updates", "seconds", *map(str, LEVELS), BOUND)
            writer.writerow([name, *(row[column] for column in columns)])
    with paths.atomic_write(path) as file:
        file.write(text.getvalue().encode())


def format_table(records: dict[str, list[dict[str, float]]]) -> str:
    """The last measurement of each run, a table in Markdown."""
    head = ["run", "updates", "minutes", *(f"error at log SNR {level}" for level in LEVELS), BOUND]
    lines = []
    for name, rows in records.items():
        last = rows[-1]
        errors = [f"{last[str(level)]:.4f}" for level in LEVELS]
        times = [str(int(last["updates"])), f"{last['seconds'] / 60:.1f}"]
        lines.append([name, *times, *errors, f"{last[BOUND]:.2f}"])
    return markdown_table(head, lines)


def _draw(records: dict[str, list[dict[str, float]]], path: Path, *, by_time: bool) -> None:
    """A panel per noise level and one of the bound, a curve per run; logarithmic.

    Runs whose names differ in a last "-1", "-2", ... are seeds of one: drawn alike, named once.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(16, 7.4), layout="constrained")
    axis, label = ("seconds", "seconds of training") if by_time else ("updates", "updates")
    families = list(dict.fromkeys(map(without_seed, records)))
    styles = {family: line_style(place) for place, family in enumerate(families)}
    lines = {}
    titles = [f"log SNR {level}" for level in LEVELS] + [BOUND]
    panels = zip(figure.subplots(2, 4).flat, [*map(str, LEVELS), BOUND], titles, strict=True)
    for axes, column, title in panels:
        for name, rows in records.items():
            x, y = [row[axis] for row in rows], [row[column] for row in rows]
            colour, dashes = styles[without_seed(name)]
            (line,) = axes.loglog(x, y, marker=".", linewidth=1.3, color=colour)
            line.set_dashes(dashes or (None, None))
            lines[without_seed(name)] = line
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(label)
        for scale in (axes.xaxis, axes.yaxis):
            scale.set_major_formatter(LogFormatter())
            scale.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.6)))
        axes.grid(alpha=0.3, which="both")
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=6)
    figure.suptitle("squared error of predicted clean frames on held-out queries", fontsize=11)
    with contextlib.closing(io.BytesIO()) as image, paths.atomic_write(path) as file:
        figure.savefig(image, format="png", dpi=80)
        file.write(image.getvalue())


def without_seed(name: str) -> str:
    """The name of a run without a last "-1", "-2", ..., by which seeds of one are told apart."""
    return re.sub(r"-\d+$", "", name)
