"""A report's page: one HTML file that needs nothing else, from numbers and videos."""

from __future__ import annotations

import json
import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from improved_diffusion.data.machine import code_version
from improved_diffusion.data.paths import atomic_write
from improved_diffusion.evaluation import metric_tables
from improved_diffusion.evaluation.comparison import find_differences, verdict
from improved_diffusion.evaluation.curves import BITS, Curve
from improved_diffusion.evaluation.intervals import MIN_VIDEOS, Interval, mean_interval
from improved_diffusion.evaluation.line_styles import line_style
from improved_diffusion.evaluation.options import ReportConfig, as_words
from improved_diffusion.evaluation.plots import axis_label, count_label
from improved_diffusion.evaluation.report.numbers import EXPECTED, Numbers, Strategy, gather_numbers
from improved_diffusion.evaluation.report.videos import Videos, gather_videos
from improved_diffusion.registry import FRAME_METRICS, METRICS, SAMPLE_METRICS, VIDEO_METRICS

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
MEGABYTE = 1e6


def write_report(config: ReportConfig) -> Path:
    """Write the report of evaluation directories; returns its path.

    As many videos go in as --max_mb has room for. Raises ValueError or FileNotFoundError for a
    user's mistake, before anything is written.
    """
    numbers = gather_numbers(config)
    bare = len(render(config, numbers, Videos()).encode())
    names = [strategy.name for strategy in numbers.strategies]
    room = config.max_mb * MEGABYTE - 1.01 * bare  # and a little for what is left out
    if room < 0:
        raise ValueError(
            f"--max_mb {config.max_mb:g}: without any video the page has {bare / MEGABYTE:.2f} MB: "
            "give more, or fewer folders"
        )
    page = render(config, numbers, gather_videos(config, names, room)).encode()
    path = Path(config.out)
    with atomic_write(path) as file:
        file.write(page)
    logger.info("wrote %s, %.1f MB", path, len(page) / MEGABYTE)
    return path


def render(config: ReportConfig, numbers: Numbers, videos: Videos) -> str:
    """The page as text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    strategies = numbers.strategies
    facts = {name: value for s in strategies for name, value in s.facts.items()}
    shared = {n: v for n, v in facts.items() if all(s.facts.get(n) == v for s in strategies)}
    return environment.get_template("page.html").render(
        title=config.title
        or f"Samples of {Path(shared.get('data set', 'several data sets')).name}",
        strategies=strategies,
        swatches=[_swatch(position) for position in range(len(strategies))],
        panels=[("truth", False)] * bool(videos.truth) + [(s.name, True) for s in strategies],
        plots=[plot["label"] for plot in plots(strategies)],
        samples=videos.samples,
        scores=score_tables(strategies),
        differences=[difference_tables(strategies, base) for base in strategies],
        notes=notes(strategies),
        shared=shared,
        own=[name for name in facts if name not in shared],
        expected=EXPECTED,
        left_out=[*numbers.left_out, *videos.left_out],
        command=shlex.join(["python", "scripts/video_report.py", *as_words([config])]),
        version=code_version(),
        data=jinja2.utils.htmlsafe_json_dumps(data(config, numbers, videos), dumps=_dumps),
        style=jinja2.utils.markupsafe.Markup((HERE / "page.css").read_text()),
        script=jinja2.utils.markupsafe.Markup((HERE / "page.js").read_text()),
    )


def _swatch(position: int) -> dict[str, str]:
    """The line in the legend."""
    style = line_style(position)
    return {
        "colour": style.colour,
        "dashes": " ".join(f"{3 * n:g}" for n in style.dashes) or "none",
    }


# ---------------------------------------------------------------- tables


class Table(NamedTuple):
    """Rows are (strategy, cells), a cell is (mean and standard error, n)."""

    caption: str
    heads: list[str]
    rows: list[tuple[str, list[tuple[str, str]]]]


class Score(NamedTuple):
    """A number that strategies are compared by: a metric, or one column of those that have several."""

    mode: str  # a name in METRICS, or BITS
    head: str
    column: int | None = None

    @property
    def key(self) -> tuple[str, str]:
        """(metric, name of its column, or "")."""
        columns = () if self.column is None else SAMPLE_METRICS[self.mode].columns
        return self.mode, columns[self.column] if columns else ""

    @property
    def is_reference(self) -> bool:
        """Whether it says nothing of the samples."""
        return (
            self.column is not None and self.key[1] in SAMPLE_METRICS[self.mode].reference_columns
        )


def score_tables(strategies: Sequence[Strategy]) -> list[Table]:
    """Means over videos: a table of all metrics with one number, one of each that has several."""
    tables = []
    for caption, scores in _scores(strategies):
        rows = [(s.name, [_cell(_summary(s, score)) for score in scores]) for s in strategies]
        floors = [_floor(strategies, score.mode) for score in scores]
        if any(floors):
            cells = [floor or ("-", "") for floor in floors]
            rows.append(("true videos, real against real", cells))
        said = f"{caption}Mean ± standard error over n videos; of distances, [95 % interval]"
        tables.append(Table(said, [score.head for score in scores], rows))
    return tables


def difference_tables(strategies: Sequence[Strategy], base: Strategy) -> list[Table]:
    """The same of differences from `base`, paired over videos, of what says something of the samples."""
    others = [strategy for strategy in strategies if strategy is not base]
    tables = []
    for caption, scores in _scores(strategies):
        compared = [score for score in scores if not score.is_reference]
        rows = [(s.name, _difference_cells(s, base, compared)) for s in others]
        if compared and rows:
            said = f"{caption}Difference from {base.name}"
            tables.append(Table(said, [score.head for score in compared], rows))
    return tables


def _difference_cells(
    strategy: Strategy, base: Strategy, scores: Sequence[Score]
) -> list[tuple[str, str]]:
    found = {
        (d.metric, d.column): (d.interval, d.n, d.verdict)
        for d in find_differences({base.name: base.table, strategy.name: strategy.table})
    }
    videos = strategy.bits.keys() & base.bits.keys()
    of_bits = mean_interval(np.array([strategy.bits[v] - base.bits[v] for v in videos]))
    if of_bits is not None:
        found[BITS, ""] = of_bits, len(videos), verdict(of_bits, higher_is_better=False)
    return [
        _difference_cell(*found[score.key])
        if score.key in found
        else ("-", _why_not(strategy, score))
        for score in scores
    ]


def _difference_cell(interval: Interval, n: int, said: str) -> tuple[str, str]:
    return _typeset(f"{interval:+}"), f"n = {n}, {said}"


def _why_not(strategy: Strategy, score: Score) -> str:
    """Why a strategy has no difference; empty where its table says nothing of it."""
    row = _summary(strategy, score)
    few = row is not None and score.mode in VIDEO_METRICS and row["n"] < MIN_VIDEOS
    return f"fewer than {MIN_VIDEOS} videos" if few else ""


def _scores(strategies: Sequence[Strategy]) -> list[tuple[str, list[Score]]]:
    """(start of the caption, scores) of each table, in the order of METRICS; the bound is the last."""
    found = [mode for mode in METRICS if any(mode in s.table.values for s in strategies)]
    single = [Score(mode, axis_label(mode)) for mode in found if mode not in SAMPLE_METRICS]
    if any(strategy.bits for strategy in strategies):
        single.append(Score(BITS, "bits/dim"))
    several = [
        (
            f"{axis_label(mode)}. ",
            [Score(mode, name, i) for i, name in enumerate(SAMPLE_METRICS[mode].columns)],
        )
        for mode in found
        if mode in SAMPLE_METRICS
    ]
    return ([("", single)] if single else []) + several


def _cell(row: Mapping[str, Any] | None) -> tuple[str, str]:
    if row is None or row["mean"] is None:
        return "-", ""
    infinite = f", {row['infinite']} infinite" if row.get("infinite") else ""
    return _typeset(metric_tables.plus_minus(row)), f"n = {row['n']}{infinite}"


def _typeset(numbers: str) -> str:
    """Lines break between a value and its interval alone."""
    spaced = numbers.replace(" ", "\N{NO-BREAK SPACE}").replace("\N{NO-BREAK SPACE}[", " [")
    return spaced.replace("-", "\N{MINUS SIGN}")


def _summary(strategy: Strategy, score: Score) -> Mapping[str, Any] | None:
    if score.mode == BITS:
        bits = np.array(list(strategy.bits.values()))
        mean, error = metric_tables.mean_and_error(bits)
        return {"n": len(bits), "mean": mean, "standard_error": error}
    row = strategy.table.info.get("metrics", {}).get(score.mode)
    return row if row is None or score.column is None else row["columns"][score.column]


def _floor(strategies: Sequence[Strategy], mode: str) -> tuple[str, str] | None:
    """The distance between true videos in the first table that has one."""
    for strategy in strategies:
        floor = strategy.table.info.get("metrics", {}).get(mode, {}).get("floor")
        if floor:
            shared = ", observed frames shared" if "shared" in floor else ""
            return f"{metric_tables.like_for_like(floor):.4g}", f"n = {floor['n']}{shared}"
    return None


def notes(strategies: Sequence[Strategy]) -> list[str]:
    """How the metrics were computed, each sentence once: settings, hashes of weights."""
    found = [
        note
        for strategy in strategies
        for mode, row in strategy.table.info.get("metrics", {}).items()
        for note in metric_tables.how_computed(mode, row)
    ]
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------- data of the script


def plots(strategies: Sequence[Strategy]) -> list[dict[str, Any]]:
    """The plots, each with a curve per strategy that has one: {"strategy": its position, ...}."""
    found = []
    for mode in (*FRAME_METRICS, BITS):
        curves = {i: s.curves[mode] for i, s in enumerate(strategies) if mode in s.curves}
        if curves:
            count = count_label({str(i): curve for i, curve in curves.items()})
            found.append(
                {
                    "label": f"{axis_label(mode)}, {count}",
                    "by": "step" if mode == BITS else "frame",
                    "curves": [{"strategy": i, **_points(c)} for i, c in curves.items()],
                }
            )
    return found


def _points(curve: Curve) -> dict[str, list[float | None]]:
    names = ("x", "mean", "error")
    return {
        name: [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]
        for name, values in zip(names, curve[:3], strict=True)
    }


def data(config: ReportConfig, numbers: Numbers, videos: Videos) -> dict[str, Any]:
    """All that the script in the page works on."""
    schedules: list[Any] = []
    samples = []
    for shown in videos.samples:
        numbered = []
        for schedule in shown.schedules:
            if schedule is not None and schedule not in schedules:
                schedules.append(schedule)
            numbered.append(None if schedule is None else schedules.index(schedule))
        samples.append(
            {
                "video": shown.video,
                "sample": shown.sample,
                "videos": [sprites._asdict() for sprites in shown.samples],
                "schedules": numbered,
            }
        )
    return {
        "fps": config.fps,
        "strategies": [
            {"name": s.name, "observed": s.observed, **line_style(i)._asdict()}
            for i, s in enumerate(numbers.strategies)
        ],
        "plots": plots(numbers.strategies),
        "truth": {str(video): sprites._asdict() for video, sprites in videos.truth.items()},
        "samples": samples,
        "schedules": schedules,
    }


def _dumps(values: Any, **options: Any) -> str:
    return json.dumps(values, separators=(",", ":"), allow_nan=False)
