"""Write evaluation directories as one HTML file: videos side by side, scores, plots, what made them.

The file opens in a browser without a server or network.
"""

import argparse

from improved_diffusion.evaluation.options import ReportConfig
from improved_diffusion.script_util import add_arguments, config_from_args, run_main

EPILOG = """\
examples:
  python scripts/video_report.py --eval_dir results/ID/ema_0.9999_latest_50000/*_300_36
  python scripts/video_report.py --eval_dir A B --num_videos 8 --max_mb 10 --out report.html
"""


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    add_arguments(parser, ReportConfig)
    return parser


def main(argv: list[str] | None = None) -> None:
    config = config_from_args(ReportConfig, create_argparser().parse_args(argv))
    from improved_diffusion.evaluation.report.page import write_report

    print(write_report(config))


if __name__ == "__main__":
    run_main(main)
