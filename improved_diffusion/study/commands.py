"""The project's commands, as a user types them: printed, parsed, or run in processes of their own."""

from __future__ import annotations

import argparse
import contextlib
import logging
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from improved_diffusion.script_util import add_arguments, config_from_args

logger = logging.getLogger(__name__)


def command_line(script: str, words: Sequence[str]) -> str:
    """The command that runs one of scripts/ with these options."""
    return shlex.join(["python", f"scripts/{script}", *words])


def parse(script: str, words: Sequence[str], *groups: type) -> list[Any]:
    """One of each option group, from words as they stand on the script's command line.

    Argparse ends the process where the words are wrong; ValueError where the values are not legal.
    """
    parser = argparse.ArgumentParser(prog=script)
    add_arguments(parser, *groups)
    args = parser.parse_args(words)
    return [config_from_args(group, args) for group in groups]


@contextlib.contextmanager
def in_place_of(script: str, words: Sequence[str]) -> Iterator[None]:
    """Print the command that does the same as the block.

    What the block records as its command, such as a run's config.json, is that command, too.
    """
    logger.info("\n$ %s", command_line(script, words))
    before, sys.argv = sys.argv, [f"scripts/{script}", *words]
    try:
        yield
    finally:
        sys.argv = before


def run_script(folder: Path, script: str, words: Sequence[str]) -> None:
    """Print a command and run its script, which lies in `folder`, in a process of its own.

    Raises ValueError where it fails.
    """
    logger.info("\n$ %s", command_line(script, words))
    done = subprocess.run([sys.executable, str(folder / script), *words])
    if done.returncode:
        raise ValueError(
            f"scripts/{script} ended with exit code {done.returncode}: see its message above"
        )
