"""Videos as lossless pictures that a browser cuts frames out of."""

from __future__ import annotations

import base64
import io
from typing import Any, NamedTuple

import numpy as np

MAX_SIDE = 4096  # pixels; browsers of phones draw no larger pictures


class Sprites(NamedTuple):
    """The frames of one video, row by row, in as many pictures as they need.

    Attributes:
        length, height, width: of the video.
        columns, rows: frames across and down in a picture; the last one may have fewer.
        pictures: data URIs of WebP files.
    """

    length: int
    height: int
    width: int
    columns: int
    rows: int
    pictures: list[str]

    @property
    def num_bytes(self) -> int:
        """What the pictures take in a page."""
        return sum(map(len, self.pictures))


def sprites(frames: np.ndarray) -> Sprites:
    """The pictures of uint8 [T, 3, H, W], T > 0. Raises ValueError for frames above MAX_SIDE."""
    length, _, height, width = frames.shape
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"frames of {height}x{width} pixels: no larger ones than {MAX_SIDE} go in")
    columns, rows = min(length, MAX_SIDE // width), MAX_SIDE // height
    rows = min(rows, -(-length // columns))
    per_picture = columns * rows
    pictures = [
        _encode(_tiled(np.asarray(frames[start : start + per_picture]), columns))
        for start in range(0, length, per_picture)
    ]
    return Sprites(length, height, width, columns, rows, pictures)


def _tiled(frames: np.ndarray, columns: int) -> np.ndarray:
    """Frames [n, 3, H, W] as one picture [rows H, columns W, 3]; black where none is left."""
    length, _, height, width = frames.shape
    rows = -(-length // columns)
    filled = np.zeros((rows * columns, height, width, 3), np.uint8)
    filled[:length] = frames.transpose(0, 2, 3, 1)
    grid = filled.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * height, columns * width, 3)


def _encode(picture: np.ndarray) -> str:
    from PIL import Image

    file = io.BytesIO()
    options: dict[str, Any] = {"lossless": True, "quality": 40, "method": 2}
    Image.fromarray(picture).save(file, format="WEBP", **options)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
