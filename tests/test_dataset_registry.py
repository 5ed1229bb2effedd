"""A data set with a generator, registered in the test: offered, made on first use, trained on."""

import json
from pathlib import Path

import numpy as np
import pytest

from helpers import call_main, make_checkpoint
from improved_diffusion.data.dataset_specs import DatasetSpec
from improved_diffusion.data.video_datasets import DATASETS, dataset_spec, get_test_dataset
from improved_diffusion.registry import NETWORKS
from improved_diffusion.unet import UNetVideoModel

TINY = (
    "--dataset drift --max_frames 3 --batch_size 2 --num_workers 0 --max_steps 1 --sample_interval 0 "
    "--num_channels 32 --num_res_blocks 1 --diffusion_steps 3 --noise_schedule cosine "
    "--attention_resolutions 4 --resume_id tiny"
)


def make_drift(folder, image_size):
    """Three videos to train with, two to test with, and where the camera was."""
    for partition, number in (("train", 3), ("test", 2)):
        for part in (partition, f"poses/{partition}"):
            (folder / part).mkdir(parents=True)
        for i in range(number):
            frames = np.zeros((8, image_size, image_size, 3), np.uint8)
            frames[..., 0] = 10 * i + np.arange(8)[:, None, None]
            np.save(folder / partition / f"{i}.npy", frames)
            np.save(folder / "poses" / partition / f"{i}.npy", np.zeros((8, 3)))


@pytest.fixture
def drift(tmp_path, monkeypatch):
    """The toy, registered as a user registers one; the current directory is a fresh one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DATASETS, "_entries", dict(DATASETS._entries))
    DATASETS["drift"] = DatasetSpec(
        "drift",
        Path("drift_{image_size}"),
        T=8,
        image_size=64,
        file_size=64,
        make=make_drift,
        made_sizes=(32, 64),
        summary="grey that drifts",
    )


def test_a_registered_data_set_is_offered_by_help(drift, capsys):
    with pytest.raises(SystemExit):
        call_main("video_train.py", "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "drift: grey that drifts" in shown and "bouncy_balls: balls that collide" in shown


def test_it_is_made_on_first_use_in_the_size_that_is_trained(drift):
    call_main("video_train.py", *f"{TINY} --image_size 32".split())
    config = json.loads(Path("checkpoints/tiny/config.json").read_text())["options"]
    assert (config["dataset"], config["T"], config["image_size"]) == ("drift", 8, 32)
    folder = Path("datasets/drift_32")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        "poses", "test", "train",
    ]  # fmt: skip
    assert not Path("datasets/drift_64").exists()
    sampling = "--inference_mode autoreg --obs_length 2 --indices 1 --device cpu --eval_dir out"
    call_main("video_sample.py", *f"checkpoints/tiny/ema_0.9999_latest.pt {sampling}".split())
    video = np.load("out/autoreg_3_1_8_2/samples/sample_0001-0.npy")
    truth = np.load(folder / "test/1.npy").transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(video[:2], truth[:2])
    assert not Path("datasets/drift_64").exists()


def test_each_size_has_files_of_its_own(drift):
    assert get_test_dataset("drift").read(0).shape == (8, 3, 64, 64)
    assert get_test_dataset("drift", image_size=32).read(0).shape == (8, 3, 32, 32)
    small = get_test_dataset(dataset_spec("drift"), image_size=32).files
    assert small.paths[0] == Path("datasets/drift_32/test/0.npy")
    assert dataset_spec("drift", image_size=32, frame_stride=2).T == 4
    with pytest.raises(ValueError, match=r"--image_size 128: drift is made in \(32, 64\)"):
        call_main("video_train.py", *f"{TINY} --image_size 128".split())


def test_the_sizes_that_are_legal_are_those_of_the_network(drift, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"--image_size 48: choose one of \(16, 32, 64, 128, 256\)"
    ):
        call_main("video_train.py", *f"{TINY} --image_size 48".split())
    monkeypatch.setattr(UNetVideoModel, "image_sizes", (64,))
    assert NETWORKS["unet"] is UNetVideoModel
    with pytest.raises(ValueError, match=r"--image_size 32: choose one of \(64,\)"):
        call_main("video_train.py", *f"{TINY} --image_size 32".split())
    path = make_checkpoint(tmp_path / "checkpoints/a/model_000001.pt", "drift", image_size=32)
    with pytest.raises(ValueError, match=r"--image_size 32: choose one of \(64,\)"):
        call_main("video_sample.py", *f"{path} --inference_mode autoreg --obs_length 2".split())


def test_a_generator_that_fails_leaves_nothing_behind(drift):
    def fail(folder, image_size):
        make_drift(folder, image_size)
        raise OSError("disk full")

    DATASETS["drift"] = DatasetSpec("drift", Path("drift"), 8, 32, 32, make=fail)
    with pytest.raises(OSError, match="disk full"):
        get_test_dataset("drift")
    assert [path.name for path in Path("datasets").iterdir() if path.is_dir()] == []
