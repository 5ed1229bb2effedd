"""Whether balls stay themselves in samples of bouncy_balls; the figures of docs/long_videos.md.

python tests/ball_coherence.py EVAL_DIR ...        (of one data set, sizes and videos)

A ball is what is redder than green, or greener than red. It is there in a frame if it weighs 0.5 to
1.5 times what it weighs in the true video, and jumps between two frames if its centre moves farther
than 1.5 times the farthest true move.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from improved_diffusion.data import paths
from improved_diffusion.data.dataset_specs import BOUNCY_BALLS
from improved_diffusion.data.video_datasets import get_test_dataset
from improved_diffusion.evaluation.metrics import psnr
from improved_diffusion.sampling.plan import VideoPlan
from improved_diffusion.sampling.results import EvalDir, load_video
from improved_diffusion.study.markdown import markdown_table

HEADS = "strategy, psnr, balls there, jumps within steps, across, change within, across".split(", ")


def balls(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(weights [T, 2], centres [T, 2, 2] in pixels) of the red and the green ball."""
    red = frames[:, 0].astype(float) - frames[:, 1]
    parts = np.stack([red, -red], axis=1).clip(min=30) - 30  # [T, 2, H, W]
    weights = parts.sum(axis=(2, 3))
    places = np.arange(parts.shape[-1])
    sums = [(parts.sum(axis) * places).sum(-1) for axis in (2, 3)]
    return weights, np.stack(sums, axis=-1) / np.maximum(weights, 1)[..., None]


def moves(frames: np.ndarray) -> np.ndarray:
    """How far the centres move from each frame to the next, [T - 1, 2] pixels."""
    return np.linalg.norm(np.diff(balls(frames)[1], axis=0), axis=-1)


def row(folder: Path) -> list[str]:
    """One strategy's, means over its videos."""
    config = json.loads((folder / "sample_config.json").read_text())
    sizes = (config[name] for name in ("inference_mode", "T", "obs_length", "max_frames"))
    plan = VideoPlan(*sizes, config["step_size"])
    stage = np.full(plan.T, -1)
    for step in plan.schedule or ():
        stage[step.latent] = step.stage
    pairs = np.arange(plan.obs_length - 1, plan.T - 1)  # each frame and the next, where it is new
    across = stage[pairs] != stage[pairs + 1]
    values = []
    for sample, truth in loaded(folder, plan):
        new, true_weights = slice(plan.obs_length, None), balls(truth)[0].mean(axis=0)
        there = np.abs(balls(sample)[0][new] / true_weights - 1) <= 0.5
        jumps = moves(sample)[pairs] > 1.5 * moves(truth).max()
        change = np.abs(np.diff(sample.astype(float), axis=0)).mean(axis=(1, 2, 3))[pairs]
        halves = [part[chosen].mean() for part in (jumps, change) for chosen in (~across, across)]
        values.append([psnr(sample[new], truth[new]).mean(), there.mean(), *halves])
    mean, count = np.mean(values, axis=0), len(values)
    error = np.std(values, axis=0, ddof=1) / count**0.5
    scale = np.array([1, 100, 100, 100, 1, 1])
    units = ("", " %", " %", " %", "", "")
    cells = zip(mean * scale, error * scale, units, strict=True)
    return [plan.mode, *(f"{m:.2f} ± {e:.2f}{unit}" for m, e, unit in cells)]


def loaded(folder: Path, plan: VideoPlan) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(sample, truth) of each video, uint8 [T, 3, H, W]."""
    eval_dir = EvalDir(folder)
    for video, samples in eval_dir.samples().items():
        for sample in samples:
            frames = load_video(paths.sample_path(eval_dir.path, video, sample))
            spec = BOUNCY_BALLS.at_size(frames.shape[-1])
            source = get_test_dataset(spec, T=plan.T, partition="test", cache_dir=None)
            yield np.array(frames), source.read(video, range(plan.T))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("eval_dir", nargs="+", type=Path)
    folders = parser.parse_args().eval_dir
    print(markdown_table(HEADS, [row(folder) for folder in folders]))


if __name__ == "__main__":
    main()
