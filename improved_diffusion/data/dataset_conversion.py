"""From the public releases of GQN-Mazes and MineRL-Navigate to this project's .npy folders.

Source of the releases: Saxena et al. 2021, "Clockwork Variational Autoencoders" (arXiv 2102.09532).
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from improved_diffusion.data import video_io
from improved_diffusion.data.dataset_specs import sorted_files
from improved_diffusion.data.paths import atomic_write
from improved_diffusion.registry import DATASETS

logger = logging.getLogger(__name__)

PARTITIONS = ("train", "test")


class Release(NamedTuple):
    """One partition of a release.

    `videos` yields (what to call the video in errors, a function that loads uint8 [T, H, W, 3]).
    """

    length: int
    videos: Iterator[tuple[str, Callable[[], np.ndarray]]]


SOURCE_FILE = "source.txt"  # beside train/ and test/: where the videos come from


def convert_release(name: str, source: Path) -> Path:
    """Write the data set `name` from a release in the folder `source`.

    Args:
        name: a name in DATASETS whose files are .npy.
        source: holds {train,test}/ with video files, or is the folder of a prepared
            tensorflow-datasets builder (with dataset_info.json in it).

    Returns: the data set's folder. It appears whole; an interrupted run is continued, and a
    finished one is left as it is.

    Raises FileNotFoundError for a missing source, ValueError for a broken or too short video.
    """
    spec = DATASETS[name]
    if spec.root.exists():
        logger.info("%s exists: nothing to do; remove it to convert %s again", spec.root, name)
        return spec.root
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; give the release's folder as --source")
    unfinished = spec.root.with_name(f"{spec.root.name}.partial")
    _claim(unfinished, source)
    read_release = _tfds_videos if (source / "dataset_info.json").is_file() else _file_videos
    for partition in PARTITIONS:
        release = read_release(source, partition)
        _write_partition(release, unfinished / partition, spec.T, spec.image_size)
    os.rename(unfinished, spec.root)
    return spec.root


def _claim(unfinished: Path, source: Path) -> None:
    """Say what the videos in the unfinished folder come from. Raises ValueError if from elsewhere."""
    said, now = unfinished / SOURCE_FILE, str(source.resolve())
    before = said.read_text() if said.exists() else None
    if before != now and any(unfinished.rglob("*.npy")):
        raise ValueError(
            f"{unfinished} holds videos of {before or 'another release'}, not of {now}: go on with that "
            "--source, or remove the folder"
        )
    if before != now:
        with atomic_write(said) as file:
            file.write(now.encode())


def _write_partition(release: Release, folder: Path, T: int, size: int) -> None:
    from tqdm import tqdm

    progress = tqdm(release.videos, desc=f"writing {folder}", total=release.length, unit="video")
    for i, (label, load) in enumerate(progress):
        path = folder / f"{i}.npy"
        if path.exists():
            continue
        video = load()
        if len(video) < T:
            raise ValueError(f"{label}: has {len(video)} frames, need {T}: download it again")
        with atomic_write(path) as file:
            np.save(file, video_io.centre_crop_resize(video, size))


def _file_videos(source: Path, partition: str) -> Release:
    """The video files in `<source>/<partition>/`, ordered by the number in their names."""
    folder = source / partition
    files = sorted_files(p for p in folder.glob("*") if p.suffix.lower() in video_io.READERS)
    if not files:
        raise FileNotFoundError(f"{folder}: no video files; --source must hold train/ and test/")
    return Release(len(files), ((str(f), partial(video_io.read_video, f)) for f in files))


def _tfds_videos(source: Path, partition: str) -> Release:
    """The feature `video` of a prepared tensorflow-datasets builder."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise ValueError(
            f"{source}: reading it needs tensorflow-datasets: pip install tensorflow-datasets"
        ) from None
    builder = tfds.builder_from_directory(str(source))
    if partition not in builder.info.splits:
        raise ValueError(f"{source}: has no split {partition}")
    examples = tfds.as_numpy(builder.as_dataset(split=partition))
    return Release(
        builder.info.splits[partition].num_examples,
        (
            (f"{source}, {partition} video {i}", partial(example.__getitem__, "video"))
            for i, example in enumerate(examples)
        ),
    )


def run(name: str, argv: Sequence[str] | None = None) -> None:
    """The command `datasets/<...>.py` of the data set `name`."""
    spec = DATASETS[name]
    parser = argparse.ArgumentParser(
        description=f"Convert the release of {name} to {spec.root}/{{train,test}}/<i>.npy."
    )
    parser.add_argument(
        "--source",
        type=Path,
        required=True,
        help="folder with train/ and test/ of video files (such as .mp4), or the folder of a "
        "prepared tensorflow-datasets builder (the one that holds dataset_info.json)",
    )
    print(convert_release(name, parser.parse_args(argv).source))
