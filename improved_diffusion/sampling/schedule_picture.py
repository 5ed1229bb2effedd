"""A picture of a strategy: which frames each inference step observes and samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from improved_diffusion.data.paths import atomic_write
from improved_diffusion.inference_utils import InferenceStrategyBase

# What a frame is in one inference step, its colour, in the order of the codes in the picture.
STATES = {
    "not sampled yet": "#f2f2f2",
    "done": "#c6d3e3",
    "observed": "#2b6cb0",
    "sampled now": "#e2711d",
}


def schedule_table(strategy: InferenceStrategyBase) -> np.ndarray:
    """int [steps, T]: for each inference step the index in STATES of every frame.

    Uses the strategy up. Adaptive strategies need their videos set; the first video is shown.
    """
    rows = []
    done = set(strategy.observed_from_data)
    for observed, latent in strategy:
        if strategy.is_adaptive:
            observed, latent = observed[0], latent[0]
        row = np.zeros(strategy._video_length, dtype=np.int64)
        row[sorted(done)] = 1
        row[observed] = 2
        row[latent] = 3
        rows.append(row)
        done.update(latent)
    return np.stack(rows)


def draw_schedule(strategy: InferenceStrategyBase, path: Path) -> None:
    """Write a PNG of a strategy: inference steps downwards, frames across. Uses the strategy up."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    table = schedule_table(strategy)
    steps, length = table.shape
    figure = Figure(figsize=(10, min(12, max(3, 1.5 + 0.12 * steps))), layout="constrained")
    axes = figure.add_subplot()
    # A cell edge at whole numbers: frame i fills [i, i + 1).
    axes.imshow(
        table,
        cmap=ListedColormap(list(STATES.values())),
        vmin=0,
        vmax=len(STATES) - 1,
        aspect="auto",
        interpolation="nearest",
        extent=(0, length, steps, 0),
    )
    axes.set_xlabel("frame")
    axes.set_ylabel("inference step")
    axes.set_title(f"{type(strategy).__name__}: {length} frames in {steps} steps", fontsize=10)
    patches = [Patch(facecolor=c, edgecolor="#999999", label=name) for name, c in STATES.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
