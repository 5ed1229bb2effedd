"""PSNR, SSIM and LPIPS against golden numbers, analytic truths and each other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from golden_fill import array
from improved_diffusion.data.metric_weights import ALEXNET_FILE, find_alexnet
from improved_diffusion.evaluation import metrics
from improved_diffusion.registry import FRAME_METRICS
from improved_diffusion.sampling.lpips_util import load_lpips, lpips_distance, lpips_embedding

GOLDEN = json.loads((Path(__file__).parent / "golden" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def frames():
    """(samples, truth) of the golden file."""
    shape = [GOLDEN["T"], 3, GOLDEN["size"], GOLDEN["size"]]
    truth = np.clip(128 + 50 * array(GOLDEN["tag"] + "/gt", shape), 0, 255).astype(np.uint8)
    difference = (20 * array(GOLDEN["tag"] + "/diff", shape)).astype(int)
    return np.clip(truth.astype(int) + difference, 0, 255).astype(np.uint8), truth


def symmetric(frames):
    return frames.astype(np.float32) / 127.5 - 1


# ---------------------------------------------------------------- PSNR and SSIM


def test_psnr_is_golden_and_not_that_of_the_pooled_channels(frames):
    np.testing.assert_allclose(metrics.psnr(*frames), GOLDEN["psnr"], rtol=1e-10)
    error = ((frames[0] / 255.0 - frames[1] / 255.0) ** 2).mean(axis=(1, 2, 3))
    assert not np.allclose(-10 * np.log10(error), GOLDEN["psnr"], rtol=1e-10)


def test_ssim_is_golden_and_not_that_of_another_data_range(frames):
    np.testing.assert_allclose(metrics.ssim(*frames), GOLDEN["ssim"], rtol=1e-6)
    inflated = metrics.ssim(*frames, data_range=2.0)
    assert np.all(inflated > np.array(GOLDEN["ssim"]) + 1e-3)


def test_psnr_of_a_constant_error_is_analytic():
    truth = np.full((2, 3, 8, 8), 100, np.uint8)
    samples = truth.copy()
    samples[0] += 1
    samples[1, 0] += 1
    samples[1, 1] += 10
    samples[1, 2] += 100
    one = 20 * np.log10(255)
    values = metrics.psnr(samples, truth)
    np.testing.assert_allclose(values, [one, (one + (one - 20) + (one - 40)) / 3])
    assert values.dtype == np.float64


def test_equal_frames_have_infinite_psnr_and_ssim_one(frames):
    truth = frames[1]
    assert np.all(metrics.psnr(truth, truth) == np.inf)
    np.testing.assert_allclose(metrics.ssim(truth, truth), 1)


def test_no_frames_give_no_numbers(random_alexnet):
    none = np.empty((0, 3, 32, 32), np.uint8)
    options = {metrics.Lpips: metrics.Lpips.Options(lpips_weights=str(random_alexnet))}
    for metric in FRAME_METRICS.values():
        values = metric(options.get(metric)).compute(none, none)
        assert values.shape == (0,) and values.dtype == np.float64


@pytest.mark.parametrize("name", sorted(FRAME_METRICS))
def test_frames_of_another_type_or_layout_are_refused(name, frames):
    metric = FRAME_METRICS[name]().compute
    with pytest.raises(ValueError, match=r"samples: float64 \[4, 3, 64, 64\] is not uint8"):
        metric(frames[0] / 255.0, frames[1])
    with pytest.raises(ValueError, match=r"truth: uint8 \[4, 64, 64, 3\] is not uint8 \[n, 3"):
        metric(frames[0], frames[1].transpose(0, 2, 3, 1))
    with pytest.raises(ValueError, match="differ in shape"):
        metric(frames[0][:3], frames[1])


def test_importing_metrics_loads_no_heavy_package():
    code = (
        "import sys, improved_diffusion.evaluation.metrics, improved_diffusion.frechet_video_distance\n"
        "print(sorted({'torch', 'skimage', 'lpips', 'tensorflow', 'scipy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


# ---------------------------------------------------------------- LPIPS, any weights


def test_squared_distance_of_embeddings_is_lpips(frames, random_alexnet):
    samples, truth = symmetric(frames[0]), symmetric(frames[1])
    expected = lpips_distance(samples, truth, weights=random_alexnet)
    e_samples = lpips_embedding(samples, weights=random_alexnet)
    e_truth = lpips_embedding(torch.from_numpy(truth), weights=random_alexnet)
    found = ((e_samples - e_truth) ** 2).sum(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert np.all(expected > 1e-3), "the distances must be far from rounding"


def test_lpips_does_not_depend_on_how_many_frames_go_at_once(frames, random_alexnet, monkeypatch):
    whole = metrics.lpips(*frames, weights=random_alexnet)
    monkeypatch.setattr(metrics, "LPIPS_CHUNK", 3)
    np.testing.assert_allclose(metrics.lpips(*frames, weights=random_alexnet), whole, rtol=1e-5)


def test_loading_lpips_draws_no_random_numbers(random_alexnet):
    state = torch.get_rng_state()
    load_lpips(random_alexnet)
    assert torch.equal(torch.get_rng_state(), state)


def test_lpips_weights_are_read_again_when_the_file_changes(frames, random_alexnet):
    before = metrics.lpips(*frames, weights=random_alexnet)
    state_dict = torch.load(random_alexnet)
    state_dict["features.3.weight"] = -state_dict["features.3.weight"]
    torch.save(state_dict, random_alexnet)
    os.utime(random_alexnet, (1, 1))
    assert not np.allclose(metrics.lpips(*frames, weights=random_alexnet), before, rtol=1e-3)


def test_lpips_refuses_frames_that_alexnet_cannot_pool(random_alexnet):
    lpips_distance(np.zeros((1, 3, 31, 31)), np.ones((1, 3, 31, 31)), weights=random_alexnet)
    with pytest.raises(ValueError, match=r"at least 31x31 pixels, not \[1, 3, 30, 64\]"):
        lpips_embedding(np.zeros((1, 3, 30, 64)), weights=random_alexnet)


def test_lpips_refuses_a_foreign_file(frames, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"other\.pth does not hold AlexNet: features\.0\.weight"):
        metrics.lpips(*frames, weights=path)
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"other\.pth is not a weights file"):
        metrics.lpips(*frames, weights=path)


# ---------------------------------------------------------------- LPIPS, the fetched weights


@pytest.mark.weights
def test_lpips_is_golden_and_not_that_of_faulty_input(frames):
    expected = np.array(GOLDEN["lpips_alex"])
    np.testing.assert_allclose(metrics.lpips(*frames), expected, rtol=1e-4)
    swapped = metrics.lpips(frames[0][:, ::-1], frames[1][:, ::-1])
    assert np.all(abs(swapped / expected - 1) > 1e-3), "BGR for RGB must show"
    unit_range = lpips_distance(frames[0] / 255.0, frames[1] / 255.0)
    assert np.all(abs(unit_range / expected - 1) > 1e-3), "[0, 1] for [-1, 1] must show"


@pytest.mark.weights
def test_the_package_lpips_alone_reads_the_fetched_backbone(frames, tmp_path, monkeypatch):
    import lpips

    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / ALEXNET_FILE).symlink_to(find_alexnet().resolve())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    network = lpips.LPIPS(net="alex", verbose=False)
    with torch.no_grad():
        found = network(*(torch.from_numpy(symmetric(f)) for f in frames)).flatten().numpy()
    np.testing.assert_allclose(metrics.lpips(*frames), found, rtol=1e-5)
