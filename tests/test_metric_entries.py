"""Metrics and extractors with options of their own, written in a test, work through the real commands."""

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from helpers import ROOT, make_folder_dataset
from improved_diffusion.config import option
from improved_diffusion.evaluation.metrics import FeatureExtractor, FrameMetric, VideoMetric
from improved_diffusion.frechet_video_distance import frechet_distance
from improved_diffusion.registry import FEATURES, FRAME_METRICS, VIDEO_METRICS, Registry
from improved_diffusion.sampling.results import EvalDir

T, NUM_OBSERVED, NUM_VIDEOS = 6, 2, 3


@contextlib.contextmanager
def registered(registry: Registry, name: str, thing: Any) -> Iterator[None]:
    """The one entry that a new thing needs, for as long as a test takes."""
    registry[name] = thing
    try:
        yield
    finally:
        del registry[name]


def script(name: str) -> ModuleType:
    """scripts/<name>, whose `main` takes a command line."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "scripts" / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def help_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `python scripts/<name> --help` prints, its white space made single spaces."""
    with pytest.raises(SystemExit):
        script(name).main(["--help"])
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture
def sampled(tmp_path: Path) -> EvalDir:
    """An evaluation directory of three videos: truth but for the last frame, which is black."""
    data = make_folder_dataset(tmp_path / "data", num_test=NUM_VIDEOS, T=T)
    directory = EvalDir(tmp_path / "results")
    stored = {"T": T, "obs_length": NUM_OBSERVED, "observed_frames": list(range(NUM_OBSERVED))}
    dataset = {"dataset": str(data), "dataset_partition": "test"}
    directory.write_configs({"image_size": 32, "dataset": str(data)}, stored | dataset)
    for video, frames in enumerate(true_videos(directory)):
        sample = frames.copy()
        sample[-1] = 0
        directory.save_sample(video, 0, sample)
    return directory


def true_videos(directory: EvalDir) -> list[np.ndarray]:
    files = [directory.path.parent / f"data/test/{video}.npy" for video in range(NUM_VIDEOS)]
    return [np.load(file).transpose(0, 3, 1, 2) for file in files]


def results(directory: EvalDir) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The table of an evaluation directory, and the rows of the .json beside it."""
    (path,) = directory.path.glob("metrics_*.pkl")
    rows = json.loads(path.with_suffix(".json").read_text())["metrics"]
    return np.load(path, allow_pickle=True), rows


# ---------------------------------------------------------------- metrics of frames


class Outliers(FrameMetric):
    """share of values that are off by more than a threshold."""

    unit = "%"

    @dataclass(frozen=True)
    class Options:
        outlier_threshold: int = option(10, "levels that Outliers forgives")

    def compute(self, samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
        off = abs(samples.astype(int) - truth) > self.options.outlier_threshold
        return 100 * off.mean(axis=(1, 2, 3))


def test_a_metric_of_frames_with_an_option(sampled, capsys):
    with registered(FRAME_METRICS, "outliers", Outliers):
        for name in ("video_eval.py", "video_eval_fvd.py", "video_study.py"):
            said = help_of(name, capsys)
            assert "outliers: share of values that are off by more than a threshold." in said
            assert "levels that Outliers forgives [10]" in said
        study = ["bouncy_balls", "--list", "--modes", "outliers", "--outlier_threshold", "5"]
        script("video_study.py").main(study)
        assert "--outlier_threshold 5 --modes outliers" in capsys.readouterr().out
        command = ["--eval_dir", str(sampled.path), "--modes", "outliers"]
        for threshold, name in ((255, "none"), (-1, "all")):
            script("video_eval.py").main([*command, "--outlier_threshold", str(threshold)])
            table, rows = results(sampled)
            assert rows["outliers"]["settings"] == {"outlier_threshold": threshold}
            assert rows["outliers"]["mean"] == {"none": 0, "all": 100}[name]
            assert "outlier_threshold" in capsys.readouterr().out
        script("video_eval.py").main(command)
    table, rows = results(sampled)
    black = np.mean([(frames[-1] > 10).mean() for frames in true_videos(sampled)])
    assert table["outliers"].shape == (NUM_VIDEOS, 1, T - NUM_OBSERVED)
    assert (table["outliers"][..., :-1] == 0).all()
    assert table["outliers"][..., -1].mean() == pytest.approx(100 * black) and black > 0.5


# ---------------------------------------------------------------- features, metrics of videos


class MeanColour(FeatureExtractor):
    """mean of each colour."""

    @dataclass(frozen=True)
    class Options:
        colour_scale: float = option(1.0, "factor of MeanColour")

    def compute(self, video: np.ndarray) -> np.ndarray:
        return self.options.colour_scale * video.mean(axis=(0, 2, 3))


class CentreDistance(VideoMetric):
    """distance between the means of the features."""

    @dataclass(frozen=True)
    class Options:
        norm: int = option(2, "norm of CentreDistance")

    def compute(self, samples: np.ndarray, truth: np.ndarray) -> float:
        return float(np.linalg.norm(samples.mean(axis=0) - truth.mean(axis=0), self.options.norm))


def mean_colours(videos: list[np.ndarray]) -> np.ndarray:
    return np.stack([video.mean(axis=(0, 2, 3)) for video in videos])


def sampled_videos(directory: EvalDir) -> list[np.ndarray]:
    return [np.load(directory.path / f"samples/sample_{v:04d}-0.npy") for v in range(NUM_VIDEOS)]


def test_a_feature_extractor(sampled, capsys):
    with registered(FEATURES, "colour", MeanColour):
        said = help_of("video_eval.py", capsys)
        assert "colour: mean of each colour." in said and "factor of MeanColour [1.0]" in said
        command = ["--eval_dir", str(sampled.path), "--modes", "fvd", "--features", "colour"]
        script("video_eval.py").main(command)
        table, rows = results(sampled)
        script("video_eval.py").main([*command, "--colour_scale", "2"])
    expected = frechet_distance(
        mean_colours(sampled_videos(sampled)), mean_colours(true_videos(sampled))
    )
    assert table["fvd"] == pytest.approx([expected]) and expected > 1
    assert rows["fvd"]["settings"] == {"features": "colour", "colour_scale": 1.0}
    table, rows = results(sampled)
    assert table["fvd"] == pytest.approx([4 * expected])
    assert rows["fvd"]["settings"] == {"features": "colour", "colour_scale": 2.0}


def test_a_metric_of_whole_videos_with_an_option(sampled, capsys):
    with (
        registered(FEATURES, "colour", MeanColour),
        registered(VIDEO_METRICS, "centre", CentreDistance),
    ):
        said = help_of("video_eval_fvd.py", capsys)
        assert "centre: distance between the means of the features." in said
        assert "norm of CentreDistance [2]" in said
        command = ["--eval_dir", str(sampled.path), "--modes", "centre", "psnr", "--floor"]
        script("video_eval.py").main([*command, "--features", "colour", "--norm", "1"])
    shown = capsys.readouterr().out
    assert (
        "centre: colour_scale 1.0, features colour, norm 1" in shown
        and "centre real against real" in shown
    )
    table, rows = results(sampled)
    assert set(table) == {"psnr", "centre"}
    difference = mean_colours(sampled_videos(sampled)) - mean_colours(true_videos(sampled))
    expected = abs(difference.mean(axis=0)).sum()
    assert table["centre"] == pytest.approx([expected]) and expected > 1
    assert rows["centre"]["settings"] == {"norm": 1, "features": "colour", "colour_scale": 1.0}
    assert rows["centre"]["floor"]["value"] > 0
