"""Bound the likelihood of the test videos: <evaluation directory>/elbos/*.npy, bits per step.

As a SLURM array job, task i takes the i-th batch of videos; bounds that are there are kept.
"""

import argparse

from improved_diffusion.config import options_only_of
from improved_diffusion.evaluation.options import NllConfig
from improved_diffusion.registry import STRATEGIES
from improved_diffusion.script_util import add_arguments, config_from_args, run_main

# Options of sampling that mean nothing here.
NOT_FOR_BOUNDS = (
    "num_samples sample_idx use_ddim sampler eta spacing guidance guidance_against "
    "guidance_interval clip_denoised precision obs_video status just_visualise"
).split()

EPILOG = """\
examples:
  python scripts/video_nll.py checkpoints/ID/ema_0.9999_latest.pt --inference_mode autoreg --step_size 10
  python scripts/video_nll.py checkpoints/ID/ema_0.9999_latest.pt --inference_mode hierarchy-2 --step_size 10 \\
    --stratified --subset_size 8
"""


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    refused = options_only_of(STRATEGIES, lambda strategy: strategy.samples_frame_twice)
    add_arguments(parser, NllConfig, leave_out=[*NOT_FOR_BOUNDS, *refused])
    return parser


def main(argv: list[str] | None = None) -> None:
    options = config_from_args(NllConfig, create_argparser().parse_args(argv))
    from improved_diffusion import dist_util
    from improved_diffusion.evaluation.nll import bound_dataset, format_bounds

    dist_util.setup_dist()
    bounds = bound_dataset(options)
    if dist_util.is_main():
        print(format_bounds(bounds))
    dist_util.cleanup()


if __name__ == "__main__":
    run_main(main)
