"""Which data sets there are, where their files lie, how missing ones are made. No torch here."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from improved_diffusion import bouncy_balls, dist_util, ray_mazes
from improved_diffusion.data import paths, video_io

logger = logging.getLogger(__name__)

IMAGE_SIZES = (32, 64, 128, 256)  # the sizes that unet.py has a network for
CSV_LINE = re.compile(r"\d+,(.+)")


# ---------------------------------------------------------------- which data sets there are


def _list_partition_folder(folder: Path, partition: str) -> list[Path]:
    """`<folder>/<partition>/*`, whatever the format."""
    if not (folder / partition).is_dir():
        raise FileNotFoundError(f"{folder / partition}: no such folder; put the videos there")
    return _videos_in(folder / partition)


def _videos_in(folder: Path) -> list[Path]:
    """Its files of any format that can be read, in order; hidden ones do not count."""
    return sorted_files(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in video_io.READERS and not path.name.startswith(".")
    )


def _list_csv(folder: Path, partition: str) -> list[Path]:
    """The files that `<folder>/video_<partition>.csv` names; of each path the file name counts."""
    csv = folder / f"video_{partition}.csv"
    if not csv.is_file():
        raise FileNotFoundError(
            f"{csv}: no such file; write it with "
            f"`python datasets/carla/make_train_test_split.py --dir {folder}`"
        )
    lines = csv.read_text().splitlines()[1:]
    matches = [CSV_LINE.fullmatch(line.strip()) for line in lines if line.strip()]
    if None in matches:
        raise ValueError(f"{csv}: line {matches.index(None) + 2} is not `<number>,<path>`")
    return [folder / Path(match[1]).name for match in matches if match is not None]


def _list_split(test_fraction: float, folder: Path, partition: str) -> list[Path]:
    """The share of `<folder>/*` whose names have the lowest hashes for testing, else the rest."""
    files = sorted(_videos_in(folder), key=lambda p: hashlib.sha256(p.name.encode()).digest())
    num_test = math.ceil(test_fraction * len(files) - 1e-9)
    return files[:num_test] if partition == "test" else files[num_test:]


@dataclass(frozen=True)
class FrameRate:
    """Which frames of a file count: one in `stride`, or `fps` per second of the file's time."""

    stride: int = 1
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.stride < 1 or (self.fps is not None and self.fps <= 0):
            raise ValueError("--frame_stride must be at least 1, --fps above 0")
        if self.stride > 1 and self.fps is not None:
            raise ValueError("--frame_stride and --fps exclude each other: choose one")

    def step(self, path: Path, file_fps: float | None) -> float:
        """Frames of the file from one frame to the next, at least 1.

        Raises ValueError where the file has no frame rate or a lower one.
        """
        if self.fps is None:
            return self.stride
        if file_fps is None:
            raise ValueError(f"{path}: has no frame rate: use --frame_stride instead of --fps")
        if file_fps < self.fps * (1 - 1e-6):
            raise ValueError(f"{path}: has {file_fps:g} frames a second, below --fps {self.fps:g}")
        return max(1.0, file_fps / self.fps)


@dataclass(frozen=True)
class DatasetSpec:
    """One data set.

    For a folder of one's own `name` is the last part of its path.
    """

    name: str
    folder: Path  # holds the videos; for the named sets relative to datasets/
    T: int  # frames of a video; the shortest one's where they differ
    image_size: int  # frames are given at this size
    file_size: int | None  # frames in the files have this size (None: any size)
    list_files: Callable[[Path, str], list[Path]] = _list_partition_folder
    how_to_make: str = ""
    frame_rate: FrameRate = FrameRate()
    skip_broken: bool = False  # leave out training videos that are broken or too short

    @property
    def root(self) -> Path:
        """The folder on disk; DATA_ROOT counts for the named sets alone."""
        return self.folder if self.folder.is_absolute() else paths.dataset_dir(str(self.folder))


DATASETS: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        DatasetSpec(
            "bouncy_balls",
            Path("bouncing_balls_100"),
            bouncy_balls.NUM_FRAMES,
            32,
            32,
            how_to_make="make it with `python datasets/bouncy_balls.py`",
        ),
        *(
            DatasetSpec(
                name,
                Path(f"{name}_{ray_mazes.IMAGE_SIZE}"),
                world.num_frames,
                ray_mazes.IMAGE_SIZE,
                ray_mazes.IMAGE_SIZE,
                how_to_make="it is made on first use",
            )
            for name, world in ray_mazes.WORLDS.items()
        ),
        DatasetSpec(
            "mazes_cwvae",
            Path("gqn_mazes-torch"),
            300,
            64,
            64,
            how_to_make="make it with `python datasets/mazes.py`",
        ),
        DatasetSpec(
            "minerl",
            Path("minerl_navigate-torch"),
            500,
            64,
            64,
            how_to_make="make it with `python datasets/minerl.py`",
        ),
        DatasetSpec(
            "memory_mazes",
            Path("memory_mazes"),
            300,
            64,
            64,
            how_to_make="make it with `python datasets/memory_mazes.py`",
        ),
        *(
            DatasetSpec(
                f"carla_{name.replace('-', '_')}",
                Path("carla") / name,
                1000,
                128,
                128,
                _list_csv,
                how_to_make="download it as datasets/README.md says",
            )
            for name in ("no-traffic", "with-traffic", "town02-no-traffic")
        ),
    )
}


def dataset_spec(
    name: str,
    *,
    image_size: int | None = None,
    frame_stride: int = 1,
    fps: float | None = None,
    test_fraction: float | None = None,
    skip_broken: bool = False,
) -> DatasetSpec:
    """The data set of a name in DATASETS, or of a folder with train/ and test/.

    Args:
        name: the name or the folder's path. A named set's videos are not looked at.
        image_size: scale the frames to this size (None: the size of the files).
        frame_stride: take one frame in so many.
        fps: take so many frames per second of the files' time.
        test_fraction: the videos lie in the folder itself; this share of them, in [0, 1], is
            for testing (None: they lie in train/ and test/).
        skip_broken: leave out training videos that are broken or too short, with a warning.

    Raises ValueError for an unknown name, impossible options, a folder with broken videos (all of
    them are named) or one whose videos differ in size or are not square while no image size is
    given.
    """
    if image_size is not None and image_size not in IMAGE_SIZES:
        raise ValueError(f"--image_size {image_size}: choose one of {IMAGE_SIZES}")
    rate = FrameRate(frame_stride, fps)
    if name in DATASETS:
        if fps is not None or test_fraction is not None:
            raise ValueError(f"--fps and --test_fraction are for folders of videos, not for {name}")
        spec = DATASETS[name]
        if name in ray_mazes.WORLDS and image_size is not None:  # rendered at any size
            folder = Path(f"{name}_{image_size}")
            spec = dataclasses.replace(spec, folder=folder, file_size=image_size)
        return dataclasses.replace(
            spec,
            T=video_io.subsampled_length(spec.T, frame_stride),
            image_size=image_size or spec.image_size,
            frame_rate=rate,
            skip_broken=skip_broken,
        )
    if not name or not Path(name).is_dir():
        names = ", ".join(DATASETS)
        raise ValueError(f"unknown data set {name!r}: choose {names} or a folder of videos")
    folder = Path(name).resolve()
    list_files = _list_partition_folder
    if test_fraction is not None:
        if not 0 <= test_fraction <= 1:
            raise ValueError(f"--test_fraction {test_fraction}: must be in [0, 1]")
        list_files = functools.partial(_list_split, test_fraction)
    spec = DatasetSpec(
        folder.name, folder, 0, 0, None, list_files, frame_rate=rate, skip_broken=skip_broken
    )
    return _measure_folder(spec, image_size)


def _measure_folder(spec: DatasetSpec, image_size: int | None) -> DatasetSpec:
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
        if len(sizes) > 1 or height != width or height not in IMAGE_SIZES:
            raise ValueError(
                f"{spec.root}: has videos of {height}x{width}"
                f"{' and other sizes' * (len(sizes) > 1)}: give --image_size, one of {IMAGE_SIZES}"
            )
        image_size = height
    shortest = min(shape[0] for shape in shapes.values())
    return dataclasses.replace(spec, T=shortest, image_size=image_size)


def sorted_files(files: Iterable[Path]) -> list[Path]:
    """By the last number in the name, then by name; names without a number come last."""

    def key(path: Path) -> tuple[float, str]:
        numbers = re.findall(r"\d+", path.stem)
        return (int(numbers[-1]) if numbers else float("inf"), path.name)

    return sorted(files, key=key)


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
    if old and file.is_file() and old[0] == list(_stamp(file)):
        return old
    video = video_io.open_video(file)
    return [list(_stamp(file)), list(video.shape), video.fps]


def _stamp(file: Path) -> tuple[int, int]:
    """Size and time of change: another stamp means other contents."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


# ---------------------------------------------------------------- making and finding files


def prepare_dataset(name: str, image_size: int | None = None) -> None:
    """Make bouncy_balls, colour_mazes or maze_laps on first use; see that any other set is there.

    Several processes may call this at once: one builds, the others wait.

    Raises FileNotFoundError that says how to make a missing data set.
    """
    if name not in DATASETS:
        return  # a folder of one's own: dataset_spec has looked at it
    spec = dataset_spec(name, image_size=image_size)
    if spec.root.is_dir():
        return
    if name != "bouncy_balls" and name not in ray_mazes.WORLDS:
        raise FileNotFoundError(
            f"{spec.root}: the data set {name} is missing; {spec.how_to_make}, "
            "or set DATA_ROOT to the folder that holds datasets/ "
            "(--cache_dir is for copying files to a faster disk on use)"
        )
    spec.root.parent.mkdir(parents=True, exist_ok=True)
    with _file_lock(spec.root):
        if not spec.root.is_dir():
            _build(spec)


def _build(spec: DatasetSpec) -> None:
    """Build beside the final place and rename: the folder appears whole or not at all."""
    root = spec.root
    logger.info("making the data set %s in %s", spec.name, root)
    temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}.", suffix=".tmp", dir=root.parent))
    try:
        if spec.name in ray_mazes.WORLDS:
            ray_mazes.make_dataset(spec.name, temporary, size=spec.image_size)
        else:
            bouncy_balls.make_dataset(temporary)
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

    With `cache_dir` every file is copied below that folder on first use, and read there.
    Raises FileNotFoundError where there are none.
    """

    def __init__(
        self, spec: DatasetSpec, partition: str, cache_dir: str | os.PathLike[str] | None = None
    ) -> None:
        self.spec = spec
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.paths = sorted_files(spec.list_files(spec.root, partition))
        if not self.paths:
            raise FileNotFoundError(f"{spec.root}: no videos in the partition {partition}")

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
