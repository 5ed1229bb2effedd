"""The cache of results: arrays in files whose names hold a hash of all that they depend on.

So nothing is computed twice, and nothing stale survives a sample that was made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from improved_diffusion.data import paths


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


def cache_name(label: str, *key: Any) -> str:
    """A file name for a result that depends on `key` (plain values) alone."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return f"{label}_{digest[:24]}.npy"
