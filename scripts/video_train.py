"""Train a video diffusion model, alone or on every rank of mpiexec, torchrun or srun."""

from __future__ import annotations

import argparse
import sys

from improved_diffusion.config import DataConfig, DiffusionConfig, ModelConfig, TrainConfig
from improved_diffusion.script_util import (
    add_arguments,
    config_from_args,
    create_train_loop,
    run_main,
)

GROUPS = (TrainConfig, DataConfig, ModelConfig, DiffusionConfig)

EPILOG = """\
Writes to checkpoints/<run id>/ (root: DIFFUSION_BLOB_LOGDIR): model_<step>.pt,
ema_<rate>_<step>.pt, opt_<step>.pt and *_latest.pt, progress.csv, samples/. The run id is also the
one at wandb (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY).

SIGTERM, SIGINT or SIGUSR1 at any one rank: all ranks finish the step, save, and exit with code 75;
--resume_id goes on from there. Exit code 1: an error, told in one line; 0: all steps done.
Under srun add --kill-on-bad-exit=1, so that an error at one rank ends them all.
"""


def create_argparser() -> argparse.ArgumentParser:
    """The parser of all training, model and diffusion options."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, *GROUPS)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse, build, run."""
    args = create_argparser().parse_args(argv)
    configs = [config_from_args(group, args) for group in GROUPS]

    from improved_diffusion import dist_util
    from improved_diffusion.train_util import EXIT_INTERRUPTED

    dist_util.setup_dist()
    interrupted = create_train_loop(*configs).run_loop()
    dist_util.cleanup()
    if interrupted:
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    run_main(main)
