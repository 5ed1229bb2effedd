"""Fréchet and kernel video distance: I3D features of whole videos and distances between them.

Source: Unterthiner et al. 2018 (arXiv 1812.01717). Two back ends compute the features: "torch"
(`i3d.I3D`, or a TorchScript file) and "tensorflow" (the published pipeline's TF-Hub module).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from improved_diffusion.data.metric_weights import MEND, find_i3d, load_tensors

if TYPE_CHECKING:
    from torch import Tensor

BACKENDS = ("torch", "tensorflow")
RESIZES = ("legacy", "half-pixel")
IMAGE_SIZE = 224
NUM_FEATURES = 400
MIN_FRAMES = 10
# Frames resized at once: bounds the memory, changes no value.
RESIZE_FRAMES = 32
HUB_URL = "https://tfhub.dev/deepmind/i3d-kinetics-400/1"


# ---------------------------------------------------------------- distances


def frechet_distance(
    features_1: np.ndarray, features_2: np.ndarray, *, backend: str = "torch"
) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of features.

    Args: float arrays [n, d] and [m, d], n and m at least 2; `backend` "tensorflow" leaves the
    work to tensorflow-gan, "torch" does it here in float64. Covariances are unbiased. Raises
    ValueError for other arrays or back ends. Source: Dowson and Landau 1982, Eq. 4; here
    tr((S1 S2)^(1/2)) is the nuclear norm of A B^T for centred features A, B over sqrt(n - 1),
    sqrt(m - 1).
    """
    _check_backend(backend)
    features_1, features_2 = _checked(features_1, features_2)
    if backend == "tensorflow":
        return _tensorflow_gan_distance(features_1, features_2)
    difference = features_1.mean(axis=0) - features_2.mean(axis=0)
    root_1, root_2 = _covariance_root(features_1), _covariance_root(features_2)
    cross = np.linalg.svd(root_1 @ root_2.T, compute_uv=False).sum()
    return float(difference @ difference + (root_1**2).sum() + (root_2**2).sum() - 2 * cross)


def _covariance_root(features: np.ndarray) -> np.ndarray:
    """R with R^T R the unbiased covariance and no more rows than needed."""
    centred = (features - features.mean(axis=0)) / np.sqrt(len(features) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r"))


def kernel_distance(features_1: np.ndarray, features_2: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / d + 1)^3.

    Args: float arrays [n, d] and [m, d], n and m at least 2. All samples count in one block; the
    result can be negative. Raises ValueError for other arrays. Source: Binkowski et al. 2018
    (arXiv 1801.01401), section 3.1, and Gretton et al. 2012, Eq. 3.
    """
    features_1, features_2 = _checked(features_1, features_2)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_off_diagonal(matrix: np.ndarray) -> float:
        return (matrix.sum() - matrix.trace()) / (len(matrix) * (len(matrix) - 1))

    within = sum(mean_off_diagonal(kernel(x, x)) for x in (features_1, features_2))
    return float(within - 2 * kernel(features_1, features_2).mean())


def extrapolated_frechet_distance(
    features_1: np.ndarray, features_2: np.ndarray, *, splits: int = 4
) -> float:
    """The Fréchet distance of infinitely many videos, on a line in 1/n.

    The distance of n videos is too large by about a constant over n. The line goes through the
    distance of all videos and the mean over their halves, which random `splits` (seeded) make; row
    i of both arrays belongs together. The bias is gone to first order only: some is left where n
    is not far above the dimensions in which features vary. It can be negative.

    Args: float arrays [n, d], twice, n at least 4. Raises ValueError for other arrays. Source: Chong
    and Forsyth 2020 (arXiv 1911.07023), there with more sizes.
    """
    features_1, features_2 = _checked(features_1, features_2)
    n = len(features_1)
    if len(features_2) != n or n < 4:
        raise ValueError(
            f"{n} and {len(features_2)} videos: the extrapolation needs as many of both, 4 or more"
        )
    rng = np.random.default_rng(0)
    halves = [half for _ in range(splits) for half in np.array_split(rng.permutation(n), 2)]
    of_halves = np.mean([frechet_distance(features_1[i], features_2[i]) for i in halves])
    whole, step = frechet_distance(features_1, features_2), np.mean([1 / len(i) for i in halves])
    return float(whole - (of_halves - whole) / n / (step - 1 / n))


def jedi_distance(features_1: np.ndarray, features_2: np.ndarray) -> float:
    """100 times the biased squared maximum mean discrepancy with the kernel (x.y / d)^2.

    Args: float arrays [n, d] and [m, d], n and m at least 2. Raises ValueError for other arrays.
    Source: Luo et al. 2024 (arXiv 2410.05203), whose features are V-JEPA's.
    """
    features_1, features_2 = _checked(features_1, features_2)

    def mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
        return ((x @ y.T / x.shape[1]) ** 2).mean()

    within = mean_kernel(features_1, features_1) + mean_kernel(features_2, features_2)
    return float(100 * (within - 2 * mean_kernel(features_1, features_2)))


def _checked(features_1: np.ndarray, features_2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64, once they are fit for a distance."""
    for features in (features_1, features_2):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(
                f"features {list(features.shape)}: a distance needs [n, d] of n >= 2 videos"
            )
        if not np.isfinite(features).all():
            raise ValueError("features hold NaN or infinity: no distance is defined")
    if features_1.shape[1] != features_2.shape[1]:
        raise ValueError(
            f"features have {features_1.shape[1]} and {features_2.shape[1]} dimensions: "
            "compute both with the same network"
        )
    return features_1.astype(np.float64), features_2.astype(np.float64)


# ---------------------------------------------------------------- features


def video_features(
    videos: np.ndarray,
    *,
    backend: str = "torch",
    resize: str = "legacy",
    weights: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    batch_size: int = 1,
) -> np.ndarray:
    """The Kinetics-400 logits of each video, averaged over time, of the whole video at once.

    Args:
        videos: uint8 [n, T, 3, H, W], T >= 10; may be memory-mapped.
        backend: "torch" or "tensorflow".
        resize: how frames become 224x224: "legacy" is TF1's bilinear, "half-pixel" today's.
        weights: file (TorchScript too) or TF-Hub folder; default: see `weights_path`.
        device: torch device (the tensorflow back end uses the CPU).
        batch_size: videos in one pass; costs memory, changes no result beyond rounding.

    Returns float32 [n, 400]. Raises ValueError for other videos, back ends or resizes and
    FileNotFoundError without weights.
    """
    _check_videos(videos, resize)
    path = weights_path(backend, weights)
    extract: Callable[[np.ndarray], np.ndarray]
    if backend == "torch":
        network = _load_torch(path, device, path.stat().st_mtime_ns)
        extract = functools.partial(_torch_features, network, resize, device)
    else:
        signature = _load_tensorflow(path, path.stat().st_mtime_ns)
        extract = functools.partial(_tensorflow_features, signature, resize)
    starts = range(0, len(videos), batch_size)
    features = [extract(videos[start : start + batch_size]) for start in starts]
    return np.concatenate([np.empty((0, NUM_FEATURES), np.float32), *features])


def _check_videos(videos: np.ndarray, resize: str) -> None:
    if resize not in RESIZES:
        raise ValueError(f"resize {resize!r} is unknown: choose from {', '.join(RESIZES)}")
    if videos.dtype != np.uint8 or videos.ndim != 5 or videos.shape[2] != 3:
        raise ValueError(
            f"videos: {videos.dtype} {list(videos.shape)} is not uint8 [n, T, 3, H, W]: "
            "give RGB videos, channels before height and width"
        )
    if videos.shape[1] < MIN_FRAMES:
        raise ValueError(
            f"videos of {videos.shape[1]} frames are too short for I3D: FVD and KVD need at least "
            f"{MIN_FRAMES} frames"
        )


def weights_path(backend: str = "torch", weights: str | os.PathLike[str] | None = None) -> Path:
    """The file or folder that `video_features` reads; `metric_weights.sha256` tells it from others.

    Default for torch: see `metric_weights.find_i3d`; for tensorflow: the TF-Hub module from
    TFHUB_CACHE_DIR, else downloaded. Raises ValueError for an unknown back end and
    FileNotFoundError without weights.
    """
    _check_backend(backend)
    return find_i3d(weights) if backend == "torch" else _find_hub_module(weights)


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: choose from {', '.join(BACKENDS)}")


def bilinear_matrix(size_in: int, size_out: int, resize: str) -> np.ndarray:
    """[size_out, size_in] float32: one axis of a bilinear resize as TensorFlow does it.

    Pixel i of the result lies at i * size_in / size_out ("legacy", without half-pixel centres) or
    at (i + 1/2) * size_in / size_out - 1/2 ("half-pixel"), and at the border beyond it.
    """
    position = np.arange(size_out)
    if resize == "half-pixel":
        source = (position + 0.5) * size_in / size_out - 0.5
    else:
        source = position * size_in / size_out
    source = source.clip(0, size_in - 1)
    low = np.floor(source).astype(int)
    high = np.minimum(low + 1, size_in - 1)
    matrix = np.zeros((size_out, size_in), np.float32)
    np.add.at(matrix, (position, low), 1 - (source - low))
    np.add.at(matrix, (position, high), source - low)
    return matrix


# ---------------------------------------------------------------- torch


def _prepare(videos: np.ndarray, resize: str, device: str) -> Tensor:
    """uint8 [b, T, 3, H, W] -> float32 [b, 3, T, 224, 224] in [-1, 1]."""
    import torch

    count, frames, channels, height, width = videos.shape
    rows = torch.from_numpy(bilinear_matrix(height, IMAGE_SIZE, resize)).to(device)
    columns = torch.from_numpy(bilinear_matrix(width, IMAGE_SIZE, resize)).to(device)
    result = torch.empty(count, channels, frames, IMAGE_SIZE, IMAGE_SIZE, device=device)
    for first in range(0, frames, RESIZE_FRAMES):
        piece = slice(first, first + RESIZE_FRAMES)
        pixels = torch.from_numpy(videos[:, piece].copy()).to(device).float()
        resized = rows @ pixels @ columns.T
        result[:, :, piece] = (2 * resized / 255 - 1).transpose(1, 2)
    return result


def _torch_features(
    network: Callable[[Tensor], Tensor], resize: str, device: str, videos: np.ndarray
) -> np.ndarray:
    import torch

    # TF32 would cost the features three digits on GPUs that have it.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return network(_prepare(videos, resize, device)).float().cpu().numpy()


@functools.lru_cache(maxsize=1)
def _load_torch(path: Path, device: str, _stamp: int) -> Callable[[Tensor], Tensor]:
    """The network of a state dict or TorchScript file; a replaced file is loaded anew."""
    import torch

    if is_torchscript(path):
        script = torch.jit.load(str(path), map_location=device).eval()
        return functools.partial(script, rescale=False, resize=False, return_features=True)
    from improved_diffusion.evaluation.i3d import I3D

    with torch.device("meta"):  # nothing to initialise: no random numbers are drawn
        network = I3D()
    try:
        network.load_state_dict(load_tensors(path), assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"{path} does not hold I3D ({reason}): {MEND}") from None
    return network.to(device).eval()


def is_torchscript(path: Path) -> bool:
    """Whether the archive holds code beside its tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


# ---------------------------------------------------------------- tensorflow


def _find_hub_module(weights: str | os.PathLike[str] | None) -> Path:
    """The TF-Hub folder `weights`, or the one of HUB_URL (TFHUB_CACHE_DIR, else the network)."""
    if weights is None:
        hub = _import_tensorflow("tensorflow_hub")
        try:
            weights = hub.resolve(HUB_URL)
        except Exception as error:  # whatever the downloader raises
            reason = " ".join(str(error).split())[:200]
            raise FileNotFoundError(
                f"no I3D module for the tensorflow back end: {HUB_URL} could not be read "
                f"({reason}): name its unpacked folder as the weights, or put it in "
                f"$TFHUB_CACHE_DIR/{hashlib.sha1(HUB_URL.encode()).hexdigest()}"
            ) from None
    path = Path(weights)
    if not (path / "saved_model.pb").is_file():
        raise FileNotFoundError(
            f"{path} is not an unpacked TF-Hub module (it holds no saved_model.pb): "
            f"get it from {HUB_URL} and name its folder"
        )
    return path


def _import_tensorflow(name: str) -> Any:
    """TensorFlow or a package on top of it. Raises ValueError where the tf extra is missing."""
    # Read by TensorFlow as it is imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"the tensorflow back end needs the tf extra ({error}): pip install -e '.[tf]' with "
            "Python below 3.12, or use the torch back end"
        ) from None


@functools.lru_cache(maxsize=1)
def _load_tensorflow(path: Path, _stamp: int) -> Callable[[Any], Any]:
    """The module's default signature; a replaced folder is loaded anew."""
    tf = _import_tensorflow("tensorflow")
    tf.get_logger().setLevel("ERROR")  # else a page of warnings about TF1 variables
    # It only extracts features: torch keeps the GPUs.
    tf.config.set_visible_devices([], "GPU")
    module = _import_tensorflow("tensorflow_hub").load(str(path))
    signature = module.signatures["default"]

    def logits(frames: Any, _alive: Any = module) -> Any:
        """The signature alone would not keep the module's variables alive."""
        return signature(frames)["default"]

    return logits


def _tensorflow_features(
    signature: Callable[[Any], Any], resize: str, videos: np.ndarray
) -> np.ndarray:
    """As the published pipeline does it, TensorFlow's own resize included."""
    tf = _import_tensorflow("tensorflow")
    count, frames = videos.shape[:2]
    pixels = tf.constant(videos.reshape(-1, *videos.shape[2:]).transpose(0, 2, 3, 1))
    resized = tf.compat.v1.image.resize_bilinear(
        tf.cast(pixels, tf.float32),
        (IMAGE_SIZE, IMAGE_SIZE),
        half_pixel_centers=resize == "half-pixel",
    )
    inputs = tf.reshape(2 * resized / 255 - 1, (count, frames, IMAGE_SIZE, IMAGE_SIZE, 3))
    return signature(inputs).numpy()


def _tensorflow_gan_distance(features_1: np.ndarray, features_2: np.ndarray) -> float:
    tf = _import_tensorflow("tensorflow")
    gan = _import_tensorflow("tensorflow_gan")
    distance = gan.eval.frechet_classifier_distance_from_activations
    return float(distance(tf.constant(features_1), tf.constant(features_2)))
