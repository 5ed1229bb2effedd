"""Compare weights of guidance: distance to the truth, and between two samples of a video.

Samples --subset_size test videos --num_samples 2 times with each; prints a table.
"""

import argparse

from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.script_util import add_arguments, config_from_args, run_main
from improved_diffusion.study.options import GuidanceSweepConfig

# Options of sampling that mean nothing here, or whose values are compared.
NOT_FOR_COMPARING = "sample_idx guidance guidance_against status just_visualise".split()

EPILOG = """\
examples:
  python scripts/video_compare_guidance.py checkpoints/pretrained/bouncy_balls/ema_0.99_latest.pt \\
    --inference_mode autoreg --T 18 --obs_length 10 --step_size 4 --subset_size 4 --num_samples 2 \\
    --sampler ipndm4 --timestep_respacing 10 --spacing logsnr
  python scripts/video_compare_guidance.py checkpoints/ID/ema_0.9999_latest.pt --inference_mode hierarchy-2 \\
    --step_size 10 --subset_size 8 --num_samples 2 --sampler ipndm4 --timestep_respacing 10 \\
    --spacing logsnr
"""


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    add_arguments(parser, SampleConfig, GuidanceSweepConfig, leave_out=NOT_FOR_COMPARING)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    # The interval is that of the guided rows, not of what samples without guidance.
    sampling = config_from_args(SampleConfig, vars(args) | {"guidance_interval": None})
    config = config_from_args(GuidanceSweepConfig, args)
    from improved_diffusion.study.guidance_sweep import guidance_sweep

    print(guidance_sweep(sampling, config))


if __name__ == "__main__":
    run_main(main)
