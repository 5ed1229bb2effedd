"""A folder of one's own from training to samples."""

import numpy as np
import pytest

from helpers import train_one_step
from improved_diffusion.bouncy_balls import render, simulate
from improved_diffusion.config import DataConfig
from improved_diffusion.data import video_io
from improved_diffusion.data.video_datasets import dataset_spec, get_test_dataset
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.sampling.video_sampling import sample_dataset


@pytest.fixture
def clips(tmp_path, monkeypatch):
    """A folder of four mp4 files of 16 frames at 10 frames a second, 48x64."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    for i in range(4):
        video = render(simulate(np.random.default_rng(i), 16, size=64))[:, :48]
        video_io.write_video(tmp_path / "clips" / f"{i}.mp4", video)
    return tmp_path / "clips"


@pytest.mark.parametrize("rate", [{"fps": 5.0}, {"frame_stride": 2}])
def test_sampling_reads_a_folder_as_training_did(clips, rate):
    checkpoint = train_one_step(str(clips), DataConfig(test_fraction=0.5, **rate))
    done = sample_dataset(
        SampleConfig(checkpoint, "autoreg", step_size=2, obs_length=3, device="cpu")
    )
    truth = get_test_dataset(dataset_spec(str(clips), image_size=32, test_fraction=0.5, **rate))
    assert len(truth) == 2 and sorted(done.samples()) == [0, 1]
    for i in range(2):
        sample = np.load(done.path / "samples" / f"sample_{i:04d}-0.npy")
        assert sample.shape == (8, 3, 32, 32)  # every second of 16 frames
        np.testing.assert_array_equal(sample[:3], truth.read(i, range(3)))


def test_sampling_bears_with_the_broken_videos_that_training_left_out(clips, tmp_path):
    (tmp_path / "split" / "test").mkdir(parents=True)
    clips.rename(tmp_path / "split" / "train")
    video = video_io.read_video(tmp_path / "split" / "train" / "0.mp4")
    np.save(tmp_path / "split" / "test" / "0.npy", video)
    (tmp_path / "split" / "train" / "3.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train/3\.mp4: the file is empty"):
        train_one_step(str(tmp_path / "split"))
    checkpoint = train_one_step(str(tmp_path / "split"), DataConfig(skip_broken=True))
    options = SampleConfig(checkpoint, "autoreg", step_size=2, obs_length=14, device="cpu")
    assert sample_dataset(options).samples() == {0: [0]}
