"""From command-line flags to option dataclasses, and from those to models. Torch is imported late."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from improved_diffusion.config import (
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    TrainConfig,
    defaults,
    from_options,
    option_groups,
)

if TYPE_CHECKING:
    import torch

    from improved_diffusion.data.checkpoints import WeightsFile
    from improved_diffusion.data.dataset_files import DatasetSpec
    from improved_diffusion.respace import SpacedDiffusion
    from improved_diffusion.train_util import TrainLoop
    from improved_diffusion.unet import UNetVideoModel

Config = TypeVar("Config")

# What a user's mistake or the machine's state raises; anything else is a defect and shows its traceback.
USER_ERRORS = (ValueError, OSError)


def str2bool(text: str) -> bool:
    """True/False, yes/no, 1/0 in any case; anything else is an argparse error."""
    if text.lower() in ("true", "yes", "y", "t", "1"):
        return True
    if text.lower() in ("false", "no", "n", "f", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def _value_type(hint: Any) -> Callable[[str], Any]:
    """The parser of one value: the first type of an `X | None`."""
    if isinstance(hint, types.UnionType):
        hint = typing.get_args(hint)[0]
    return str2bool if hint is bool else hint


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows descriptions as they are; the lines after an option's first help line are a list."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        first, *items = text.splitlines()
        lines = textwrap.wrap(" ".join(first.split()), width)
        for item in items:
            lines += textwrap.wrap(item, width, initial_indent="  ", subsequent_indent="      ")
        return lines


def add_arguments(
    parser: argparse.ArgumentParser, *groups: type, leave_out: Collection[str] = ()
) -> None:
    """Add one flag per field of the option groups; a name that two groups share is added once.

    A field of `config.owned_options` adds the flags of all things in its registry.
    """
    parser.formatter_class = HelpFormatter
    for group in groups:
        hints = typing.get_type_hints(group)
        for item in dataclasses.fields(group):
            if "owned_by" in item.metadata:
                owned = option_groups(item.metadata["owned_by"])
                add_arguments(parser, *owned, leave_out=leave_out)
            elif item.name not in {*leave_out, *(action.dest for action in parser._actions)}:
                _add_argument(parser, item, hints[item.name])


def _add_argument(parser: argparse.ArgumentParser, item: dataclasses.Field[Any], hint: Any) -> None:
    meta, choices = item.metadata, item.metadata.get("choices")
    required = item.default is dataclasses.MISSING
    help_text = meta["help"]
    if not required and item.default not in (None, ""):
        shown = " ".join(item.default) if isinstance(item.default, tuple) else item.default
        help_text += f" [{shown}]"
    if hasattr(choices, "help"):  # a registry: what its names are stands below
        help_text += f"\n{choices.help()}"
    options: dict[str, Any] = {"help": help_text.replace("%", "%%")}
    if meta.get("positional"):
        parser.add_argument(item.name, **options)
        return
    options |= {"required": True} if required else {"default": item.default}
    if meta.get("nargs"):
        options |= _list_parsing(meta, is_text=hint is str)
    else:
        options["type"] = _value_type(hint)
        if not hasattr(
            choices, "help"
        ):  # names of a registry are checked by the dataclass, in one line
            options["choices"] = choices
    if meta.get("flag"):  # `--optimal` and `--optimal True` are both fine
        options |= {"nargs": "?", "const": True}
    parser.add_argument(f"--{item.name}", **options)


def _list_parsing(meta: Mapping[str, Any], *, is_text: bool) -> dict[str, Any]:
    """How argparse reads a list: items apart by spaces, each of which may be a comma list.

    The value is a tuple of `item_type`, or, for an option that is a text, that comma list.
    """
    item_type = meta.get("item_type", str)

    def items_of(text: str) -> Any:
        if not meta.get("commas", True):
            return [item_type(text)]
        items = [item_type(part.strip()) for part in text.split(",") if part.strip()]
        return ",".join(items) if is_text else items

    items_of.__name__ = item_type.__name__  # which argparse names in errors

    class StoreList(argparse.Action):
        def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
            joined = ",".join(filter(None, values)) if is_text else tuple(sum(values, []))
            setattr(namespace, self.dest, joined)

    return {"nargs": meta["nargs"], "type": items_of, "action": StoreList}


def parse_with_config(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse options, taking those not given from the file of --config.

    Raises ValueError or FileNotFoundError for a file that is no config.json of a run.
    """
    actions = {action.dest: action for action in parser._actions}
    required = [action for action in actions.values() if action.required]
    for action in required:
        action.required = False
    path = parser.parse_args(argv).config
    options = {}
    if path:
        from improved_diffusion.training.runs import options_of

        options = options_of(path, actions)
    for name, value in options.items():
        choices, default = actions[name].choices, actions[name].default
        if (choices and value not in (default, *choices)) or (value is None) > (default is None):
            raise ValueError(f"--config {path}: {name} cannot be {value!r}")
    # As text, so that argparse checks the types.
    parser.set_defaults(**{k: v if v is None else str(v) for k, v in options.items()})
    for action in required:
        action.required = action.dest not in options
    return parser.parse_args(argv)


def config_from_args(group: type[Config], args: argparse.Namespace | dict[str, Any]) -> Config:
    """An option dataclass from parsed flags or a stored flat dict; see `config.from_options`."""
    return from_options(group, args if isinstance(args, dict) else vars(args))


def run_main(main: Callable[[], Any]) -> NoReturn:
    """Run a script's main: a user's mistake ends in one line and exit code 1, on every rank.

    A failing rank ends the whole run, so that no other waits for it for ever.
    """
    from improved_diffusion import dist_util

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    dist_util.keep_freed_memory()
    try:
        main()
    except USER_ERRORS as error:
        print(
            f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(error).split())}",
            file=sys.stderr,
        )
        dist_util.abort(1)
    except (Exception, KeyboardInterrupt):
        import traceback

        traceback.print_exc()
        dist_util.abort(1)
    sys.exit(0)


# ---------------------------------------------------------------- models


def model_and_diffusion_defaults() -> dict[str, Any]:
    """{option: default} of the model and the diffusion process."""
    return defaults(ModelConfig, DiffusionConfig)


def create_model_and_diffusion(**options: Any) -> tuple[UNetVideoModel, SpacedDiffusion]:
    """The network and the diffusion process for options of `model_and_diffusion_defaults`.

    Raises ValueError for an unknown option or an illegal value. image_size must be given.
    """
    unknown = sorted(set(options) - set(model_and_diffusion_defaults()))
    if unknown:
        raise ValueError(f"unknown model or diffusion option {', '.join(unknown)}")
    return create_model(config_from_args(ModelConfig, options)), create_diffusion(
        config_from_args(DiffusionConfig, options)
    )


def create_model(config: ModelConfig) -> UNetVideoModel:
    """The network of `config`, freshly initialised by torch's global generator."""
    from improved_diffusion.unet import UNetVideoModel

    return UNetVideoModel(config)


def create_diffusion(config: DiffusionConfig) -> SpacedDiffusion:
    """The diffusion process of `config`, respaced as it says."""
    from improved_diffusion.respace import SpacedDiffusion

    return SpacedDiffusion(config)


def resolve_train_options(
    train: TrainConfig, data: DataConfig, model: ModelConfig
) -> tuple[TrainConfig, ModelConfig, DatasetSpec]:
    """The options with T and image_size as the data set has them, and the data set.

    Raises ValueError or FileNotFoundError for an unknown or missing data set.
    """
    from improved_diffusion.data.dataset_files import dataset_spec

    reading = {key: value for key, value in vars(data).items() if key != "cache_dir"}
    spec = dataset_spec(train.dataset, image_size=model.image_size, **reading)
    train = dataclasses.replace(train, T=spec.T if train.T == -1 else train.T)
    return train, dataclasses.replace(model, image_size=spec.image_size), spec


def create_train_loop(
    train: TrainConfig, data: DataConfig, model: ModelConfig, diffusion: DiffusionConfig
) -> TrainLoop:
    """The training loop of these options, at the start or where its run was left.

    All ranks must call. Raises ValueError, FileNotFoundError or OSError for a user's mistake.
    """
    import torch

    from improved_diffusion.data.video_datasets import get_train_dataset
    from improved_diffusion.train_util import Measures, TrainLoop
    from improved_diffusion.training.runs import open_run, record_run
    from improved_diffusion.training.train_data import held_out_items

    train, model, spec = resolve_train_options(train, data, model)
    items = get_train_dataset(
        spec,
        T=train.T,
        max_frames=train.max_frames,
        seed=train.seed,
        pad_with_random_frames=train.pad_with_random_frames,
        cache_dir=data.cache_dir,
    )
    valid_items = held_out_items(spec, train, data.cache_dir) if train.valid_interval else None
    stored = {**vars(train), **vars(data), **vars(model), **vars(diffusion)}
    process = create_diffusion(diffusion)
    sample_steps = str(min(train.sample_steps, process.num_timesteps))
    sample_process = dataclasses.replace(diffusion, timestep_respacing=sample_steps)
    torch.manual_seed(train.seed)
    network = create_model(model)
    run = open_run(train, stored)
    record_run(run, stored)
    return TrainLoop(
        network,
        process,
        items,
        train,
        run=run,
        measures=Measures(create_diffusion(sample_process), valid_items),
    )


def default_device(name: str = "") -> str:
    """`name`, or cuda where there is a GPU, else cpu."""
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def load_model(path: str, device: str = "cpu") -> tuple[torch.nn.Module, dict[str, Any], int]:
    """(network in eval mode, flat config, step) of a model or EMA checkpoint.

    Half-precision weights are cast to float32. Raises FileNotFoundError or ValueError for a
    missing, truncated or foreign file.
    """
    from improved_diffusion.data.checkpoints import load_weights

    weights = load_weights(path)
    return build_model(weights, path, device), weights.config, weights.step


def build_model(
    weights: WeightsFile, path: str, device: str, *, compile: bool = False
) -> torch.nn.Module:
    """The network of a checkpoint's config with its weights, in eval mode on `device`.

    Raises ValueError naming `path` where the weights do not fit the config, and where `compile` asks
    for a C++ compiler that is missing.
    """
    from improved_diffusion.nn import compile_network

    config = weights.config | {"image_size": trained_image_size(weights.config)}
    model = create_model(config_from_args(ModelConfig, config))
    try:
        model.load_state_dict(weights.state_dict)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[1].strip()
        raise ValueError(
            f"{path}: the weights do not fit the network of its config: {first}"
        ) from None
    model = model.to(device).eval()
    return compile_network(model) if compile else model


def trained_image_size(model_config: dict[str, Any]) -> int:
    """Height and width of a checkpoint's frames: its option, or else the data set's."""
    size = model_config.get("image_size")
    if size is None:
        size = stored_dataset(model_config.get("dataset", ""), model_config).image_size
    return size


def stored_dataset(name: str, model_config: dict[str, Any]) -> DatasetSpec:
    """The data set `name` as a network of `model_config` reads it.

    The training options on how to read videos hold for the data set that was trained on.
    """
    from improved_diffusion.data.dataset_files import dataset_spec

    options: dict[str, Any] = {"image_size": model_config.get("image_size")}
    if name == model_config.get("dataset"):
        stored = defaults(DataConfig) | model_config
        options |= {key: stored[key] for key in defaults(DataConfig) if key != "cache_dir"}
    return dataset_spec(name, **options)


def choose_videos(
    num_videos: int, *, indices: Sequence[int] | None, subset_size: int | None
) -> list[int]:
    """The videos that --indices or --subset_size choose of a data set, in order.

    `subset_size` takes the first of one fixed permutation, the same for every run. Raises
    ValueError for an index or a size out of range.
    """
    import numpy as np

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


def array_task() -> int | None:
    """SLURM_ARRAY_TASK_ID, or None outside of array jobs; ValueError where it is no number."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if task is None:
        return None
    if not task.isdigit():
        raise ValueError(
            f"SLURM_ARRAY_TASK_ID={task!r} is not a number: unset it or give the batch's index"
        )
    return int(task)
