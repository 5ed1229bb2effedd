"""The identity and the past of a training run: its id, folder, start, and config.json."""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import secrets
import shlex
import string
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from improved_diffusion import dist_util
from improved_diffusion.config import (
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    defaults,
    from_options,
)
from improved_diffusion.data import checkpoints, paths
from improved_diffusion.data.machine import code_version
from improved_diffusion.registry import TIMESTEP_DISTRIBUTIONS
from improved_diffusion.training import run_lock, signals
from improved_diffusion.training.options import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

ID_LETTERS = string.ascii_lowercase + string.digits
# What weights of the same shapes may differ in, and would be misread by.
WEIGHTS_MEAN = "network num_heads num_heads_upsample use_scale_shift_norm prediction".split()
IDENTITY = ("resume_id", "resume_checkpoint")  # options that say which run, not what it computes
OPTIMISER_KEYS = ("optimizer", "schedule_sampler", "position", "loss_scale_log2")


@dataclass(frozen=True)
class Run:
    """Where a run writes, and what it starts from: a saved state, given weights, or neither.

    Rank 0 alone has given weights, since the network is copied from it, and the lock. Whoever has
    taken up state and weights goes on with `forget_start`, so that they do not stay in memory.
    """

    run_id: str
    folder: str
    options: Mapping[str, Any]  # flat, as checkpoints hold them
    state: checkpoints.RunState | None = None
    weights: dict[str, Tensor] | None = None
    lock: run_lock.RunLock | None = None

    def forget_start(self) -> Run:
        """This run without the tensors it starts from."""
        return replace(self, state=None, weights=None)

    def check_held(self) -> None:
        """Raise BlockingIOError where another process has the folder by now."""
        if self.lock is not None:
            self.lock.check()

    def close(self) -> None:
        """Let another process have the folder."""
        if self.lock is not None:
            self.lock.release()


def open_run(config: TrainConfig, stored_config: Mapping[str, Any]) -> Run:
    """The run that --resume_id names, or a fresh one. All ranks must call.

    Args:
        config: the training options.
        stored_config: the flat options that this run's checkpoints will hold.

    Rank 0 makes and locks the folder and chooses the checkpoint; every rank then maps its files
    into memory. Raises ValueError where a saved network, diffusion process, objective or optimiser
    differs from this run's options, the run began with other weights than --resume_checkpoint or no
    checkpoint is whole, FileNotFoundError for a missing --resume_checkpoint, OSError where the folder
    cannot be made or another process has it, signals.Interrupted where a signal came before.
    """
    signals.leave_if_signalled()
    own = _open_run(config, stored_config) if dist_util.is_main() else None
    told = (own.run_id, own.folder, own.state and own.state.source) if own else None
    run_id, folder, source = dist_util.broadcast_object(told, what="opening the run") or (
        "",
        "",
        None,
    )
    if own is not None:
        return own
    return Run(run_id, folder, stored_config, checkpoints.load_set(source) if source else None)


def _open_run(config: TrainConfig, stored_config: Mapping[str, Any]) -> Run:
    run_id = config.resume_id or "".join(secrets.choice(ID_LETTERS) for _ in range(8))
    folder = paths.run_dir(run_id)
    # A run that goes on does not need the file it began with, which may be gone by now.
    weights = None if paths.exists(folder) else _given_weights(config, stored_config)
    _make_folder(folder)
    lock = run_lock.hold(folder)
    signals.before_leaving(run_lock.release_all)
    state = None
    if config.resume_id:
        checkpoints.end_killed_saves(folder)
        state = checkpoints.load_newest(folder)
    if state is None:
        weights = weights or _given_weights(config, stored_config)
        if config.resume_id:
            start = f"the weights of {config.resume_checkpoint}" if weights else "random weights"
            message = "%s holds no complete checkpoint: starting at step 0 with %s"
            logger.info(message, folder, start)
        return Run(run_id, folder, stored_config, weights=weights, lock=lock)
    _check_options(state.config, stored_config, folder)
    began_with = _check_beginning(state.config, config.resume_checkpoint, folder)
    if any(key not in state.opt_state for key in OPTIMISER_KEYS):
        raise ValueError(
            f"{folder}: its opt_*.pt is another program's: "
            "start a new run from its weights with --resume_checkpoint"
        )
    options = {**stored_config, "resume_checkpoint": began_with}
    return Run(run_id, folder, options, state, lock=lock)


def _given_weights(
    config: TrainConfig, stored_config: Mapping[str, Any]
) -> dict[str, Tensor] | None:
    """The weights of --resume_checkpoint, which must mean the same in this run's network."""
    if not config.resume_checkpoint:
        return None
    found = checkpoints.load_weights(config.resume_checkpoint)
    _check_meaning(found.config, stored_config, config.resume_checkpoint)
    return found.state_dict


def _check_beginning(old: Mapping[str, Any], given: str, folder: str) -> str:
    """The file whose weights the run in `folder` began with, "" for none; refuse another one."""
    began_with = old.get("resume_checkpoint", "")
    if given and given != began_with:
        began = f"those of {began_with}" if began_with else "random weights"
        raise ValueError(
            f"--resume_checkpoint {given}: the run in {folder} began with {began}: "
            "leave it out to go on, or give another --resume_id"
        )
    return began_with


def _make_folder(folder: str) -> None:
    if paths.is_remote(folder):
        return
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "not writable")
    except OSError as error:
        raise OSError(
            f"cannot make the run's folder {folder}: {error.strerror}: "
            "set DIFFUSION_BLOB_LOGDIR to a folder that can be written to"
        ) from None


def _check_options(old: Mapping[str, Any], new: Mapping[str, Any], folder: str) -> None:
    """Refuse what `_fixed_options` names, where it differs; tell of every other change."""
    groups = (TrainConfig, DataConfig, ModelConfig, DiffusionConfig)
    # Options that are younger than the run had their defaults in it.
    old, new = (_with_prediction(defaults(*groups) | dict(options)) for options in (old, new))
    fixed = _fixed_options(old) | _fixed_options(new)
    changed = [k for k in new if old[k] != new[k] and k not in IDENTITY]
    for key in changed:
        if key in fixed:
            raise ValueError(
                f"--{key} {new[key]} differs from the checkpoint in {folder}: "
                f"give --{key} {old[key]}"
            )
        logger.info("--%s was %s before, is %s now", key, old[key], new[key])


def _check_meaning(old: Mapping[str, Any], new: Mapping[str, Any], file: str) -> None:
    """Refuse weights that would compute something else here; tell of another process.

    Shapes that do not fit are told when the weights are loaded.
    """
    known = defaults(ModelConfig, DiffusionConfig)
    old, new = (_with_prediction(known | dict(options)) for options in (old, new))
    for key in (key for key in known if old[key] != new[key]):
        if key in WEIGHTS_MEAN:
            raise ValueError(
                f"--{key} {new[key]} differs from the network in {file}: give --{key} {old[key]}"
            )
        logger.info("--%s is %s, in %s it was %s", key, new[key], file, old[key])


def _with_prediction(options: dict[str, Any]) -> dict[str, Any]:
    """The same with one name for what the network predicts, which has two options."""
    predicts = from_options(DiffusionConfig, options).prediction_type
    return options | {"prediction": predicts, "predict_xstart": predicts == "xstart"}


def _fixed_options(options: Mapping[str, Any]) -> set[str]:
    """The options that a run of these keeps to its end: network, process, masks, objective, optimiser."""
    fixed = {"optimizer", "mask_distribution", *defaults(ModelConfig, DiffusionConfig)}
    timesteps = TIMESTEP_DISTRIBUTIONS[options["schedule_sampler"]]
    if getattr(timesteps, "changes_objective", False):
        fixed |= {"schedule_sampler", *defaults(timesteps.Options)}
    return fixed


# ---------------------------------------------------------------- config.json


def describe_run(options: Mapping[str, Any], run_id: str | None = None) -> dict[str, Any]:
    """All that makes a run what it is: options, versions, machines. All ranks must call.

    options: the flat resolved options; run_id: None for a run that has none yet.
    """
    import numpy
    import torch

    device = dist_util.dev()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "run_id": run_id,
        "options": dict(options),
        "global_batch_size": options["batch_size"] * dist_util.world_size(),
        "command": shlex.join(["python", *sys.argv]),
        "launcher": dist_util.launcher() or "none",
        "hosts": dist_util.hosts(),  # of every rank
        "device": device.type if gpu is None else f"{device.type} ({gpu})",
        "versions": {
            "code": code_version() if dist_util.is_main() else "",  # git takes its time on NFS
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
    }


def record_run(run: Run) -> None:
    """Write config.json beside the run's checkpoints. All ranks must call."""
    description = describe_run(run.options, run.run_id)
    if not dist_util.is_main():
        return
    path = f"{run.folder}/config.json"
    try:
        with paths.atomic_write(path) as file:
            file.write((json.dumps(description, indent=2) + "\n").encode())
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None


def options_of(path: str, known: Collection[str]) -> dict[str, Any]:
    """The options in a config.json, but for those that say which run it was.

    Raises FileNotFoundError for a missing file, ValueError for one that is no such file or has
    options that are not `known`.
    """
    try:
        options = json.loads(Path(path).read_text())["options"]
    except FileNotFoundError:
        raise FileNotFoundError(f"--config {path}: no such file") from None
    except (ValueError, KeyError, TypeError):
        options = None
    if not isinstance(options, dict):
        raise ValueError(f"--config {path}: not the config.json of a training run")
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"--config {path}: unknown options {', '.join(unknown)}: take them out")
    return {key: value for key, value in options.items() if key not in IDENTITY}


# ---------------------------------------------------------------- resuming


def resume_command(run_id: str) -> str:
    """This process's command line, launcher and folder's root included, with --resume_id."""
    kept, arguments = [], iter(sys.argv[1:])
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name == "--resume_id":
            if not equals:
                next(arguments, None)
        else:
            kept.append(argument)
    command = shlex.join([sys.argv[0], *kept, "--resume_id", run_id])
    root = paths.checkpoints_root()
    variable = "" if root == "checkpoints" else f"DIFFUSION_BLOB_LOGDIR={shlex.quote(root)} "
    return f"{variable}{dist_util.launch_command()} {command}"
