"""Laps of a maze with and without memory, then from nothing to videos: data, training, samples, scores, gifs."""

import argparse

from improved_diffusion.script_util import add_arguments, config_from_args, run_main
from improved_diffusion.study.options import DemoConfig

EPILOG = """\
examples:
  python scripts/video_demo.py
  python scripts/video_demo.py --minutes 0
"""


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    add_arguments(parser, DemoConfig)
    return parser


def main(argv: list[str] | None = None) -> None:
    config = config_from_args(DemoConfig, create_argparser().parse_args(argv))
    from improved_diffusion.study.demo import run_demo

    run_demo(config)


if __name__ == "__main__":
    run_main(main)
