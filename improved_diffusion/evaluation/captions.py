"""Words on videos: titles above the columns, a line for each frame below."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

FONT_SIZE, LINE_HEIGHT = 11, 14  # pixels
SMALLEST_SIZE = 8  # of titles whose words would not fit otherwise


def captioned(video: np.ndarray, titles: Sequence[str], notes: Sequence[str]) -> np.ndarray:
    """A video [T, H, W, 3] uint8 with a strip above and one below it.

    titles: of columns of equal width that make up W. notes: [T], what stands below each frame.
    """
    from PIL import ImageFont

    font = ImageFont.load_default(FONT_SIZE)
    width = video.shape[2] // len(titles)
    title_font = fitting_font(titles, width - 2)
    columns = [wrapped(title, title_font, width - 2) for title in titles]
    above = _strip(max(map(len, columns)), video.shape[2])
    for position, lines in enumerate(columns):
        for number, line in enumerate(lines):
            _write(above, (position * width + width // 2, number), line, title_font, "ma")
    whole = []
    for image, note in zip(video, notes, strict=True):
        below = _strip(1, video.shape[2])
        _write(below, (2, 0), note, font, "la")
        whole.append(np.concatenate([np.asarray(above), image, np.asarray(below)]))
    return np.stack(whole)


def fitting_font(titles: Sequence[str], width: float) -> Any:
    """The largest in which no word of the titles is wider, or else the smallest."""
    from PIL import ImageFont

    words = [word.strip() for title in titles for word in _words(title)]
    fonts = [ImageFont.load_default(size) for size in range(FONT_SIZE, SMALLEST_SIZE - 1, -1)]
    fitting = (font for font in fonts if all(font.getlength(word) <= width for word in words))
    return next(fitting, fonts[-1])


def _words(title: str) -> list[str]:
    """Its parts, each with the hyphens, commas and spaces after it."""
    return re.findall(r"[^-, ]+[-, ]*|[-, ]+", title)


def wrapped(title: str, font: Any, width: float) -> list[str]:
    """A title as lines of at most `width` pixels, broken after hyphens, commas and spaces.

    Words that are wider end in dots.
    """
    lines = [""]
    for word in _words(title):
        if lines[-1] and font.getlength((lines[-1] + word).rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return [_cut(line.strip(), font, width) for line in lines]


def _cut(line: str, font: Any, width: float) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."


def _strip(lines: int, width: int) -> Any:
    from PIL import Image

    return Image.new("RGB", (width, lines * LINE_HEIGHT + 2), "white")


def _write(strip: Any, place: tuple[int, int], text: str, font: Any, anchor: str) -> None:
    """place: (pixels from the left, line)."""
    from PIL import ImageDraw

    x, line = place
    ImageDraw.Draw(strip).text((x, 1 + line * LINE_HEIGHT), text, "black", font, anchor)
