"""The only reader and writer of checkpoint files (`paths` names them).

A set is what one save writes: `model_<step>.pt`, one `ema_<rate>_<step>.pt` per rate, and last
`opt_<step>.pt`, whose presence says that the set is complete. The `*_latest.pt` files are links to
the newest set.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from improved_diffusion.data import paths

if TYPE_CHECKING:
    from torch import Tensor

    StateDict = Mapping[str, Tensor]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightsFile:
    """A model or EMA file: weights (float32 on the CPU), flat training options, updates done."""

    state_dict: dict[str, Tensor]
    config: dict[str, Any]
    step: int


@dataclass(frozen=True)
class RunState:
    """One complete set: what a run needs to go on after `step` updates."""

    step: int
    config: dict[str, Any]
    model_state: dict[str, Tensor]
    ema_states: dict[str, dict[str, Tensor]]  # by rate, as it stands in the file name
    opt_state: dict[str, Any]


# ---------------------------------------------------------------- reading


def load_weights(path: str) -> WeightsFile:
    """Read a model or EMA file, ours or the published code's; half precision becomes float32.

    Raises FileNotFoundError for a missing file, ValueError for a truncated or foreign one.
    """
    content = _read(path)
    missing = [key for key in ("state_dict", "config", "step") if key not in content]
    if missing:
        raise ValueError(
            f"{path}: not a model or EMA checkpoint, it lacks {', '.join(missing)}: "
            "give a model_*.pt or ema_*.pt file of a training run"
        )
    config = content["config"]
    config = dict(vars(config) if isinstance(config, argparse.Namespace) else config)
    state = {name: _float32(value) for name, value in content["state_dict"].items()}
    return WeightsFile(state, config, int(content["step"]))


def _float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _read(path: str) -> dict[str, Any]:
    """The dict in a checkpoint file; nothing but tensors and plain types is unpickled."""
    import torch

    if not _exists(path):
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    try:
        with _open(path) as file, torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise type(error)(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # torch raises many types for bytes that are no checkpoint
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"{path}: truncated, or not a checkpoint ({reason}): copy it again"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: not a checkpoint of this project (holds a {type(content).__name__})"
        )
    return content


def find_resume_step(folder: str) -> int | None:
    """The step of the newest complete set in a run's folder, None where there is none."""
    return max((step for step, _ in _complete_sets(folder)), default=None)


def load_run(folder: str) -> RunState:
    """The newest complete set of a run's folder.

    Raises FileNotFoundError where there is none, ValueError for a damaged file.
    """
    sets = _complete_sets(folder)
    if not sets:
        raise FileNotFoundError(f"{folder}: no complete checkpoint (model_*.pt with its opt_*.pt)")
    step, suffix = max(sets, key=lambda item: item[0])
    model = load_weights(paths.checkpoint_path(folder, "model", suffix))
    opt_state = _read(paths.checkpoint_path(folder, "opt", suffix))
    emas = {
        name.ema_rate: load_weights(f"{folder}/{file}").state_dict
        for file, name in _names(folder)
        if name.ema_rate is not None and name.step == suffix
    }
    return RunState(step, model.config, model.state_dict, emas, opt_state)


def _names(folder: str) -> list[tuple[str, paths.CheckpointName]]:
    """(file, parsed name) of the checkpoint files in `folder`, which need not exist."""
    if not _exists(folder):
        return []
    files = sorted(_listdir(folder))
    return [
        (file, name) for file in files if (name := paths.parse_checkpoint_name(file)) is not None
    ]


def _complete_sets(folder: str) -> list[tuple[int, int | None]]:
    """(step, step in the file names) of the complete sets; None in the names stands for latest."""
    kinds: dict[int | None, set[str]] = {}
    for _, name in _names(folder):
        kinds.setdefault(name.step, set()).add(name.kind)
    complete = [suffix for suffix, found in kinds.items() if {"model", "opt"} <= found]
    sets: list[tuple[int, int | None]] = [
        (suffix, suffix) for suffix in complete if suffix is not None
    ]
    if None in complete:
        steps = {
            _stored_step(f"{folder}/{file}") for file, name in _names(folder) if name.step is None
        }
        if len(steps) == 1:  # a killed save can leave links to two sets; then one is here by number
            newest = steps.pop()
            if newest not in complete:
                sets.append((newest, None))
    return sets


def _stored_step(path: str) -> int:
    """The step inside a file, read without its tensors where the file is local."""
    import torch

    if paths.is_remote(path):
        return int(_read(path)["step"])
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"])
    except Exception:
        return int(_read(path)["step"])  # says in one line what is wrong with the file


# ---------------------------------------------------------------- writing


def remove_leftovers(folder: str) -> None:
    """Remove the temporary files that a killed save left in a run's local folder.

    For when nothing writes there: a save under way would lose its file.
    """
    if paths.is_remote(folder) or not os.path.isdir(folder):
        return
    for file in os.listdir(folder):
        match = re.fullmatch(r"\.?(\w+_[\w.+-]+\.pt)\.\w+\.tmp", file)
        if match and paths.parse_checkpoint_name(match[1]):
            os.unlink(f"{folder}/{file}")


def save_run(
    folder: str,
    step: int,
    model_state: StateDict,
    ema_states: Mapping[str, StateDict],
    opt_state: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    latest_only: bool = False,
    keep: int = 0,
) -> None:
    """Write the set of `step`, point `*_latest.pt` at it, and remove what is not to be kept.

    `ema_states` by rate; `opt_state`: all else that an exact resume needs. `latest_only` leaves
    only `*_latest.pt` of this set, `keep` the newest so many numbered sets (0: all).
    Raises OSError with a clear message where the disk is full or the folder not writable.
    """
    weights = {"model": model_state, **{paths.ema_kind(rate): s for rate, s in ema_states.items()}}
    contents: dict[str, Any] = {
        kind: {"state_dict": state, "config": dict(config), "step": step}
        for kind, state in weights.items()
    }
    contents["opt"] = {**opt_state, "step": step}
    for kind, content in contents.items():
        _write(paths.checkpoint_path(folder, kind, step), content)
    for kind in contents:
        _link(paths.checkpoint_path(folder, kind, step), paths.checkpoint_path(folder, kind, None))
    logger.info("saved %s", paths.checkpoint_path(folder, "model", None if latest_only else step))
    if latest_only:
        _remove_set(folder, step)
    elif keep:
        steps = sorted(suffix for _, suffix in _complete_sets(folder) if suffix is not None)
        for old in steps[:-keep]:
            _remove_set(folder, old)


def _write(path: str, content: Any) -> None:
    import torch

    try:
        with paths.atomic_write(path) as file:
            torch.save(_portable(content), file)
    except (OSError, RuntimeError) as error:  # torch hides a failing write in a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or str(error).partition("\n")[0]
        raise OSError(
            f"cannot write {path}: {reason}; the last complete checkpoint is untouched"
        ) from error


def _portable(value: Any) -> Any:
    """`value` with every tensor inside contiguous on the CPU."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().cpu().contiguous()
    if isinstance(value, Mapping):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_portable(item) for item in value]
    return value


def _link(source: str, target: str) -> None:
    """Make `target` another name of `source` at once; a copy where links are impossible."""
    if paths.is_remote(target):
        import blobfile

        blobfile.copy(source, target, overwrite=True)
        return
    temporary = f"{target}.{os.getpid()}.tmp"
    try:
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError:
        with open(source, "rb") as file, paths.atomic_write(target) as copy:
            while chunk := file.read(1 << 24):
                copy.write(chunk)
    finally:  # renaming onto a link to the same file leaves both names
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _remove_set(folder: str, step: int) -> None:
    """Remove the numbered files of a set, `opt` first: without it the set no longer counts."""
    files = [(name.kind != "opt", file) for file, name in _names(folder) if name.step == step]
    for _, file in sorted(files):
        _remove(f"{folder}/{file}")


# ---------------------------------------------------------------- local and remote files


def _exists(path: str) -> bool:
    if not paths.is_remote(path):
        return os.path.exists(path)
    import blobfile

    return blobfile.exists(path)


def _listdir(folder: str) -> list[str]:
    if not paths.is_remote(folder):
        return os.listdir(folder)
    import blobfile

    return list(blobfile.listdir(folder))


def _open(path: str) -> BinaryIO:
    if not paths.is_remote(path):
        return open(path, "rb")
    import blobfile

    return blobfile.BlobFile(path, "rb", streaming=False)


def _remove(path: str) -> None:
    if not paths.is_remote(path):
        os.unlink(path)
        return
    import blobfile

    blobfile.remove(path)
