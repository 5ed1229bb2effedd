"""A picture of a strategy: which frames each inference step observes and samples."""

from __future__ import annotations

import dataclasses
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


def schedule_title(strategy: InferenceStrategyBase, steps: int) -> str:
    """The strategy's mode and options, then its sizes."""
    own = [f"--{name} {value}" for name, value in dataclasses.asdict(strategy.options).items()]
    sizes = {
        "T": strategy._video_length,
        "obs_length": strategy._num_obs,
        "max_frames": strategy._max_T,
        "step_size": strategy._step_size,
    }
    named = " ".join([strategy._mode(), *own])
    optimal = " --optimal" if strategy._schedule is not None else ""
    words = " ".join(f"--{name} {value}" for name, value in sizes.items())
    return f"{named}{optimal}: {steps} inference steps\n{words}"


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
    axes.set_title(schedule_title(strategy, steps), fontsize=10, loc="left")
    patches = [Patch(facecolor=c, edgecolor="#999999", label=name) for name, c in STATES.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
