"""Measure what training and sampling cost here, beside what this machine could do at most.

Prints a table and writes it as JSON. One process; --sizes, --measure and the sizes' own options
choose what is measured. With --estimate, prints what GPUs would need, counted without one.
"""

import argparse

from improved_diffusion.script_util import add_arguments, config_from_args, run_main
from improved_diffusion.study.options import BenchmarkConfig

EPILOG = """\
examples:
  python scripts/video_benchmark.py
  python scripts/video_benchmark.py --sizes small --measure forward,train
"""


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    add_arguments(parser, BenchmarkConfig)
    return parser


def main(argv: list[str] | None = None) -> None:
    config = config_from_args(BenchmarkConfig, create_argparser().parse_args(argv))
    from improved_diffusion.study.benchmark import estimate_benchmark, run_benchmark
    from improved_diffusion.study.benchmark_table import format_report

    print(estimate_benchmark(config) if config.estimate else format_report(run_benchmark(config)))


if __name__ == "__main__":
    run_main(main)
