"""One evaluation directory on disk: what was sampled, with which options, and the files in it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from improved_diffusion.data import paths
from improved_diffusion.data.file_lock import file_lock

logger = logging.getLogger(__name__)

# Written beside the samples, but two runs may differ in it and still make the same videos.
NOT_A_VALUE = {"checkpoint_path", "guidance_file"}  # files, whose weights are what counts
FOLDERS = "samples records truth partial elbos metrics_cache optimal_schedule".split()
# Options that came later, with what all folders were made with before.
EARLIER = {"spacing": "time", "guidance": 1.0}
# Hashes of what the values depend on; folders of earlier versions have none.
HASH_SUFFIX = "_sha256"


class KeptStep(NamedTuple):
    """One inference step of an unfinished video.

    latent: int [n], the frames that it sampled. frames: these, uint8 [n, 3, H, W]. observed_sha256:
    `content_digest` of the video's frames from the data.
    """

    latent: np.ndarray
    frames: np.ndarray
    observed_sha256: str


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` readably and atomically."""
    with paths.atomic_write(path) as file:
        file.write((json.dumps(values, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError naming the file where it holds something else."""
    try:
        values = json.loads(path.read_text())
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object: delete it or restore it")
    return values


def load_video(path: Path) -> np.ndarray:
    """A sampled video, uint8 [T, 3, H, W], memory-mapped.

    Raises ValueError naming the file where it is truncated or no such array.
    """
    try:
        video = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"{path} cannot be read ({error}): delete it and sample it again"
        ) from None
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[1] != 3:
        raise ValueError(f"{path} holds {video.dtype} {video.shape}, not uint8 [T, 3, H, W]")
    return video


def content_digest(frames: np.ndarray) -> str:
    """A hash of an array's type, shape and values."""
    digest = hashlib.sha256(f"{frames.dtype} {frames.shape}".encode())
    digest.update(np.ascontiguousarray(frames).data)
    return digest.hexdigest()


def truth_of(frames: np.ndarray) -> dict[str, Any]:
    """What `EvalDir.save_truth` keeps of a video's frames."""
    return {"frames": len(frames), "sha256": content_digest(frames)}


def check_same(
    what: str, before: Mapping[str, Any], now: Mapping[str, Any], ignored: Collection[str] = ()
) -> None:
    """See that `what` (a folder and its content) was made with the options that hold now.

    Options that only one of both knows are not compared; where those are hashes, which earlier
    versions did not store, a warning says so. Raises ValueError naming the first that differs.
    """
    ignored = NOT_A_VALUE | set(ignored)
    for name in sorted(set(before) & set(now) - ignored):
        if before[name] != now[name]:
            raise ValueError(
                f"{what} made with {name} {before[name]}, not {now[name]}: choose another folder "
                "with --eval_dir"
            )
    unknown = [n for n in sorted(set(now) - set(before) - ignored) if n.endswith(HASH_SUFFIX)]
    if before and unknown:
        _say_unknown(what, ", ".join(name.removesuffix(HASH_SUFFIX) for name in unknown))


@functools.cache  # said once
def _say_unknown(what: str, names: str) -> None:
    logger.warning("%s made by an earlier version: cannot tell whether by the same %s", what, names)


def shared_samples(of: Sequence[Mapping[int, Sequence[int]]]) -> dict[int, list[int]]:
    """{video: samples} that all evaluation directories have; of: what `EvalDir.samples` says of each."""
    first, *others = of
    shared = {
        video: [i for i in samples if all(i in other.get(video, ()) for other in others)]
        for video, samples in first.items()
    }
    return {video: samples for video, samples in shared.items() if samples}


class EvalDir:
    """The evaluation directory at `path` (results/<run>/<checkpoint>/<inference_mode_str>)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def sample_config_path(self) -> Path:
        return self.path / "sample_config.json"

    @property
    def model_config_path(self) -> Path:
        return self.path / "model_config.json"

    def sample_config(self) -> dict[str, Any]:
        """The options that the samples were made with; empty where nothing says so."""
        return read_json(self.sample_config_path) if self.sample_config_path.exists() else {}

    def model_config(self) -> dict[str, Any]:
        """The training options of the checkpoint; empty where nothing says so."""
        return read_json(self.model_config_path) if self.model_config_path.exists() else {}

    def bound_config(self) -> dict[str, Any]:
        """What the bounds were made with; empty where nothing says so."""
        path = paths.elbo_config_path(self.path)
        return read_json(path) if path.exists() else {}

    def is_begun(self) -> bool:
        """Whether a sample, finished or not, is here."""
        patterns = ("samples/sample_*.npy", "partial/sample_*/step_*.npz", "partial/sample_*.npz")
        return any(paths.files_of(self.path, pattern) for pattern in patterns)

    def check_config(self, now: Mapping[str, Any], ignored: Collection[str] = ()) -> None:
        """See that what is sampled here already was made with the options `now`.

        ignored: options that play no part. Raises ValueError naming the first that differs, and where
        nothing says what the samples were made with.
        """
        if not self.is_begun():
            return
        before = self.sample_config()
        if not before:
            raise ValueError(
                f"{self.path} holds samples, but no {self.sample_config_path.name} that says what they were "
                "made with: restore it, or choose another folder with --eval_dir"
            )
        check_same(f"{self.path} holds samples", EARLIER | before, now, ignored)

    def write_configs(
        self,
        model_config: Mapping[str, Any],
        sample_config: Mapping[str, Any],
        ignored: Collection[str] = (),
    ) -> None:
        """Store the options, or check that they are those of the samples already here.

        Options of a run that came to nothing are replaced. Raises ValueError as `check_config`.
        """
        self.check_config(sample_config, ignored)
        if not self.sample_config_path.exists() or not self.is_begun():
            write_json(self.model_config_path, model_config)
            write_json(self.sample_config_path, sample_config)

    @contextlib.contextmanager
    def claimed(self, *configs: Any) -> Iterator[None]:
        """Around writing a run's first file: `write_configs`, with no other run in between."""
        with file_lock(self.sample_config_path):
            self.write_configs(*configs)
            yield

    def has_sample(self, video: int, sample: int, shape: tuple[int, ...] | None = None) -> bool:
        """Whether that sample is there and whole, and of the shape [T, 3, H, W] if one is given.

        A file that is not is named and counts as missing.
        """
        path = paths.sample_path(self.path, video, sample)
        try:
            found = load_video(path).shape
        except FileNotFoundError:
            return False
        except ValueError as error:
            logger.warning("%s; making it again", error)
            return False
        if shape is not None and found != shape:
            logger.warning("%s holds %s, not %s; making it again", path, list(found), list(shape))
            return False
        return True

    def save_sample(self, video: int, sample: int, frames: np.ndarray) -> None:
        """Write one sampled video, uint8 [T, 3, H, W], atomically."""
        with paths.atomic_write(paths.sample_path(self.path, video, sample)) as file:
            np.save(file, frames)
        # What was computed of an earlier file of this name.
        name = paths.sample_name(video, sample)
        for stale in paths.metrics_cache_dir(self.path).glob(f"{name}_*.npy"):
            stale.unlink(missing_ok=True)

    def save_step(self, video: int, sample: int, stage: int, step: KeptStep) -> None:
        """Keep an inference step of an unfinished video: one file, which no later step touches."""
        path = paths.step_path(self.path, video, sample, stage)
        with paths.atomic_write(path, sync=False) as file:
            np.savez(file, **step._asdict())

    def kept_stages(self, video: int, sample: int) -> set[int]:
        """The inference steps that are kept of an unfinished video."""
        folder = paths.partial_dir(self.path, video, sample)
        found = (paths.parse_step_name(path.name) for path in paths.files_of(folder, "step_*.npz"))
        return {stage for stage in found if stage is not None}

    def load_step(self, video: int, sample: int, stage: int) -> KeptStep | None:
        """A kept inference step; None where it cannot be read."""
        path = paths.step_path(self.path, video, sample, stage)
        try:
            with np.load(path, allow_pickle=False) as kept:
                return KeptStep(kept["latent"], kept["frames"], str(kept["observed_sha256"]))
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return None

    def drop_steps(self, video: int, sample: int) -> None:
        """Forget the unfinished video: it is finished, or is to be begun again."""
        self._drop_folder(paths.partial_dir(self.path, video, sample))

    def _drop_folder(self, folder: Path) -> None:
        for path in paths.files_of(folder, "step_*.npz"):
            path.unlink(missing_ok=True)
        for empty in (folder, folder.parent):
            with contextlib.suppress(OSError):  # not there, or another run writes in it
                empty.rmdir()

    def record(self, video: int, sample: int) -> dict[str, Any]:
        """How a sample was made, see `save_record`; empty where nothing says so."""
        path = paths.record_path(self.path, video, sample)
        return read_json(path) if path.exists() else {}

    def save_record(self, video: int, sample: int, record: Mapping[str, Any]) -> None:
        """Keep how a sample was made.

        record: "schedule", a list of [observed, latent frames] of each inference step; "seconds",
        its share of those of its rounds, or None where it was made in several sittings;
        "version" of the code.
        """
        with paths.atomic_write(paths.record_path(self.path, video, sample)) as file:
            file.write((json.dumps(record, sort_keys=True) + "\n").encode())

    def samples(self) -> dict[int, list[int]]:
        """{video index: sorted sample indices}. Raises FileNotFoundError where there are none."""
        found: dict[int, list[int]] = {}
        for path in sorted((self.path / "samples").glob("sample_*.npy")):
            parsed = paths.parse_sample_name(path.name)
            if parsed is not None:
                found.setdefault(parsed[0], []).append(parsed[1])
        if not found:
            raise FileNotFoundError(
                f"no samples in {self.path / 'samples'}: {self._where_samples_are()}"
            )
        return {video: sorted(found[video]) for video in sorted(found)}

    def _where_samples_are(self) -> str:
        """What to do about a folder without samples; the sampler's --eval_dir is one above them."""
        below = sorted(str(folder.parent) for folder in self.path.glob("*/samples"))
        if below:
            return f"the folders below have some, give --eval_dir {' '.join(below)}"
        return "run scripts/video_sample.py first, or check --eval_dir"

    # ------------------------------------------------------------ the truth of the samples

    def truth(self, video: int) -> dict[str, Any] | None:
        """What a video's samples continue: {"frames": n, "sha256": of its first n}; None: unsaid."""
        path = paths.truth_path(self.path, video)
        return read_json(path) if path.exists() else None

    def check_truth(self, video: int, truth: Mapping[str, Any] | None, dataset: str) -> None:
        """Raise ValueError where a video's samples or bounds are said to be of another than `truth`."""
        stored = self.truth(video)
        if stored is not None and stored != truth:
            raise ValueError(
                f"{self.path} holds samples or bounds of another video {video} than the one that "
                f"{dataset} has now: choose another folder with --eval_dir, or restore the data set"
            )

    def save_truth(self, video: int, truth: Mapping[str, Any]) -> None:
        """Keep what a video's samples continue, where nothing says so yet."""
        if not paths.truth_path(self.path, video).exists():
            write_json(paths.truth_path(self.path, video), truth)

    def clean_up(self) -> None:
        """Remove what killed runs have left behind: temporary files, stale unfinished videos."""
        unfinished = [
            path for path in paths.files_of(self.path / "partial", "sample_*") if path.is_dir()
        ]
        paths.remove_leftovers(*(self.path / name for name in ("", *FOLDERS)), *unfinished)
        for folder in unfinished:
            if _is_whole(self.path / "samples" / f"{folder.name}.npy"):
                self._drop_folder(folder)
        for bounds in paths.files_of(self.path / "partial", "elbo_*.npy"):
            if _is_whole(self.path / "elbos" / bounds.name):
                bounds.unlink(missing_ok=True)
        for old in paths.files_of(self.path / "partial", "sample_*.npz"):
            logger.info("%s was kept by an earlier version: that video is begun again", old)
            old.unlink(missing_ok=True)
        for cached in paths.metrics_cache_dir(self.path).glob("sample_*.npy"):
            name = "_".join(cached.name.split("_")[:2])
            if not (self.path / "samples" / f"{name}.npy").exists():
                cached.unlink(missing_ok=True)
        for empty in (*unfinished, self.path / "partial"):
            with contextlib.suppress(OSError):  # not there, or not empty
                empty.rmdir()


def _is_whole(path: Path) -> bool:
    try:
        np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError):
        return False
    return True
