"""What made the content of an evaluation directory: its schedule, its command, time and version.

Each sample has a record (`EvalDir.record`); of folders made before there were records, the schedule of a
strategy that does not look at frames follows from the stored options.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from improved_diffusion.config import NoOptions, option_groups
from improved_diffusion.data import paths
from improved_diffusion.inference_utils import create_strategy
from improved_diffusion.registry import STRATEGIES
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.sampling.results import EvalDir, read_json

# (observed, latent) frames of one inference step.
ScheduleStep = tuple[list[int], list[int]]
# What says how a folder's samples were made, or, where it has none, its bounds.
CONFIGS = ("sample_config.json", "elbo_config.json")
# What must be the same of directories whose videos stand side by side.
SHARED = ("dataset", "dataset_partition", "obs_video")


def stored_options(eval_dir: EvalDir) -> dict[str, Any]:
    """The options that the samples or bounds were made with; empty where nothing says so."""
    for name in CONFIGS:
        if (eval_dir.path / name).exists():
            return read_json(eval_dir.path / name)
    return {}


def check_side_by_side(eval_dirs: Sequence[EvalDir], otherwise: str = "") -> None:
    """Raise ValueError where the videos of evaluation directories are of different data.

    otherwise: what else the user may do than leave some out.
    """
    stored = [stored_options(eval_dir) for eval_dir in eval_dirs]
    for name in SHARED:
        found = {str(options[name]) for options in stored if options.get(name)}
        if len(found) > 1:
            raise ValueError(
                f"these directories differ in {name} ({' and '.join(sorted(found))}), so their videos "
                f"cannot stand side by side: leave some out{otherwise}"
            )


def strategy_names(eval_dirs: Sequence[EvalDir]) -> list[str]:
    """What to call evaluation directories that are shown together: as little as tells them apart.

    Their modes; or else those with their options; with the sampler; the folders' names; their paths.
    """
    candidates = list(zip(*map(_names, eval_dirs), strict=True))
    distinct = (names for names in candidates if len(set(names)) == len(eval_dirs))
    return list(next(distinct, candidates[-1]))  # one directory twice has one name


def _names(eval_dir: EvalDir) -> list[str]:
    """Names of a directory, the shortest first; those that it does not say are its folder's."""
    stored, folder = stored_options(eval_dir), eval_dir.path.resolve().name
    mode = stored.get("inference_mode", folder)
    named = mode + (" optimal" if stored.get("optimal") else "")
    own = fields(getattr(STRATEGIES[mode], "Options", NoOptions)) if mode in STRATEGIES else ()
    with_options = ", ".join(
        [named, *(f"{f.name} {stored[f.name]}" for f in own if f.name in stored)]
    )
    sampler = f"{stored.get('sampler', '')} {stored.get('timestep_respacing', '')}".strip()
    with_sampler = f"{with_options}, {sampler}" if sampler else with_options
    return [
        named,
        with_options,
        with_sampler,
        folder,
        str(eval_dir.path),
        str(eval_dir.path.resolve()),
    ]


def recorded_schedule(eval_dir: EvalDir, video: int, sample: int) -> list[ScheduleStep] | None:
    """The inference steps that made a sample, as they were recorded; None where they were not."""
    schedule = eval_dir.record(video, sample).get("schedule")
    return None if schedule is None else [(observed, latent) for observed, latent in schedule]


def planned_schedule(eval_dir: EvalDir) -> list[ScheduleStep] | None:
    """The inference steps that the stored options lead to, the same for all videos.

    None for strategies that choose frames by what they look like, and for options that do not say
    enough: of a strategy that is not registered here, for instance.
    """
    is_adaptive, steps = _planned(eval_dir)
    return None if is_adaptive else steps


def latent_counts(eval_dir: EvalDir) -> list[int] | None:
    """Frames that each inference step samples; None where the stored options do not say enough."""
    _, steps = _planned(eval_dir)
    return None if steps is None else [len(latent) for _, latent in steps]


def _planned(eval_dir: EvalDir) -> tuple[bool, list[ScheduleStep] | None]:
    """Whether the strategy looks at frames, and its inference steps: on a blank video, if it does."""
    stored = stored_options(eval_dir)
    own = {f.name for group in option_groups(STRATEGIES) for f in fields(group)}
    optimal = paths.optimal_schedule_path(eval_dir.path) if stored.get("optimal") else None
    try:
        strategy = create_strategy(
            stored["inference_mode"],
            video_length=stored["T"],
            num_obs=stored["obs_length"],
            max_frames=stored["max_frames"],
            step_size=stored["step_size"],
            optimal_schedule_path=optimal,
            options={name: stored[name] for name in own & stored.keys()},
            embed=lambda frames: np.zeros((len(frames), 1), np.float32),
        )
        if not strategy.is_adaptive:
            return False, list(strategy)
        strategy.set_videos(np.zeros((1, stored["T"], 3, 1, 1), np.float32))  # type: ignore[attr-defined]
        return True, [(observed[0], latent[0]) for observed, latent in strategy]
    except (KeyError, ValueError, OSError):  # says too little, or of things that are not here
        return False, None


def sample_command(eval_dir: EvalDir) -> str | None:
    """The command that makes the folder's samples; None where the stored options do not say enough."""
    stored = eval_dir.sample_config()
    if not {"checkpoint_path", "inference_mode"} <= stored.keys():
        return None
    words = [stored["checkpoint_path"]]
    groups = (SampleConfig, getattr(STRATEGIES.get(stored["inference_mode"]), "Options", None))
    for item in (item for group in groups if group for item in fields(group)):
        value = stored.get(item.name)
        if item.name == "guidance_against":  # of a FILE its weights are stored there
            value = stored.get("guidance_file") or value
        if item.metadata.get("positional") or value in (None, "", [], item.default):
            continue
        if item.name == "sampler" and value == "ddpm":
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{item.name}", *map(str, values)]
    if stored.get("dataset", "") not in ("", eval_dir.model_config().get("dataset")):
        words += ["--override_dataset", stored["dataset"]]
    samples = eval_dir.samples()
    number = 1 + max(map(max, samples.values()))
    words += ["--num_samples", str(number)] if number > 1 else []
    words += ["--indices", *map(str, samples), "--eval_dir", str(eval_dir.path.parent)]
    return shlex.join(["python", "scripts/video_sample.py", *words])


def seconds_per_video(eval_dir: EvalDir) -> tuple[float, int] | None:
    """(mean seconds, number of samples that it is of); None where no sample recorded them."""
    found = [record["seconds"] for record in records(eval_dir) if record.get("seconds") is not None]
    return (float(np.mean(found)), len(found)) if found else None


def versions(eval_dir: EvalDir) -> list[str]:
    """The versions of the code that made the samples, sorted; empty where none was recorded."""
    return sorted({record["version"] for record in records(eval_dir) if "version" in record})


def records(eval_dir: EvalDir) -> list[dict[str, Any]]:
    """The records of all samples, empty ones of those that have none."""
    return [
        eval_dir.record(video, sample)
        for video, samples in eval_dir.samples().items()
        for sample in samples
    ]
