"""How training items reach the loop: one rank's batches, read by workers that outlive signals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch.utils.data import DataLoader, Dataset, default_collate

from improved_diffusion import dist_util
from improved_diffusion.data.dataset_files import VideoFiles, require_length
from improved_diffusion.data.dataset_specs import DatasetSpec
from improved_diffusion.data.video_datasets import ItemRecipe, ShardedSampler, TrainDataset
from improved_diffusion.training.options import TrainConfig
from improved_diffusion.training.signals import ignore_in_worker


def train_loader(data: TrainDataset, config: TrainConfig, position: int) -> DataLoader[Any]:
    """This rank's batches from `position` on, for ever.

    position: training items that all ranks together have consumed. A batch is the items stacked,
    or the ValueError or OSError that reading one of them raised.
    """
    keys = ShardedSampler(
        len(data),
        rank=dist_util.rank(),
        world_size=dist_util.world_size(),
        seed=config.seed,
        start=position,
    )
    on_gpu = dist_util.dev().type == "cuda"
    return DataLoader(
        _ItemsOrErrors(data),
        config.batch_size,
        sampler=keys,
        collate_fn=_collate,
        num_workers=_num_workers(config.num_workers, on_gpu),
        worker_init_fn=ignore_in_worker,
        pin_memory=on_gpu,
    )


def _num_workers(asked: int, on_gpu: bool) -> int:
    """The processes that read items: as many as asked for; -1: all cores but one.

    At least one then where a GPU trains: reading in this process would hold up its next kernels.
    """
    return asked if asked >= 0 else max(dist_util.cores() - 1, int(on_gpu))


def held_out_items(
    spec: DatasetSpec,
    config: TrainConfig,
    cache_dir: str | None,
    *,
    names: Sequence[str] | None = None,
) -> TrainDataset:
    """Items of the test videos, made like those of training, for --valid_interval.

    names: as for `get_train_dataset`. Raises ValueError for a test video that is broken or too short,
    now and not hours later.
    """
    files = VideoFiles(spec, "test", cache_dir, names=names)
    for index in range(min(config.valid_videos, len(files)) if names is None else 0):
        video = files.open(index)
        require_length(video.path, video.shape[0], config.T)
    return TrainDataset(files, ItemRecipe(**item_options(config)))


def item_options(config: TrainConfig) -> dict[str, Any]:
    """The training options that say how an item is drawn, by the names of ItemRecipe."""
    return {item.name: getattr(config, item.name) for item in fields(ItemRecipe)}


class _ItemsOrErrors(Dataset[Any]):
    """Training items, or what reading one raised: a worker would wrap that in its own traceback."""

    def __init__(self, data: TrainDataset) -> None:
        self.data = data

    def __getitem__(self, key: tuple[int, int]) -> Any:
        try:
            return self.data[key]
        except (ValueError, OSError) as error:
            return error


def _collate(items: list[Any]) -> Any:
    """A batch of the items, or the first error among them."""
    errors = [item for item in items if isinstance(item, Exception)]
    return errors[0] if errors else default_collate(items)
