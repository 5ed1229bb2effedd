"""The only reader and writer of checkpoint files (`paths` names them).

A set is what one save writes: `model_<step>.pt`, one `ema_<rate>_<step>.pt` per rate, and last
`opt_<step>.pt`, whose presence says that the set is complete. The `*_latest.pt` files are links to
the newest set.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from improved_diffusion.data import paths
from improved_diffusion.data.nested_state import portable

if TYPE_CHECKING:
    from torch import Tensor

    StateDict = Mapping[str, Tensor]

logger = logging.getLogger(__name__)

MARKER = "latest_step.json"  # in a blob store: the step of *_latest.pt, which all are of it


@dataclass(frozen=True)
class WeightsFile:
    """A model or EMA file: weights (float32 on the CPU), flat training options, updates done."""

    state_dict: dict[str, Tensor]
    config: dict[str, Any]
    step: int


@dataclass(frozen=True)
class SavedSet:
    """Where one complete set is: `step` updates; `suffix` as in the names, None for latest."""

    folder: str
    step: int
    suffix: int | None

    def path(self, kind: str) -> str:
        """The file of `kind`: model, opt, ema_<rate>."""
        return paths.checkpoint_path(self.folder, kind, self.suffix)


@dataclass(frozen=True)
class RunState:
    """One complete set: what a run needs to go on after `step` updates."""

    source: SavedSet
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
    return _weights(path)


def _weights(path: str, *, in_file: bool = False) -> WeightsFile:
    content = _read(path, in_file=in_file)
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


def _read(path: str, *, in_file: bool = False) -> dict[str, Any]:
    """The dict in a checkpoint file; nothing but tensors and plain types is unpickled.

    `in_file` leaves the tensors of a local file in it: pages are read when they are used, and
    processes share them.
    """
    import torch

    if not paths.exists(path):
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = _load(path, in_file=in_file and not paths.is_remote(path))
    except OSError as error:
        raise type(error)(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # torch raises many types for bytes that are no checkpoint
        if _is_no_damage(error):
            raise
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"{path}: truncated, or not a checkpoint ({reason}): copy it again"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: not a checkpoint of this project (holds a {type(content).__name__})"
        )
    return content


def _is_no_damage(error: Exception) -> bool:
    """Whether a file could not be read for want of memory or of its store's answer."""
    store = type(error).__module__.partition(".")[0] == "blobfile"
    return store or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _load(path: str, *, in_file: bool) -> Any:
    import torch

    if in_file:
        with contextlib.suppress(RuntimeError, OSError):  # the oldest format cannot stay in a file
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with paths.open_binary(path) as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def load_newest(folder: str) -> RunState | None:
    """The newest complete set whose files can all be read; None in a folder without checkpoints.

    A warning names each damaged file that was passed over. Raises ValueError where there are files
    of a run but no whole set: starting over would overwrite them.
    """
    problem = "no model_*.pt with its opt_*.pt"
    for found in sorted(_complete_sets(folder), key=lambda s: (-s.step, s.suffix is None)):
        try:
            return load_set(found)
        except (ValueError, FileNotFoundError) as error:
            problem = str(error)
            logger.warning("%s; looking for an older checkpoint", problem)
    if not _names(folder):
        return None
    raise ValueError(
        f"{folder} has checkpoint files but no whole set to go on from ({problem}): "
        "mend or move them, or train under another --resume_id"
    )


def load_set(found: SavedSet) -> RunState:
    """The state of one set; tensors of local files lie in the files until they are touched.

    Averages of another step than the set's are told and left. Raises FileNotFoundError or
    ValueError naming the file that is missing or damaged.
    """
    model = _weights(found.path("model"), in_file=True)
    opt_state = _read(found.path("opt"), in_file=True)
    for kind, step in (("model", model.step), ("opt", opt_state.get("step", found.step))):
        if step != found.step:
            raise ValueError(f"{found.path(kind)}: holds step {step}, not {found.step}")
    emas = {}
    for rate in (name.ema_rate for _, name in _names(found.folder) if name.step == found.suffix):
        if rate is None:
            continue
        path = found.path(paths.ema_kind(rate))
        weights = _weights(path, in_file=True)
        if weights.step == found.step:
            emas[rate] = weights.state_dict
        else:
            logger.warning("%s is of step %d, not of %d: left out", path, weights.step, found.step)
    return RunState(found, found.step, model.config, model.state_dict, emas, opt_state)


def _names(folder: str) -> list[tuple[str, paths.CheckpointName]]:
    """(file, parsed name) of the checkpoint files in `folder`, which need not exist."""
    if not paths.exists(folder):
        return []
    files = sorted(paths.listdir(folder))
    return [
        (file, name) for file in files if (name := paths.parse_checkpoint_name(file)) is not None
    ]


def _kinds(folder: str, step: int) -> list[str]:
    """The kinds of file (model, ema_<rate>, opt) that the numbered set of `step` has, opt last."""
    names = [name for _, name in _names(folder) if name.step == step]
    kinds = [
        name.kind if name.ema_rate is None else paths.ema_kind(name.ema_rate) for name in names
    ]
    return sorted(kinds, key=lambda kind: ({"model": 0, "opt": 2}.get(kind, 1), kind))


def _complete_sets(folder: str) -> list[SavedSet]:
    """The sets that have a model and an optimiser file, of which `latest` need a common step."""
    kinds: dict[int | None, set[str]] = {}
    for _, name in _names(folder):
        kinds.setdefault(name.step, set()).add(name.kind)
    complete = [suffix for suffix, found in kinds.items() if {"model", "opt"} <= found]
    sets = [SavedSet(folder, suffix, suffix) for suffix in complete if suffix is not None]
    if None in complete:
        newest = _latest_step(folder)
        if newest is not None:
            sets.append(SavedSet(folder, newest, None))
    return sets


def _latest_step(folder: str) -> int | None:
    """The step of both `model_latest.pt` and `opt_latest.pt`; None where they differ.

    A killed save can leave links to two sets; then one of them is here by number. A file that
    cannot be read counts as one of the other's step: reading the set will say what is wrong.
    """
    if paths.is_remote(folder) and paths.exists(f"{folder}/{MARKER}"):
        with paths.open_binary(f"{folder}/{MARKER}") as file:
            return int(json.loads(file.read())["step"])
    steps = set()
    for kind in ("model", "opt"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            content = _read(paths.checkpoint_path(folder, kind, None), in_file=True)
            steps.add(int(content["step"]))
    return steps.pop() if len(steps) == 1 else None


# ---------------------------------------------------------------- writing


# While a set is written or removed an empty file names it, so that the next start can end what a
# kill left half done: one that is kept by number, one that becomes *_latest.pt alone, one that goes.
KEPT, PASSING, GOING = "begun", "passing", "going"


@contextlib.contextmanager
def _marked(folder: str, step: int, what: str) -> Iterator[None]:
    path = f"{folder}/.{paths.checkpoint_path('', 'opt', step)[1:]}.{what}.tmp"
    try:
        with paths.atomic_write(path):
            pass
    except OSError as error:
        raise _cannot_write(paths.checkpoint_path(folder, "model", step), error) from error
    yield
    paths.remove(path)


def end_killed_saves(folder: str) -> None:
    """Finish or undo the saves that a kill left half done in a run's folder.

    For when nothing else writes there: a save under way would lose its files.
    """
    if not paths.exists(folder):
        return
    for file in paths.listdir(folder):
        mark = re.fullmatch(rf"\.(opt_\d+\.pt)\.({KEPT}|{PASSING}|{GOING})\.tmp", file)
        name = paths.parse_checkpoint_name(mark[1]) if mark else None
        if mark and name and name.step is not None:
            if mark[2] == GOING or not {"model", "opt"} <= set(_kinds(folder, name.step)):
                _remove_set(folder, name.step)
            else:
                _publish(folder, name.step, latest_only=mark[2] == PASSING)
            paths.remove(f"{folder}/{file}")
    _remove_temporaries(folder)


def _remove_temporaries(folder: str) -> None:
    """The temporary files of killed writes of what a run's local folder holds."""
    if paths.is_remote(folder):
        return
    for place, pattern in (
        (folder, r"\w+_[\w.+-]+\.pt|progress\.csv|config\.json"),
        (f"{folder}/samples", r"sample_\d+_\d+\.gif"),
    ):
        for file in os.listdir(place) if os.path.isdir(place) else ():
            if re.fullmatch(rf"\.?({pattern})\.\w+\.tmp", file):
                os.unlink(f"{place}/{file}")


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

    `ema_states` by rate; `opt_state`: all else that an exact resume needs. Nothing may change them
    meanwhile: see `nested_state.snapshot`. `latest_only` leaves only `*_latest.pt` of this set, `keep` the newest
    so many numbered sets (0: all). Raises OSError where the disk is full or the folder not writable;
    what was written of the set is removed then.
    """
    weights = {"model": model_state, **{paths.ema_kind(rate): s for rate, s in ema_states.items()}}
    contents: dict[str, Any] = {
        kind: {"state_dict": state, "config": dict(config), "step": step}
        for kind, state in weights.items()
    }
    contents["opt"] = {**opt_state, "step": step}
    with _marked(folder, step, PASSING if latest_only else KEPT):
        try:
            _remove_set(folder, step)  # its optimiser would make whole what is cut off here
            for kind, content in contents.items():
                _write(paths.checkpoint_path(folder, kind, step), content)
        except OSError:
            with contextlib.suppress(OSError):
                end_killed_saves(folder)
            raise
        _publish(folder, step, latest_only=latest_only)
    logger.info("saved %s", paths.checkpoint_path(folder, "model", None if latest_only else step))
    if keep and not latest_only:
        numbered = sorted(s.step for s in _complete_sets(folder) if s.suffix is not None)
        for old in [number for number in numbered if number <= step][:-keep]:
            with _marked(folder, old, GOING):
                _remove_set(folder, old)


def _publish(folder: str, step: int, *, latest_only: bool) -> None:
    """Point `*_latest.pt` at the set of `step`, which loses its number with `latest_only`."""
    marker = f"{folder}/{MARKER}" if paths.is_remote(folder) else ""
    if marker and paths.exists(marker):
        paths.remove(marker)  # until all of them are of one step again
    for kind in _kinds(folder, step):
        _link(paths.checkpoint_path(folder, kind, step), paths.checkpoint_path(folder, kind, None))
    if marker:
        with paths.atomic_write(marker) as file:
            file.write(json.dumps({"step": step}).encode())
    if latest_only:
        _remove_set(folder, step)


def _write(path: str, content: Any) -> None:
    import torch

    try:
        with paths.atomic_write(path) as file:
            torch.save(portable(content), file)
    except (OSError, RuntimeError) as error:  # torch hides a failing write in a RuntimeError
        raise _cannot_write(path, error) from error


def _cannot_write(path: str, error: Exception) -> OSError:
    cause = error if isinstance(error, OSError) else error.__context__
    reason = getattr(cause, "strerror", None) or str(error).partition("\n")[0]
    return OSError(f"cannot write {path}: {reason}; the last complete checkpoint is untouched")


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
        paths.remove(f"{folder}/{file}")
