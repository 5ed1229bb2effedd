"""Write video_train.csv and video_test.csv: the last 100 videos are the test set."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from improved_diffusion.data.paths import atomic_write
from improved_diffusion.script_util import run_main

NUM_TEST = 100


def write_split(folder: Path) -> None:
    """Split the files video_<n>.pt of `folder` by their numbers.

    Raises FileNotFoundError for a missing folder, ValueError where no training video would be left.
    """
    from improved_diffusion.data.dataset_specs import sorted_files

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give that of the video_<n>.pt files")
    videos = sorted_files(folder.glob("video_*.pt"))
    if len(videos) <= NUM_TEST:
        raise ValueError(
            f"{folder}: has {len(videos)} files video_<n>.pt, "
            f"need more than the {NUM_TEST} of the test set: download the rest"
        )
    for partition, part in (("train", videos[:-NUM_TEST]), ("test", videos[-NUM_TEST:])):
        lines = [",path", *(f"{i},{video.name}" for i, video in enumerate(part))]
        path, text = folder / f"video_{partition}.csv", "\n".join(lines) + "\n"
        if not path.is_file() or path.read_text() != text:
            with atomic_write(path) as file:
                file.write(text.encode())


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the options and write the split."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="folder of the video_<n>.pt files")
    write_split(parser.parse_args(argv).dir)


if __name__ == "__main__":
    run_main(main)
