"""What a data set is, and those that have a name. No torch here.

A named set is a `DatasetSpec` here and its line in `registry.DATASETS`. Where its files can be
generated, `make` writes them on first use.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from improved_diffusion import bouncy_balls
from improved_diffusion.data import paths, ray_mazes, video_io

CSV_LINE = re.compile(r"\d+,(.+)")


# ---------------------------------------------------------------- the files of a partition


def sorted_files(files: Iterable[Path]) -> list[Path]:
    """By the last number in the name, then by name; names without a number come last."""

    def key(path: Path) -> tuple[float, str]:
        numbers = re.findall(r"\d+", path.stem)
        return (int(numbers[-1]) if numbers else float("inf"), path.name)

    return sorted(files, key=key)


def list_partition_folder(folder: Path, partition: str) -> list[Path]:
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


def list_csv(folder: Path, partition: str) -> list[Path]:
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


def list_split(test_fraction: float, folder: Path, partition: str) -> list[Path]:
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
        if self.stride < 1 or (self.fps is not None and not 0 < self.fps < math.inf):
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
    # Holds the videos; for the named sets relative to datasets/. With `made_sizes` it may hold
    # "{image_size}".
    folder: Path
    T: int  # frames of a video; the shortest one's where they differ
    image_size: int  # frames are given at this size
    file_size: int | None  # frames in the files have this size (None: any size)
    list_files: Callable[[Path, str], list[Path]] = list_partition_folder
    how_to_make: str = ""  # told where the folder is missing and there is no `make`
    # Fills an empty folder with files of an image size: train/, test/, and what else belongs to it.
    make: Callable[[Path, int], None] | None = None
    made_sizes: tuple[int, ...] = ()  # image sizes with files of their own; (): one set of files
    frame_rate: FrameRate = FrameRate()
    skip_broken: bool = False  # leave out training videos that are broken or too short
    summary: str = ""  # a line of --help, where the registry has none

    @property
    def root(self) -> Path:
        """The folder on disk; DATA_ROOT counts for the named sets alone."""
        folder = self.folder
        if self.made_sizes:
            folder = Path(str(folder).format(image_size=self.image_size))
        return folder if folder.is_absolute() else paths.dataset_dir(str(folder))

    def at_size(self, image_size: int | None) -> DatasetSpec:
        """The same with frames of this size (None: as they are).

        Raises ValueError for a size that its files are not made in.
        """
        if image_size is None:
            return self
        if not self.made_sizes:
            return dataclasses.replace(self, image_size=image_size)
        if image_size not in self.made_sizes:
            raise ValueError(
                f"--image_size {image_size}: {self.name} is made in {self.made_sizes}: choose one"
            )
        return dataclasses.replace(self, image_size=image_size, file_size=image_size)


# ---------------------------------------------------------------- the named ones


def _make_bouncy_balls(folder: Path, image_size: int) -> None:
    bouncy_balls.make_dataset(folder)


def _ray_mazes(name: str) -> DatasetSpec:
    return DatasetSpec(
        name,
        Path(name + "_{image_size}"),
        ray_mazes.WORLDS[name].num_frames,
        ray_mazes.IMAGE_SIZE,
        ray_mazes.IMAGE_SIZE,
        make=functools.partial(ray_mazes.make_dataset, name),
        made_sizes=(16, 32, 64, 128, 256),
    )


def _carla(name: str) -> DatasetSpec:
    return DatasetSpec(
        f"carla_{name.replace('-', '_')}",
        Path("carla") / name,
        1000,
        128,
        128,
        list_csv,
        how_to_make="download it as datasets/README.md says",
    )


BOUNCY_BALLS = DatasetSpec(
    "bouncy_balls",
    Path("bouncing_balls_100"),
    bouncy_balls.NUM_FRAMES,
    bouncy_balls.IMAGE_SIZE,
    bouncy_balls.IMAGE_SIZE,
    make=_make_bouncy_balls,
)
COLOUR_MAZES = _ray_mazes("colour_mazes")
MAZE_LAPS = _ray_mazes("maze_laps")
MAZES_CWVAE = DatasetSpec(
    "mazes_cwvae",
    Path("gqn_mazes-torch"),
    300,
    64,
    64,
    how_to_make="make it with `python datasets/mazes.py`",
)
MINERL = DatasetSpec(
    "minerl",
    Path("minerl_navigate-torch"),
    500,
    64,
    64,
    how_to_make="make it with `python datasets/minerl.py`",
)
MEMORY_MAZES = DatasetSpec(
    "memory_mazes",
    Path("memory_mazes"),
    300,
    64,
    64,
    how_to_make="make it with `python datasets/memory_mazes.py`",
)
CARLA_NO_TRAFFIC = _carla("no-traffic")
CARLA_WITH_TRAFFIC = _carla("with-traffic")
CARLA_TOWN02_NO_TRAFFIC = _carla("town02-no-traffic")
