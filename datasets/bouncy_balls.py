"""Make the built-in data set bouncy_balls: python datasets/bouncy_balls.py"""

import argparse

from improved_diffusion.script_util import run_main


def main() -> None:
    """Make it where it is missing."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    from improved_diffusion.data.dataset_files import DATASETS, prepare_dataset

    prepare_dataset("bouncy_balls")
    print(DATASETS["bouncy_balls"].root)


if __name__ == "__main__":
    run_main(main)
