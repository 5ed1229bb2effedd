"""Networks of one's own, from a TorchScript or torch.export file.

The file says nothing of the frames that its network was trained on: options do. Its code is run, so it
has to come from somebody whom one trusts.
"""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from improved_diffusion.frechet_video_distance import is_torchscript

if TYPE_CHECKING:
    from torch import Tensor

# (mean, standard deviation) of each colour that are taken away from frames in [0, 1].
RANGES = {
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "symmetric": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
RANGES_HELP = (
    "unit [0, 1], symmetric [-1, 1], or imagenet (normalised by ImageNet's mean and standard "
    "deviation)"
)


class NetworkFile:
    """The network of a file, loaded once per process.

    Args:
        check: the options to check, named where it does not take what it is given.
    """

    def __init__(self, path: str, *, device: str, check: str) -> None:
        self.path, self.device, self.check = Path(path), device, check

    def __call__(self, x: Tensor) -> Any:
        """What it returns for x. Raises ValueError for another file, and where it does not take x."""
        import torch

        network = _load(self.path, self.device, self.path.stat().st_mtime_ns)
        try:
            with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                return network(x)
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            raise ValueError(
                f"{self.path} does not take {list(x.shape)} ({reason}): check {self.check}"
            ) from None

    def frames(self, frames: np.ndarray, size: int, values: str) -> Tensor:
        """uint8 [T, 3, H, W] as float32 [T, 3, size, size] of the range `values`; bilinear, antialiased."""
        import torch
        import torch.nn.functional as F

        x = torch.from_numpy(np.ascontiguousarray(frames)).to(self.device).float() / 255
        x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
        mean, deviation = (
            torch.tensor(v, device=self.device).view(3, 1, 1) for v in RANGES[values]
        )
        return (x - mean) / deviation


def shape_of(found: Any) -> str:
    """What a network has returned, for a message."""
    shape = getattr(found, "shape", None)
    return type(found).__name__ if shape is None else str(list(shape))


@functools.lru_cache(maxsize=2)
def _load(path: Path, device: str, _stamp: int) -> Callable[[Tensor], Any]:
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
