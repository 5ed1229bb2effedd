"""Draw PSNR, SSIM and LPIPS against the frame index, and the ELBO of each inference step."""

import argparse

from improved_diffusion.evaluation.options import PlotConfig
from improved_diffusion.script_util import add_arguments, config_from_args, run_main

EPILOG = """\
examples:
  python scripts/video_plot.py --eval_dir results/ID/ema_0.9999_latest_50000/*_300_36
  python scripts/video_plot.py --eval_dir A B --out metrics.png
"""


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    add_arguments(parser, PlotConfig)
    return parser


def main(argv: list[str] | None = None) -> None:
    config = config_from_args(PlotConfig, create_argparser().parse_args(argv))
    from improved_diffusion.evaluation.plots import draw_metrics

    print(draw_metrics(config))


if __name__ == "__main__":
    run_main(main)
