"""Which data sets there are, where their files lie, and how missing ones are made. No torch here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from improved_diffusion import bouncy_balls, paths, video_io

logger = logging.getLogger(__name__)

IMAGE_SIZES = (32, 64, 128, 256)  # the sizes that the network knows
CSV_LINE = re.compile(r"\d+,(.+)")


# ---------------------------------------------------------------- which data sets there are


def _list_partition_folder(folder: Path, partition: str) -> list[Path]:
    """`<folder>/<partition>/*`, whatever the format."""
    if not (folder / partition).is_dir():
        raise FileNotFoundError(f"{folder / partition}: no such folder; put the videos there")
    return [p for p in (folder / partition).iterdir() if p.suffix.lower() in video_io.READERS]


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

    @property
    def root(self) -> Path:
        """The folder on disk; DATA_ROOT counts for the named sets alone."""
        return paths.dataset_dir(str(self.folder)) if self.name in DATASETS else self.folder


DATASETS: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        DatasetSpec(
            "bouncy_balls", Path("bouncing_balls_100"), bouncy_balls.NUM_FRAMES, 32, 32,
            how_to_make="make it with `python datasets/bouncy_balls.py`",
        ),
        DatasetSpec(
            "mazes_cwvae", Path("gqn_mazes-torch"), 300, 64, 64,
            how_to_make="make it with `python datasets/mazes.py`",
        ),
        DatasetSpec(
            "minerl", Path("minerl_navigate-torch"), 500, 64, 64,
            how_to_make="make it with `python datasets/minerl.py`",
        ),
        DatasetSpec(
            "carla_no_traffic", Path("carla/no-traffic"), 1000, 128, 128, _list_csv,
            how_to_make="download it as datasets/README.md says",
        ),
    )
}


def dataset_spec(name: str, *, image_size: int | None = None) -> DatasetSpec:
    """The data set of a name in DATASETS, or of a folder with train/ and test/.

    Args:
        name: the name or the folder's path. A named set's videos are not looked at.
        image_size: scale the frames to this size (None: the size of the files).

    Raises ValueError for an unknown name, an impossible image size, or a folder whose videos
    differ in size or are not square while no image size is given.
    """
    if image_size is not None and image_size not in IMAGE_SIZES:
        raise ValueError(f"--image_size {image_size}: choose one of {IMAGE_SIZES}")
    if name in DATASETS:
        spec = DATASETS[name]
        return spec if image_size is None else dataclasses.replace(spec, image_size=image_size)
    if name and Path(name).is_dir():
        return _folder_spec(Path(name), image_size)
    names = ", ".join(DATASETS)
    raise ValueError(f"unknown data set {name!r}: choose {names} or a folder of videos")


def _folder_spec(folder: Path, image_size: int | None) -> DatasetSpec:
    """The data set of a folder of one's own: lengths and sizes are those of its videos."""
    shapes: dict[Path, tuple[int, int, int]] = {}
    for partition in ("train", "test"):
        if (folder / partition).is_dir():
            shapes |= _video_shapes(folder, _list_partition_folder(folder, partition))
    if not shapes:
        formats = ", ".join(sorted(video_io.READERS))
        raise FileNotFoundError(f"{folder}: no videos ({formats}) in its folders train/ or test/")
    if image_size is None:
        sizes = {shape[1:] for shape in shapes.values()}
        height, width = min(sizes)
        if len(sizes) > 1 or height != width or height not in IMAGE_SIZES:
            raise ValueError(
                f"{folder}: has videos of {height}x{width}{' and other sizes' * (len(sizes) > 1)}: "
                f"give --image_size, one of {IMAGE_SIZES}"
            )
        image_size = height
    shortest = min(shape[0] for shape in shapes.values())
    return DatasetSpec(folder.resolve().name, folder.resolve(), shortest, image_size, None)


def sorted_files(files: Iterable[Path]) -> list[Path]:
    """By the last number in the name, then by name; names without a number come last."""

    def key(path: Path) -> tuple[float, str]:
        numbers = re.findall(r"\d+", path.stem)
        return (int(numbers[-1]) if numbers else float("inf"), path.name)

    return sorted(files, key=key)


def _video_shapes(folder: Path, files: list[Path]) -> dict[Path, tuple[int, int, int]]:
    """{file: (T, H, W)}, kept in `<folder>/.video_index.json`; changed files are read again."""
    from tqdm import tqdm

    index_path = folder / ".video_index.json"
    with _file_lock(index_path):
        try:
            index = json.loads(index_path.read_text())
        except (OSError, ValueError):
            index = {}
        names = {file: f"{file.parent.name}/{file.name}" for file in files}
        stamps = {file: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
        new = [file for file in files if index.get(names[file], [None])[0] != stamps[file]]
        for file in tqdm(new, desc=f"indexing {folder.name}", unit="video", disable=len(new) < 100):
            index[names[file]] = [stamps[file], video_io.open_video(file).shape]
        if new:
            # A folder that cannot be written to only costs time.
            with contextlib.suppress(OSError), paths.atomic_write(index_path) as output:
                output.write(json.dumps(index).encode())
    return {file: tuple(index[names[file]][1]) for file in files}


# ---------------------------------------------------------------- making and finding files


def prepare_dataset(name: str) -> None:
    """Make bouncy_balls on first use; see that any other data set is there.

    Several processes may call this at once: one builds, the others wait.

    Raises FileNotFoundError that says how to make a missing data set.
    """
    if name not in DATASETS:
        return  # a folder of one's own: dataset_spec has looked at it
    spec = DATASETS[name]
    if spec.root.is_dir():
        return
    if name != "bouncy_balls":
        raise FileNotFoundError(
            f"{spec.root}: the data set {name} is missing; {spec.how_to_make}, "
            "or set DATA_ROOT to the folder that holds datasets/"
        )
    spec.root.parent.mkdir(parents=True, exist_ok=True)
    with _file_lock(spec.root):
        if not spec.root.is_dir():
            _build_bouncy_balls(spec.root)


def _build_bouncy_balls(root: Path) -> None:
    """Build beside the final place and rename: the folder appears whole or not at all."""
    logger.info("making the data set bouncy_balls in %s", root)
    temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}.", suffix=".tmp", dir=root.parent))
    try:
        bouncy_balls.make_dataset(temporary)
        temporary.chmod(root.parent.stat().st_mode & 0o777)
        with contextlib.suppress(OSError):  # another process was quicker, where locks do not work
            os.rename(temporary, root)
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


class VideoFiles:
    """The videos of one partition of a data set.

    Raises FileNotFoundError where there are none.
    """

    def __init__(self, spec: DatasetSpec, partition: str) -> None:
        self.spec = spec
        self.paths = sorted_files(spec.list_files(spec.root, partition))
        if not self.paths:
            raise FileNotFoundError(f"{spec.root}: no videos in the partition {partition}")

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, i: int) -> video_io.OpenVideo:
        """Open video i.

        Raises ValueError that names the file where it is broken or of another size than its set.
        """
        video = video_io.open_video(self.paths[i])
        _, height, width = video.shape
        need = self.spec.file_size
        if need is not None and (height, width) != (need, need):
            raise ValueError(
                f"{video.path}: is {height}x{width}, videos of {self.spec.name} are {need}x{need}"
            )
        return video

    def read(
        self, video: video_io.OpenVideo, frame_indices: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """uint8 [n, 3, H, W]: n frames at the data set's size. Raises as `OpenVideo.read`."""
        frames = video_io.centre_crop_resize(video.read(frame_indices), self.spec.image_size)
        return np.ascontiguousarray(frames.transpose(0, 3, 1, 2))

    def check_length(self, T: int) -> None:
        """Raise ValueError naming a video that is shorter than T frames.

        Looks at every video of a folder of one's own, else at the first: the others are checked
        when they are read.
        """
        if self.spec.file_size is None:
            shapes = _video_shapes(self.spec.root, self.paths)
            shortest = min(self.paths, key=lambda path: shapes[path][0])
            require_length(shortest, shapes[shortest][0], T)
        else:
            require_length(self.paths[0], self.open(0).shape[0], T)


def require_length(path: Path, length: int, T: int) -> None:
    """Raise ValueError that names a video of fewer than T frames."""
    if length < T:
        raise ValueError(
            f"{path}: has {length} frames, need T={T}: give a smaller --T or remove the file"
        )
