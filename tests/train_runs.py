"""Tiny training runs for tests: a videos made on the spot, loops in process, commands as typed."""

from __future__ import annotations

import csv
import dataclasses
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch

from improved_diffusion import train_util
from improved_diffusion.config import DiffusionConfig, ModelConfig, flat_options
from improved_diffusion.data import checkpoints
from improved_diffusion.data.dataset_files import dataset_spec
from improved_diffusion.data.video_datasets import get_train_dataset
from improved_diffusion.sampling.trained_model import create_diffusion, create_model
from improved_diffusion.training.options import TrainConfig
from improved_diffusion.training.runs import open_run
from improved_diffusion.training.train_data import held_out_items

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "scripts" / "video_train.py")
MPIEXEC = str(Path(sys.executable).parent / "mpiexec")
MODEL = {"num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "4"}
TRAIN = {
    "batch_size": 2,
    "max_frames": 3,
    "T": 6,
    "num_workers": 0,
    "log_interval": 1,
    "save_interval": 2,
    "max_steps": 4,
    "ema_rate": "0.9,0.99",
    "lr": 0.001,
}


def make_videos(folder: Path, num_videos: int = 5) -> str:
    """A folder data set of 8-frame videos of 32x32 random pixels; returns its path."""
    for partition in ("train", "test"):
        (folder / partition).mkdir(parents=True)
        for i in range(num_videos):
            video = np.random.default_rng(i).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
            np.save(folder / partition / f"{i}.npy", video)
    return str(folder)


def make_loop(
    dataset: str,
    model_options: dict | None = None,
    diffusion_options: dict | None = None,
    **options,
) -> train_util.TrainLoop:
    """The loop of the command's options, in this process."""
    train = TrainConfig(dataset=dataset, **{**TRAIN, **options})
    model_config = ModelConfig(image_size=32, **{**MODEL, **(model_options or {})})
    diffusion_config = DiffusionConfig(**{"diffusion_steps": 40, **(diffusion_options or {})})
    stored = flat_options(train, model_config, diffusion_config)
    data = get_train_dataset(
        dataset,
        T=train.T,
        max_frames=train.max_frames,
        seed=train.seed,
        image_size=32,
        pad_with_random_frames=train.pad_with_random_frames,
        mask_distribution=train.mask_distribution,
        mask_options=train.mask_options,
    )
    torch.manual_seed(train.seed)
    valid_data = None
    if train.valid_interval:
        spec = dataset_spec(dataset, image_size=32)
        valid_data = held_out_items(spec, train, None)
    short = dataclasses.replace(diffusion_config, timestep_respacing="2")
    return train_util.TrainLoop(
        create_model(model_config),
        create_diffusion(diffusion_config),
        data,
        train,
        run=open_run(train, stored),
        monitoring=train_util.Monitoring(create_diffusion(short), valid_data),
    )


def flags(dataset: str, **options) -> list[str]:
    """The command line of the same options."""
    values = {"dataset": dataset, "diffusion_steps": 40, **MODEL, **TRAIN, **options}
    return [f"--{name}={value}" for name, value in values.items()]


def environment(**variables: str) -> dict[str, str]:
    """This process's variables without wandb and with one thread."""
    return {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", **variables}


def train(
    cwd: Path,
    *arguments: str,
    ranks: int = 0,
    script: str = SCRIPT,
    variables: dict[str, str] | None = None,
    **options,
) -> subprocess.CompletedProcess[str]:
    """Run the command (`ranks` > 0: under mpiexec) in `cwd`; stdout and stderr as text."""
    launch = [MPIEXEC, "-n", str(ranks)] if ranks else []
    return subprocess.run(
        [*launch, sys.executable, script, *arguments],
        cwd=cwd,
        env=environment(**(variables or {})),
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def rank_script(folder: Path, body: str) -> str:
    """A training script in which `body` may change TrainLoop before it runs."""
    script = folder / "ranks.py"
    script.write_text(
        "import functools, os, signal, sys, time, torch\n"
        f"sys.path[:0] = [{str(ROOT / 'scripts')!r}, {str(ROOT / 'tests')!r}]\n"
        "import video_train\n"
        "from improved_diffusion import dist_util, registry, resample, train_util\n"
        "from improved_diffusion.training.train_step import TrainStep\n"
        "from improved_diffusion.script_util import run_main\n"
        "Loop, update = train_util.TrainLoop, TrainStep.begin\n"
        + textwrap.dedent(body)
        + "\nrun_main(video_train.main)\n"
    )
    return str(script)


def wake_up(model: torch.nn.Module) -> torch.nn.Module:
    """Replace the zeros that much of the network starts with, so that all gradients count."""
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.02 * torch.randn(param.shape, generator=torch.Generator().manual_seed(0)))
    return model


def equal(a: object, b: object) -> bool:
    """Whether two nested states are the same bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def load_run(folder: str) -> checkpoints.RunState:
    """The newest set of a run, which must be there."""
    state = checkpoints.load_newest(folder)
    assert state is not None, folder
    return state


def newest_step(folder: str) -> int | None:
    """The step of the newest complete set in a run's folder, None where there is none."""
    return max((found.step for found in checkpoints._complete_sets(folder)), default=None)


def assert_same_run(first: object, second: object) -> None:
    first, second = load_run(str(first)), load_run(str(second))
    assert first.step == second.step
    assert equal(first.model_state, second.model_state)
    assert equal(first.ema_states, second.ema_states)
    assert equal(first.opt_state, second.opt_state)


def column(folder: str | Path, name: str) -> list[str]:
    """A column of a run's progress.csv."""
    with open(Path(folder) / "progress.csv", newline="") as file:
        return [row[name] for row in csv.DictReader(file)]
