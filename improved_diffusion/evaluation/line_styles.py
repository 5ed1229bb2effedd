"""How the curves of several strategies are told apart, in pictures and in the report alike."""

from __future__ import annotations

from typing import NamedTuple


class LineStyle(NamedTuple):
    """A curve's colour, and the lengths of its dashes and gaps, in line widths; empty: none."""

    colour: str
    dashes: tuple[float, ...]


# Okabe and Ito 2008, "Color Universal Design": told apart with any colour vision, and as lines on
# white (their yellow, which is not, is left out).
COLOURS = "#0072b2 #d55e00 #009e73 #cc79a7 #000000 #e69f00 #56b4e9".split()
DASHES = ((), (5, 2), (1, 1.5), (5, 1.5, 1, 1.5), (9, 2), (3, 1.5))


def line_style(position: int) -> LineStyle:
    """The style of the strategy at `position` of the list; those of 42 are all different."""
    return LineStyle(COLOURS[position % len(COLOURS)], DASHES[position % len(DASHES)])
