"""Sample videos from a trained network; writes <evaluation directory>/samples/*.npy."""

import argparse

from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.script_util import add_arguments, config_from_args, run_main


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
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
