"""Write samples as videos to look at: <eval_dir>/videos/*.gif, observed frames with a red border."""

import argparse

from improved_diffusion.evaluation.options import GifConfig
from improved_diffusion.script_util import add_arguments, config_from_args, run_main


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, GifConfig)
    return parser


def main(argv: list[str] | None = None) -> None:
    config = config_from_args(GifConfig, create_argparser().parse_args(argv))
    from improved_diffusion.evaluation.gallery import make_gallery

    make_gallery(config)


if __name__ == "__main__":
    run_main(main)
