"""The numbers of a report, and what made them: gathered from evaluation directories, plain values alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from improved_diffusion.evaluation import curves, metric_tables
from improved_diffusion.evaluation.curves import Curve
from improved_diffusion.evaluation.intervals import MIN_VIDEOS
from improved_diffusion.evaluation.metric_tables import ScoreTable
from improved_diffusion.evaluation.options import ReportConfig
from improved_diffusion.registry import FRAME_METRICS, VIDEO_METRICS
from improved_diffusion.sampling import provenance
from improved_diffusion.sampling.results import EvalDir

logger = logging.getLogger(__name__)

# What must be the same of bounds that are compared.
BOUNDED = ("T", "obs_length", "dataset_partition", "timestep_respacing", "stratified")

# What the stored options are called in the report; others keep their names and come last.
NAMED = {
    "checkpoint": "checkpoint_path",
    "updates": "checkpoint_step",
    "weights (SHA-256)": "weights_sha256",
    "data set": "dataset",
    "partition": "dataset_partition",
    "own clip": "obs_video",
    "frames": "T",
    "observed at the start": "obs_length",
    "frames in a call": "max_frames",
    "step size": "step_size",
    "sampler": "sampler",
    "timesteps": "timestep_respacing",
    "eta": "eta",
    "arithmetic": "precision",
    "seed": "seed",
}
# What every directory should say; other options may be those of some strategies alone.
EXPECTED = {
    "seconds per video": "how long sampling took",
    "version": "the version of the code that sampled",
    "weights (SHA-256)": "the hash of the weights",
    "checkpoint": "the checkpoint",
}
SAID_ELSEWHERE = ("inference_mode", "observed_frames")


@dataclass(frozen=True)
class Strategy:
    """One evaluation directory.

    Attributes:
        name: what it is called in the report.
        facts: {what: value} of how it was made.
        command: the one that makes its samples; None where the folder does not say enough.
        observed: frames that the data gave.
        table: its newest table.
        curves: {metric, or curves.BITS: curve}.
        bits: {video: its bound in bits per dimension}; empty where there is none.
    """

    name: str
    facts: dict[str, str]
    command: str | None
    observed: list[int]
    table: ScoreTable
    curves: dict[str, Curve]
    bits: dict[int, float]


@dataclass(frozen=True)
class Numbers:
    """All of a report but its videos.

    Attributes:
        left_out: what is missing, a sentence each.
    """

    strategies: list[Strategy]
    left_out: list[str]


def gather_numbers(config: ReportConfig) -> Numbers:
    """What the evaluation directories say.

    Raises ValueError for directories that cannot be compared, FileNotFoundError for one without
    samples.
    """
    eval_dirs = [EvalDir(folder) for folder in dict.fromkeys(config.eval_dir)]
    names = provenance.strategy_names(eval_dirs)
    strategies: list[Strategy] = []
    missing: dict[str, list[str]] = {}
    for name, eval_dir in zip(names, eval_dirs, strict=True):
        strategies.append(_strategy(name, eval_dir))
        for sentence in _missing(strategies[-1], eval_dir):
            missing.setdefault(sentence, []).append(name)
    _check_comparable(strategies, eval_dirs, allow=config.allow_differences)
    return Numbers(strategies, [f"{', '.join(of)}: {said}" for said, of in missing.items()])


def _check_comparable(strategies: list[Strategy], eval_dirs: list[EvalDir], *, allow: bool) -> None:
    infos = {s.name: s.table.info for s in strategies if s.table.info}
    if infos:
        metric_tables.check_comparable(infos, allow=allow)
    if allow:
        return
    provenance.check_side_by_side(eval_dirs, ", or go on with --allow_differences")
    bounds = [e.bound_config() for s, e in zip(strategies, eval_dirs, strict=True) if s.bits]
    for name in BOUNDED:
        found = {str(options[name]) for options in bounds if name in options}
        if len(found) > 1:
            raise ValueError(
                f"the bounds of these directories differ in {name} ({' and '.join(sorted(found))}), and "
                "cannot be compared: leave some out, or go on with --allow_differences"
            )


def _strategy(name: str, eval_dir: EvalDir) -> Strategy:
    path = curves.newest_table(eval_dir.path)
    table = metric_tables.read_scores(path)
    bounds = curves.read_bounds(eval_dir)
    return Strategy(
        name,
        _facts(eval_dir),
        provenance.sample_command(eval_dir),
        eval_dir.sample_config().get("observed_frames", []),
        table,
        curves.table_curves(path, table.info)
        | ({} if bounds is None else {curves.BITS: bounds.curve()}),
        {} if bounds is None else bounds.per_video,
    )


def _facts(eval_dir: EvalDir) -> dict[str, str]:
    """How the samples were made, in words; what nothing says is not in it."""
    stored = provenance.stored_options(eval_dir)
    others = {name: name for name in sorted(stored.keys() - {*NAMED.values(), *SAID_ELSEWHERE})}
    names = NAMED | others
    facts = {
        what: str(stored[name])
        for what, name in names.items()
        if stored.get(name) not in (None, "")
    }
    if facts.get("sampler") not in (None, "ddim"):
        facts.pop("eta", None)
    if "sampler" in facts:
        facts.setdefault("timesteps", "all that were trained on")
    if bound := eval_dir.bound_config():
        kind = "an unbiased estimate" if bound.get("stratified") else "the whole sum"
        respaced = bound.get("timestep_respacing")
        facts["bound"] = kind + (f" of the chain respaced to {respaced}" if respaced else "")
    seconds = provenance.seconds_per_video(eval_dir)
    if seconds is not None:
        facts["seconds per video"] = f"{seconds[0]:.4g} (mean of {seconds[1]} videos)"
    versions = provenance.versions(eval_dir)
    if versions:
        facts["version"] = ", ".join(versions)
    number = sum(map(len, eval_dir.samples().values()))
    return facts | {"samples": f"{number}, of {len(eval_dir.samples())} videos"}


def _missing(strategy: Strategy, eval_dir: EvalDir) -> Iterator[str]:
    """Sentences on what the directory does not say, without its name."""
    unsaid = [words for what, words in EXPECTED.items() if what not in strategy.facts]
    if unsaid:
        yield f"the folder does not say {', '.join(unsaid)}."
    if not strategy.table.values:
        yield "no scores; scripts/video_eval.py computes them."
    elif not strategy.table.values.keys() & FRAME_METRICS.keys():
        yield "no scores of single frames, so no curves of them."
    if strategy.table.values and _is_of_other_samples(strategy.table, eval_dir):
        yield (
            "samples were made, or made again, after its scores; scripts/video_eval.py computes them anew."
        )
    if old := _without_halves(strategy.table):
        yield (
            f"differences in {', '.join(old)}, whose table was written before it held "
            "what they need; scripts/video_eval_fvd.py writes it anew from what it has kept."
        )
    if curves.has_bounds(eval_dir) and not strategy.bits:
        yield "the bounds, since the folder does not say of how many frames they are."


def _is_of_other_samples(table: ScoreTable, eval_dir: EvalDir) -> bool:
    """Whether there are videos that the table has not, or samples that are younger than it."""
    path = curves.newest_table(eval_dir.path)
    files = [*(eval_dir.path / "samples").glob("sample_*.npy")]
    if path is None or not files:
        return False
    younger = max(file.stat().st_mtime for file in files) > path.stat().st_mtime
    return younger or not set(eval_dir.samples()) <= set(table.info.get("videos", []))


def _without_halves(table: ScoreTable) -> list[str]:
    """Distances of enough videos whose row lacks those of halves of the videos."""
    return [
        mode
        for mode, row in table.info.get("metrics", {}).items()
        if mode in VIDEO_METRICS
        and row["n"] >= MIN_VIDEOS
        and "of_halves" not in row.get("interval", {})
    ]
