"""Curves of an evaluation directory: metrics against the frame index, the bound against the step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from improved_diffusion.evaluation import metric_tables
from improved_diffusion.registry import FRAME_METRICS
from improved_diffusion.sampling.provenance import latent_counts, stored_options
from improved_diffusion.sampling.results import EvalDir
from improved_diffusion.sampling.trained_model import stored_dataset

logger = logging.getLogger(__name__)

BITS = "bits"


class Curve(NamedTuple):
    """x, mean over videos and its standard error, each [points]; n: videos."""

    x: np.ndarray
    mean: np.ndarray
    error: np.ndarray
    n: int


def newest_table(folder: Path) -> Path | None:
    """The table of metrics that was written last; None where there is none."""
    found = sorted(folder.glob("metrics_*.pkl"), key=lambda path: path.stat().st_mtime_ns)
    if len(found) > 1:
        logger.info("%s holds %d tables: taking %s", folder, len(found), found[-1].name)
    return found[-1] if found else None


def table_curves(path: Path | None, info: dict[str, Any]) -> dict[str, Curve]:
    """{metric: curve over the frame index} of a table and what its .json says.

    Raises ValueError where the two do not belong together.
    """
    table = {} if path is None else metric_tables.read_table(path)
    curves: dict[str, Curve] = {}
    for mode in [mode for mode in FRAME_METRICS if mode in table]:
        frames = np.array(info.get("frames", []), dtype=float)
        if table[mode].ndim != 3 or table[mode].shape[-1] != len(frames):
            raise ValueError(
                f"{path} and the .json beside it do not belong together: run scripts/video_eval.py"
            )
        curves[mode] = Curve(frames, *metric_tables.frame_curve(table[mode]), len(table[mode]))
    return curves


class Bounds(NamedTuple):
    """The bounds of an evaluation directory.

    videos: their indices. bits: [videos, steps], of each inference step. dimensions: [steps], the
    numbers that each step samples: frames x 3 x H x W.
    """

    videos: list[int]
    bits: np.ndarray
    dimensions: np.ndarray

    @property
    def per_video(self) -> dict[int, float]:
        """{video: bits per dimension of all its sampled frames}."""
        values = self.bits.sum(axis=1) / self.dimensions.sum()
        return dict(zip(self.videos, values.tolist(), strict=True))

    def curve(self) -> Curve:
        """Bits per dimension against the inference step."""
        steps = np.arange(len(self.dimensions), dtype=float)
        return Curve(steps, *metric_tables.frame_curve(self.bits / self.dimensions), len(self.bits))


def has_bounds(eval_dir: EvalDir) -> bool:
    """Whether there are bounds, readable or not."""
    return any((eval_dir.path / "elbos").glob("elbo_*.npy"))


def read_bounds(eval_dir: EvalDir) -> Bounds | None:
    """The bounds in elbos/; None where there are none or, told, of what sizes they are is not known.

    Raises ValueError where they are of different numbers of steps.
    """
    files = sorted((eval_dir.path / "elbos").glob("elbo_*.npy"))
    rows = [metric_tables.load_elbo(file) for file in files]
    if not rows:
        return None
    if len({len(row) for row in rows}) > 1:
        raise ValueError(
            f"{eval_dir.path / 'elbos'} holds bounds of different numbers of steps: empty it"
        )
    size, counts = _image_size(eval_dir), latent_counts(eval_dir)
    if size is None or counts is None or len(counts) != len(rows[0]):
        logger.warning(
            "%s does not say how many frames of what size each of its %d inference steps samples: "
            "its bits per dimension are left out", eval_dir.path, len(rows[0])
        )  # fmt: skip
        return None
    videos = [int(file.stem.partition("_")[2]) for file in files]
    return Bounds(videos, np.stack(rows), np.array(counts) * 3.0 * size**2)


def _image_size(eval_dir: EvalDir) -> int | None:
    """Height and width of the frames that were sampled or bounded."""
    trained = eval_dir.model_config()
    if trained.get("image_size"):
        return int(trained["image_size"])
    try:
        return stored_dataset(stored_options(eval_dir).get("dataset", ""), trained).image_size
    except (ValueError, OSError):
        return None
