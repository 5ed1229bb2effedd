"""How far the frames of one video are from each other, each distance computed once. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# Numbers of a difference between embeddings that are computed at once: what the cache of a CPU's
# core holds, and what keeps a GPU busy.
NUMBERS_AT_ONCE = {"array": 2**18, "tensor": 2**26}


class FrameDistances:
    """Squared Euclidean distances between the embeddings of a video's done frames.

    Embeddings stay where they are given, in an array or on a tensor's device; only distances come
    back. Those from a frame are kept, and computed later for new frames alone.

    Args:
        capacity: the most frames there can be.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._vectors: Any = None  # [capacity, d], in the order of arrival
        self._places: dict[int, int] = {}  # frame -> row of _vectors
        self._rows: dict[int, np.ndarray] = {}  # frame -> [n], to the first n frames that came
        self._order = np.zeros(0, np.int64)  # rows of _vectors, in the order of the video

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, frame: int) -> bool:
        return frame in self._places

    @property
    def frames(self) -> list[int]:
        """The frames that are known, sorted."""
        return sorted(self._places)

    def add(self, frames: Sequence[int], embeddings: Any) -> None:
        """Take in frames that are not known yet: embeddings, array or tensor [n, d] of floats."""
        if self._vectors is None:
            shape = self._capacity, embeddings.shape[1]
            is_tensor = hasattr(embeddings, "new_empty")
            self._vectors = (
                embeddings.new_empty(shape) if is_tensor else np.empty(shape, embeddings.dtype)
            )
        begin = len(self)
        self._vectors[begin : begin + len(frames)] = embeddings
        self._places.update({frame: begin + i for i, frame in enumerate(frames)})
        self._order = np.array([self._places[frame] for frame in self.frames])

    def row(self, frame: int) -> np.ndarray:
        """Distances from a known frame to all known ones, in the order of `frames`: [N]."""
        parts = [self._rows[frame]] if frame in self._rows else []
        vector = self._vectors[self._places[frame]]
        kind = "array" if isinstance(vector, np.ndarray) else "tensor"
        rows_at_once = max(1, NUMBERS_AT_ONCE[kind] // len(vector))
        for begin in range(len(parts[0]) if parts else 0, len(self), rows_at_once):
            end = min(begin + rows_at_once, len(self))
            parts.append(_squared_norms(self._vectors[begin:end] - vector))
        self._rows[frame] = np.concatenate(parts)
        return self._rows[frame][self._order]


def as_array(values: Any) -> Any:
    """`values` as an array, without a copy where they are a tensor of the CPU; other tensors stay."""
    is_elsewhere = hasattr(values, "device") and str(values.device) != "cpu"
    return values if is_elsewhere else np.asarray(values)


def _squared_norms(vectors: Any) -> np.ndarray:
    if isinstance(vectors, np.ndarray):
        return np.matmul(vectors[:, None, :], vectors[:, :, None])[:, 0, 0]
    return vectors.square().sum(1).cpu().numpy()
