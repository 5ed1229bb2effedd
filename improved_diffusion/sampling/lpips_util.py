"""LPIPS with AlexNet from the package lpips, its backbone read from a local file.

Source: Zhang et al. 2018 (arXiv 1801.03924), Eq. 1.
"""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from improved_diffusion.data.metric_weights import MEND, find_alexnet, load_tensors

if TYPE_CHECKING:
    from torch import Tensor

# Below this the last pooling of AlexNet has nothing left to pool.
MIN_IMAGE_SIZE = 31


def load_lpips(weights: str | os.PathLike[str] | None = None, device: str = "cpu") -> Any:
    """The LPIPS network (a `lpips.LPIPS`), loaded once per process, file and device.

    Raises FileNotFoundError without a weights file, ValueError for a foreign one.
    """
    path = find_alexnet(weights)
    return _load(path, device, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _load(path: Path, device: str, _stamp: int) -> Any:
    """`_stamp` makes a file that was replaced load anew."""
    import lpips
    import torch

    tensors = load_tensors(path)
    # lpips draws a random backbone before it is given ours: other random numbers must not change.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's old names, as lpips 0.1.4 calls them
        network = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
    with torch.no_grad():
        for name, parameter in network.net.named_parameters():
            name = "features." + name.split(".", 1)[1]  # slice3.6.weight -> features.6.weight
            value = tensors.get(name)
            if value is None or value.shape != parameter.shape:
                raise ValueError(f"{path} does not hold AlexNet: {name} does not fit: {MEND}")
            parameter.copy_(value)
    return network.to(device).requires_grad_(False)


def lpips_distance(
    frames_1: Any,
    frames_2: Any,
    *,
    weights: str | os.PathLike[str] | None = None,
    device: str = "cpu",
) -> np.ndarray:
    """LPIPS of pairs of frames: [n, 3, H, W] floats in [-1, 1], twice -> float64 [n].

    Raises FileNotFoundError without weights and ValueError for frames too small for AlexNet.
    """
    import torch

    network = load_lpips(weights, device)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        distances = network(_frames(frames_1, device), _frames(frames_2, device))
    return distances.flatten().double().cpu().numpy()


def lpips_embedding(
    frames: Any, *, weights: str | os.PathLike[str] | None = None, device: str = "cpu"
) -> np.ndarray:
    """Vectors whose squared Euclidean distance is LPIPS, up to rounding.

    Args: frames, array or tensor [n, 3, H, W], float in [-1, 1]. Returns float32 [n, d]: the
    unit-normalised features of each layer l times sqrt(w_l / (H_l W_l)), one after the other;
    the weights w of LPIPS are not negative. Raises as `lpips_distance`.
    """
    import lpips
    import torch

    network = load_lpips(weights, device)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        layers = network.net(network.scaling_layer(_frames(frames, device)))
        parts = []
        for features, lin in zip(layers, network.lins, strict=True):
            scale = (lin.model[-1].weight / features[0, 0].numel()).sqrt()
            parts.append((lpips.normalize_tensor(features) * scale).flatten(1))
        return torch.cat(parts, dim=1).cpu().numpy()


def last_features(
    frames: Any, *, weights: str | os.PathLike[str] | None = None, device: str = "cpu"
) -> np.ndarray:
    """AlexNet's last convolution, averaged over pixels: [n, 3, H, W] in [-1, 1] -> float32 [n, 256].

    Raises as `lpips_distance`.
    """
    import torch

    network = load_lpips(weights, device)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        *_, last = network.net(network.scaling_layer(_frames(frames, device)))
        return last.mean(dim=(2, 3)).cpu().numpy()


def _frames(frames: Any, device: str) -> Tensor:
    import torch

    frames = torch.as_tensor(frames, dtype=torch.float32, device=device)
    if frames.ndim != 4 or frames.shape[1] != 3 or min(frames.shape[2:]) < MIN_IMAGE_SIZE:
        raise ValueError(
            f"LPIPS (AlexNet) needs frames [n, 3, H, W] of at least {MIN_IMAGE_SIZE}x"
            f"{MIN_IMAGE_SIZE} pixels, not {list(frames.shape)}: leave lpips out"
        )
    return frames


# What an adaptive strategy may ask for by name: squared distances of the vectors are its distance.
EMBEDDINGS = {"lpips": lpips_embedding}
# The file that each depends on, or why there is none (FileNotFoundError).
EMBEDDING_WEIGHTS = {"lpips": find_alexnet}
