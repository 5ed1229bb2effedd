"""Train a video diffusion model, alone or on every rank of mpiexec, torchrun or srun."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from improved_diffusion.config import DiffusionConfig, ModelConfig, TrainConfig
from improved_diffusion.script_util import add_arguments, config_from_args, run_main

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
    add_arguments(parser, TrainConfig, ModelConfig, DiffusionConfig)
    return parser


def main() -> None:
    """Parse, build, run."""
    args = create_argparser().parse_args()
    train = config_from_args(TrainConfig, args)
    model_config = config_from_args(ModelConfig, args)
    diffusion_config = config_from_args(DiffusionConfig, args)

    import torch

    from improved_diffusion import dist_util, train_util
    from improved_diffusion.runs import open_run
    from improved_diffusion.script_util import create_diffusion, create_model
    from improved_diffusion.video_datasets import dataset_spec, get_train_dataset

    dist_util.setup_dist()
    spec = dataset_spec(train.dataset, image_size=model_config.image_size)
    train = dataclasses.replace(train, T=spec.T if train.T == -1 else train.T)
    model_config = dataclasses.replace(model_config, image_size=spec.image_size)
    data = get_train_dataset(
        train.dataset,
        T=train.T,
        max_frames=train.max_frames,
        seed=train.seed,
        image_size=model_config.image_size,
        pad_with_random_frames=train.pad_with_random_frames,
    )
    stored = {**vars(train), **vars(model_config), **vars(diffusion_config)}
    diffusion = create_diffusion(diffusion_config)
    sample_steps = str(min(train.sample_steps, diffusion.num_timesteps))
    torch.manual_seed(train.seed)
    loop = train_util.TrainLoop(
        create_model(model_config),
        diffusion,
        data,
        train,
        run=open_run(train, stored),
        stored_config=stored,
        sample_diffusion=create_diffusion(
            dataclasses.replace(diffusion_config, timestep_respacing=sample_steps)
        ),
    )
    interrupted = loop.run_loop()
    dist_util.cleanup()
    if interrupted:
        sys.exit(train_util.EXIT_INTERRUPTED)


if __name__ == "__main__":
    run_main(main)
