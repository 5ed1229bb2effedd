"""Pictures of metrics: against the frame index, and the bound against the inference step."""

from __future__ import annotations

from pathlib import Path

from improved_diffusion.data.paths import atomic_write
from improved_diffusion.evaluation import metric_tables
from improved_diffusion.evaluation.curves import (
    BITS,
    Curve,
    newest_table,
    read_bounds,
    table_curves,
)
from improved_diffusion.evaluation.line_styles import line_style
from improved_diffusion.evaluation.options import PlotConfig
from improved_diffusion.registry import FRAME_METRICS, METRICS
from improved_diffusion.sampling.provenance import strategy_names
from improved_diffusion.sampling.results import EvalDir

# {what is drawn in a panel: {name of an evaluation directory: its curve}}
Panels = dict[str, dict[str, Curve]]


def draw_metrics(config: PlotConfig) -> Path:
    """Write a PNG of the metrics of frames and bounds that evaluation directories hold; returns its path.

    A curve per directory: metrics against the frame index (of the newest table), the bound in bits
    per dimension against the inference step; means over videos, with a band of one standard error.
    Raises ValueError for tables that cannot be compared, FileNotFoundError where nothing is to be
    drawn.
    """
    eval_dirs = [EvalDir(folder) for folder in dict.fromkeys(config.eval_dir)]
    names = strategy_names(eval_dirs)
    tables = {
        name: newest_table(eval_dir.path) for name, eval_dir in zip(names, eval_dirs, strict=True)
    }
    infos = {name: metric_tables.read_info(path) for name, path in tables.items() if path}
    if infos:
        metric_tables.check_comparable(infos, allow=config.allow_differences)
    panels: Panels = {panel: {} for panel in (*FRAME_METRICS, BITS)}
    for name, eval_dir in zip(names, eval_dirs, strict=True):
        found = table_curves(tables[name], infos.get(name, {}))
        if (bounds := read_bounds(eval_dir)) is not None:
            found[BITS] = bounds.curve()
        if not found:
            raise FileNotFoundError(
                f"{eval_dir.path} holds no metrics_*.pkl with {', '.join(FRAME_METRICS)} and no "
                "elbos/ that can be drawn: run scripts/video_eval.py or scripts/video_nll.py first, "
                "or check --eval_dir"
            )
        for panel, curve in found.items():
            panels[panel][name] = curve
    path = Path(config.out) if config.out else eval_dirs[0].path / "metrics.png"
    _draw_panels({panel: rows for panel, rows in panels.items() if rows}, names, path)
    return path


def axis_label(panel: str) -> str:
    """What the numbers of a panel are, with their unit."""
    if panel == BITS:
        return "negative ELBO (bits/dim)"
    unit = METRICS[panel].unit
    return panel.upper() + (f" ({unit})" if unit else "")


def count_label(curves: dict[str, Curve]) -> str:
    """How many videos the curves of a panel are means of."""
    counts = sorted({curve.n for curve in curves.values()})
    return f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"


def _draw_panels(panels: Panels, names: list[str], path: Path) -> None:
    """Two panels in a row at most; a directory has one style everywhere."""
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1 + 5 * columns, 0.9 + 3.1 * rows), layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False).flat
    lines = {}
    for (panel, curves), axes in zip(panels.items(), cells, strict=False):
        for name, curve in curves.items():
            colour, dashes = line_style(names.index(name))
            style = {"linestyle": (0, dashes)} if dashes else {}
            marker = "." if len(curve.x) < 50 else None
            (lines[name],) = axes.plot(
                curve.x, curve.mean, color=colour, marker=marker, linewidth=1.6, **style
            )
            low, high = curve.mean - curve.error, curve.mean + curve.error
            axes.fill_between(curve.x, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.set_xlabel("inference step" if panel == BITS else "frame")
        axes.set_ylabel(axis_label(panel))
        axes.set_title(count_label(curves), loc="right", fontsize=9)
        axes.grid(alpha=0.25)
    for unused in cells:
        unused.remove()
    shown = [name for name in names if name in lines]
    figure.legend(
        [lines[name] for name in shown],
        shown,
        loc="outside lower center",
        ncols=-(-len(shown) // -(-len(shown) // 4)),  # rows of four at most, all as long
        frameon=False,
        handlelength=3.5,
    )
    figure.suptitle("mean over videos; band: one standard error", fontsize=10)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
