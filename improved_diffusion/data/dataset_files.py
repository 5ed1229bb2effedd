"""The files of a data set: found, measured, made where they are missing, read. No torch here."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from improved_diffusion import dist_util
from improved_diffusion.config import DataConfig
from improved_diffusion.data import paths, video_io
from improved_diffusion.data.dataset_specs import DatasetSpec, FrameRate, list_split, sorted_files
from improved_diffusion.registry import DATASETS

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- the data set that is asked for


def dataset_spec(
    name: str,
    *,
    image_size: int | None = None,
    image_sizes: Collection[int] | None = None,
    measured: tuple[int, int] | None = None,
    **reading: Any,
) -> DatasetSpec:
    """The data set of a name in DATASETS, or of a folder of videos, as it is to be read.

    Args:
        name: the name or the folder's path. A named set's videos are not looked at.
        image_size: scale the frames to this size (None: the size of the files).
        image_sizes: the sizes that the network can have (None: any).
        measured: (T, image_size) of a folder as another process made it: no video is looked at.
        reading: fields of `config.DataConfig`; cache_dir plays no part.

    Raises ValueError for an unknown name, impossible options, a folder with broken videos (all of
    them are named) or one whose videos differ in size or are not square while no image size is
    given.
    """
    if image_size is not None and image_sizes is not None and image_size not in image_sizes:
        raise ValueError(f"--image_size {image_size}: choose one of {tuple(image_sizes)}")
    data = DataConfig(**reading)
    rate = FrameRate(data.frame_stride, data.fps)
    if name in DATASETS:
        if data.fps is not None or data.test_fraction is not None:
            raise ValueError(f"--fps and --test_fraction are for folders of videos, not for {name}")
        spec = DATASETS[name].at_size(image_size)
        T = video_io.subsampled_length(spec.T, data.frame_stride)
    else:
        spec, T = _own_folder(name, data.test_fraction), 0
    spec = dataclasses.replace(spec, T=T, frame_rate=rate, skip_broken=data.skip_broken)
    if name in DATASETS:
        return spec
    if measured is not None:
        return dataclasses.replace(spec, T=measured[0], image_size=measured[1])
    return _measure_folder(spec, image_size, image_sizes)


def _own_folder(name: str, test_fraction: float | None) -> DatasetSpec:
    """The data set in a folder of one's own, before its videos are looked at."""
    if not name or not Path(name).is_dir():
        names = ", ".join(DATASETS)
        raise ValueError(f"unknown data set {name!r}: choose {names} or a folder of videos")
    folder = Path(name).resolve()
    if test_fraction is None:
        return DatasetSpec(folder.name, folder, 0, 0, None)
    if not 0 <= test_fraction <= 1:
        raise ValueError(f"--test_fraction {test_fraction}: must be in [0, 1]")
    list_files = functools.partial(list_split, test_fraction)
    return DatasetSpec(folder.name, folder, 0, 0, None, list_files)


def _measure_folder(
    spec: DatasetSpec, image_size: int | None, image_sizes: Collection[int] | None
) -> DatasetSpec:
    """`spec` with the T and the image size of the videos in a folder of one's own."""
    shapes: dict[Path, tuple[int, int, int]] = {}
    faults: list[str] = []
    for partition in ("train", "test"):
        # One of the two folders may be missing, until somebody wants its videos.
        with contextlib.suppress(FileNotFoundError):
            good, bad = _video_shapes(spec, partition)
            shapes |= good
            faults += [] if spec.skip_broken and partition == "train" else bad
    if faults:
        raise _unusable(spec, faults)
    if not shapes:
        formats = ", ".join(sorted(video_io.READERS))
        raise FileNotFoundError(
            f"{spec.root}: no videos ({formats}) in its folders train/ or test/; "
            "for videos in the folder itself give --test_fraction"
        )
    if image_size is None:
        sizes = {shape[1:] for shape in shapes.values()}
        height, width = min(sizes)
        fits = image_sizes is None or height in image_sizes
        if len(sizes) > 1 or height != width or not fits:
            legal = "" if image_sizes is None else f", one of {tuple(image_sizes)}"
            raise ValueError(
                f"{spec.root}: has videos of {height}x{width}"
                f"{' and other sizes' * (len(sizes) > 1)}: give --image_size{legal}"
            )
        image_size = height
    shortest = min(shape[0] for shape in shapes.values())
    return dataclasses.replace(spec, T=shortest, image_size=image_size)


# ---------------------------------------------------------------- what the headers say


def _unusable(spec: DatasetSpec, faults: list[str]) -> ValueError:
    """The error that names all bad files."""
    if len(faults) == 1:
        return ValueError(faults[0])
    return ValueError(f"{spec.root}: {len(faults)} videos cannot be used: {'; '.join(faults)}")


def _video_shapes(
    spec: DatasetSpec, partition: str
) -> tuple[dict[Path, tuple[int, int, int]], list[str]]:
    """({file: (T, H, W)}, faults of the other files) of a partition in its order.

    T is at the spec's frame rate. What the headers say is kept in `<folder>/.video_index.json`;
    changed files are read again.
    """
    files = sorted_files(spec.list_files(spec.root, partition))
    entries, faults = _index_entries(files, spec)
    shapes = {}
    for file, (_, (length, height, width), fps) in entries.items():
        try:
            step = spec.frame_rate.step(file, fps)
        except ValueError as error:
            faults.append(str(error))
        else:
            shapes[file] = (video_io.subsampled_length(length, step), height, width)
    return shapes, faults


def _index_entries(files: list[Path], spec: DatasetSpec) -> tuple[dict[Path, Any], list[str]]:
    """({file: [[size, mtime], [T, H, W], frames per second]}, faults of the other files).

    Of several processes one reads the headers, the others wait and take what it kept.
    """
    from tqdm import tqdm

    index_path = spec.root / ".video_index.json"
    entries, faults = {}, []
    with _file_lock(index_path):
        try:
            old = json.loads(index_path.read_text())
        except (OSError, ValueError):
            old = {}
        for file in tqdm(files, desc=f"indexing {spec.name}", unit="video", delay=1):
            try:
                entries[file] = _index_entry(file, old.get(_index_key(file, spec)))
            except (ValueError, OSError) as error:
                faults.append(str(error))
        new = old | {_index_key(file, spec): entry for file, entry in entries.items()}
        if new != old:
            # A folder that cannot be written to only costs time.
            with contextlib.suppress(OSError), paths.atomic_write(index_path) as output:
                output.write(json.dumps(new).encode())
    return entries, faults


def _index_key(file: Path, spec: DatasetSpec) -> str:
    return file.relative_to(spec.root).as_posix()


def _index_entry(file: Path, old: Any) -> list[Any]:
    """What the index keeps of a file: `old` where that still holds."""
    with contextlib.suppress(OSError):  # to open it says what is wrong
        if old and old[0] == list(_stamp(file)):
            return old
    video = video_io.open_video(file)
    return [list(_stamp(file)), list(video.shape), video.fps]


def _stamp(file: Path) -> tuple[int, int]:
    """Size and time of change: another stamp means other contents."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


# ---------------------------------------------------------------- making and finding files


def prepare_dataset(spec: DatasetSpec) -> None:
    """See that the data set is there; make it on first use where it can be made.

    Several processes may call this at once: one builds, the others wait.

    Raises FileNotFoundError that says how to make a missing data set.
    """
    if spec.root.is_dir():
        return
    if spec.make is None:
        raise FileNotFoundError(
            f"{spec.root}: the data set {spec.name} is missing; {spec.how_to_make}, "
            "or set DATA_ROOT to the folder that holds datasets/ "
            "(--cache_dir is for copying files to a faster disk on use)"
        )
    spec.root.parent.mkdir(parents=True, exist_ok=True)
    with _file_lock(spec.root):
        if not spec.root.is_dir():
            _build(spec, spec.make)


def _build(spec: DatasetSpec, make: Callable[[Path, int], None]) -> None:
    """Build beside the final place and rename: the folder appears whole or not at all."""
    root = spec.root
    logger.info("making the data set %s in %s", spec.name, root)
    temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}.", suffix=".tmp", dir=root.parent))
    try:
        make(temporary, spec.image_size)
        temporary.chmod(root.parent.stat().st_mode & 0o777)
        os.rename(temporary, root)
    except OSError:
        if not root.is_dir():  # else another process was quicker, where locks do not work
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Hold a lock beside `path` where the file system allows it; only saves doing work twice."""
    from filelock import FileLock

    lock = FileLock(path.parent / f".{path.name.lstrip('.')}.lock")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):
            stack.enter_context(lock)
        yield


def _cached_copy(path: Path, cache_dir: Path) -> Path:
    """The copy of `path` below `cache_dir`, made where it is missing or the file has changed."""
    copy = cache_dir / path.resolve().relative_to("/")
    stamp = _stamp(path)
    if not copy.is_file() or _stamp(copy) != stamp:
        with open(path, "rb") as source, paths.atomic_write(copy) as target:
            shutil.copyfileobj(source, target)
        os.utime(copy, ns=(stamp[1], stamp[1]))
    return copy


class VideoFiles:
    """The videos of one partition of a data set.

    With `cache_dir` every file is copied below that folder on first use, and read there. `names`:
    those of the same partition in another process; the folder is not listed then.
    Raises FileNotFoundError where there are none.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        partition: str,
        cache_dir: str | os.PathLike[str] | None = None,
        *,
        names: Sequence[str] | None = None,
    ) -> None:
        self.spec = spec
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        if names is None:
            self.paths = sorted_files(spec.list_files(spec.root, partition))
        else:
            self.paths = [spec.root / name for name in names]
        if not self.paths:
            raise FileNotFoundError(f"{spec.root}: no videos in the partition {partition}")

    @property
    def names(self) -> list[str]:
        """The videos in their order, as paths below the data set's folder."""
        return [os.path.relpath(path, self.spec.root) for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, i: int) -> video_io.OpenVideo:
        """Open video i, at the data set's frame rate.

        Raises ValueError that names the file where it is broken or of another size than its set.
        """
        path = self.paths[i]
        if self.cache_dir is not None and path.is_file():
            path = _cached_copy(path, self.cache_dir)
        video = video_io.open_video(path)
        self._require_size(video.path, video.shape[1:])
        return video_io.subsample(video, self.spec.frame_rate.step(path, video.fps))

    def read(
        self, video: video_io.OpenVideo, frame_indices: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """uint8 [n, 3, H, W]: n frames at the data set's size. Raises as `OpenVideo.read`."""
        frames = video_io.centre_crop_resize(video.read(frame_indices), self.spec.image_size)
        return np.ascontiguousarray(frames.transpose(0, 3, 1, 2))

    def _require_size(self, path: Path, size: tuple[int, int]) -> None:
        need = self.spec.file_size
        if need is not None and size != (need, need):
            raise ValueError(
                f"{path}: is {size[0]}x{size[1]}, videos of {self.spec.name} are {need}x{need}"
            )

    def check_training_videos(self, T: int) -> None:
        """See that the header of every training video is good and tells of at least T frames.

        With `skip_broken` videos that are not fit are left out, named and counted.

        Raises ValueError naming all that are not fit, or where none is left.
        """
        shapes, faults = _video_shapes(self.spec, "train")
        fit = []
        for path, (length, *size) in shapes.items():
            try:
                self._require_size(path, (size[0], size[1]))
                require_length(path, length, T)
                fit.append(path)
            except ValueError as error:
                faults.append(str(error))
        if faults and not self.spec.skip_broken:
            raise _unusable(self.spec, faults)
        if faults and dist_util.is_main():
            for fault in faults:
                logger.warning("left out: %s", fault)
            logger.warning("left out %d of %d training videos", len(faults), len(self))
        if not fit:
            raise ValueError(f"{self.spec.root}: no training video is fit for T={T}")
        self.paths = fit


def require_length(path: Path, length: int, T: int) -> None:
    """Raise ValueError that names a video of fewer than T frames."""
    if length < T:
        raise ValueError(
            f"{path}: has {length} frames, need T={T}: give a smaller --T or remove the file"
        )
