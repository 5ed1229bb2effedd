"""Search the frames that each inference step had best observe; --optimal of video_sample.py uses them.

As a SLURM array job, task i searches step i; steps that are found already are kept.
"""

import argparse

from improved_diffusion.config import options_only_of
from improved_diffusion.registry import STRATEGIES
from improved_diffusion.sampling.options import ScheduleConfig, SearchedConfig
from improved_diffusion.script_util import add_arguments, config_from_args, run_main

# Options of sampling that mean nothing here.
NOT_FOR_SEARCH = (
    "num_samples subset_size indices sample_idx optimal clip_denoised precision obs_video "
    "status just_visualise dataset_partition"
).split()

EPILOG = """\
examples:
  python scripts/video_optimal_schedule.py checkpoints/ID/ema_0.9999_latest.pt --inference_mode autoreg \\
    --step_size 10
  python scripts/video_optimal_schedule.py checkpoints/ID/ema_0.9999_latest.pt --inference_mode autoreg \\
    --step_size 10 --num_videos 4 --num_timesteps 1
"""


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    refused = options_only_of(STRATEGIES, lambda s: s.is_adaptive or s.samples_frame_twice)
    add_arguments(parser, SearchedConfig, ScheduleConfig, leave_out=[*NOT_FOR_SEARCH, *refused])
    return parser


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    options, search = config_from_args(SearchedConfig, args), config_from_args(ScheduleConfig, args)
    from improved_diffusion.sampling.optimal_schedule import find_schedule

    find_schedule(options, search)


if __name__ == "__main__":
    run_main(main)
