"""How the distributions of frame masks share out what training spends its items on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from improved_diffusion.data.frame_masks import create_mask_distribution
from improved_diffusion.registry import MASK_DISTRIBUTIONS
from improved_diffusion.study.markdown import markdown_table

HEADER = (
    "T, K", "masks", "observe nothing", "like a query", "full", "frames of the video", "ms a draw"
)  # fmt: skip


class Shares(NamedTuple):
    """Shares in [0, 1] of the items of a distribution, and the time of drawing one."""

    nothing_observed: float
    like_a_query: float  # 40 to 60 % of K frames are observed, and as many latent
    full: float  # no padding
    real_frames: float  # of all frames, those that are no padding
    milliseconds: float  # after as many draws to warm up


def mask_shares(name: str, T: int, max_frames: int, *, draws: int, seed: int) -> Shares:
    """The shares of the distribution `name` with its default options, from so many draws.

    Raises ValueError for an unknown name and for sizes below 1.
    """
    draw, rng = create_mask_distribution(name), np.random.default_rng(seed)
    for _ in range(draws):
        draw(T, max_frames, rng)
    began = time.perf_counter()
    items = [draw(T, max_frames, rng) for _ in range(draws)]
    seconds = time.perf_counter() - began
    observed, latent = np.array([list(map(len, item)) for item in items]).T
    balanced = [
        (0.4 <= part / max_frames) & (part / max_frames <= 0.6) for part in (observed, latent)
    ]
    return Shares(
        nothing_observed=float((observed == 0).mean()),
        like_a_query=float((balanced[0] & balanced[1]).mean()),
        full=float((observed + latent == max_frames).mean()),
        real_frames=float((observed + latent).mean() / max_frames),
        milliseconds=1e3 * seconds / draws,
    )


def parse_sizes(text: str) -> tuple[int, int]:
    """(T, K) of a text such as 300x20. Raises ValueError for another."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--mask_shares {text!r}: give T and max_frames, such as 300x20")
    return int(parts[0]), int(parts[1])


def format_shares(sizes: Sequence[str], *, draws: int, seed: int) -> str:
    """A table in Markdown of all registered distributions at these sizes ("300x20")."""
    rows = []
    for T, max_frames in map(parse_sizes, sizes):
        for name in MASK_DISTRIBUTIONS:
            *shares, milliseconds = mask_shares(name, T, max_frames, draws=draws, seed=seed)
            cells = [f"{100 * share:.1f} %" for share in shares]
            rows.append((f"{T}, {max_frames}", name, *cells, f"{milliseconds:.2f}"))
    return markdown_table(HEADER, rows)
