"""Every file and folder name under checkpoints/, results/ and datasets/, each with its inverse.

Paths of checkpoints are strings, since they may be remote (gs://, az://) as well as local;
paths of results are local.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

LATEST = "latest"
LEFTOVER_AGE_S = 86400.0
# What a lock file says: see `file_lock`.
LOCK_OWNER = r"process (\d+) on (.+)"

_umask_is_mine = threading.Lock()


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` names an object of a blob store, such as gs://bucket/name."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[BinaryIO]:
    """Yield a binary file that appears at `path` whole or not at all.

    Local files are written beside their final place, synced and renamed; remote ones are one
    blob write. Without `sync`, which takes its time, a machine that loses power may lose a file's
    content; a killed process does not. Parent folders are made. Nothing is left behind when the
    body raises; what a killed process leaves behind, `remove_leftovers` removes. Raises OSError
    that names the path where it cannot be written.
    """
    path = os.fspath(path)
    if is_remote(path):
        with _remote_write(path) as file:
            yield file
        return
    with temporary_file(path) as (handle, temporary):
        with os.fdopen(handle, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)


@contextlib.contextmanager
def temporary_file(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """(open handle, name) of a file beside `path` that is gone at the end, if nobody has moved it.

    Parent folders are made. Raises OSError that names the path, whatever fails in the body.
    """
    path = os.fspath(path)
    folder, name = os.path.split(os.path.abspath(path))
    prefix = f".{name}.{_host()}_{os.getpid()}_"
    os.makedirs(folder, exist_ok=True)
    try:
        handle, temporary = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=folder)
    except FileNotFoundError:  # another process has just removed the folder, which was empty
        os.makedirs(folder, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=folder)
    try:
        yield handle, temporary
    except OSError as error:
        if error.errno is None:  # numpy's own
            raise OSError(f"{path}: cannot be written ({error}): is the disk full?") from None
        if error.filename is None:
            error.filename = path
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _host() -> str:
    """This machine's name, of letters, digits and underscores."""
    return re.sub(r"\W", "_", socket.gethostname())[:32]


def is_gone(host: str, pid: int, started: str | None = None) -> bool:
    """Whether a process is known to have ended: one of this machine (named as by `gethostname`).

    started: what `process_start` said of it, where that is known: numbers are used again.
    """
    if re.sub(r"\W", "_", host)[:32] != _host():
        return False
    now = process_start(pid)
    return now is None or (now != "" and started is not None and now != started)


def process_start(pid: int) -> str | None:
    """When a process of this machine started, None where there is none; "" where nobody knows."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # no such process, or no such file system, or somebody else's that is hidden
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ""
    values = text.rpartition(")")[2].split()  # the name before it may hold anything
    return None if values[0] in "ZX" else values[19]


def files_of(folder: Path, pattern: str) -> list[Path]:
    """Path.glob's, sorted, while another run may remove folders: that of Python 3.11 fails then."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            return sorted(folder.glob(pattern))


def remove_leftovers(*folders: Path) -> None:
    """Remove the temporary files and lock files of killed processes in these folders.

    Those of processes of this machine that have ended, and those that nobody has touched for a day.
    """
    for path in (path for f in folders for path in files_of(f, ".*.*")):
        with contextlib.suppress(OSError):
            if path.suffix in (".tmp", ".lock") and _is_leftover(path):
                path.unlink()


def _is_leftover(path: Path) -> bool:
    if time.time() - path.stat().st_mtime > LEFTOVER_AGE_S:
        return True
    if path.suffix == ".lock":
        owner = re.fullmatch(LOCK_OWNER, path.read_text())
        return owner is not None and is_gone(owner[2], int(owner[1]))
    owner = re.search(r"\.(\w+)_(\d+)_\w{8}\.tmp$", path.name)
    return owner is not None and is_gone(owner[1], int(owner[2]))


@contextlib.contextmanager
def _remote_write(path: str) -> Iterator[BinaryIO]:
    """Collect the bytes locally, so that a failing body never leaves half a blob."""
    import blobfile

    with tempfile.TemporaryFile() as file:
        yield file  # type: ignore[misc]
        file.seek(0)
        with blobfile.BlobFile(path, "wb") as blob:
            while chunk := file.read(1 << 24):
                blob.write(chunk)


def exists(path: str) -> bool:
    """Whether there is a local or remote file or folder of this name."""
    if not is_remote(path):
        return os.path.exists(path)
    import blobfile

    return blobfile.exists(path)


def listdir(folder: str) -> list[str]:
    """The names in a local or remote folder."""
    if not is_remote(folder):
        return os.listdir(folder)
    import blobfile

    return list(blobfile.listdir(folder))


def open_binary(path: str) -> BinaryIO:
    """A local or remote file to read bytes from; a remote one is copied here first."""
    if not is_remote(path):
        return open(path, "rb")
    import blobfile

    return blobfile.BlobFile(path, "rb", streaming=False)


def remove(path: str) -> None:
    """Remove a local or remote file; raises FileNotFoundError where there is none."""
    if not is_remote(path):
        os.unlink(path)
        return
    import blobfile

    blobfile.remove(path)


def _umask() -> int:
    with _umask_is_mine:  # it cannot be read without being set, and threads share it
        mask = os.umask(0)
        os.umask(mask)
    return mask


# ---------------------------------------------------------------- datasets/


def dataset_dir(folder: str) -> Path:
    """`datasets/<folder>`, below DATA_ROOT where that variable is set."""
    return Path(os.environ.get("DATA_ROOT", "")) / "datasets" / folder


# ---------------------------------------------------------------- checkpoints/


class CheckpointName(NamedTuple):
    """What a checkpoint's file name says; `step` is None for `*_latest.pt`."""

    kind: str  # "model", "ema" or "opt"
    ema_rate: str | None
    step: int | None


# The pose network for colour_mazes and maze_laps, in the source tree.
POSE_NETWORK = Path(__file__).resolve().parents[2] / "checkpoints/pretrained/poses/ray_mazes.pt"


def checkpoints_root() -> str:
    """The folder of all runs: DIFFUSION_BLOB_LOGDIR, or `checkpoints`."""
    return os.environ.get("DIFFUSION_BLOB_LOGDIR") or "checkpoints"


def run_dir(run_id: str) -> str:
    """The folder of the run `run_id`, which may hold slashes."""
    return f"{checkpoints_root().rstrip('/')}/{run_id}"


def pretrained_checkpoint(dataset: str, *, flag: str) -> str:
    """The network for a data set that comes with the repository.

    Raises FileNotFoundError where there is none below the current directory; `flag` names another.
    """
    folder = Path("checkpoints/pretrained") / dataset
    found = sorted(map(str, folder.glob("*.pt")))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no network: start in the repository's root, or give --{flag}"
        )
    return found[0]


def checkpoint_path(folder: str, kind: str, step: int | None) -> str:
    """`<folder>/<kind>_<6-digit step>.pt`, or `_latest` for None; kind: model, ema_<rate>, opt."""
    return f"{folder}/{kind}_{LATEST if step is None else f'{step:06d}'}.pt"


def ema_kind(ema_rate: str) -> str:
    """The file name's start for the moving average of rate `ema_rate` (as the user typed it)."""
    return f"ema_{ema_rate}"


def parse_checkpoint_name(name: str) -> CheckpointName | None:
    """The inverse of `checkpoint_path`; None for any other file.

    Also reads the published code's `model000100.pt` and `ema_0.9999_000100.pt`.
    """
    match = re.fullmatch(
        rf"(model|opt|ema_([0-9.eE+-]+?))_?({LATEST}|\d+)\.pt", os.path.basename(name)
    )
    if match is None:
        return None
    kind = "ema" if match[1].startswith("ema") else match[1]
    return CheckpointName(kind, match[2], None if match[3] == LATEST else int(match[3]))


# ---------------------------------------------------------------- results/


def checkpoint_dir_subset(checkpoint: str) -> str:
    """What of the checkpoint's folder follows the last folder whose name contains "checkpoint".

    With no such folder: the name of the file's folder.
    """
    parts = Path(os.path.abspath(checkpoint) if not is_remote(checkpoint) else checkpoint).parts[
        :-1
    ]
    for position in range(len(parts) - 1, -1, -1):
        if "checkpoint" in parts[position]:
            return "/".join(parts[position + 1 :])
    return parts[-1]


def checkpoint_name(checkpoint: str, step: int, sampler_suffix: str = "") -> str:
    """The checkpoint's folder under results/: stem, `_<step>` for `latest`, then the sampler."""
    stem = Path(checkpoint).stem
    if stem.endswith(LATEST):
        stem += f"_{step}"
    return stem + sampler_suffix


def results_dir(checkpoint: str, step: int, sampler_suffix: str = "") -> Path:
    """`results/<checkpoint_dir_subset>/<checkpoint_name>`."""
    subset = checkpoint_dir_subset(checkpoint)
    return Path("results") / subset / checkpoint_name(checkpoint, step, sampler_suffix)


def inference_mode_str(
    mode: str,
    sizes: tuple[int, int, int, int],
    *,
    optimal: bool = False,
    prefix: str = "",
    options: str = "",
) -> str:
    """`[<prefix>]<mode>[<options>][_optimal]_<max_frames>_<step_size>_<T>_<obs_length>`.

    sizes: those four. options: the strategy's own, as its `folder_suffix` names them.
    """
    words = (f"{prefix}{mode}{options}", *(("optimal",) if optimal else ()), *map(str, sizes))
    return "_".join(words)


def sample_name(video: int, sample: int) -> str:
    """`sample_<video:04d>-<sample>`, without a suffix."""
    return f"sample_{video:04d}-{sample}"


def sample_path(eval_dir: Path, video: int, sample: int) -> Path:
    """The file of one sampled video."""
    return eval_dir / "samples" / f"{sample_name(video, sample)}.npy"


def optimal_schedule_path(eval_dir: Path) -> Path:
    """The file {step: observed frames} of an `_optimal` evaluation directory."""
    return eval_dir / "optimal_schedule.pt"


def schedule_search_path(eval_dir: Path) -> Path:
    """The options of the search for an optimal schedule."""
    return eval_dir / "optimal_schedule" / "search.json"


def schedule_step_path(eval_dir: Path, step: int) -> Path:
    """What the search for an optimal schedule has found for one inference step."""
    return eval_dir / "optimal_schedule" / f"step_{step:04d}.json"


def record_path(eval_dir: Path, video: int, sample: int) -> Path:
    """How one sampled video was made."""
    return eval_dir / "records" / f"{sample_name(video, sample)}.json"


def partial_dir(eval_dir: Path, video: int, sample: int) -> Path:
    """The folder of what is kept of a video that is not finished yet."""
    return eval_dir / "partial" / sample_name(video, sample)


def step_path(eval_dir: Path, video: int, sample: int, stage: int) -> Path:
    """The file of one inference step of such a video."""
    return partial_dir(eval_dir, video, sample) / f"step_{stage:04d}.npz"


def parse_step_name(name: str) -> int | None:
    """The inverse of the file's name in `step_path`; None for any other file."""
    match = re.fullmatch(r"step_(\d+)\.npz", os.path.basename(name))
    return None if match is None else int(match[1])


def truth_path(eval_dir: Path, video: int) -> Path:
    """What is kept of the true video that a sample continues, to know it again."""
    return eval_dir / "truth" / f"video_{video:04d}.json"


def parse_sample_name(name: str) -> tuple[int, int] | None:
    """(video, sample) of a sample's file name; None for any other file."""
    match = re.fullmatch(r"sample_(\d+)-(\d+)\.npy", os.path.basename(name))
    return None if match is None else (int(match[1]), int(match[2]))


def metrics_cache_dir(eval_dir: Path) -> Path:
    """The folder of results per video and sample."""
    return eval_dir / "metrics_cache"


def elbo_config_path(eval_dir: Path) -> Path:
    """The options that the bounds of an evaluation directory depend on."""
    return eval_dir / "elbo_config.json"


def elbo_path(eval_dir: Path, video: int) -> Path:
    """The file of one video's variational bounds, `elbo_<video:04d>.npy`."""
    return eval_dir / "elbos" / f"elbo_{video:04d}.npy"


def elbo_partial_path(eval_dir: Path, video: int) -> Path:
    """The bounds of the first inference steps of a video that is not finished yet."""
    return eval_dir / "partial" / f"elbo_{video:04d}.npy"


def metrics_path(eval_dir: Path, num_videos: int, num_samples: int, video_length: int) -> Path:
    """`metrics_<videos>-<samples>-<T>.pkl`."""
    return eval_dir / f"metrics_{num_videos}-{num_samples}-{video_length}.pkl"
