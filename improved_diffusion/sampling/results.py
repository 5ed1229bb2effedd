"""One evaluation directory on disk: what was sampled, with which options, and the files in it."""

from __future__ import annotations

import contextlib
import json
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from improved_diffusion.data import paths

logger = logging.getLogger(__name__)

# Written beside the samples, but two runs may differ in it and still make the same videos.
NOT_A_VALUE = {"checkpoint_path"}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` readably and atomically."""
    with paths.atomic_write(path) as file:
        file.write((json.dumps(values, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError naming the file where it holds something else."""
    try:
        values = json.loads(path.read_text())
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object: delete it or restore it")
    return values


def load_video(path: Path) -> np.ndarray:
    """A sampled video, uint8 [T, 3, H, W], memory-mapped.

    Raises ValueError naming the file where it is truncated or no such array.
    """
    try:
        video = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"{path} cannot be read ({error}): delete it and sample it again"
        ) from None
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[1] != 3:
        raise ValueError(f"{path} holds {video.dtype} {video.shape}, not uint8 [T, 3, H, W]")
    return video


class EvalDir:
    """The evaluation directory at `path` (results/<run>/<checkpoint>/<inference_mode_str>)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def sample_config_path(self) -> Path:
        return self.path / "sample_config.json"

    @property
    def model_config_path(self) -> Path:
        return self.path / "model_config.json"

    def sample_config(self) -> dict[str, Any]:
        """The options that the samples were made with; empty where nothing says so."""
        return read_json(self.sample_config_path) if self.sample_config_path.exists() else {}

    def model_config(self) -> dict[str, Any]:
        """The training options of the checkpoint; empty where nothing says so."""
        return read_json(self.model_config_path) if self.model_config_path.exists() else {}

    def write_configs(
        self, model_config: Mapping[str, Any], sample_config: Mapping[str, Any]
    ) -> None:
        """Store the options, or check that they are those of the samples already here.

        Raises ValueError naming the first option that differs.
        """
        before = self.sample_config()
        for name in sorted(set(before) & set(sample_config) - NOT_A_VALUE):
            if before[name] != sample_config[name]:
                raise ValueError(
                    f"{self.path} holds samples made with {name} {before[name]}, not "
                    f"{sample_config[name]}: choose another folder with --eval_dir"
                )
        if not before:
            write_json(self.model_config_path, model_config)
            write_json(self.sample_config_path, sample_config)

    def has_sample(self, video: int, sample: int) -> bool:
        """Whether that sample is there and whole; an unreadable file is named and counts as missing."""
        path = paths.sample_path(self.path, video, sample)
        try:
            load_video(path)
        except FileNotFoundError:
            return False
        except ValueError as error:
            logger.warning("%s; making it again", error)
            return False
        return True

    def save_sample(self, video: int, sample: int, frames: np.ndarray) -> None:
        """Write one sampled video, uint8 [T, 3, H, W], atomically."""
        with paths.atomic_write(paths.sample_path(self.path, video, sample)) as file:
            np.save(file, frames)

    def save_partial(self, video: int, sample: int, frames: np.ndarray, stages: int) -> None:
        """Keep a video of which `stages` inference steps are made, uint8 [T, 3, H, W]."""
        with paths.atomic_write(paths.partial_path(self.path, video, sample)) as file:
            np.savez(file, frames=frames, stages=stages)

    def load_partial(self, video: int, sample: int) -> tuple[int, np.ndarray | None]:
        """(inference steps made, frames) of an unfinished video; (0, None) where none is kept."""
        try:
            with np.load(paths.partial_path(self.path, video, sample), allow_pickle=False) as kept:
                return int(kept["stages"]), kept["frames"]
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return 0, None

    def drop_partial(self, video: int, sample: int) -> None:
        """Forget the unfinished video, now that it is finished."""
        path = paths.partial_path(self.path, video, sample)
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty yet
            path.parent.rmdir()

    def samples(self) -> dict[int, list[int]]:
        """{video index: sorted sample indices}. Raises FileNotFoundError where there are none."""
        found: dict[int, list[int]] = {}
        for path in sorted((self.path / "samples").glob("sample_*.npy")):
            parsed = paths.parse_sample_name(path.name)
            if parsed is not None:
                found.setdefault(parsed[0], []).append(parsed[1])
        if not found:
            raise FileNotFoundError(
                f"no samples in {self.path / 'samples'}: run scripts/video_sample.py first, or check --eval_dir"
            )
        return {video: sorted(found[video]) for video in sorted(found)}
