"""The networks that come with the repository."""

from pathlib import Path

import numpy as np
import pytest
import torch

from improved_diffusion.sampling.video_sampling import sample_video
from improved_diffusion.script_util import load_model

FOLDER = Path(__file__).parent.parent / "checkpoints" / "pretrained"


@pytest.mark.parametrize("dataset", ["bouncy_balls", "colour_mazes", "maze_laps"])
def test_pretrained_networks_are_small_and_continue_frames(dataset):
    (path,) = (FOLDER / dataset).glob("*.pt")
    assert path.stat().st_size < 10e6
    torch.set_num_threads(1)
    loaded = load_model(str(path))
    assert loaded.dataset == dataset
    observed = np.zeros((4, 32, 32, 3), np.uint8)
    if dataset == "bouncy_balls":
        observed[:, 10:16, 10:16, 0] = 230
    else:
        observed[:, :14], observed[:, 14:] = (140, 200, 240), (60, 45, 30)  # sky and floor
    video = sample_video(loaded, observed, T=6, step_size=2, max_frames=6, steps=5)
    assert (video[:4] == observed).all()
    untrained = np.abs(127.5 - observed[0]).mean()  # it predicts clean frames, 0 everywhere
    error = np.abs(video[4:].astype(float) - observed[0]).mean()
    assert error < untrained / 2
