"""A network without weights to speak of, its checkpoint, and runs of it that several tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from helpers import make_folder_dataset
from improved_diffusion.data import paths
from improved_diffusion.registry import NETWORKS
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.sampling.results import EvalDir, load_video
from improved_diffusion.sampling.video_sampling import sample_dataset

T, OBSERVED, SIZE = 12, 2, 32


class Pixelwise(torch.nn.Module):
    """Every pixel by itself, from its mean over the observed frames: bit for bit the same in any batch."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor([0.7]))

    def forward(self, x, timesteps, *, x0, obs_mask, latent_mask, frame_indices):  # type: ignore
        context = x0[:, :1] * obs_mask[:, :1]
        for frame in range(1, x0.shape[1]):
            context = context + x0[:, frame : frame + 1] * obs_mask[:, frame : frame + 1]
        return self.gain * context / obs_mask.sum(1, keepdim=True).clamp(min=1) + 0.1 * x


NETWORKS["pixelwise"] = Pixelwise


def make_toy(folder: Path, gain: float = 0.7, **options: object) -> Path:
    """A data set (if there is none yet) and a checkpoint of a network with this gain in `folder`."""
    data = folder / "data"
    if not data.exists():
        make_folder_dataset(data, T=T, size=SIZE, num_train=4, num_test=4)
    config = {
        "network": "pixelwise",
        "image_size": SIZE,
        "diffusion_steps": 3,
        "noise_schedule": "cosine",
        "predict_xstart": True,
        "max_frames": 4,
        "dataset": str(data),
    }
    path = folder / "checkpoints/toy/model_000001.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"gain": torch.tensor([gain])}
    torch.save({"state_dict": state, "config": config | options, "step": 1}, path)
    return path


def toy_options(checkpoint: Path, **options: Any) -> dict[str, Any]:
    """The options of sampling by which the tests work, some of them replaced."""
    shared = {
        "checkpoint_path": str(checkpoint),
        "inference_mode": "autoreg",
        "step_size": 2,
        "obs_length": OBSERVED,
        "device": "cpu",
        "eval_dir": str(checkpoint.parents[2] / "results"),
    }
    return shared | options


def sample(checkpoint: Path, **options: Any) -> EvalDir:
    return sample_dataset(SampleConfig(**toy_options(checkpoint, **options)))


def load(eval_dir: EvalDir, video: int, index: int = 0) -> np.ndarray:
    return np.array(load_video(paths.sample_path(eval_dir.path, video, index)))
