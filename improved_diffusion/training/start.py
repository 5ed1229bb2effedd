"""From training options to a run: the work of scripts/video_train.py."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable

import torch

from improved_diffusion import dist_util, fp16_util
from improved_diffusion.config import DataConfig, DiffusionConfig, ModelConfig, flat_options
from improved_diffusion.data.dataset_files import dataset_spec
from improved_diffusion.data.dataset_specs import DatasetSpec
from improved_diffusion.data.video_datasets import TrainDataset, get_train_dataset
from improved_diffusion.sampling.trained_model import create_diffusion, create_model, image_sizes
from improved_diffusion.train_util import Monitoring, TrainLoop
from improved_diffusion.training import run_lock, signals
from improved_diffusion.training.options import TrainConfig
from improved_diffusion.training.runs import describe_run, open_run, record_run
from improved_diffusion.training.train_data import held_out_items, item_options


def resolve_train_options(
    train: TrainConfig, data: DataConfig, model: ModelConfig
) -> tuple[TrainConfig, ModelConfig, DatasetSpec]:
    """The options with T and image_size as the data set has them, and the data set.

    An automatic precision becomes that of rank 0's device. All ranks must call; rank 0 alone looks at
    videos. Raises ValueError or FileNotFoundError for an unknown or missing data set.
    """
    sizes = image_sizes(model.network)
    find = functools.partial(
        dataset_spec, train.dataset, image_size=model.image_size, image_sizes=sizes, **vars(data)
    )

    def look() -> tuple[tuple[int, int], str]:
        found = find()
        precision = fp16_util.resolve_precision(train.precision, dist_util.dev())
        return (found.T, found.image_size), precision

    found = look() if dist_util.is_main() else ((0, 0), "")
    measured, precision = dist_util.broadcast_object(found, what="looking at the data set")
    spec = find(measured=measured)
    T = spec.T if train.T == -1 else train.T
    train = dataclasses.replace(train, T=T, precision=precision)
    return train, dataclasses.replace(model, image_size=spec.image_size), spec


def _on_all_ranks(make: Callable[..., TrainDataset], *, what: str) -> TrainDataset:
    """The data that `make` makes on rank 0; the others call it with the `names` found there."""
    own = make() if dist_util.is_main() else None
    names = dist_util.broadcast_object(own.files.names if own else None, what=what)
    return make(names=names) if own is None else own


def create_train_loop(
    train: TrainConfig, data: DataConfig, model: ModelConfig, diffusion: DiffusionConfig
) -> TrainLoop:
    """The training loop of these options, at the start or where its run was left.

    All ranks must call. Raises ValueError, FileNotFoundError or OSError for a user's mistake.
    """
    train, model, spec = resolve_train_options(train, data, model)
    items = _on_all_ranks(
        functools.partial(get_train_dataset, spec, cache_dir=data.cache_dir, **item_options(train)),
        what="the training videos",
    )
    valid_items = None
    if train.valid_interval:
        valid_items = _on_all_ranks(
            functools.partial(held_out_items, spec, train, data.cache_dir),
            what="the test videos",
        )
    stored = flat_options(train, data, model, diffusion)
    process = create_diffusion(diffusion)
    sample_steps = str(min(train.sample_steps, process.num_timesteps))
    sample_process = dataclasses.replace(diffusion, timestep_respacing=sample_steps)
    torch.manual_seed(train.seed)
    network = create_model(model)
    run = open_run(train, stored)
    record_run(run)
    return TrainLoop(
        network,
        process,
        items,
        train,
        run=run,
        monitoring=Monitoring(create_diffusion(sample_process), valid_items),
    )


def train_run(
    train: TrainConfig, data: DataConfig, model: ModelConfig, diffusion: DiffusionConfig
) -> bool:
    """Train as these options say; whether a signal ended it before its limit. All ranks must call."""
    try:
        return create_train_loop(train, data, model, diffusion).run_loop()
    except signals.Interrupted:
        return True
    finally:
        run_lock.release_all()


def dry_run(
    train: TrainConfig, data: DataConfig, model: ModelConfig, diffusion: DiffusionConfig
) -> None:
    """Print what the run's config.json would hold. All ranks must call."""
    train, model, _ = resolve_train_options(train, data, model)
    description = describe_run(flat_options(train, data, model, diffusion))
    if dist_util.is_main():
        print(json.dumps(description, indent=2))
