"""Data sets of videos: training items, the order of training, test videos.

Frames are uint8 here; the training loop turns them into [-1, 1] on the device.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from improved_diffusion.data.dataset_files import (
    VideoFiles,
    dataset_spec,
    prepare_dataset,
    require_length,
)
from improved_diffusion.data.dataset_specs import DatasetSpec
from improved_diffusion.data.frame_masks import create_mask_distribution
from improved_diffusion.data.walks import load_period
from improved_diffusion.registry import DATASETS

logger = logging.getLogger(__name__)

__all__ = [
    "DATASETS",
    "DatasetSpec",
    "ShardedSampler",
    "TrainDataset",
    "VideoTestSet",
    "dataset_spec",
    "get_test_dataset",
    "get_train_dataset",
    "prepare_dataset",
]


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class ItemRecipe:
    """How a training item is drawn from a video.

    Raises ValueError for T or max_frames below 1.
    """

    T: int  # frames of the random window that is trained on
    max_frames: int  # K, frames of an item
    seed: int = 0  # of everything random
    pad_with_random_frames: bool = True  # fill up with frames of another video instead of zeros
    mask_distribution: str = "published"  # a name in MASK_DISTRIBUTIONS
    mask_options: Any = None  # its own: an instance of its `Options`, a mapping, or None

    def __post_init__(self) -> None:
        if self.T < 1 or self.max_frames < 1:
            sizes = f"--T {self.T}, --max_frames {self.max_frames}"
            raise ValueError(f"{sizes}: both must be at least 1")


class TrainDataset(Dataset[dict[str, torch.Tensor]]):
    """Training items, each a function of (seed, epoch, index) alone.

    An item has K = max_frames frames: observed ones first, then latent ones, then padding, which
    is in neither mask. Keys:
        frames: uint8 [K, 3, H, W]; padding is random frames of another video, or zeros.
        frame_indices: int64 [K], positions in the window of T frames.
        obs_mask, latent_mask: float32 [K, 1, 1, 1], 0 or 1.
    """

    def __init__(self, files: VideoFiles, recipe: ItemRecipe) -> None:
        self.files, self.recipe = files, recipe
        self.T, self.max_frames = recipe.T, recipe.max_frames
        self.draw_frames = create_mask_distribution(recipe.mask_distribution, recipe.mask_options)
        self._faults: set[str] = set()  # what was found by this process and left out

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        """The item of video `index` in epoch `epoch`; key: (epoch, index).

        With the data set's `skip_broken` the next good video stands in for one whose header was
        good but whose frames are not. Else raises ValueError that names a broken file.
        """
        epoch, index = key
        for stand_in in range(index, index + len(self)):
            try:
                return self._item(epoch, stand_in % len(self))
            except ValueError as error:
                if not self.files.spec.skip_broken:
                    raise
                fault = str(error)
            if fault not in self._faults:
                self._faults.add(fault)
                logger.warning("left out, number %d of this process: %s", len(self._faults), fault)
        raise ValueError(f"{self.files.spec.root}: no training video can be read")

    def _item(self, epoch: int, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.recipe.seed, epoch, index])
        observed, latent = self.draw_frames(self.T, self.max_frames, rng)
        indices = np.concatenate([observed, latent])
        frames = self._read_window(index, indices, rng)
        num_padding = self.max_frames - len(indices)
        if num_padding:
            pad_frames, pad_indices = self._padding(index, num_padding, frames, rng)
            frames = np.concatenate([frames, pad_frames])
            indices = np.concatenate([indices, pad_indices])
        role = np.arange(self.max_frames).reshape(-1, 1, 1, 1)
        is_observed = role < len(observed)
        is_latent = ~is_observed & (role < len(observed) + len(latent))
        return {
            "frames": torch.from_numpy(frames),
            "frame_indices": torch.from_numpy(indices),
            "obs_mask": torch.from_numpy(is_observed.astype(np.float32)),
            "latent_mask": torch.from_numpy(is_latent.astype(np.float32)),
        }

    def _read_window(self, index: int, indices: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The frames `indices` of a random window of T frames of video `index`."""
        video = self.files.open(index)
        length = video.shape[0]
        require_length(video.path, length, self.T)
        return self.files.read(video, rng.integers(length - self.T + 1) + indices)

    def _padding(
        self, index: int, number: int, frames: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """(frames, frame indices) that fill up an item of video `index`.

        Distinct frames where the window has enough; of the same video where it is the only one.
        """
        if not self.recipe.pad_with_random_frames:
            return np.zeros((number, *frames.shape[1:]), np.uint8), np.zeros(number, np.int64)
        other = (index + int(rng.integers(1, max(2, len(self))))) % len(self)
        indices = rng.choice(self.T, size=number, replace=number > self.T)
        return self._read_window(other, indices, rng), indices


def _resolve(name: str | DatasetSpec, image_size: int | None) -> DatasetSpec:
    """The spec of a data set whose files are there."""
    if isinstance(name, DatasetSpec):
        spec = name.at_size(image_size)
    else:
        spec = dataset_spec(name, image_size=image_size)
    prepare_dataset(spec)
    return spec


def get_train_dataset(
    name: str | DatasetSpec,
    *,
    image_size: int | None = None,
    cache_dir: str | None = None,
    names: Sequence[str] | None = None,
    **recipe: Any,
) -> TrainDataset:
    """The training items of a data set.

    Args:
        name: a name in DATASETS, a folder of videos, or what `dataset_spec` made of it.
        image_size: None: that of the data set.
        cache_dir: copy files below this folder on first use, and read them there.
        names: the `VideoFiles.names` of the same data set as another process made it.
        recipe: the fields of ItemRecipe; T and max_frames must be given.

    The headers of all training videos are looked at, unless `names` says that somebody has.

    Raises ValueError as ItemRecipe, and naming all videos that are broken, of another size than
    their set or shorter than T, and as `dataset_spec`; FileNotFoundError as `prepare_dataset`.
    """
    items = ItemRecipe(**recipe)
    files = VideoFiles(_resolve(name, image_size), "train", cache_dir, names=names)
    if names is None:
        files.check_training_videos(items.T)
    return TrainDataset(files, items)


class ShardedSampler(Sampler[tuple[int, int]]):
    """One rank's share of an endless stream of keys (epoch, index).

    The stream of all ranks is one seeded permutation of the videos per epoch, end to end; rank r
    takes the positions start + r, start + r + world_size, ... So no key is lost or met twice, and
    a run that has consumed n keys on all ranks together goes on exactly with start=n.

    Raises ValueError for an empty data set, a rank outside [0, world_size) or start < 0.
    """

    def __init__(
        self, num_videos: int, *, rank: int, world_size: int, seed: int, start: int = 0
    ) -> None:
        if num_videos < 1 or not 0 <= rank < world_size or start < 0:
            raise ValueError(f"cannot shard {num_videos} videos: {rank=}, {world_size=}, {start=}")
        self.num_videos = num_videos
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position = self.start + self.rank
        current = -1
        while True:
            epoch, place = divmod(position, self.num_videos)
            if epoch != current:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.num_videos)
                current = epoch
            yield epoch, int(order[place])
            position += self.world_size


# ---------------------------------------------------------------- testing


class VideoTestSet:
    """Test videos in a fixed order: by the number in the file's name, then by name."""

    def __init__(self, files: VideoFiles, T: int) -> None:
        self.files = files
        self.name = files.spec.name
        self.T = T

    def __len__(self) -> int:
        return len(self.files)

    def length(self, i: int) -> int:
        """Frames in the file of video i, perhaps fewer than T."""
        return self.files.open(i).shape[0]

    def read(self, i: int, frame_indices: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Frames of video i: uint8 [n, 3, H, W].

        Args:
            i: index of the video in [0, len(self)).
            frame_indices: n frames of the file (None: the first T, or all where it has fewer).

        Raises ValueError for an index outside the video or a broken file.
        """
        video = self.files.open(i)
        if frame_indices is None:
            frame_indices = range(min(self.T, video.shape[0]))
        return self.files.read(video, frame_indices)

    def period(self, i: int) -> int:
        """Frames after which video i repeats itself; 0: not known.

        Raises ValueError where a period of the file is none of the frames that are read.
        """
        path, stride = self.files.paths[i], self.files.spec.frame_rate.stride
        period, rest = divmod(load_period(path), stride)
        if rest:
            raise ValueError(
                f"--frame_stride {stride}: {path} repeats itself after {period * stride + rest} "
                "frames, which it does not divide"
            )
        return period


def get_test_dataset(
    name: str | DatasetSpec,
    *,
    T: int | None = None,
    image_size: int | None = None,
    partition: str = "test",
    cache_dir: str | os.PathLike[str] | None = None,
) -> VideoTestSet:
    """The videos of one partition of a data set, from their first frame on.

    Args:
        name: a name in DATASETS, a folder of videos, or what `dataset_spec` made of it.
        T: frames of a video (None: the data set's); may be more than the files have.
        image_size: None: that of the data set.
        partition: "test" or "train".
        cache_dir: copy files below this folder on first use, and read them there.

    Raises ValueError as `dataset_spec`, FileNotFoundError as `prepare_dataset`.
    """
    spec = _resolve(name, image_size)
    return VideoTestSet(VideoFiles(spec, partition, cache_dir), spec.T if T is None else T)


def choose_videos(
    num_videos: int, *, indices: Sequence[int] | None, subset_size: int | None
) -> list[int]:
    """The videos that --indices or --subset_size choose of a data set, in order.

    `subset_size` takes the first of one fixed permutation, the same for every run. Raises
    ValueError for an index or a size out of range.
    """
    if indices is not None:
        for index in indices:
            if not 0 <= index < num_videos:
                raise ValueError(
                    f"--indices {index}: the data set has videos 0 to {num_videos - 1}"
                )
        return list(dict.fromkeys(indices))
    if subset_size is not None:
        if not 1 <= subset_size <= num_videos:
            raise ValueError(f"--subset_size {subset_size}: the data set has {num_videos} videos")
        return [int(i) for i in np.random.RandomState(0).permutation(num_videos)[:subset_size]]
    return list(range(num_videos))
