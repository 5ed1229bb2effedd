"""Features by a network of one's own, from a TorchScript or torch.export file.

The file says nothing of the frames that its network was trained on: the options do. Its code is
run, so it has to come from somebody whom one trusts.
"""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from improved_diffusion.config import check_choices, check_positive, option
from improved_diffusion.data.metric_weights import sha256
from improved_diffusion.evaluation.metrics import FeatureExtractor
from improved_diffusion.frechet_video_distance import is_torchscript

if TYPE_CHECKING:
    from torch import Tensor

# (mean, standard deviation) of each colour that are taken away from frames in [0, 1].
RANGES = {
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "symmetric": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
LAYOUTS = ("video", "frames")


class FileFeatures(FeatureExtractor):
    """What the network of a file returns, averaged over tokens, frames and calls."""

    shared = True

    @dataclass(frozen=True)
    class Options:
        """The file, and what its network takes."""

        feature_file: str | None = option(None, "the same as --features FILE")
        feature_size: int | None = option(
            None, "height and width of the frames that the network of --features FILE takes"
        )
        feature_range: str | None = option(
            None,
            "their values: unit [0, 1], symmetric [-1, 1], or imagenet (normalised by ImageNet's "
            "mean and standard deviation)",
            choices=tuple(RANGES),
        )
        feature_layout: str = option(
            "video", "what it takes: video [1, 3, T, H, W], or frames [T, 3, H, W]", choices=LAYOUTS
        )
        feature_frames: int | None = option(
            None, "frames of one call of it, T above (default: all of the video)"
        )

        def __post_init__(self) -> None:
            check_choices(self)
            check_positive(self, "feature_size", "feature_frames")

    def settings(self) -> dict[str, Any]:
        options = self.options
        if options.feature_file is None:
            raise ValueError("--features file: name the file itself, --features FILE")
        if options.feature_size is None or options.feature_range is None:
            raise ValueError(
                f"--features {options.feature_file}: say what its network takes, with "
                "--feature_size and --feature_range"
            )
        return {
            "weights_sha256": sha256(options.feature_file),
            "size": options.feature_size,
            "range": options.feature_range,
            "layout": options.feature_layout,
            "frames": options.feature_frames or "all",
        }

    def compute(self, video: np.ndarray) -> np.ndarray:
        count = self.options.feature_frames or len(video)
        if len(video) < count:
            raise ValueError(
                f"videos of {len(video)} frames are too short for --feature_frames {count}"
            )
        path = Path(self.options.feature_file)
        network = _load(path, self.device, path.stat().st_mtime_ns)
        of_frames = self.options.feature_layout == "frames"
        rows = []
        for start, fresh in _windows(len(video), count):
            found = self._call(network, video[start : start + count])
            # What an earlier call has seen already counts once.
            rows.append(found[count - fresh :] if of_frames else found)
        return np.concatenate(rows).mean(axis=0)

    def _call(self, network: Callable[[Tensor], Tensor], frames: np.ndarray) -> np.ndarray:
        """[1, d] of a video, or [T, d] of frames uint8 [T, 3, H, W], float64.

        Raises ValueError for a network that does not take them or returns something else.
        """
        import torch

        options = self.options
        x = _scaled(frames, options.feature_size, options.feature_range, self.device)
        x = x.transpose(0, 1)[None] if options.feature_layout == "video" else x
        try:
            with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                found = network(x)
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            raise ValueError(
                f"{options.feature_file} does not take {list(x.shape)} ({reason}): check "
                "--feature_size, --feature_layout and --feature_frames"
            ) from None
        if not isinstance(found, torch.Tensor) or found.ndim < 2 or len(found) != len(x):
            shape = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise ValueError(
                f"{options.feature_file} returns {shape} for {list(x.shape)}, not [{len(x)}, d] or "
                f"[{len(x)}, tokens, d]: check --feature_layout, or export it with such an output"
            )
        tokens = found.double().reshape(len(found), -1, found.shape[-1])
        return tokens.mean(dim=1).cpu().numpy()


def _windows(length: int, count: int) -> Iterator[tuple[int, int]]:
    """(first frame, frames not seen before) of windows of `count` frames that cover a video.

    The last one ends with the video and may overlap the one before.
    """
    for start in range(0, length, count):
        yield min(start, length - count), min(count, length - start)


def _scaled(frames: np.ndarray, size: int, values: str, device: str) -> Tensor:
    """uint8 [T, 3, H, W] as float32 [T, 3, size, size] of the range `values`; bilinear, antialiased."""
    import torch
    import torch.nn.functional as F

    x = torch.from_numpy(np.ascontiguousarray(frames)).to(device).float() / 255
    x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    mean, deviation = (torch.tensor(v, device=device).view(3, 1, 1) for v in RANGES[values])
    return (x - mean) / deviation


@functools.lru_cache(maxsize=1)
def _load(path: Path, device: str, _stamp: int) -> Callable[[Tensor], Tensor]:
    """The network of a file; one that was replaced is loaded anew. Raises ValueError for others."""
    import torch

    scripted = is_torchscript(path)
    try:
        if not scripted and not _is_exported(path):
            raise ValueError("weights alone do not say how to compute")
        if scripted:
            return torch.jit.load(str(path), map_location=device).eval()
        program = torch.export.load(str(path))
        if device != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        return program.module()
    except Exception as error:  # a broken archive raises anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is neither a TorchScript nor a torch.export file ({reason}): save the network "
            "with torch.jit.save or torch.export.save"
        ) from None


def _is_exported(path: Path) -> bool:
    """Whether the archive holds a program of torch.export, of today's torch or an earlier one."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return any("/models/" in name or "serialized_exported_program" in name for name in names)
