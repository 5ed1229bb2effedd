"""Tiny checkpoints, data sets and script calls that several tests share."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from golden_fill import array, weights
from improved_diffusion import dist_util
from improved_diffusion.config import DataConfig, DiffusionConfig, ModelConfig
from improved_diffusion.data.metric_weights import ALEXNET_FILE
from improved_diffusion.training.options import TrainConfig
from improved_diffusion.training.start import create_train_loop

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
ALEXNET_SHAPES = {
    0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3),
    10: (256, 256, 3, 3),
}  # fmt: skip


def run_script(name: str, *args: object, cwd: Path, env: dict[str, str] | None = None, launcher=()):
    """Run scripts/<name> as a user types it; returns the finished process with its text."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"} | (env or {})
    command = [*launcher, sys.executable, str(ROOT / "scripts" / name), *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def call_main(script: str, *words: object) -> None:
    """Run the main of scripts/<script> in this process, with these words of the command line."""
    try:
        runpy.run_path(str(ROOT / "scripts" / script))["main"]([str(word) for word in words])
    finally:
        dist_util.cleanup()  # a main that raises has not


def scripted(folder: Path, network: torch.nn.Module) -> str:
    """A TorchScript file of a network."""
    path = folder / "network.pt"
    torch.jit.script(network).save(str(path))
    return str(path)


def make_folder_dataset(
    folder: Path, *, num_train: int = 3, num_test: int = 4, T: int = 8, size: int = 32
) -> Path:
    """A folder data set of smooth random videos, .npy [T, size, size, 3]."""
    rng = np.random.default_rng(0)
    for partition, number in (("train", num_train), ("test", num_test)):
        (folder / partition).mkdir(parents=True)
        for index in range(number):
            start = rng.integers(0, 255, (1, 4, 4, 3))
            frames = np.clip(start + 3 * np.arange(T)[:, None, None, None], 0, 255).astype(np.uint8)
            np.save(
                folder / partition / f"{index}.npy",
                frames.repeat(size // 4, 1).repeat(size // 4, 2),
            )
    return folder


def golden_case(name: str) -> dict:
    """One case of golden/unet.json."""
    return next(c for c in json.loads((GOLDEN / "unet.json").read_text()) if c["name"] == name)


def make_checkpoint(path: Path, dataset: Path | str, **options: object) -> Path:
    """A checkpoint in the published format: golden's parameter names and shapes, a flat config.

    The config has keys that only the published code knows, and lacks most of ours.
    """
    case = golden_case("small32")
    state = {
        name: torch.from_numpy(value) for name, value in weights(case["state_dict_shapes"]).items()
    }
    config = case["args"] | {
        "diffusion_steps": 3,
        "noise_schedule": "cosine",
        "predict_xstart": True,
        "max_frames": 4,
        "dataset": str(dataset),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "config": config | options, "step": 1234}, path)
    return path


def train_one_step(dataset: str, data: DataConfig | None = None, max_frames: int = 3) -> str:
    """Train a tiny network of 32x32 for one step in the current folder; returns its EMA's path."""
    train = TrainConfig(
        dataset=dataset,
        max_frames=max_frames,
        batch_size=2,
        num_workers=0,
        max_steps=1,
        sample_interval=0,
        resume_id="tiny",
    )
    model = ModelConfig(image_size=32, num_channels=32, num_res_blocks=1, attention_resolutions="4")
    diffusion = DiffusionConfig(diffusion_steps=3, noise_schedule="cosine", predict_xstart=True)
    create_train_loop(train, data or DataConfig(), model, diffusion).run_loop()
    return "checkpoints/tiny/ema_0.9999_latest.pt"


def write_random_alexnet(folder: Path) -> Path:
    """A backbone file of the right shapes, so that LPIPS runs without the fetched weights."""
    state_dict = {}
    for position, shape in ALEXNET_SHAPES.items():
        scale = np.sqrt(2 / np.prod(shape[1:]))
        weight = array(f"alex{position}", shape, scale)
        state_dict[f"features.{position}.weight"] = torch.from_numpy(weight)
        state_dict[f"features.{position}.bias"] = torch.zeros(shape[0])
    path = folder / ALEXNET_FILE
    torch.save(state_dict, path)
    return path
