"""The identity and the past of a training run: its id, its folder, what it starts from."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shlex
import string
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from improved_diffusion import checkpoints, dist_util, paths
from improved_diffusion.config import DiffusionConfig, ModelConfig, TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

ID_LETTERS = string.ascii_lowercase + string.digits
OPTIMISER_KEYS = ("optimizer", "schedule_sampler", "position", "loss_scale_log2")


@dataclass(frozen=True)
class Run:
    """Where a run writes, and what it starts from: a saved state, given weights, or neither."""

    run_id: str
    folder: str
    state: checkpoints.RunState | None = None
    weights: dict[str, Tensor] | None = None


def open_run(config: TrainConfig, stored_config: Mapping[str, Any]) -> Run:
    """The run that --resume_id or --resume_checkpoint names, or a fresh one. All ranks must call.

    Args:
        config: the training options.
        stored_config: the flat options that this run's checkpoints will hold.

    Rank 0 makes the folder and reads the files. Raises ValueError where a saved network or
    diffusion process differs from this run's options, FileNotFoundError for a missing
    --resume_checkpoint, OSError where the folder cannot be made.
    """
    opened = _open_run(config, stored_config) if dist_util.is_main() else None
    run = dist_util.broadcast_object(opened)
    assert run is not None, "rank 0 opened no run"
    return run


def _open_run(config: TrainConfig, stored_config: Mapping[str, Any]) -> Run:
    run_id = config.resume_id or "".join(secrets.choice(ID_LETTERS) for _ in range(8))
    folder = paths.run_dir(run_id)
    if config.resume_checkpoint:
        weights = checkpoints.load_weights(config.resume_checkpoint).state_dict
        _make_folder(folder)
        return Run(run_id, folder, weights=weights)
    _make_folder(folder)
    if not config.resume_id:
        return Run(run_id, folder)
    if checkpoints.find_resume_step(folder) is None:
        logger.info("%s holds no complete checkpoint: starting at step 0", folder)
        return Run(run_id, folder)
    state = checkpoints.load_run(folder)
    _check_options(state.config, stored_config, folder)
    if any(key not in state.opt_state for key in OPTIMISER_KEYS):
        raise ValueError(
            f"{folder}: its opt_*.pt is another program's: "
            "start a new run from its weights with --resume_checkpoint"
        )
    return Run(run_id, folder, state)


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
    """Refuse another network or process than the saved one; tell of every other change."""
    fixed = {item.name for group in (ModelConfig, DiffusionConfig) for item in fields(group)}
    identity = {"resume_id", "resume_checkpoint"}
    changed = [k for k in new if k in old and old[k] != new[k] and k not in identity]
    for key in changed:
        if key in fixed:
            raise ValueError(
                f"--{key} {new[key]} differs from the checkpoint in {folder}: "
                f"give --{key} {old[key]}"
            )
        logger.info("--%s was %s before, is %s now", key, old[key], new[key])


def resume_command(run_id: str) -> str:
    """This process's command line with --resume_id set to `run_id`."""
    kept, arguments = [], iter(sys.argv[1:])
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name in ("--resume_id", "--resume_checkpoint"):
            if not equals:
                next(arguments, None)
        else:
            kept.append(argument)
    command = shlex.join(["python", sys.argv[0], *kept, "--resume_id", run_id])
    ranks = dist_util.world_size()
    return f"mpiexec -n {ranks} {command}" if dist_util.launcher() == "mpi" else command
