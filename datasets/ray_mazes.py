"""Make a built-in data set: python datasets/ray_mazes.py {colour_mazes,maze_laps} [--image_size N]"""

import argparse

from improved_diffusion.script_util import run_main


def main() -> None:
    """Make it where it is missing."""
    from improved_diffusion.data.dataset_files import dataset_spec, prepare_dataset
    from improved_diffusion.data.ray_mazes import IMAGE_SIZE, WORLDS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", choices=list(WORLDS))
    parser.add_argument("--image_size", type=int, default=IMAGE_SIZE)
    args = parser.parse_args()
    spec = dataset_spec(args.dataset, image_size=args.image_size)
    prepare_dataset(spec)
    print(spec.root)


if __name__ == "__main__":
    run_main(main)
