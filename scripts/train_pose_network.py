"""Train the network that the metrics by place ask, on true videos with poses, and print its accuracy.

Its weights for colour_mazes and maze_laps come with the repository; docs/evaluation.md has their accuracy.
"""

import argparse

from improved_diffusion.evaluation.options import PoseConfig
from improved_diffusion.script_util import add_arguments, config_from_args, run_main

EPILOG = """\
examples:
  python scripts/train_pose_network.py --out pose_network.pt
  python scripts/train_pose_network.py --out pose_network.pt --updates 0
"""


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    add_arguments(parser, PoseConfig)
    return parser


def main(argv: list[str] | None = None) -> None:
    config = config_from_args(PoseConfig, create_argparser().parse_args(argv))
    from improved_diffusion.evaluation.pose_training import train_and_test

    train_and_test(config)


if __name__ == "__main__":
    run_main(main)
