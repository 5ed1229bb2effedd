"""Fréchet and kernel video distance of samples; writes into the same file as video_eval.py.

Several evaluation directories are printed as one table. As a SLURM array job, task i scores the
i-th batch of videos, and the task that completes the table writes it.
"""

import argparse

from improved_diffusion.evaluation.options import FvdConfig
from improved_diffusion.script_util import add_arguments, config_from_args, run_main

EPILOG = """\
examples:
  python scripts/video_eval_fvd.py --eval_dir results/ID/ema_0.9999_latest_50000/autoreg_20_10_300_36
  python scripts/video_eval_fvd.py --eval_dir A B --floor
"""


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    add_arguments(parser, FvdConfig)
    return parser


def main(argv: list[str] | None = None) -> None:
    config = config_from_args(FvdConfig, create_argparser().parse_args(argv))
    from improved_diffusion import dist_util
    from improved_diffusion.evaluation.evaluate import run

    dist_util.setup_dist()
    run(config)
    dist_util.cleanup()


if __name__ == "__main__":
    run_main(main)
