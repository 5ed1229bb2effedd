"""From command-line flags to option dataclasses, and from those to models. Torch is imported late."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import os
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from improved_diffusion.config import (
    DiffusionConfig,
    ModelConfig,
    NoOptions,
    defaults,
    from_options,
    option_groups,
)

if TYPE_CHECKING:
    from torch import nn

    from improved_diffusion.respace import SpacedDiffusion
    from improved_diffusion.sampling.trained_model import TrainedModel

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


def _value_type(hint: Any, word_for_none: str | None = None) -> Callable[[str], Any]:
    """The parser of one value: the first type of an `X | None`."""
    if isinstance(hint, types.UnionType):
        hint = typing.get_args(hint)[0]
    parse = str2bool if hint is bool else hint
    if word_for_none is None:
        return parse

    def value_or_word(text: str) -> Any:
        return None if text == word_for_none else parse(text)

    value_or_word.__name__ = (
        f"{hint.__name__} (or {word_for_none})"  # which argparse names in errors
    )
    return value_or_word


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows descriptions as they are; the lines after an option's first help line are a list.

    The usage line names what must be given alone: it also stands above every message of argparse.
    """

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        needed = [
            f"{action.option_strings[0]} {action.dest.upper()}"
            if action.option_strings
            else action.dest
            for action in actions
            if action.required
        ]
        usage = usage or " ".join(["%(prog)s", *needed, "[options]"])
        super().add_usage(usage, actions, groups, prefix)

    def _split_lines(self, text: str, width: int) -> list[str]:
        first, *items = text.splitlines()
        # Names of strategies stay whole: they are copied from here.
        # Names of strategies stay whole: they are copied from here.
        lines = textwrap.wrap(" ".join(first.split()), width, break_on_hyphens=False)
        listed = textwrap.TextWrapper(
            width, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False
        )
        for item in items:
            lines += listed.wrap(item)
        return lines


TYPED = "typed_options"  # of a namespace: which of those that things of a registry own


def add_arguments(
    parser: argparse.ArgumentParser,
    *groups: type,
    leave_out: Collection[str] = (),
    action: type[argparse.Action] | str = "store",
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
                _check_no_clash(group, owned)
                add_arguments(parser, *owned, leave_out=leave_out, action=_StoreTyped)
            elif item.name not in {*leave_out, *(action.dest for action in parser._actions)}:
                _add_argument(parser, item, hints[item.name], action)


class _StoreTyped(argparse.Action):
    """Stores a value, and that it was typed: an option of something that is not chosen is refused then."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values)
        setattr(namespace, TYPED, {*getattr(namespace, TYPED, ()), self.dest})


def _check_no_clash(group: type, owned: Sequence[type]) -> None:
    """Raise ValueError where an owned option has the name of one of `group` itself."""
    names = {item.name for item in dataclasses.fields(group)}
    for item in (item for owner in owned for item in dataclasses.fields(owner)):
        if item.name in names:
            raise ValueError(f"--{item.name} is an option of {group.__name__} already: rename it")


def _add_argument(
    parser: argparse.ArgumentParser,
    item: dataclasses.Field[Any],
    hint: Any,
    action: type[argparse.Action] | str,
) -> None:
    meta, choices = item.metadata, item.metadata.get("choices")
    required = item.default is dataclasses.MISSING
    help_text = meta["help"]
    if not required and item.default not in (None, ""):
        shown = (
            " ".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
        )
        help_text += f" [{shown}]"
    names = meta.get("names_of", choices)
    if hasattr(names, "help"):  # a registry: what its names are stands below
        help_text += f"\n{names.help()}"
    options: dict[str, Any] = {"help": help_text.replace("%", "%%")}
    if meta.get("positional"):
        parser.add_argument(item.name, **options)
        return
    options |= {"required": True} if required else {"default": item.default}
    if meta.get("nargs"):
        options |= _list_parsing(meta, is_text=hint is str)
    else:
        options["type"] = _value_type(hint, meta.get("word_for_none"))
        if not hasattr(
            choices, "help"
        ):  # names of a registry are checked by the dataclass, in one line
            options["choices"] = choices
    if meta.get("flag"):  # `--optimal` and `--optimal True` are both fine
        options |= {"nargs": "?", "const": True}
    parser.add_argument(f"--{item.name}", **{"action": action} | options)


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
    """An option dataclass from parsed flags or a stored flat dict; see `config.from_options`.

    Raises ValueError for a flag that was typed and belongs to something that is not chosen.
    """
    if isinstance(args, dict):
        return from_options(group, args)
    _refuse_options_of_others(group, args)
    return from_options(group, vars(args))


def _refuse_options_of_others(group: type, args: argparse.Namespace) -> None:
    for item in dataclasses.fields(group):
        registry, chosen_by = (item.metadata.get(key) for key in ("owned_by", "chosen_by"))
        chosen = getattr(args, chosen_by, None) if chosen_by else None
        if registry is None or chosen not in registry:
            continue
        owners: dict[str, list[str]] = {}
        for name, thing in registry.items():
            for owned in dataclasses.fields(getattr(thing, "Options", NoOptions)):
                owners.setdefault(owned.name, []).append(name)
        for name in sorted(getattr(args, TYPED, ())):
            if chosen not in owners.get(name, [chosen]):
                raise ValueError(
                    f"--{name} does nothing with --{chosen_by} {chosen}: leave it out (it is an option of "
                    f"{', '.join(owners[name])})"
                )


def run_main(main: Callable[[], Any]) -> NoReturn:
    """Run a script's main: a user's mistake ends in one line and exit code 1, on every rank.

    A failing rank ends the whole run, so that no other waits for it for ever.
    """
    from improved_diffusion import dist_util
    from improved_diffusion.data import machine

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    machine.keep_freed_memory()
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        told = _one_line(error)
        if told:
            print(f"{os.path.basename(sys.argv[0])}: error: {told}", file=sys.stderr)
        else:
            import traceback

            traceback.print_exc()
        dist_util.abort(1)
    sys.exit(0)


def _one_line(error: BaseException) -> str:
    """What a user can do something about, in one line; nothing for a defect."""
    from improved_diffusion.data import machine

    if machine.is_out_of_memory(error):
        first = str(error).partition(". GPU")[0].partition("\n")[0]
        return f"out of memory ({first or 'the machine has no more'}): try a smaller --batch_size"
    return " ".join(str(error).split()) if isinstance(error, USER_ERRORS) else ""


# ---------------------------------------------------------------- published names


def model_and_diffusion_defaults() -> dict[str, Any]:
    """{option: default} of the model and the diffusion process."""
    return defaults(ModelConfig, DiffusionConfig)


def create_model_and_diffusion(**options: Any) -> tuple[nn.Module, SpacedDiffusion]:
    """The network and the diffusion process for options of `model_and_diffusion_defaults`.

    Raises ValueError for an unknown option or an illegal value. image_size must be given.
    """
    from improved_diffusion.sampling.trained_model import create_diffusion, create_model

    unknown = sorted(set(options) - set(model_and_diffusion_defaults()))
    if unknown:
        raise ValueError(f"unknown model or diffusion option {', '.join(unknown)}")
    network = create_model(from_options(ModelConfig, options))
    return network, create_diffusion(from_options(DiffusionConfig, options))


def load_model(path: str, device: str = "cpu") -> TrainedModel:
    """A model or EMA checkpoint, ready to sample with; see `TrainedModel.load`."""
    from improved_diffusion.sampling.trained_model import TrainedModel

    model = TrainedModel.load(path, device)
    model.network  # noqa: B018  built now, so that weights that do not fit are told here
    return model


def __getattr__(name: str) -> Any:
    """Names that earlier versions had here."""
    moved = {"create_model": "sampling.trained_model", "create_diffusion": "sampling.trained_model"}
    moved["create_train_loop"] = "training.start"
    if name not in moved:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"improved_diffusion.{moved[name]}"), name)
