"""Scoring: the documented pickle, its cache, and what is refused."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from helpers import make_folder_dataset, run_script
from improved_diffusion import evaluation, metrics
from improved_diffusion.config import EvalConfig
from improved_diffusion.results import EvalDir

T, OBSERVED = 8, 3


@pytest.fixture
def eval_dir(tmp_path) -> EvalDir:
    """Samples of 3 videos, 2 each: the truth with noise, observed frames exact."""
    dataset = make_folder_dataset(tmp_path / "data", T=T)
    directory = EvalDir(tmp_path / "results/autoreg")
    directory.write_configs(
        {"image_size": 32, "dataset": str(dataset)},
        {
            "T": T,
            "obs_length": OBSERVED,
            "observed_frames": [0, 1, 2],
            "dataset": str(dataset),
            "dataset_partition": "test",
        },
    )
    for video in range(3):
        for sample in range(2):
            directory.save_sample(video, sample, noisy(tmp_path, video, sample))
    return directory


def noisy(tmp_path: Path, video: int, sample: int) -> np.ndarray:
    frames = truth(tmp_path, video).astype(int)
    noise = np.random.default_rng([video, sample]).integers(-9, 10, frames[OBSERVED:].shape)
    frames[OBSERVED:] += noise
    return np.clip(frames, 0, 255).astype(np.uint8)


def truth(tmp_path: Path, video: int) -> np.ndarray:
    return np.load(tmp_path / f"data/test/{video}.npy").transpose(0, 3, 1, 2)


def evaluate(eval_dir: EvalDir, **options) -> dict[str, np.ndarray]:
    path = evaluation.evaluate(EvalConfig(eval_dir=str(eval_dir.path), **options))
    return pickle.loads(path.read_bytes())


def test_the_pickle_has_the_documented_name_and_shape(eval_dir, tmp_path):
    table = evaluate(eval_dir)
    assert (eval_dir.path / "metrics_3-2-8.pkl").exists()
    assert set(table) == {"psnr", "ssim"}
    assert table["psnr"].shape == table["ssim"].shape == (3, 2, T - OBSERVED)
    expected = metrics.psnr(noisy(tmp_path, 2, 1)[OBSERVED:], truth(tmp_path, 2)[OBSERVED:])
    np.testing.assert_allclose(table["psnr"][2, 1], expected)
    beside = json.loads((eval_dir.path / "metrics_3-2-8.json").read_text())
    assert beside["videos"] == [0, 1, 2] and beside["frames"] == [3, 4, 5, 6, 7]
    assert beside["metrics"]["psnr"]["mean"] == pytest.approx(table["psnr"].mean())


def test_a_second_run_computes_nothing_and_a_new_sample_only_itself(
    eval_dir, tmp_path, monkeypatch
):
    calls = []

    def counting(samples, truth):
        calls.append(len(samples))
        return metrics.psnr(samples, truth)

    monkeypatch.setitem(evaluation.METRICS, "psnr", counting)
    before = evaluate(eval_dir)["psnr"]
    assert len(calls) == 6
    evaluate(eval_dir)
    assert len(calls) == 6
    eval_dir.save_sample(1, 0, noisy(tmp_path, 1, 7))
    after = evaluate(eval_dir)["psnr"]
    assert len(calls) == 7
    changed = (before != after).any(axis=-1)
    assert changed.sum() == 1 and changed[1, 0]


def test_metrics_are_added_to_those_that_are_there_but_not_to_stale_ones(eval_dir, tmp_path):
    assert set(evaluate(eval_dir, modes=("psnr",))) == {"psnr"}
    assert set(evaluate(eval_dir, modes=("ssim",))) == {"psnr", "ssim"}
    eval_dir.save_sample(0, 0, noisy(tmp_path, 0, 9))
    assert set(evaluate(eval_dir, modes=("ssim",))) == {"ssim"}


def test_infinite_psnr_is_stored_and_counted_but_not_averaged():
    values = np.array([[[20.0, np.inf]], [[30.0, 40.0]]])
    row = evaluation.summarise(values)
    assert row["infinite"] == 1 and row["n"] == 2
    assert row["mean"] == pytest.approx((20 + 35) / 2)


def test_obs_length_can_be_given(eval_dir):
    assert evaluate(eval_dir, obs_length=5)["psnr"].shape == (3, 2, 3)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_samples": 3}, "3 asked for"),
        ({"modes": ("psnrr",)}, "psnrr.*psnr, ssim"),
        ({"dataset": "nowhere"}, "nowhere"),
    ],
)
def test_mistakes_are_named(eval_dir, options, words):
    with pytest.raises(ValueError, match=words):
        evaluate(eval_dir, **options)


def test_a_folder_without_samples_is_named(tmp_path):
    done = run_script("video_eval.py", "--eval_dir", tmp_path / "none", cwd=tmp_path)
    assert done.returncode == 1 and "no samples" in done.stderr and "Traceback" not in done.stderr


def test_an_unreadable_sample_is_named(eval_dir):
    path = eval_dir.path / "samples/sample_0001-1.npy"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="sample_0001-1.npy"):
        evaluate(eval_dir)


def test_the_script_prints_the_table(eval_dir, tmp_path):
    done = run_script("video_eval.py", "--eval_dir", eval_dir.path, "--modes", "psnr", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[:2] == ["psnr", "3"]


def test_gifs_show_observed_frames_with_a_red_border(eval_dir, tmp_path):
    import imageio.v3 as iio

    done = run_script("video_make_gif.py", "--eval_dir", eval_dir.path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((eval_dir.path / "videos").glob("sample_*.gif"))) == 6
    frames = iio.imread(eval_dir.path / "videos/sample_0000-0.gif", mode="RGB")
    corner = frames[:, 3, 3].astype(int)  # inside the grey frame, on the border of the video
    assert (corner[0] == [255, 0, 0]).all() and (corner[-1] != [255, 0, 0]).any()


def test_a_grid_puts_the_truth_beside_the_samples(eval_dir, tmp_path):
    args = ("--eval_dir", eval_dir.path, "--grid", "--add_gt", "--format", "mp4")
    done = run_script("video_make_gif.py", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    import imageio.v3 as iio

    height, width = iio.imread(eval_dir.path / "videos/grid.mp4").shape[1:3]
    assert width == height == 3 * (128 + 4)  # truth and 2 samples; 3 videos
