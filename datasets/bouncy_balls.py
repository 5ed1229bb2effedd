"""Make the built-in data set bouncy_balls: python datasets/bouncy_balls.py"""

import argparse

from improved_diffusion.script_util import run_main


def main() -> None:
    """Make it where it is missing."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    from improved_diffusion.data.dataset_files import prepare_dataset
    from improved_diffusion.registry import DATASETS

    spec = DATASETS["bouncy_balls"]
    prepare_dataset(spec)
    print(spec.root)


if __name__ == "__main__":
    run_main(main)
