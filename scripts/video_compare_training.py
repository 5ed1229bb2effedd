"""Compare ways to train: what each has learnt after equal updates, or equal time.

Every --every updates each run denoises the same inference steps on test videos at seven noise levels.
Writes <out>/errors.csv, errors.png and a .json per run, which goes on from there when started again.
With --num_videos the last checkpoints also sample, are scored, and their drift is drawn (drift.png).
"""

import argparse
import functools
from pathlib import Path

from improved_diffusion.script_util import add_arguments, config_from_args, run_main
from improved_diffusion.study.options import ComparisonConfig

EPILOG = """\
examples:
  python scripts/video_compare_training.py --updates 1500 --common "--dataset bouncy_balls \\
    --num_channels 32 --num_res_blocks 1 --batch_size 8 --max_frames 8" \\
    --runs "published:" "filled: --mask_distribution filled"
  python scripts/video_compare_training.py --mask_shares 300x20 100x8
"""


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    add_arguments(parser, ComparisonConfig)
    return parser


def main(argv: list[str] | None = None) -> None:
    config = config_from_args(ComparisonConfig, create_argparser().parse_args(argv))
    if config.mask_shares:
        from improved_diffusion.study.mask_shares import format_shares

        print(format_shares(config.mask_shares, draws=config.draws, seed=config.seed))
    else:
        from improved_diffusion.study.commands import run_script
        from improved_diffusion.study.training_comparison import compare

        print(compare(config, functools.partial(run_script, Path(__file__).parent)))


if __name__ == "__main__":
    run_main(main)
