"""Sample videos from a trained network; writes <evaluation directory>/samples/*.npy."""

import argparse

from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.script_util import add_arguments, config_from_args, run_main

EPILOG = """\
examples:
  python scripts/video_sample.py checkpoints/ID/ema_0.9999_latest.pt --inference_mode hierarchy-2 --step_size 10
  python scripts/video_sample.py checkpoints/ID/ema_0.9999_latest.pt --inference_mode autoreg --step_size 10 \\
    --sampler ipndm4 --timestep_respacing 10 --spacing logsnr --subset_size 8
"""


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    add_arguments(parser, SampleConfig)
    return parser


def main(argv: list[str] | None = None) -> None:
    options = config_from_args(SampleConfig, create_argparser().parse_args(argv))
    from improved_diffusion import dist_util
    from improved_diffusion.sampling.video_sampling import sample_dataset

    dist_util.setup_dist()
    sample_dataset(options)
    dist_util.barrier()
    dist_util.cleanup()


if __name__ == "__main__":
    run_main(main)
