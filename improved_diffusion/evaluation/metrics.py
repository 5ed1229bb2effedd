"""Per-frame metrics of samples against the truth: arrays in, one float64 number per frame out.

`METRICS` maps a metric's name to a function (samples, truth) -> [n]. Both arguments are uint8
[n, 3, H, W]. Libraries are imported by the function that needs them.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

# Frames that the LPIPS network sees at once: bounds its memory, changes no value.
LPIPS_CHUNK = 64


def psnr(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each frame: per channel on [0, 1], then the mean.

    A frame with a channel equal to the truth's is inf. Raises ValueError for arrays that are not
    uint8 [n, 3, H, W] of one shape.
    """
    samples, truth = _unit_range(samples, truth)
    mean_squared_error = ((samples - truth) ** 2).mean(axis=(2, 3))
    with np.errstate(divide="ignore"):
        return (-10 * np.log10(mean_squared_error)).mean(axis=1)


def ssim(samples: np.ndarray, truth: np.ndarray, *, data_range: float = 1.0) -> np.ndarray:
    """Structural similarity of each frame: per channel on [0, 1] (7x7 windows), then the mean.

    `data_range` is the range that the stabilising constants assume: 1 is right for [0, 1];
    2 reproduces numbers of old scikit-image, which guessed it for float images. Raises ValueError
    as `psnr` does, and for frames below 7x7. Source: Wang et al. 2004, Eq. 13.
    """
    from skimage.metrics import structural_similarity

    samples, truth = _unit_range(samples, truth)
    values = [
        structural_similarity(sample, target, channel_axis=0, data_range=data_range)
        for sample, target in zip(samples, truth, strict=True)
    ]
    return np.array(values, dtype=np.float64)


def lpips(
    samples: np.ndarray,
    truth: np.ndarray,
    *,
    device: str = "cpu",
    weights: str | os.PathLike[str] | None = None,
) -> np.ndarray:
    """LPIPS (AlexNet, version 0.1) of each frame, on [-1, 1].

    `weights` is a backbone file; by default it is looked up (see `metric_weights`). The network
    is loaded once per process. Raises FileNotFoundError without weights, ValueError as `psnr`
    does. Source: Zhang et al. 2018 (arXiv 1801.03924), Eq. 1.
    """
    from improved_diffusion.sampling.lpips_util import lpips_distance

    _check(samples, truth)
    values = [
        lpips_distance(
            _symmetric(samples[i : i + LPIPS_CHUNK]),
            _symmetric(truth[i : i + LPIPS_CHUNK]),
            device=device,
            weights=weights,
        )
        for i in range(0, len(samples), LPIPS_CHUNK)
    ]
    return np.concatenate([np.empty(0), *values])


def _check(samples: np.ndarray, truth: np.ndarray) -> None:
    for name, frames in (("samples", samples), ("truth", truth)):
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1] != 3:
            raise ValueError(
                f"{name}: {frames.dtype} {list(frames.shape)} is not uint8 [n, 3, H, W]: "
                "give RGB frames, channels first"
            )
    if samples.shape != truth.shape:
        raise ValueError(
            f"samples {list(samples.shape)} and truth {list(truth.shape)} differ in shape: "
            "give the same frames of both"
        )


def _unit_range(samples: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 in [0, 1], once they are checked."""
    _check(samples, truth)
    return samples / 255.0, truth / 255.0


def _symmetric(frames: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]."""
    return frames.astype(np.float32) / 127.5 - 1


METRICS: dict[str, Callable[..., np.ndarray]] = {"psnr": psnr, "ssim": ssim, "lpips": lpips}
