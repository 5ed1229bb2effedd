"""What training and sampling cost on this machine, beside what the machine could do at most.

One run in one process measures the network, the update, the samplers, the reading of training
items and the drawing of masks; beside the network's speed stand a 3x3 convolution's and a matrix
product's, timed right before and after in the same arithmetic.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from typing import Any

import torch

from improved_diffusion.config import check_known
from improved_diffusion.data import paths
from improved_diffusion.study import benchmark_cases, speed
from improved_diffusion.study.benchmark_cases import DATA_CASES, NETWORK_CASES
from improved_diffusion.study.benchmark_table import Row
from improved_diffusion.study.estimate import format_estimates
from improved_diffusion.study.options import BenchmarkConfig
from improved_diffusion.study.workload import SIZES, Size, Workload

# Activations (frames x pixels x channels) of one update that 24 GiB do not hold.
CPU_LIMIT = 20 * 128 * 128 * 128
NOT_ON_A_CPU = {
    "train": "not run on a CPU: needs more memory",
    "sampling": "not run on a CPU: forward calls say how long it takes",
}


def run_benchmark(config: BenchmarkConfig) -> dict[str, Any]:
    """Measure what `config` asks for, write it as JSON (and the profile), and return the same.

    {"torch", "device", "threads", "options", "rows"}; rows are Row as dictionaries.

    Raises ValueError for an unknown name, a device that is not there or an impossible size.
    """
    chosen = choose("measure", config.measure, [*NETWORK_CASES, *DATA_CASES])
    device = speed.open_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    sizes, workloads = resolve_sizes(config), resolve_workloads(config, device)
    rows: list[Row] = []
    for workload in workloads:
        for measure in (name for name in NETWORK_CASES if name in chosen):
            rows += _network_rows(workload, measure)
    for name, size in sizes.items():
        for measure in (name for name in DATA_CASES if name in chosen):
            rows.append(DATA_CASES[measure](name, size, config.repeats))
    if config.profile is not None:
        with paths.atomic_write(config.profile) as file:
            file.write("\n".join(map(_profile, workloads)).encode())
    report = speed.describe_machine(device) | {
        "options": vars(config),
        "rows": list(map(vars, rows)),
    }
    with paths.atomic_write(config.out) as file:
        file.write(json.dumps(report, indent=2).encode())
    return report


def estimate_benchmark(config: BenchmarkConfig) -> str:
    """What the networks of `config` would cost on GPUs, as a table; ValueError for an unknown name."""
    return format_estimates(resolve_workloads(config, torch.device("cpu")))


def resolve_workloads(config: BenchmarkConfig, device: torch.device) -> list[Workload]:
    """The networks of the sizes, each in each arithmetic; ValueError for an unknown name."""
    precisions = choose("precision", config.precision, benchmark_cases.DTYPES)
    return [
        Workload(name, size, precision, device, config)
        for name, size in networks(resolve_sizes(config)).items()
        for precision in precisions
    ]


def choose(flag: str, text: str, known: Collection[str]) -> list[str]:
    """The names in a comma list; ValueError for one that is not among `known`."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    check_known(flag, names, known)
    return names


def resolve_sizes(config: BenchmarkConfig) -> dict[str, Size]:
    """The sizes by name, changed as the options say."""
    options = ("batch_size", "max_frames", "image_size", "num_channels")
    given = {name: getattr(config, name) for name in options if getattr(config, name) is not None}
    names = choose("sizes", config.sizes, SIZES)
    return {name: dataclasses.replace(SIZES[name], **given) for name in names}


def networks(sizes: dict[str, Size]) -> dict[str, Size]:
    """The networks of some sizes, each once, by the names of those that have it."""
    names_of: dict[Size, list[str]] = {}
    for name, size in sizes.items():
        names_of.setdefault(size.network, []).append(name)
    return {"/".join(names): size for size, names in names_of.items()}


def _profile(workload: Workload) -> str:
    model, _ = workload.build()
    call = benchmark_cases.forward_call(workload, benchmark_cases.timed_network(workload, model))
    return speed.profile_table(call, f"{workload.name}, {workload.precision}: one forward call")


def _network_rows(workload: Workload, measure: str) -> list[Row]:
    size = workload.size
    activations = size.batch_size * size.max_frames * size.image_size**2 * size.num_channels
    too_large = workload.device.type == "cpu" and activations >= CPU_LIMIT
    if too_large and measure in NOT_ON_A_CPU:
        return [Row(workload.name, measure, workload.precision, note=NOT_ON_A_CPU[measure])]
    return NETWORK_CASES[measure](workload)
