"""Videos to look at: gif and mp4 files of samples, titled, observed frames marked by a red border."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from improved_diffusion.data import paths
from improved_diffusion.data.video_datasets import VideoTestSet, get_test_dataset
from improved_diffusion.data.video_io import add_border, write_video
from improved_diffusion.evaluation.captions import captioned
from improved_diffusion.evaluation.laps import lap_of
from improved_diffusion.evaluation.options import GifConfig
from improved_diffusion.sampling.provenance import check_side_by_side, strategy_names
from improved_diffusion.sampling.results import EvalDir, load_video, shared_samples, truth_of
from improved_diffusion.sampling.trained_model import stored_dataset

logger = logging.getLogger(__name__)

GAP = 2  # grey pixels between the videos of a grid


class Source(NamedTuple):
    """An evaluation directory that is shown."""

    path: Path
    name: str
    samples: dict[int, list[int]]
    observed: list[int]  # frames


def tile(rows: list[list[np.ndarray]]) -> np.ndarray:
    """One video [T, H, W, 3] of rows of videos [T, 3, h, w] uint8, all of one shape."""
    padding = ((0, 0), (0, 0), (GAP, GAP), (GAP, GAP))
    framed = [[np.pad(video, padding, constant_values=128) for video in row] for row in rows]
    whole = np.concatenate([np.concatenate(row, axis=3) for row in framed], axis=2)
    return whole.transpose(0, 2, 3, 1)


def enlarge(video: np.ndarray, width: int) -> np.ndarray:
    """Repeat the pixels of [T, 3, h, w] by a whole factor, up to about `width` pixels."""
    factor = max(1, width // video.shape[-1])
    return video.repeat(factor, axis=2).repeat(factor, axis=3)


def make_gallery(config: GifConfig) -> list[Path]:
    """Write `videos/<name>.<format>` for each sample, or one grid; returns the files.

    Raises ValueError or FileNotFoundError for a user's mistake.
    """
    if not config.grid and (len(config.eval_dir) > 1 or config.out):
        raise ValueError("several --eval_dir, and --out, go with --grid")
    eval_dirs = [EvalDir(path) for path in config.eval_dir]
    sources = [
        Source(d.path, name, d.samples(), d.sample_config().get("observed_frames", []))
        for d, name in zip(eval_dirs, strategy_names(eval_dirs), strict=True)
    ]
    check_side_by_side(eval_dirs)
    truth = _truth(eval_dirs[0]) if config.add_gt else None
    videos = _videos(config, sources)
    folder = sources[0].path / "videos"
    if config.grid:
        of_all = set.intersection(*map(set, videos.values()))
        if not of_all:
            raise ValueError("no sample is there of all these videos: show fewer with --num_videos")
        shown = {video: sorted(of_all) for video in videos}
        left_out = sum(len(indices) - len(of_all) for indices in videos.values())
        if left_out:
            logger.info("left out: %d samples that not all of the videos have", left_out)
        files = [Path(config.out or folder / f"grid.{config.format}")]
        _write(config, files[0], sources, truth, shown)
    else:
        files = []
        for video, sample in tqdm([(v, i) for v, of in videos.items() for i in of], unit="video"):
            files.append(folder / f"{paths.sample_name(video, sample)}.{config.format}")
            _write(config, files[-1], sources, truth, {video: [sample]})
    logger.info("wrote %d files into %s", len(files), files[0].parent)
    return files


def _write(
    config: GifConfig,
    path: Path,
    sources: list[Source],
    truth: VideoTestSet | None,
    shown: dict[int, list[int]],
) -> None:
    """Write a row for each video, of the truth, if it is asked for, and of these samples of it."""
    rows = [_row(config, sources, truth, video, samples) for video, samples in shown.items()]
    samples = next(iter(shown.values()))
    titles = ["truth"] * (truth is not None) + [
        f"{source.name} {sample}" if len(samples) > 1 else source.name
        for source in sources
        for sample in samples
    ]
    grid = tile(rows)
    frames = np.arange(len(grid)) * config.every
    notes = [f"frame {frame}" for frame in frames]
    if truth is not None:
        laps = _laps(truth, list(shown), sources[0].observed, frames)
        notes = [note + lap for note, lap in zip(notes, laps, strict=True)]
    write_video(path, captioned(grid, titles, notes), fps=config.fps)


def _laps(
    truth: VideoTestSet, videos: list[int], observed: list[int], frames: np.ndarray
) -> list[str]:
    """ ", lap 3" of each frame [n], where the true videos repeat themselves, all after one period."""
    start = len(observed)
    try:
        periods = {truth.period(video) for video in videos}
    except ValueError:  # laps of part of a frame, at this stride
        periods = {0}
    if len(periods) > 1 or not 0 < max(periods) <= start or observed != list(range(start)):
        return [""] * len(frames)
    laps = lap_of(frames, start, max(periods))
    return [", lap 1, observed" if lap == 1 else f", lap {lap}" for lap in laps]


def _videos(config: GifConfig, sources: list[Source]) -> dict[int, list[int]]:
    """{video: samples} that all directories have, of those that the options ask for."""
    shared = shared_samples([source.samples for source in sources])
    if not shared:
        raise ValueError(f"{' and '.join(config.eval_dir)}: no sample is in all of them")
    return dict(list(shared.items())[: config.num_videos])


def _row(
    config: GifConfig,
    sources: list[Source],
    truth: VideoTestSet | None,
    video: int,
    indices: list[int],
) -> list[np.ndarray]:
    """The truth, if it is asked for, and the samples of one video, as they are shown."""

    def shown(frames: np.ndarray, source: Source) -> np.ndarray:
        chosen = np.arange(0, len(frames), config.every)
        frames = enlarge(np.asarray(frames)[chosen], config.width)
        return add_border(frames, np.isin(chosen, source.observed))

    samples = [
        (load_video(paths.sample_path(source.path, video, i)), source)
        for source in sources
        for i in indices
    ]
    shapes = {frames.shape for frames, _ in samples}
    if len(shapes) > 1:
        raise ValueError(
            f"{' and '.join(config.eval_dir)}: samples of video {video} differ in shape: "
            f"{', '.join(map(str, sorted(shapes)))}"
        )
    row = [shown(frames, source) for frames, source in samples]
    if truth is not None:
        length = len(samples[0][0])
        true = truth.read(video)
        for source in sources:
            EvalDir(source.path).check_truth(video, truth_of(true), truth.name)
        if len(true) < length:  # the sample goes on where the data ends: hold black
            black = np.zeros((length - len(true), *true.shape[1:]), np.uint8)
            true = np.concatenate([true, black])
        row.insert(0, shown(true, sources[0]))
    return row


def _truth(eval_dir: EvalDir) -> VideoTestSet:
    stored = eval_dir.sample_config()
    if "dataset" not in stored:
        raise ValueError(f"{eval_dir.sample_config_path} does not say dataset: leave out --add_gt")
    if stored.get("obs_video"):
        raise ValueError(f"{eval_dir.path} continues a clip of your own: leave out --add_gt")
    return get_test_dataset(
        stored_dataset(stored["dataset"], eval_dir.model_config()),
        T=stored["T"],
        partition=stored["dataset_partition"],
    )
