"""The cache of results: arrays in files whose names hold a hash of all that they depend on.

So nothing is computed twice, and nothing stale survives a sample that was made again. Each evaluation
directory has one; features of true videos are kept in another beside it, for all of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from improved_diffusion.data import paths
from improved_diffusion.data.metric_weights import user_cache

logger = logging.getLogger(__name__)


class Cache:
    """Arrays by name in `folders[0]`; those of the other folders are read too."""

    def __init__(self, folders: Sequence[Path]):
        self.folders = folders

    def load(self, name: str) -> np.ndarray | None:
        """A stored result, or None."""
        for folder in self.folders:
            try:
                return np.load(folder / name, allow_pickle=False)
            except (OSError, ValueError, EOFError):
                continue
        return None

    def save(self, name: str, values: np.ndarray) -> None:
        """Keep a result."""
        with paths.atomic_write(self.folders[0] / name) as file:
            np.save(file, values)

    def labels(self) -> set[str]:
        """The names without their hashes: what was computed at all, perhaps of other content."""
        files = [file for folder in self.folders for file in folder.glob("*.npy")]
        return {file.name.rpartition("_")[0] for file in files}


class TruthCache(Cache):
    """Features of true videos, for all runs and strategies; where it cannot be written it is not used."""

    def __init__(self) -> None:
        super().__init__([truth_cache_dir()])

    def save(self, name: str, values: np.ndarray) -> None:
        try:
            super().save(name, values)
        except OSError as error:
            logger.warning("features of true videos are not kept for other runs: %s", error)


def truth_cache_dir() -> Path:
    """The folder of true videos' features: METRIC_CACHE_DIR, or one in the user's cache folder."""
    named = os.environ.get("METRIC_CACHE_DIR")
    return Path(named or user_cache() / "improved_diffusion" / "truth_features")


def cache_name(label: str, *key: Any) -> str:
    """A file name for a result that depends on `key` (plain values) alone."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return f"{label}_{digest[:24]}.npy"
