# ruff: noqa: E402
"""Train a video diffusion model, alone or on every rank of mpiexec, torchrun or srun."""

from __future__ import annotations

from improved_diffusion.training import signals

if __name__ == "__main__":
    signals.watch()  # before all else, which takes its time to be imported

import argparse
import sys
from datetime import timedelta

from improved_diffusion.config import DataConfig, DiffusionConfig, ModelConfig
from improved_diffusion.script_util import (
    add_arguments,
    config_from_args,
    parse_with_config,
    run_main,
)
from improved_diffusion.training.options import LaunchConfig, TrainConfig

GROUPS = (TrainConfig, DataConfig, ModelConfig, DiffusionConfig)

EPILOG = """\
examples:
  python scripts/video_train.py --batch_size 2 --max_frames 20 --dataset mazes_cwvae --num_res_blocks 1
  mpiexec -n 4 python scripts/video_train.py --batch_size 2 --max_frames 20 --dataset mazes_cwvae \\
    --num_res_blocks 1 --resume_id ID

Writes to checkpoints/<run id>/ (root: DIFFUSION_BLOB_LOGDIR): model_<step>.pt,
ema_<rate>_<step>.pt, opt_<step>.pt and *_latest.pt, config.json, progress.csv, samples/. The run id is
also the one at wandb (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY).

SIGTERM, SIGINT or SIGUSR1 at any one rank: all ranks finish the step, save, and exit with code 75;
--resume_id goes on from there. Exit code 1: an error, told in one line; 0: all steps done.
Under srun add --mpi=none, and --wait=5, so that an error at one rank ends them all; torchrun turns
75 into 1. One process at a time trains a run: run.lock in its folder names it.
"""


def create_argparser() -> argparse.ArgumentParser:
    """The parser of all training, model and diffusion options."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, *GROUPS, LaunchConfig)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse, build, run."""
    args = parse_with_config(create_argparser(), argv)
    train, data, model, diffusion = (config_from_args(group, args) for group in GROUPS)
    launch = config_from_args(LaunchConfig, args)

    from improved_diffusion import dist_util
    from improved_diffusion.training.start import dry_run, train_run

    dist_util.setup_dist(timedelta(hours=launch.collective_timeout))
    work = dry_run if launch.dry_run else train_run
    interrupted = work(train, data, model, diffusion)
    dist_util.cleanup()
    signals.end(signals.EXIT_INTERRUPTED if interrupted else 0)
    if interrupted:
        sys.exit(signals.EXIT_INTERRUPTED)


if __name__ == "__main__":
    run_main(main)
