"""Write samples as videos to look at: <eval_dir>/videos/*.gif, observed frames with a red border."""

import argparse

from improved_diffusion.evaluation.options import GifConfig
from improved_diffusion.script_util import add_arguments, config_from_args, run_main

EPILOG = """\
examples:
  python scripts/video_make_gif.py --eval_dir results/ID/ema_0.9999_latest_50000/autoreg_20_10_300_36 --add_gt
  python scripts/video_make_gif.py --eval_dir A B --add_gt --grid --num_videos 4 --out videos.gif
"""


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    add_arguments(parser, GifConfig)
    return parser


def main(argv: list[str] | None = None) -> None:
    config = config_from_args(GifConfig, create_argparser().parse_args(argv))
    from improved_diffusion.evaluation.gallery import make_gallery

    make_gallery(config)


if __name__ == "__main__":
    run_main(main)
