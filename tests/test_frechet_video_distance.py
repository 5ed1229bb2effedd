"""FVD and KVD: distances against golden and analytic values, the I3D network, its input."""

import importlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from golden_fill import array
from improved_diffusion import frechet_video_distance as fvd
from improved_diffusion.evaluation.i3d import I3D, in_time_slices, same_padding

GOLDEN = Path(__file__).parent / "golden"
FRECHET = json.loads((GOLDEN / "frechet.json").read_text())
FVD = json.loads((GOLDEN / "fvd.json").read_text())


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


class MeanOfPixels(torch.nn.Module):
    """Stands for I3D in a TorchScript file: features tell order, layout and range of the input."""

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool = False):
        assert not rescale and not resize and return_features
        assert x.shape[1] == 3 and x.shape[3] == 224 and x.shape[4] == 224
        means = x.mean(dim=(2, 3, 4))
        corner = x[:, :, -1, 1, 1]
        return torch.cat([means, corner, torch.zeros(x.shape[0], 394)], dim=1)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "i3d_torchscript.pt"
    torch.jit.script(MeanOfPixels()).save(str(path))
    return path


@pytest.fixture(scope="module")
def random_i3d(tmp_path_factory):
    """An I3D file whose random weights keep the size of the signal from layer to layer."""
    state_dict = {}
    for name, value in I3D().state_dict().items():
        scale = np.sqrt(2 / np.prod(value.shape[1:])) if value.ndim > 1 else 0.1
        state_dict[name] = torch.from_numpy(array(name, value.shape, scale))
    path = tmp_path_factory.mktemp("i3d") / "i3d.pt"
    torch.save(state_dict, path)
    return path


# ---------------------------------------------------------------- distances


@pytest.mark.parametrize("case", FRECHET, ids=lambda case: case["tag"])
def test_frechet_distance_is_golden_and_not_that_of_biased_covariances(case):
    shape = [case["n"], case["dim"]]
    real = array(case["tag"] + "/real", shape).astype(np.float64)
    fake = array(case["tag"] + "/fake", shape, case["fake_scale"]) + case["fake_shift"]
    found = fvd.frechet_distance(real, fake)
    assert found == pytest.approx(case["frechet"], rel=1e-6)
    difference = ((real.mean(axis=0) - fake.mean(axis=0)) ** 2).sum()
    biased = difference + (found - difference) * (case["n"] - 1) / case["n"]  # ddof 0
    assert biased != pytest.approx(case["frechet"], rel=1e-6)


def test_frechet_distance_equals_the_route_over_the_matrix_square_root():
    from scipy.linalg import sqrtm

    x, y = array("x", [50, 6]).astype(np.float64), 2 * array("y", [40, 6]).astype(np.float64) + 1
    s_x, s_y = np.cov(x.T), np.cov(y.T)
    difference = x.mean(axis=0) - y.mean(axis=0)
    expected = difference @ difference + np.trace(s_x + s_y - 2 * sqrtm(s_x @ s_y).real)
    assert fvd.frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_a_shifted_set_is_the_squared_shift():
    x = array("x", [30, 100])
    assert fvd.frechet_distance(x, x) == pytest.approx(0, abs=1e-4)
    assert fvd.frechet_distance(x, x.astype(np.float64) + 2.0) == pytest.approx(400, rel=1e-6)


def test_kernel_distance_is_the_mean_over_all_pairs_of_different_samples():
    x, y = array("x", [5, 4]).astype(np.float64), array("y", [7, 4]).astype(np.float64) + 0.5

    def kernel(a, b):
        return (a @ b / 4 + 1) ** 3

    within_x = np.mean([kernel(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
    within_y = np.mean([kernel(y[i], y[j]) for i in range(7) for j in range(7) if i != j])
    between = np.mean([kernel(a, b) for a in x for b in y])
    found = fvd.kernel_distance(x, y)
    assert found == pytest.approx(within_x + within_y - 2 * between, rel=1e-10)
    biased = sum(np.mean([kernel(a, b) for a in s for b in s]) for s in (x, y)) - 2 * between
    assert found != pytest.approx(biased, rel=1e-2)


@pytest.mark.parametrize("distance", [fvd.frechet_distance, fvd.kernel_distance])
def test_distances_refuse_what_has_no_distance(distance):
    x = array("x", [4, 3])
    with pytest.raises(ValueError, match="n >= 2"):
        distance(x, x[:1])
    with pytest.raises(ValueError, match="3 and 2 dimensions"):
        distance(x, x[:, :2])
    with pytest.raises(ValueError, match="NaN or infinity"):
        distance(x, np.where(x > 0, np.nan, x))


# ---------------------------------------------------------------- resize


def test_legacy_resize_has_no_pixel_centres():
    expected = [[1, 0], [0.5, 0.5], [0, 1], [0, 1]]
    np.testing.assert_allclose(fvd.bilinear_matrix(2, 4, "legacy"), expected)
    expected = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    np.testing.assert_allclose(fvd.bilinear_matrix(2, 4, "half-pixel"), expected)


@pytest.mark.parametrize("size", [1, 7, 64, 100, 224, 300])
def test_half_pixel_resize_is_that_of_torch(size):
    image = torch.from_numpy(array("image", [1, 3, size, size + 5]))
    rows, columns = (
        torch.from_numpy(fvd.bilinear_matrix(n, 224, "half-pixel")) for n in (size, size + 5)
    )
    expected = F.interpolate(image, (224, 224), mode="bilinear", align_corners=False)
    torch.testing.assert_close(rows @ image @ columns.T, expected, rtol=1e-4, atol=1e-4)


def test_resize_of_the_right_size_changes_nothing():
    for resize in fvd.RESIZES:
        np.testing.assert_array_equal(fvd.bilinear_matrix(224, 224, resize), np.eye(224))


# ---------------------------------------------------------------- the network


def test_same_padding_puts_the_odd_one_after():
    assert same_padding(224, 7, 2) == (2, 3)
    assert same_padding(225, 7, 2) == (3, 3)
    assert same_padding(112, 3, 2) == (0, 1)
    assert same_padding(7, 2, 2) == (0, 1)
    assert same_padding(8, 2, 2) == (0, 0)


@pytest.mark.parametrize("kernel, stride", [(7, 2), (3, 1), (2, 2)])
def test_time_slices_are_what_the_whole_is_and_stay_small(kernel, stride):
    weight = torch.from_numpy(array("w", [2, 3, kernel, 1, 1])).double()
    seen = []

    def layer(x):
        seen.append(x.shape[2])
        return F.conv3d(x, weight, stride=(stride, 1, 1))

    for size in range(1, 40):
        x = torch.from_numpy(array("x", [1, 3, size, 2, 2])).double()
        before, after = same_padding(size, kernel, stride)
        whole = layer(F.pad(x, (0, 0, 0, 0, before, after)))
        for frames in (1, 2, 5):
            seen.clear()
            torch.testing.assert_close(in_time_slices(layer, x, kernel, stride, frames), whole)
            assert max(seen) <= (frames - 1) * stride + kernel


def test_i3d_does_not_depend_on_the_size_of_its_time_slices(random_i3d):
    network = I3D(slice_frames=1000).eval()
    network.load_state_dict(torch.load(random_i3d))
    video = torch.from_numpy(array("video", [1, 3, 11, 224, 224], 0.5))
    with torch.no_grad():
        whole = network(video)
        network.slice_frames = 2
        sliced = network(video)
    assert whole.abs().max() > 0.1
    torch.testing.assert_close(sliced, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_features_do_not_depend_on_the_batch_size(random_i3d):
    videos = noise(2, 10, 3, 16, 16)
    one = fvd.video_features(videos, weights=random_i3d)
    two = fvd.video_features(videos, weights=random_i3d, batch_size=2)
    assert one.shape == (2, 400) and one.dtype == np.float32
    scale = abs(one).max()
    np.testing.assert_allclose(two / scale, one / scale, atol=1e-5)
    assert abs(one[0] - one[1]).max() > 1e-3 * scale, "different videos, different features"


def test_loading_i3d_draws_no_random_numbers(random_i3d):
    state = torch.get_rng_state()
    fvd._load_torch(random_i3d, "cpu", 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_resizing_in_slices_changes_nothing(monkeypatch):
    videos = noise(2, 21, 3, 20, 30)
    whole = fvd._prepare(videos, "legacy", "cpu")
    monkeypatch.setattr(fvd, "RESIZE_FRAMES", 4)
    torch.testing.assert_close(fvd._prepare(videos, "legacy", "cpu"), whole)


# ---------------------------------------------------------------- TorchScript files


def test_videos_may_be_memory_mapped(script, tmp_path):
    videos = noise(2, 12, 3, 8, 8)
    np.save(tmp_path / "videos.npy", videos)
    mapped = np.load(tmp_path / "videos.npy", mmap_mode="r")
    expected = fvd.video_features(videos, weights=script)
    np.testing.assert_array_equal(fvd.video_features(mapped, weights=script), expected)


def test_a_torchscript_file_is_given_resized_frames_in_minus_one_to_one(script):
    videos = noise(3, 12, 3, 224, 224)
    videos[1] = 0
    features = fvd.video_features(videos, weights=script, batch_size=2)
    scaled = videos.astype(np.float64) * 2 / 255 - 1
    np.testing.assert_allclose(features[:, :3], scaled.mean(axis=(1, 3, 4)), atol=1e-5)
    np.testing.assert_allclose(features[:, 3:6], scaled[:, -1, :, 1, 1], atol=1e-5)
    np.testing.assert_allclose(features[1, :6], -1)


def test_resize_says_how_frames_are_resized(script):
    videos = noise(1, 10, 3, 112, 112)
    pixels = videos[0, -1].astype(np.float64) * 2 / 255 - 1
    legacy = fvd.video_features(videos, weights=script, resize="legacy")[0, 3:6]
    np.testing.assert_allclose(legacy, pixels[:, :2, :2].mean(axis=(1, 2)), atol=1e-5)
    half = fvd.video_features(videos, weights=script, resize="half-pixel")[0, 3:6]
    weights = np.outer([0.75, 0.25], [0.75, 0.25])
    np.testing.assert_allclose(half, (pixels[:, :2, :2] * weights).sum(axis=(1, 2)), atol=1e-5)


def test_a_replaced_weights_file_is_read_again(script, random_i3d, tmp_path):
    path, videos = tmp_path / "weights.pt", noise(1, 10, 3, 8, 8)
    path.write_bytes(script.read_bytes())
    first = fvd.video_features(videos, weights=path)
    path.write_bytes(random_i3d.read_bytes())
    os.utime(path, (1, 1))
    assert abs(fvd.video_features(videos, weights=path) - first).max() > 1e-2


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "videos, options, message",
    [
        (noise(1, 9, 3, 8, 8), {}, "videos of 9 frames are too short.*at least 10"),
        (noise(1, 12, 8, 8, 3), {}, r"uint8 \[1, 12, 8, 8, 3\] is not uint8 \[n, T, 3, H, W\]"),
        (np.zeros((1, 12, 3, 8, 8)), {}, "videos: float64"),
        (noise(1, 12, 3, 8, 8), {"resize": "area"}, "'area' is unknown: choose from legacy, half"),
        (noise(1, 12, 3, 8, 8), {"backend": "jax"}, "'jax' is unknown: choose from torch, tensor"),
    ],
)
def test_unfit_videos_and_unknown_options_are_refused(videos, options, message, script):
    with pytest.raises(ValueError, match=message):
        fvd.video_features(videos, weights=script, **options)


def test_a_distance_of_an_unknown_back_end_is_refused():
    with pytest.raises(ValueError, match="'jax' is unknown"):
        fvd.frechet_distance(array("x", [4, 3]), array("y", [4, 3]), backend="jax")


def test_missing_and_foreign_weights_are_refused_in_one_line(tmp_path, monkeypatch):
    videos = noise(1, 10, 3, 8, 8)
    monkeypatch.setenv("METRIC_WEIGHTS_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="i3d_kinetics_400.pt.*fetch_metric_weights.py"):
        fvd.video_features(videos)
    path = tmp_path / "i3d_kinetics_400.pt"
    path.write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(ValueError, match="is not a weights file"):
        fvd.video_features(videos)
    torch.save({"Conv3d_1a_7x7.bias": torch.zeros(64)}, path)
    with pytest.raises(ValueError, match="does not hold I3D") as error:
        fvd.video_features(videos)
    assert "\n" not in str(error.value)


def test_the_tensorflow_back_end_names_its_extra_and_its_folder(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"holds no saved_model\.pb.*https://tfhub\.dev"):
        fvd.weights_path("tensorflow", tmp_path)

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"needs the tf extra .*pip install"):
        fvd.weights_path("tensorflow")


# ---------------------------------------------------------------- the fetched weights


def golden_videos(kind):
    shape = [FVD["n"], FVD["T"], 3, FVD["size"], FVD["size"]]
    values = 128 + FVD[kind]["shift"] + FVD[kind]["std"] * array(f"{FVD['tag']}/{kind}", shape)
    return np.clip(values, 0, 255).astype(np.uint8)


@pytest.mark.weights
def test_features_are_golden_and_not_those_of_faulty_input():
    video, expected = golden_videos("real")[:1], np.array(FVD["real_features_first_video"])

    def error(pixels, resize=FVD["resize"]):
        return abs(fvd.video_features(pixels, resize=resize)[0] - expected).max()

    assert error(video) < 1e-3
    assert error(video, "half-pixel") > 1e-2
    assert error(video[:, :, ::-1]) > 1e-2, "BGR for RGB must show"
    assert error(video // 2 + 128) > 1e-2, "[0, 1] for [-1, 1] must show"


@pytest.mark.weights
def test_fvd_is_golden_and_not_that_of_biased_covariances():
    real, fake = (fvd.video_features(golden_videos(kind)) for kind in ("real", "fake"))
    assert fvd.frechet_distance(real, fake) == pytest.approx(FVD["fvd"], rel=1e-5)
    difference = ((real.mean(axis=0) - fake.mean(axis=0)) ** 2).sum()
    n = FVD["n"]
    biased = difference + (fvd.frechet_distance(real, fake) - difference) * (n - 1) / n
    assert biased != pytest.approx(FVD["fvd"], rel=1e-3)
