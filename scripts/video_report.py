"""Write evaluation directories as one HTML file: videos side by side, scores, plots, what made them.

The file opens in a browser without a server or network.
"""

import argparse

from improved_diffusion.evaluation.options import ReportConfig
from improved_diffusion.script_util import add_arguments, config_from_args, run_main


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, ReportConfig)
    return parser


def main(argv: list[str] | None = None) -> None:
    config = config_from_args(ReportConfig, create_argparser().parse_args(argv))
    from improved_diffusion.evaluation.report.page import write_report

    print(write_report(config))


if __name__ == "__main__":
    run_main(main)
