"""Features of videos: of motion, of AlexNet, of a file of one's own, and in bf16."""

import json
import os

import numpy as np
import pytest
import torch

from helpers import scripted
from improved_diffusion.data.metric_weights import sha256
from improved_diffusion.evaluation.feature_file import FileFeatures
from improved_diffusion.evaluation.features import AlexNetFeatures, I3DFeatures, MotionFeatures
from improved_diffusion.evaluation.measurements import Workshop
from improved_diffusion.evaluation.metrics import Lpips, psnr
from improved_diffusion.evaluation.options import EvalConfig
from improved_diffusion.script_util import config_from_args


def walk(T: int = 24, size: int = 32, seed: int = 0) -> np.ndarray:
    """uint8 [T, 3, size, size]: a smooth pattern that moves on by one pixel per frame."""
    wave = np.sin(np.arange(2 * size) / 3)[:, None] * np.cos(np.arange(size) / (4 + seed))
    frames = [np.roll(wave, -t, axis=0)[:size] for t in range(T)]
    levels = np.array([90, 60, 30])[:, None, None]
    return (128 + levels * np.stack(frames)[:, None]).astype(np.uint8)


# ---------------------------------------------------------------- motion


def test_motion_of_an_even_change_is_known():
    """Three levels a frame: lags 1, 2, 4, 8 change by 3, 6, 12, 24 of 255, always alike."""
    video = np.broadcast_to(3 * np.arange(20, dtype=np.uint8)[:, None, None, None], (20, 3, 8, 8))
    found = MotionFeatures().compute(video)
    change = np.array([3, 6, 12, 24, 3, 0]) / 255
    np.testing.assert_allclose(found[::2], np.log(change + 0.1 / 255), rtol=1e-5)
    np.testing.assert_allclose(found[1::2], 0, atol=1e-6)


def test_motion_sees_the_order_of_frames_and_alexnet_does_not(random_alexnet):
    video = walk()
    shuffled = video[np.random.default_rng(0).permutation(len(video))]
    frozen = np.repeat(video[::4], 4, axis=0)
    motion, frames = MotionFeatures(), AlexNetFeatures(AlexNetFeatures.Options(str(random_alexnet)))
    distance = [abs(motion.compute(v) - motion.compute(video)).max() for v in (shuffled, frozen)]
    assert min(distance) > 1
    of_video = frames.compute(video)
    assert of_video.shape == (256,) and of_video.std() > 0
    np.testing.assert_allclose(frames.compute(shuffled), of_video, rtol=1e-4)
    assert not np.allclose(frames.compute(255 - video), of_video, rtol=0.01)


def test_fine_flicker_is_told_from_large_motion():
    noise = np.random.default_rng(0).integers(-20, 21, (24, 3, 32, 32))
    grey = np.full((24, 3, 32, 32), 128)
    flicker = MotionFeatures().compute((grey + noise).astype(np.uint8))
    blocks = noise[:, :, ::4, ::4].repeat(4, axis=2).repeat(4, axis=3)
    large = MotionFeatures().compute((grey + blocks).astype(np.uint8))
    assert flicker[0] == pytest.approx(large[0], abs=0.1)
    assert flicker[8] < large[8] - 1


def test_videos_too_short_for_motion_are_refused():
    with pytest.raises(ValueError, match="9 frames of 32x32 has no motion features.* 10 frames"):
        MotionFeatures().compute(walk(9))


# ---------------------------------------------------------------- a file of one's own


class Means(torch.nn.Module):
    """Mean and first frame's mean of each colour of a video [B, 3, T, H, W]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.mean(dim=(2, 3, 4)), x[:, :, 0].mean(dim=(2, 3))], dim=1)


class Corners(torch.nn.Module):
    """Tokens [B, 2, 3] of frames [B, 3, H, W]: first and last pixel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[:, :, 0, 0], x[:, :, -1, -1]], dim=1)


class Colours(torch.nn.Module):
    """No axis of videos: [3]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(0, 2, 3, 4))


def extractor(file: str, **options) -> FileFeatures:
    known = {"feature_size": 32, "feature_range": "unit"} | options
    return FileFeatures(FileFeatures.Options(file, **known))


def test_a_network_of_ones_own_gets_frames_of_the_declared_range_and_size(tmp_path):
    video, file = walk(), scripted(tmp_path, Means())
    unit = video.mean(axis=(0, 2, 3)) / 255
    first = video[0].mean(axis=(1, 2)) / 255
    found = {
        values: extractor(file, feature_range=values).compute(video)
        for values in ("unit", "symmetric", "imagenet")
    }
    np.testing.assert_allclose(found["unit"], [*unit, *first], rtol=1e-5)
    np.testing.assert_allclose(found["symmetric"], 2 * found["unit"] - 1, atol=1e-5)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(found["imagenet"][:3], (unit - mean) / deviation, rtol=1e-4)
    grown = extractor(file, feature_size=56).compute(video)
    np.testing.assert_allclose(grown, found["unit"], atol=0.02)
    assert (grown != found["unit"]).any()


def test_calls_of_some_frames_cover_the_video_and_count_alike(tmp_path):
    video, file = walk(24), scripted(tmp_path, Means())
    found = extractor(file, feature_frames=10).compute(video)
    windows = [video[0:10], video[10:20], video[14:24]]
    expected = np.mean([extractor(file).compute(window) for window in windows], axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="24 frames are too short for --feature_frames 25"):
        extractor(file, feature_frames=25).compute(video)


def test_a_network_of_frames_sees_each_frame_once_and_tokens_are_averaged(tmp_path):
    video, file = walk(24), scripted(tmp_path, Corners())
    expected = (video[:, :, 0, 0] + 0.0 + video[:, :, -1, -1]).mean(axis=0) / 2 / 255
    for frames in (None, 1, 7, 24):
        found = extractor(file, feature_layout="frames", feature_frames=frames).compute(video)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_an_exported_program_is_read_too(tmp_path):
    video, path = walk(16), tmp_path / "network.pt2"
    program = torch.export.export(Means(), (torch.zeros(1, 3, 8, 32, 32),))
    torch.export.save(program, str(path))
    found = extractor(str(path), feature_frames=8).compute(video)
    expected = extractor(scripted(tmp_path, Means()), feature_frames=8).compute(video)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"network\.pt2 does not take \[1, 3, 16, 32, 32\]"):
        extractor(str(path)).compute(video)


def test_what_a_network_takes_must_be_declared_and_stands_beside_the_number(tmp_path):
    file = scripted(tmp_path, Means())
    config = config_from_args(
        EvalConfig,
        {"eval_dir": ("x",), "modes": ("fvd",), "features": file, "feature_size": 64},
    )
    _, failures = Workshop(config).metrics()
    assert "--feature_size and --feature_range" in failures["fvd"]
    values = {"eval_dir": ("x",), "modes": ("fvd", "motion"), "features": file}
    declared = {"feature_size": 64, "feature_range": "symmetric", "feature_frames": 16}
    ready, failures = Workshop(config_from_args(EvalConfig, values | declared)).metrics()
    assert not failures
    assert json.loads(json.dumps(ready["fvd"].settings)) == {
        "features": "file",
        "weights_sha256": sha256(file),
        "size": 64,
        "range": "symmetric",
        "layout": "video",
        "frames": 16,
    }
    assert ready["motion"].settings == {"features": "motion"}


def test_files_that_are_no_network_or_return_no_features_are_refused(tmp_path):
    video = walk()
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="broken.pt is neither a TorchScript nor"):
        extractor(str(broken)).compute(video)
    torch.save({"weight": torch.zeros(1)}, broken)
    with pytest.raises(ValueError, match="weights alone do not say how to compute"):
        extractor(str(broken)).compute(video)
    file = scripted(tmp_path, Means())
    with pytest.raises(ValueError, match=r"does not take \[24, 3, 32, 32\] .*--feature_layout"):
        extractor(file, feature_layout="frames").compute(video)
    with pytest.raises(ValueError, match=r"returns \[3\] for \[1, 3, 24, 32, 32\], not \[1, d\]"):
        extractor(scripted(tmp_path, Colours())).compute(video)
    with pytest.raises(ValueError, match="--features 'nowhere.pt' is unknown: choose from i3d, .*"):
        config_from_args(EvalConfig, {"eval_dir": ("x",), "features": "nowhere.pt"})


# ---------------------------------------------------------------- arithmetic and memory


def test_bf16_is_another_number_and_says_so(random_alexnet):
    samples, truth = walk(4), walk(4, seed=1)
    exact = Lpips(Lpips.Options(str(random_alexnet)))
    rough = Lpips(Lpips.Options(str(random_alexnet), lpips_precision="bf16"))
    assert "precision" not in exact.settings()
    assert rough.settings() == exact.settings() | {"precision": "bf16"}
    one, two = exact.compute(samples, truth), rough.compute(samples, truth)
    assert (one != two).all()
    np.testing.assert_allclose(two, one, rtol=0.1)
    with pytest.raises(ValueError, match="--i3d_precision bf16 goes with --backend torch"):
        I3DFeatures.Options(backend="tensorflow", i3d_precision="bf16")
    with pytest.raises(ValueError, match="--lpips_precision 'fp8'"):
        Lpips.Options(lpips_precision="fp8")


def test_i3d_computes_in_bf16_where_asked(tmp_path):
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 400)

        def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool):
            return self.layer(x.mean(dim=(2, 3, 4)))

    torch.manual_seed(0)
    path = tmp_path / "i3d.pt"
    torch.jit.script(Linear()).save(str(path))
    found = {
        precision: I3DFeatures(
            I3DFeatures.Options(i3d_weights=str(path), i3d_precision=precision)
        ).compute(walk(12))
        for precision in ("fp32", "bf16")
    }
    assert found["bf16"].dtype == np.float32 and (found["bf16"] != found["fp32"]).any()
    np.testing.assert_allclose(found["bf16"], found["fp32"], atol=0.02)


def test_psnr_holds_few_frames_in_float64_and_computes_the_same():
    import tracemalloc

    rng = np.random.default_rng(0)
    samples, truth = rng.integers(0, 256, (2, 1000, 3, 32, 32), dtype=np.uint8)
    whole = ((samples / 255.0 - truth / 255.0) ** 2).mean(axis=(2, 3))
    expected = (-10 * np.log10(whole)).mean(axis=1)
    tracemalloc.start()
    found = psnr(samples, truth)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found, expected)
    assert peak < samples.nbytes * 3, "a float64 copy alone takes 8 times the bytes"


@pytest.mark.weights
@pytest.mark.skipif("METRIC_WEIGHTS_DIR" not in os.environ, reason="no fetched weights")
def test_alexnets_features_are_read_from_the_fetched_weights():
    found = AlexNetFeatures().compute(walk(4))
    assert found.shape == (256,) and np.isfinite(found).all() and found.std() > 0
