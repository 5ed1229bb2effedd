"""What is counted of a GPU's work, and that the work does not grow."""

import functools

import pytest
import torch
import torch.nn.functional as F

from helpers import call_main
from improved_diffusion.study import benchmark_cases, estimate, speed
from improved_diffusion.study.options import BenchmarkConfig
from improved_diffusion.study.workload import Size, Workload

TINY = Size(32, T=0, num_channels=32, max_frames=4, batch_size=2)


def workload(precision="bf16"):
    return Workload("tiny", TINY, precision, torch.device("cpu"), BenchmarkConfig())


@functools.cache
def kernels_of(what, precision="bf16"):
    return estimate.estimate(workload(precision), what)


def totals(kernels):
    return sum(k.launches for k in kernels), sum(k.bytes for k in kernels) / 1e6


# What the code needs now: less is progress (lower the number), more must be worth it.
@pytest.mark.parametrize("what, launches, megabytes", [
    ("forward", 860, 152),
    ("train", 2250, 467),
])  # fmt: skip
def test_kernels_and_bytes_do_not_grow(what, launches, megabytes):
    found_launches, found_megabytes = totals(kernels_of(what))
    assert 0.95 * launches < found_launches <= launches
    assert 0.95 * megabytes < found_megabytes <= megabytes


def test_every_norm_is_one_kernel_each_way():
    kernels = kernels_of("train")
    norms = sum(
        isinstance(module, torch.nn.GroupNorm) for module in workload().build()[0].modules()
    )
    names = [kernel.op for kernel in kernels]
    assert names.count("normalise") == names.count("normalise_backward") == norms
    assert 0 < names.count("normalise_again") < norms


def test_flops_are_those_that_the_benchmark_counts():
    model, _ = workload("fp32").build()
    counted = speed.count_gflop(benchmark_cases.forward_call(workload("fp32"), model))
    kernels = kernels_of("forward", "fp32")
    attention = sum(k.flops for k in kernels if "attention" in k.op) / 1e9
    estimated = sum(k.flops for k in kernels) / 1e9
    assert estimated - attention == pytest.approx(counted, rel=1e-6)  # torch counts none on CPUs
    assert 0 < attention < 0.1 * estimated


def test_a_kernel_takes_its_flops_its_bytes_or_its_launch():
    card = estimate.CARDS[0]
    x, weight, bias = torch.zeros(2, 64, 32, 32), torch.zeros(64, 64, 3, 3), torch.zeros(64)
    with estimate._Kernels("tf32") as kernels:
        F.conv2d(x, weight, bias, padding=1)
        x.expand(2, 64, 32, 32).add(x[:, :1].expand_as(x))  # the second is stored once
        bias + 1
    conv, its_bias, addition, small = kernels.found
    assert conv.flops == 2 * x.numel() * 64 * 9 and conv.arithmetic == "tf32"
    assert conv.bytes == 4 * (2 * x.numel() + weight.numel())
    assert its_bias.bytes == 4 * 2 * x.numel()
    assert addition.bytes == 4 * (2 * x.numel() + x.numel() / 64)
    assert small.seconds(card) == card.launch
    assert estimate.Kernel("add", bytes=1.6e12).seconds(card) == pytest.approx(1.0)
    assert estimate.Kernel("mm", 1.0, flops=75e12, arithmetic="tf32").seconds(card) == 1.0


def test_mfu_is_of_the_data_sheet():
    card = estimate.card_of("NVIDIA H100 80GB HBM3")
    assert card.mfu(989e3, "half") == pytest.approx(1)
    assert estimate.card_of("NVIDIA GeForce") is None


@pytest.mark.slow
def test_the_command_prints_a_line_for_each_card_and_measures_nothing(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    call_main(
        "video_benchmark.py", *"--estimate --sizes small --precision bf16 --batch_size 1".split()
    )
    head, *lines = capsys.readouterr().out.splitlines()[1:]
    assert "A100 ms" in head and "H100 MFU" in head
    assert [line.split("  ")[0] for line in lines] == ["small, batch 1"] * 2
    assert not list(tmp_path.iterdir())
