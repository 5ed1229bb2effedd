"""Videos to look at: gif and mp4 files of samples, observed frames marked by a red border."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from tqdm import tqdm

from improved_diffusion import paths
from improved_diffusion.config import GifConfig
from improved_diffusion.results import EvalDir, load_video
from improved_diffusion.script_util import stored_dataset
from improved_diffusion.video_datasets import VideoTestSet, get_test_dataset
from improved_diffusion.video_io import add_border, write_video

logger = logging.getLogger(__name__)

GAP = 2  # grey pixels between the videos of a grid
SCALE_TO = 128  # smaller videos are enlarged by a whole factor up to about this width


def tile(rows: list[list[np.ndarray]]) -> np.ndarray:
    """One video [T, H, W, 3] of rows of videos [T, 3, h, w] uint8, all of one shape."""
    padding = ((0, 0), (0, 0), (GAP, GAP), (GAP, GAP))
    framed = [[np.pad(video, padding, constant_values=128) for video in row] for row in rows]
    whole = np.concatenate([np.concatenate(row, axis=3) for row in framed], axis=2)
    return whole.transpose(0, 2, 3, 1)


def enlarge(video: np.ndarray) -> np.ndarray:
    """Repeat the pixels of [T, 3, h, w] so that a small video can be looked at."""
    factor = max(1, SCALE_TO // video.shape[-1])
    return video.repeat(factor, axis=2).repeat(factor, axis=3)


def make_gallery(config: GifConfig) -> list[Path]:
    """Write `videos/<name>.<format>` for each sample, or one grid; returns the files."""
    eval_dir = EvalDir(config.eval_dir)
    samples = eval_dir.samples()
    stored = eval_dir.sample_config()
    truth = _truth(eval_dir) if config.add_gt else None
    observed = stored.get("observed_frames", [])

    def row(video: int, indices: list[int]) -> list[np.ndarray]:
        videos = [load_video(paths.sample_path(eval_dir.path, video, i)) for i in indices]
        length = len(videos[0])
        if truth is not None:
            true = truth.read(video)
            if len(true) < length:  # the sample goes on where the data ends: hold black
                true = np.concatenate(
                    [true, np.zeros((length - len(true), *true.shape[1:]), np.uint8)]
                )
            videos.insert(0, true)
        is_observed = np.isin(np.arange(length), observed)
        return [add_border(enlarge(np.asarray(v)), is_observed) for v in videos]

    folder = eval_dir.path / "videos"
    if config.grid:
        columns = min(len(indices) for indices in samples.values())
        grid = tile([row(video, indices[:columns]) for video, indices in samples.items()])
        return [_write(folder / f"grid.{config.format}", grid, config.fps)]
    names = [(video, sample) for video, indices in samples.items() for sample in indices]
    return [
        _write(
            folder / f"{paths.sample_name(video, sample)}.{config.format}",
            tile([row(video, [sample])]),
            config.fps,
        )
        for video, sample in tqdm(names, unit="video")
    ]


def _truth(eval_dir: EvalDir) -> VideoTestSet:
    stored = eval_dir.sample_config()
    if "dataset" not in stored:
        raise ValueError(f"{eval_dir.sample_config_path} does not say dataset: leave out --add_gt")
    return get_test_dataset(
        stored_dataset(stored["dataset"], eval_dir.model_config()),
        T=stored["T"],
        partition=stored["dataset_partition"],
    )


def _write(path: Path, frames: np.ndarray, fps: int) -> Path:
    write_video(path, frames, fps=fps)
    return path
