"""Score samples against the test videos; writes <eval_dir>/metrics_<videos>-<samples>-<T>.pkl.

Several evaluation directories are printed as one table. As a SLURM array job, task i scores the
i-th batch of videos, and the task that completes the table writes it.
"""

import argparse

from improved_diffusion.evaluation.options import EvalConfig
from improved_diffusion.script_util import add_arguments, config_from_args, run_main

EPILOG = """\
examples:
  python scripts/video_eval.py --eval_dir results/ID/ema_0.9999_latest_50000/autoreg_20_10_300_36
  python scripts/video_eval.py --eval_dir A B --modes psnr ssim lpips fvd
"""


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    add_arguments(parser, EvalConfig)
    return parser


def main(argv: list[str] | None = None) -> None:
    config = config_from_args(EvalConfig, create_argparser().parse_args(argv))
    from improved_diffusion import dist_util
    from improved_diffusion.evaluation.evaluate import run

    dist_util.setup_dist()
    run(config)
    dist_util.cleanup()


if __name__ == "__main__":
    run_main(main)
