"""Pictures of metrics: against the frame index, and the bound against the inference step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from improved_diffusion.data.paths import atomic_write
from improved_diffusion.evaluation import metric_tables
from improved_diffusion.evaluation.options import PlotConfig

logger = logging.getLogger(__name__)

# What is drawn, in this order: the axis' label.
PANELS = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "elbo": "negative ELBO (bits)",
}
# x, mean and standard error of one curve.
Curve = tuple[np.ndarray, np.ndarray, np.ndarray]


def draw_metrics(config: PlotConfig) -> Path:
    """Write a PNG of all that evaluation directories hold of PANELS; returns its path.

    A curve per directory: PSNR, SSIM and LPIPS against the frame index (of the newest table), the
    ELBO against the inference step; means over videos, with a band of one standard error. Raises
    ValueError for tables that cannot be compared, FileNotFoundError where nothing is to be drawn.
    """
    folders = [Path(folder) for folder in dict.fromkeys(config.eval_dir)]
    names = metric_tables.short_names(folders)
    tables = {name: newest_table(folder) for name, folder in zip(names, folders, strict=True)}
    infos = {name: metric_tables.read_info(path) for name, path in tables.items() if path}
    if infos:
        metric_tables.check_comparable(infos, allow=config.allow_differences)
    curves: dict[str, dict[str, Curve]] = {panel: {} for panel in PANELS}
    for name, folder in zip(names, folders, strict=True):
        found = table_curves(tables[name], infos.get(name, {})) | elbo_curve(folder)
        if not found:
            raise FileNotFoundError(
                f"{folder} holds no metrics_*.pkl with {', '.join(PANELS)} and no elbos/: run "
                "scripts/video_eval.py or scripts/video_nll.py first, or check --eval_dir"
            )
        for panel, curve in found.items():
            curves[panel][name] = curve
    path = Path(config.out) if config.out else folders[0] / "metrics.png"
    _draw_curves({panel: rows for panel, rows in curves.items() if rows}, path)
    return path


def newest_table(folder: Path) -> Path | None:
    """The table of metrics that was written last; None where there is none."""
    found = sorted(folder.glob("metrics_*.pkl"), key=lambda path: path.stat().st_mtime_ns)
    if len(found) > 1:
        logger.info("%s holds %d tables: drawing %s", folder, len(found), found[-1].name)
    return found[-1] if found else None


def table_curves(path: Path | None, info: dict[str, Any]) -> dict[str, Curve]:
    """{metric: curve over the frame index} of a table and what its .json says.

    Raises ValueError where the two do not belong together.
    """
    table = {} if path is None else metric_tables.read_table(path)
    curves: dict[str, Curve] = {}
    for mode in PANELS.keys() & table.keys():
        frames = np.array(info.get("frames", []), dtype=float)
        if table[mode].ndim != 3 or table[mode].shape[-1] != len(frames):
            raise ValueError(
                f"{path} and the .json beside it do not belong together: run scripts/video_eval.py"
            )
        curves[mode] = (frames, *metric_tables.frame_curve(table[mode]))
    return curves


def elbo_curve(folder: Path) -> dict[str, Curve]:
    """{"elbo": curve over inference steps} of a folder's elbos/; empty where it has none."""
    files = sorted((folder / "elbos").glob("elbo_*.npy"))
    if not files:
        return {}
    rows = [metric_tables.load_elbo(file) for file in files]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"{folder / 'elbos'} holds bounds of different numbers of steps: empty it")
    steps = np.arange(len(rows[0]), dtype=float)
    return {"elbo": (steps, *metric_tables.frame_curve(np.stack(rows)))}


def _draw_curves(curves: dict[str, dict[str, Curve]], path: Path) -> None:
    """One panel per key, one curve per directory; a directory has one colour everywhere."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for rows in curves.values() for name in rows))
    figure = Figure(figsize=(1 + 4.5 * len(curves), 3.8), layout="constrained")
    lines = {}
    for axes, (panel, rows) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        for name, (x, mean, error) in rows.items():
            colour = f"C{names.index(name) % 10}"
            marker = "." if len(x) < 50 else None
            (lines[name],) = axes.plot(x, mean, color=colour, marker=marker, linewidth=1.3)
            axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
        axes.set_xlabel("inference step" if panel == "elbo" else "frame")
        axes.set_ylabel(PANELS[panel])
        axes.grid(alpha=0.3)
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", frameon=False)
    figure.suptitle("mean over videos, band: standard error", fontsize=10)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
