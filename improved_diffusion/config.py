"""All options of all commands: one frozen dataclass per group, each field with its default and help.

No torch here, so that `--help` is quick. `script_util` turns these into flags and back; the code
that consumes an option reads it from the dataclass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from improved_diffusion.registry import (
    LOSS_WEIGHTINGS,
    NETWORKS,
    PREDICTIONS,
    Registry,
)

Config = TypeVar("Config")

COMPILE_HELP = (
    "compile the network's blocks with torch.compile (needs a C++ compiler): for GPUs; on CPUs without "
    "AVX-512 measured useless, and with bf16 seven times slower"
)


def option(
    default: Any = MISSING, help: str = "", *, choices: Collection[str] | None = None, **extra: Any
) -> Any:
    """A dataclass field that is also a command-line flag of the same name.

    Without a default the flag is required. choices: names, or a registry, whose names and help are
    shown. extra: nargs="+" for a list, whose items are apart by spaces or commas: a tuple of
    `item_type`, or a text, which then is a comma list; names_of=<registry> where other values than
    its names are legal too; word_for_none=<text> where that is what one writes for None.
    """
    return field(default=default, metadata={"help": help, "choices": choices, **extra})


def required_list(help: str) -> Any:
    """A dataclass field that is also a required flag of one or more texts, commas and all: paths."""
    return option(help=help, nargs="+", item_type=str, commas=False)


def owned_options(registry: Registry, chosen_by: str = "") -> Any:
    """A dataclass field for the `Options` of the thing in `registry` that the field `chosen_by` names.

    Without `chosen_by`, where several things are chosen: a tuple of the `Options` of all of them.
    The options of all its things are flags. The dataclass calls `fill_options`, so that the field
    may be given as an `Options`, as a mapping of some of them, or not at all.
    """
    text = f"options of what --{registry.flag} names"
    return field(
        default=None, metadata={"help": text, "owned_by": registry, "chosen_by": chosen_by}
    )


@dataclass(frozen=True)
class NoOptions:
    """The `Options` of a thing that has none of its own."""


def option_groups(registry: Registry) -> list[type]:
    """The `Options` classes of the things in `registry`, each once.

    Raises ValueError where two of them mean different things by one name: it is one flag.
    """
    groups = list(dict.fromkeys(getattr(x, "Options", NoOptions) for x in registry.values()))
    declared: dict[str, Any] = {}
    for item in (item for group in groups for item in fields(group)):
        meaning = item.type, item.default, dict(item.metadata)
        if declared.setdefault(item.name, meaning) != meaning:
            raise ValueError(
                f"two of --{registry.flag} have an option {item.name} and differ in it: rename one"
            )
    return groups


def options_only_of(registry: Registry, is_meant: Callable[[Any], bool]) -> list[str]:
    """The names of options that things in `registry` own which are all meant."""
    meant: list[str] = []
    others: list[str] = []
    for thing in registry.values():
        found = [item.name for item in fields(getattr(thing, "Options", NoOptions))]
        (meant if is_meant(thing) else others).extend(found)
    return [name for name in dict.fromkeys(meant) if name not in others]


def chosen_options(registry: Registry, name: str, values: Any = None) -> Any:
    """The `Options` of the thing `name`, with those of `values` that it has and its own defaults.

    values: None, an `Options`, or a mapping. Raises ValueError for an unknown name, for a key of a
    mapping that is an option of no thing in the registry, and what the class raises.
    """
    group = getattr(registry[name], "Options", NoOptions)
    if isinstance(values, group):
        return values
    if is_dataclass(values):
        values = vars(values)
    _check_owned(registry, values or {})
    return group(**{f.name: values[f.name] for f in fields(group) if f.name in (values or {})})


def _check_owned(registry: Registry, values: Mapping[str, Any]) -> None:
    """Raise ValueError for a key of `values` that is an option of nothing in the registry."""
    known = [item.name for group in option_groups(registry) for item in fields(group)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"no --{registry.flag} has an option {unknown[0]}: choose from {known}")


def all_options(registry: Registry, values: Any = None) -> tuple[Any, ...]:
    """The `Options` of all things in the registry, each class once, with those of `values` it has.

    values: None, a mapping, or some `Options`. Raises ValueError for a key of a mapping that is an
    option of nothing in the registry, and what the classes raise.
    """
    groups = option_groups(registry)
    if values is not None and not isinstance(values, Mapping):
        given = {type(options): options for options in values}
        return tuple(given.get(group) or group() for group in groups)
    values = values or {}
    _check_owned(registry, values)
    return tuple(
        group(**{f.name: values[f.name] for f in fields(group) if f.name in values})
        for group in groups
    )


def fill_options(config: Any) -> None:
    """In `__post_init__`: turn each field of `owned_options` into the `Options` of what is chosen."""
    for item in fields(config):
        if "owned_by" in item.metadata:
            registry, given = item.metadata["owned_by"], getattr(config, item.name)
            name = item.metadata["chosen_by"]
            filled = (
                chosen_options(registry, getattr(config, name), given)
                if name
                else all_options(registry, given)
            )
            object.__setattr__(config, item.name, filled)


def from_options(group: type[Config], values: Mapping[str, Any]) -> Config:
    """An option dataclass from {option: value}, as parsed or as stored.

    Unknown keys are ignored and missing ones get their defaults, so that old and foreign
    checkpoints load. Raises ValueError where the values are not legal.
    """
    chosen: dict[str, Any] = {}
    for item in fields(group):  # type: ignore[arg-type]
        if item.name in values:
            value = values[item.name]
            chosen[item.name] = tuple(value) if isinstance(value, list) else value
        elif "owned_by" in item.metadata:
            known = [f.name for g in option_groups(item.metadata["owned_by"]) for f in fields(g)]
            chosen[item.name] = {name: values[name] for name in known if name in values}
    return group(**chosen)


def check_choices(config: Any) -> None:
    """Raise ValueError for a field whose value is neither its default nor among its choices."""
    for item in fields(config):
        choices, value = item.metadata.get("choices"), getattr(config, item.name)
        if choices and value != item.default:
            check_known(item.name, value if isinstance(value, (tuple, list)) else [value], choices)


def check_known(flag: str, values: Iterable[Any], known: Collection[Any]) -> None:
    """Raise ValueError for the first of a flag's values that is not among `known`."""
    for value in values:
        if value not in known:
            raise ValueError(f"--{flag} {value!r} is unknown: choose from {', '.join(known)}")


def check_positive(config: Any, *names: str) -> None:
    """Raise ValueError for the first of these fields that is given and below 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")


def defaults(*groups: type) -> dict[str, Any]:
    """{option: default} of option groups, in order, with those of all things that own some.

    Options without a default are left out.
    """
    found: dict[str, Any] = {}
    for item in (item for group in groups for item in fields(group)):
        if "owned_by" in item.metadata:
            found |= defaults(*option_groups(item.metadata["owned_by"]))
        elif item.default is not MISSING:
            found[item.name] = item.default
    return found


def flat_options(*configs: Any) -> dict[str, Any]:
    """{option: value} of option dataclasses, in order, as files hold them and `from_options` reads them.

    In the place of a field of `owned_options` stand the options of the things that are chosen.
    """
    flat: dict[str, Any] = {}
    for config in configs:
        for item in fields(config):
            value = getattr(config, item.name)
            if "owned_by" in item.metadata:
                flat |= flat_options(*(value if isinstance(value, tuple) else (value,)))
            else:
                flat[item.name] = value
    return flat


@dataclass(frozen=True)
class ModelConfig:
    """The network's size and form (unet.py)."""

    network: str = option("unet", "kind of network", choices=NETWORKS)
    image_size: int | None = option(
        None, "height and width of the frames (default: the data set's)"
    )
    num_channels: int = option(128, "channels of the outermost level; a multiple of 32")
    num_res_blocks: int = option(2, "residual blocks per level")
    num_heads: int = option(4, "attention heads")
    num_heads_upsample: int = option(-1, "attention heads in the decoder (-1: num_heads)")
    attention_resolutions: str = option("16,8", "image sizes that get attention", nargs="+")
    dropout: float = option(0.0, "dropout rate inside residual blocks")
    learn_sigma: bool = option(False, "also predict the variance (6 output channels)")
    use_checkpoint: bool = option(
        False, "recompute activations in the backward pass to save memory"
    )
    use_scale_shift_norm: bool = option(
        True, "time embedding scales and shifts the norm (False: added)"
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.num_channels < 32 or self.num_channels % 32:
            raise ValueError(
                f"--num_channels {self.num_channels}: must be a multiple of 32 (GroupNorm 32)"
            )
        for flag in ("num_heads", "num_heads_upsample"):
            heads = getattr(self, flag)
            if heads != -1 and (heads < 1 or self.num_channels % heads):
                raise ValueError(
                    f"--{flag} {heads}: must divide --num_channels {self.num_channels}"
                )


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion process (gaussian_diffusion.py, respace.py)."""

    learn_sigma: bool = option(False, "also predict the variance (6 output channels)")
    sigma_small: bool = option(False, "fixed variance: the posterior's instead of beta")
    diffusion_steps: int = option(1000, "number of diffusion timesteps")
    noise_schedule: str = option(
        "linear", "shape of the noise schedule", choices=("linear", "cosine")
    )
    timestep_respacing: str = option(
        "",
        "timesteps to keep: an integer, a comma list of section counts, or ddim<int> (empty: all)",
    )
    use_kl: bool = option(False, "train on the variational bound instead of the MSE")
    predict_xstart: bool = option(False, "the same as --prediction xstart")
    prediction: str = option("", "what the network predicts (default: eps)", choices=PREDICTIONS)
    rescale_timesteps: bool = option(True, "the network sees timesteps scaled to 0..1000")
    rescale_learned_sigmas: bool = option(True, "with learn_sigma: weigh the bound by steps/1000")
    loss_weighting: str = option(
        "none", "how the errors of timesteps are weighted", choices=LOSS_WEIGHTINGS
    )
    loss_weighting_options: Any = owned_options(LOSS_WEIGHTINGS, chosen_by="loss_weighting")

    def __post_init__(self) -> None:
        check_choices(self)
        fill_options(self)
        check_positive(self, "diffusion_steps")
        if self.predict_xstart and self.prediction_type != "xstart":
            raise ValueError(
                f"--predict_xstart True and --prediction {self.prediction} contradict each other: "
                "drop one"
            )
        if self.use_kl and self.loss_weighting != "none":
            raise ValueError(
                f"--use_kl True and --loss_weighting {self.loss_weighting} exclude each other: "
                "choose one"
            )
        if self.noise_schedule == "linear" and self.diffusion_steps <= 20:
            raise ValueError(
                f"--diffusion_steps {self.diffusion_steps} is too few for the linear noise schedule "
                "(more than 20 are needed): use --noise_schedule cosine or more steps"
            )

    @property
    def prediction_type(self) -> str:
        """The registered name of what the network predicts."""
        return self.prediction or ("xstart" if self.predict_xstart else "eps")


@dataclass(frozen=True)
class DataConfig:
    """How the videos of the data set are read (dataset_files.py); travels in the checkpoint."""

    frame_stride: int = option(1, "take one frame in so many")
    fps: float | None = option(
        None, "take so many frames per second of the files' time (default: all)"
    )
    test_fraction: float | None = option(
        None, "share of a folder's videos to test with (default: it has train/ and test/)"
    )
    skip_broken: bool = option(
        False, "leave out broken or too short training videos, named and counted (False: stop)"
    )
    cache_dir: str | None = option(None, "copy the files here on first use, and read them here")
