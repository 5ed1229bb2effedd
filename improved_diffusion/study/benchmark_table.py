"""The rows that the benchmark measures, and their table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from improved_diffusion.study.speed import aligned

COLUMNS = {
    "size": "{}", "what": "{}", "precision": "{}", "seconds": "{:.4g}", "GFLOP": "{:.4g}",
    "GFLOP/s": "{:.4g}", "conv limit": "{:.4g}", "GEMM limit": "{:.4g}", "ratio": "{:.2f}",
    "MFU": "{:.2f}", "GB moved": "{:.4g}", "peak GB": "{:.2f}", "rate": "{}", "note": "{}",
}  # fmt: skip
FIELDS = (
    "size what precision seconds gflop gflops conv_limit gemm_limit ratio mfu gb peak_gb"
).split()


@dataclass(frozen=True)
class Row:
    """One line of the table; None where there is nothing to say.

    `seconds` is the median and `fastest` the least of the repeats, of one call, update, trajectory,
    item or draw; `ratio` is gflops over conv_limit; `rate` counts `unit` per second. Of a GPU, `mfu` is
    gflops over those of its data sheet, where it is known, and `gb` what is read and written, as counted.
    """

    size: str
    what: str
    precision: str | None = None
    seconds: float | None = None
    fastest: float | None = None
    gflop: float | None = None
    gflops: float | None = None
    conv_limit: float | None = None
    gemm_limit: float | None = None
    ratio: float | None = None
    mfu: float | None = None
    gb: float | None = None
    peak_gb: float | None = None
    rate: float | None = None
    unit: str = ""
    note: str = ""


def format_report(report: dict[str, Any]) -> str:
    """The table of `run_benchmark`'s result, under a line that says what it holds for."""
    lines = [list(COLUMNS)]
    for row in report["rows"]:
        rate = None if row["rate"] is None else f"{row['rate']:.4g} {row['unit']}"
        values = [row[name] for name in FIELDS] + [rate, row["note"] or None]
        formats = COLUMNS.values()
        lines.append(
            ["-" if v is None else f.format(v) for v, f in zip(values, formats, strict=True)]
        )
    title = (
        "{device}, {threads} threads, torch {torch}; limits in GFLOP/s; ratio: of the conv limit"
    )
    return "\n".join([title.format(**report), *aligned(lines)])
