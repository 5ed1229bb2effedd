"""Metrics: of each frame against the truth, of each sampled video, and of whole sets of videos.

A metric is one class and one line of `registry.FRAME_METRICS`, `SAMPLE_METRICS` or `VIDEO_METRICS`,
under whose name it is asked for (`--modes`), cached and tabled. Options of its own are the fields
of its class `Options`: they become flags of every command that computes metrics. Libraries are
imported by the function that needs them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from improved_diffusion.config import NoOptions, check_choices, option
from improved_diffusion.data.metric_weights import find_alexnet, sha256
from improved_diffusion.frechet_video_distance import frechet_distance, kernel_distance

# Frames that the LPIPS network sees at once, and that PSNR holds in float64: they bound the memory
# and change no value.
LPIPS_CHUNK = 64
PSNR_CHUNK = 64
PRECISIONS = ("fp32", "bf16")


# ---------------------------------------------------------------- what metrics are


class Measure:
    """What is computed of videos: a metric, or the features that one needs.

    Args:
        options: an instance of the class's `Options` (None: all defaults).
        device: torch device, for those that use one.
    """

    unit: ClassVar[str] = ""
    # Which of two values is better; None: neither is ever called so.
    higher_is_better: ClassVar[bool | None] = None

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
    # Those of them that say nothing of the sample: strategies are not compared by them.
    reference_columns: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def compute(self, sample: np.ndarray, truth: TrueVideo) -> np.ndarray:
        """[columns] floats of a sample, uint8 [T, 3, H, W]; nan for those that it does not have.

        Raises ValueError for videos that have no such numbers.
        """


class FeatureExtractor(Measure, ABC):
    """Features of one video, from which metrics of whole videos are computed."""

    # Whether `settings` name all that computes, networks by their hash. Then the features of true
    # videos are kept for all runs and strategies (`cache.truth_cache_dir`).
    shared: ClassVar[bool] = False

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
    higher_is_better = True

    def compute(self, samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
        return psnr(samples, truth)


class Ssim(FrameMetric):
    """Structural similarity of each frame."""

    higher_is_better = True

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

    higher_is_better = False

    @dataclass(frozen=True)
    class Options:
        """The weights of the backbone, and the arithmetic of the network."""

        lpips_weights: str | None = option(
            None, "AlexNet file of LPIPS (default: what fetch_metric_weights.py stored)"
        )
        lpips_precision: str = option(
            "fp32", "arithmetic of LPIPS; bf16 is said beside the number", choices=PRECISIONS
        )

        def __post_init__(self) -> None:
            check_choices(self)

    def settings(self) -> dict[str, Any]:
        weights = {"weights_sha256": sha256(find_alexnet(self.options.lpips_weights))}
        return weights | said_precision(self.options.lpips_precision)

    def compute(self, samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
        weights = self.options.lpips_weights
        with arithmetic(self.options.lpips_precision, self.device):
            return lpips(samples, truth, device=self.device, weights=weights)


def said_precision(precision: str) -> dict[str, str]:
    """The setting that tells of another arithmetic than float32, of which nothing is said."""
    return {} if precision == "fp32" else {"precision": precision}


def arithmetic(precision: str, device: str) -> contextlib.AbstractContextManager:
    """The context in which the networks of metrics compute: "fp32" or "bf16"."""
    if precision == "fp32":
        return contextlib.nullcontext()
    import torch

    from improved_diffusion.fp16_util import autocast

    return autocast(torch.device(device), precision=precision, use_fp16=False)


def psnr(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each frame: per channel on [0, 1], then the mean.

    A frame with a channel equal to the truth's is inf. Raises ValueError for arrays that are not
    uint8 [n, 3, H, W] of one shape.
    """
    _check(samples, truth)
    values = [
        _psnr(samples[i : i + PSNR_CHUNK] / 255.0, truth[i : i + PSNR_CHUNK] / 255.0)
        for i in range(0, len(samples), PSNR_CHUNK)
    ]
    return np.concatenate([np.empty(0), *values])


def _psnr(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
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

    _check(samples, truth)
    values = [
        structural_similarity(sample / 255.0, target / 255.0, channel_axis=0, data_range=data_range)
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


# ---------------------------------------------------------------- of whole videos


class Fvd(VideoMetric):
    """Fréchet distance between the sets, by the library that computed the features."""

    higher_is_better = False

    def compute(self, samples: np.ndarray, truth: np.ndarray) -> float:
        backend = self.extractor.backend if self.extractor else "torch"
        return frechet_distance(samples, truth, backend=backend)


class Kvd(VideoMetric):
    """Kernel distance between the sets (unbiased squared maximum mean discrepancy)."""

    higher_is_better = False

    def compute(self, samples: np.ndarray, truth: np.ndarray) -> float:
        return kernel_distance(samples, truth)
