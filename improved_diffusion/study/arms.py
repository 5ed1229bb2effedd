"""What a study compares: the options of its file, and its arms, the strategies with their own options."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from improved_diffusion.config import check_positive
from improved_diffusion.data import paths
from improved_diffusion.inference_utils import create_strategy
from improved_diffusion.registry import STRATEGIES
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.sampling.results import read_json
from improved_diffusion.study.commands import parse
from improved_diffusion.study.options import PRESETS, StudyConfig, preset_names

LEFT_OPEN = ("", (), -1)
NEEDED = (
    "dataset T obs_length max_frames step_size strategies num_videos num_samples sampler timesteps "
    "spacing bound_videos modes"
).split()


def resolve(config: StudyConfig) -> StudyConfig:
    """The options with those of the study's file where they were left open.

    The functions of study.py and study_report.py take such resolved options. Raises ValueError or
    FileNotFoundError for a file that is not there, is none, or leaves something open; for strategies
    that cannot work with these sizes, do not sample each frame once, or share a folder.
    """
    file = _file(config.preset)
    values = _read(file)
    values = {"out": f"results/study/{file.stem}"} | values
    left_open = {key: v for key, v in values.items() if getattr(config, key) in LEFT_OPEN}
    config = dataclasses.replace(config, **left_open)
    for name in NEEDED:
        if getattr(config, name) in LEFT_OPEN:
            raise ValueError(f"{file} does not say {name}: add it, or give --{name}")
    check_positive(config, "num_videos", "num_samples", "timesteps")
    if not config.checkpoint:
        found = paths.pretrained_checkpoint(config.dataset, flag="checkpoint")
        config = dataclasses.replace(config, checkpoint=found)
    _check(arms(config), config)
    return config


def _file(preset: str) -> Path:
    file = PRESETS / f"{preset}.json" if preset in preset_names() else Path(preset)
    if not file.is_file():
        raise FileNotFoundError(
            f"{preset}: no such study: choose from {', '.join(preset_names())}, or give a file like "
            f"{PRESETS.parent.name}/{PRESETS.name}/*.json"
        )
    return file


def _read(file: Path) -> dict[str, Any]:
    """The options that a file of a study holds."""
    values = read_json(file)
    known = {item.name for item in dataclasses.fields(StudyConfig) if item.default in LEFT_OPEN}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(
            f"{file}: {unknown[0]} is nothing that the file of a study says: see --help, and give "
            "options of metrics and --seed on the command line"
        )
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


# ---------------------------------------------------------------- the strategies


@dataclass(frozen=True)
class Arm:
    """A strategy with its own options, one of those that a study compares.

    words: its mode and options, as a user types them. options: the strategy's `Options`. folder: the
    name of its evaluation directory. name: what it is called in tables and names of commands.
    """

    words: tuple[str, ...]
    options: Any
    folder: str
    name: str

    @property
    def mode(self) -> str:
        """The strategy."""
        return self.words[0]

    @property
    def sampled_by(self) -> str:
        """The name of the command that samples it."""
        return f"sample.{self.name}"


def arms(config: StudyConfig) -> list[Arm]:
    """The strategies of a study, in its order; one whose mode another has is called by its options too."""
    typed = [_parsed(text) for text in config.strategies]
    modes = [words[0] for words, _ in typed]
    sizes = config.max_frames, config.step_size, config.T, config.obs_length
    found = []
    for words, options in typed:
        suffix = STRATEGIES[words[0]].folder_suffix(options)
        folder = paths.inference_mode_str(words[0], sizes, options=suffix)
        name = words[0] + (suffix if modes.count(words[0]) > 1 else "")
        found.append(Arm(words, options, folder, name))
    return found


@functools.cache  # building a parser of all options takes a while
def _parsed(text: str) -> tuple[tuple[str, ...], Any]:
    """The words of one item of --strategies, and the strategy's `Options`."""
    mode, *words = shlex.split(text)
    typed = ["checkpoint", "--inference_mode", mode, *words]
    (given,) = parse("video_sample.py", typed, SampleConfig)
    alone = SampleConfig("checkpoint", inference_mode=mode, strategy_options=given.strategy_options)
    if given != alone:
        raise ValueError(
            f"--strategies {text!r}: give options of the strategy alone; those of sampling hold for all"
        )
    return (mode, *words), given.strategy_options


def _check(found: list[Arm], config: StudyConfig) -> None:
    for arm in found:
        strategy = create_strategy(
            arm.mode,
            options=arm.options,
            video_length=config.T,
            num_obs=config.obs_length,
            max_frames=config.max_frames,
            step_size=config.step_size,
        )
        if strategy.is_goal_directed or strategy.samples_frame_twice:
            raise ValueError(
                f"--strategies {arm.mode}: does not sample every later frame, once each"
            )
        if sum(other.folder == arm.folder for other in found) > 1:
            raise ValueError(f"--strategies: two of them are {arm.folder}: drop one")
