"""Compare inference strategies on a small data set by the documented commands, one after the other.

Commands that are done are skipped; --only spreads them over sittings and processes. Writes
<out>/tables.md, curves.png, videos.gif, report.html, and an evaluation directory per strategy.
"""

import argparse
import functools
from pathlib import Path

from improved_diffusion.script_util import add_arguments, config_from_args, run_main
from improved_diffusion.study.options import StudyConfig

EPILOG = """\
examples:
  python scripts/video_study.py maze_laps
  python scripts/video_study.py bouncy_balls --num_videos 4 --num_samples 1 --bound_videos 0 --list
"""


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    add_arguments(parser, StudyConfig)
    parser.add_argument(
        "--only", nargs="+", default=[], help="commands whose names match one of these patterns"
    )
    parser.add_argument(
        "--list", action="store_true", help="print names, seconds and commands; run nothing"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    options = config_from_args(StudyConfig, args)
    from improved_diffusion.study import study
    from improved_diffusion.study.arms import resolve

    config = resolve(options)
    if args.list:
        print(study.listing(config, args.only))
    else:
        from improved_diffusion.study.commands import run_script
        from improved_diffusion.study.study_report import write_report

        run_here = functools.partial(run_script, Path(__file__).parent)
        study.run(config, args.only, run_script=run_here)
        print(write_report(config))


if __name__ == "__main__":
    run_main(main)
