"""Metrics: of each frame against the truth, of each sampled video, and of whole sets of videos.

A metric is one class and one line of `registry.FRAME_METRICS`, `SAMPLE_METRICS` or `VIDEO_METRICS`,
under whose name it is asked for (`--modes`), cached and tabled. Options of its own are the fields
of its class `Options`: they become flags of every command that computes metrics. Libraries are
imported by the function that needs them.
"""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from improved_diffusion.config import NoOptions, option
from improved_diffusion.data.metric_weights import find_alexnet, sha256
from improved_diffusion.frechet_video_distance import frechet_distance, kernel_distance

# Frames that the LPIPS network sees at once: bounds its memory, changes no value.
LPIPS_CHUNK = 64


# ---------------------------------------------------------------- what metrics are


class Measure:
    """What is computed of videos: a metric, or the features that one needs.

    Args:
        options: an instance of the class's `Options` (None: all defaults).
        device: torch device, for those that use one.
    """

    unit: ClassVar[str] = ""

    # A frozen dataclass of fields made by `config.option`, each a flag of that name.
    Options: ClassVar[type] = NoOptions

    def __init__(self, options: Any = None, *, device: str = "cpu") -> None:
        self.options = self.Options() if options is None else options
        self.device = device

    def settings(self) -> dict[str, Any]:
        """All that the values depend on beside the videos, as plain values; by default the options.

        They stand beside the numbers, and results are cached by them. Raises ValueError or
        FileNotFoundError where nothing can be computed, for instance without weights.
        """
        return dataclasses.asdict(self.options)


class FrameMetric(Measure, ABC):
    """One number for each frame of a sample, beside the frame that is true."""

    @abstractmethod
    def compute(self, samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """[n] floats of frames uint8 [n, 3, H, W], twice.

        Raises ValueError for frames that have no such number.
        """


@dataclass(frozen=True)
class TrueVideo:
    """A true video, and what is known of it and its samples."""

    frames: np.ndarray  # uint8 [T, 3, H, W]
    predicted: np.ndarray  # int64 [n], the frames that were sampled
    dataset: str  # the name of its data set
    period: int  # frames after which it repeats itself; 0: it does not, or that is not known


class SampleMetric(Measure, ABC):
    """Some numbers of a sampled video, with those of the true video, or of predictions, beside them."""

    # What the numbers are; each has its own mean and standard error over the videos.
    columns: ClassVar[tuple[str, ...]]

    @abstractmethod
    def compute(self, sample: np.ndarray, truth: TrueVideo) -> np.ndarray:
        """[columns] floats of a sample, uint8 [T, 3, H, W]; nan for those that it does not have.

        Raises ValueError for videos that have no such numbers.
        """


class FeatureExtractor(Measure, ABC):
    """Features of one video, from which metrics of whole videos are computed."""

    @property
    def backend(self) -> str:
        """The library that computes; FVD is left to the same one, as published numbers are."""
        return "torch"

    @abstractmethod
    def compute(self, video: np.ndarray) -> np.ndarray:
        """Float [d] of frames uint8 [T, 3, H, W]. Raises ValueError for a video that has none."""


class VideoMetric(Measure, ABC):
    """One number for a set of samples beside the set of true videos, from features of both.

    Args:
        extractor: what has computed the features; others as `Measure`.
    """

    # The extractor that it needs, by its name in `registry.FEATURES`; "": that of --features.
    features: ClassVar[str] = ""

    def __init__(
        self, options: Any = None, *, device: str = "cpu", extractor: FeatureExtractor | None = None
    ) -> None:
        super().__init__(options, device=device)
        self.extractor = extractor

    @abstractmethod
    def compute(self, samples: np.ndarray, truth: np.ndarray) -> float:
        """The number of features [n, d] of samples and [m, d] of true videos.

        Raises ValueError for features that have no such number.
        """


# ---------------------------------------------------------------- of each frame


class Psnr(FrameMetric):
    """Peak signal-to-noise ratio of each frame."""

    unit = "dB"

    def compute(self, samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
        return psnr(samples, truth)


class Ssim(FrameMetric):
    """Structural similarity of each frame."""

    @dataclass(frozen=True)
    class Options:
        """The range that the stabilising constants assume."""

        ssim_data_range: float = option(
            1.0,
            "range that SSIM assumes of frames in [0, 1]; 2 reproduces numbers of old scikit-image",
        )

        def __post_init__(self) -> None:
            if not self.ssim_data_range > 0:
                raise ValueError(f"--ssim_data_range {self.ssim_data_range}: must be above 0")

    def settings(self) -> dict[str, Any]:
        return {"data_range": self.options.ssim_data_range}

    def compute(self, samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
        return ssim(samples, truth, data_range=self.options.ssim_data_range)


class Lpips(FrameMetric):
    """LPIPS (AlexNet, version 0.1) of each frame."""

    @dataclass(frozen=True)
    class Options:
        """The weights of the backbone."""

        lpips_weights: str | None = option(
            None, "AlexNet file of LPIPS (default: what fetch_metric_weights.py stored)"
        )

    def settings(self) -> dict[str, Any]:
        return {"weights_sha256": sha256(find_alexnet(self.options.lpips_weights))}

    def compute(self, samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
        weights = self.options.lpips_weights
        return lpips(samples, truth, device=self.device, weights=weights)


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
    from improved_diffusion.data.frame_batch import to_symmetric
    from improved_diffusion.sampling.lpips_util import lpips_distance

    _check(samples, truth)
    values = [
        lpips_distance(
            to_symmetric(samples[i : i + LPIPS_CHUNK]),
            to_symmetric(truth[i : i + LPIPS_CHUNK]),
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


# ---------------------------------------------------------------- of whole videos


class Fvd(VideoMetric):
    """Fréchet distance between the sets, by the library that computed the features."""

    def compute(self, samples: np.ndarray, truth: np.ndarray) -> float:
        backend = self.extractor.backend if self.extractor else "torch"
        return frechet_distance(samples, truth, backend=backend)


class Kvd(VideoMetric):
    """Kernel distance between the sets (unbiased squared maximum mean discrepancy)."""

    def compute(self, samples: np.ndarray, truth: np.ndarray) -> float:
        return kernel_distance(samples, truth)
