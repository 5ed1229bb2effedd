"""The notebook API: the README's example runs, and samples are those of the script."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import make_checkpoint, make_folder_dataset
from improved_diffusion.config import ModelConfig
from improved_diffusion.data import paths
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.sampling.results import load_video
from improved_diffusion.sampling.trained_model import create_model
from improved_diffusion.sampling.video_sampling import sample_dataset, sample_video
from improved_diffusion.script_util import config_from_args, load_model

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.fixture
def checkpoint(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    data = make_folder_dataset(tmp_path / "data", num_test=1, T=9)
    return str(make_checkpoint(tmp_path / "checkpoints/run/model_latest.pt", data))


@pytest.mark.slow
def test_the_example_of_readme_runs_as_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(import numpy.*?load_model.*?)```", README, flags=re.S)[1]
    assert len(example.splitlines()) <= 12
    make_folder_dataset(tmp_path / "datasets/bouncing_balls_100", T=12)
    path = tmp_path / re.search(r"checkpoints/\S+\.pt", example)[0]
    options = {"image_size": 32, "num_channels": 32, "num_res_blocks": 1, "diffusion_steps": 25}
    weights = create_model(config_from_args(ModelConfig, options)).state_dict()
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": weights, "config": options | {"max_frames": 8}, "step": 1}, path)
    scope: dict[str, np.ndarray] = {}
    exec(example, scope)
    assert scope["video"].shape == (20, 32, 32, 3) and scope["video"].dtype == np.uint8
    assert list(tmp_path.glob("*.gif"))


@pytest.mark.slow
def test_a_video_is_the_one_that_the_script_samples(checkpoint):
    config = SampleConfig(
        checkpoint_path=checkpoint, inference_mode="hierarchy-2", step_size=2, obs_length=4,
        sampler="heun", timestep_respacing="3", spacing="logsnr", seed=5,
    )  # fmt: skip
    theirs = load_video(paths.sample_path(sample_dataset(config).path, 0, 0))
    frames = np.load("data/test/0.npy")[:4]
    loaded = load_model(checkpoint)
    ours = sample_video(loaded, frames, 9, "hierarchy-2", sampler="heun", steps=3, seed=5)
    np.testing.assert_array_equal(ours, theirs.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(ours[:4], frames)
    other = sample_video(loaded, frames, 9, "hierarchy-2", sampler="heun", steps=3, seed=6)
    assert (ours[4:] != other[4:]).mean() > 0.1


def test_a_strategy_that_compares_frames_has_its_options(checkpoint):
    loaded, frames = load_model(checkpoint), np.load("data/test/0.npy")[:4]
    by = {"distance": "l2"}
    video = sample_video(loaded, frames, 9, "adaptive-autoreg", steps=3, strategy_options=by)
    assert video.shape == (9, 32, 32, 3)
    with pytest.raises(ValueError, match="distance"):
        sample_video(loaded, frames, 9, "adaptive-autoreg", strategy_options={"distance": "far"})


@pytest.mark.parametrize(
    "change, options, message",
    [
        (lambda x: x.astype(np.float32), {}, r"give uint8 .* not float32"),
        (lambda x: x[:, :16], {}, r"give uint8 \[n, 32, 32, 3\]"),
        (lambda x: x.transpose(0, 3, 1, 2), {}, r"give uint8 \[n, 32, 32, 3\]"),
        (lambda x: x, {"strategy": "goal-directed-autoreg", "T": 12, "max_frames": 12}, "the end"),
        (lambda x: x, {"strategy": "no-such"}, "'no-such' is unknown"),
        (lambda x: x, {"T": 4}, "--obs_length 4 is illegal"),
        (lambda x: x, {"steps": 20}, "--timestep_respacing '20': give a number from 2 to the 3"),
    ],
)
def test_frames_and_options_that_do_not_fit_are_refused(checkpoint, change, options, message):
    frames = change(np.load("data/test/0.npy")[:4])
    with pytest.raises(ValueError, match=message):
        sample_video(load_model(checkpoint), frames, **{"T": 9, "steps": 3} | options)
