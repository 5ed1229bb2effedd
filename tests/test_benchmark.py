"""The benchmark counts right, steps as training does, and its table and its file say the same."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from helpers import run_script
from improved_diffusion import train_util
from improved_diffusion.data.dataset_files import dataset_spec
from improved_diffusion.registry import SAMPLERS
from improved_diffusion.study import benchmark, benchmark_cases, speed
from improved_diffusion.study.options import BenchmarkConfig
from improved_diffusion.study.workload import SIZES, Size, Workload
from improved_diffusion.training import train_step
from test_readme import COMMANDS, load_script

CPU = torch.device("cpu")
TINY = Size(32, T=5, num_channels=32, max_frames=2)
TINY_FLAGS = "--sizes small --batch_size 1 --max_frames 2 --repeats 1".split()


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    monkeypatch.setattr(speed, "CONV_IMAGES", (1,))
    monkeypatch.setattr(speed, "GEMM_SIZES", (64,))
    monkeypatch.setattr(speed, "LIMIT_S", 0.01)


def test_sizes_are_those_of_the_documented_training_commands():
    parser = load_script("scripts/video_train.py").create_argparser()
    seen = set()
    for script, words in COMMANDS:
        match = re.search(r"--dataset=(\w+)", words)
        if script != "scripts/video_train.py" or match is None or match[1] not in SIZES:
            continue
        if "--config" in words:
            continue  # the options stand in the file
        args = parser.parse_args(shlex.split(re.sub(r"\$\w+", "1", words)))
        size, data = SIZES[match[1]], dataset_spec(match[1])
        assert size.T == (data.T if args.T == -1 else args.T)
        assert size.image_size == data.image_size
        for name in ("num_channels", "num_res_blocks", "max_frames"):
            assert getattr(size, name) == getattr(args, name)
        seen.add(match[1])
    assert seen == {"mazes_cwvae", "minerl", "carla_no_traffic"}


def test_a_convolution_counts_two_operations_per_product():
    layer = torch.nn.Conv2d(5, 7, 3, padding=1)
    gflop = speed.count_gflop(lambda: layer(torch.zeros(2, 5, 8, 16)))
    assert gflop * 1e9 == pytest.approx(2 * 2 * 7 * 5 * 9 * 8 * 16)


def test_the_limit_is_that_of_the_largest_call_that_is_quick_enough(monkeypatch):
    monkeypatch.setattr(speed, "LIMIT_S", 1.0)
    monkeypatch.setattr(speed, "count_gflop", lambda call: call())
    monkeypatch.setattr(speed, "timed", lambda call, repeats: [call() ** 2 / 4])
    assert speed._rate([lambda: 1.0, lambda: 4.0, lambda: 100.0]) == 4.0 / 4.0
    assert speed._rate([lambda: 1.0, lambda: 1.5]) == pytest.approx(1.5 / 0.5625)


def test_the_peak_starts_anew():
    if not speed.reset_peak_memory(CPU):
        pytest.fail("this system does not let the peak be reset")
    before = speed.peak_memory_gb(CPU)
    big = torch.ones(50_000_000)
    peak = speed.peak_memory_gb(CPU)
    assert peak > before + 0.15
    del big
    speed.reset_peak_memory(CPU)
    assert speed.peak_memory_gb(CPU) < peak - 0.15


def test_the_benchmark_times_the_update_of_the_training_loop(monkeypatch):
    """Every timed call goes through the class that the loop makes its updates with."""
    made = []
    real = train_step.TrainStep.__call__

    def counted(self, items, *args):
        update = real(self, items, *args)
        made.append(update.done)
        return update

    monkeypatch.setattr(train_step.TrainStep, "__call__", counted)
    monkeypatch.setattr(benchmark_cases.speed, "limits", lambda *_: (1.0, 1.0))
    config = BenchmarkConfig(repeats=2)
    (row,) = benchmark_cases.measure_train(Workload("tiny", TINY, "fp32", CPU, config))
    assert made == [True] * 4  # counted, warmed up, timed twice
    assert row.gflop > 0 and row.seconds > 0
    assert train_util.TrainStep is train_step.TrainStep


def test_a_rate_is_compared_with_that_of_convolutions_before_and_after(monkeypatch):
    limits = iter([(10.0, 100.0), (30.0, 500.0)])
    monkeypatch.setattr(speed, "limits", lambda *_: next(limits))
    monkeypatch.setattr(speed, "timed", lambda *_: [1.0, 2.0, 6.0])
    workload = Workload("tiny", TINY, "fp32", CPU, BenchmarkConfig())
    row = benchmark_cases._measure(workload, "nothing", lambda: None, 8.0)
    assert (row.conv_limit, row.gemm_limit) == (20.0, 300.0)
    assert (row.gflops, row.ratio) == (4.0, 0.2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_call_the_network_as_often_as_the_scaling_says(sampler):
    workload = Workload("tiny", TINY, "fp32", CPU, BenchmarkConfig())
    model, diffusion = workload.build("4")
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    benchmark_cases.sampling_call(workload, model, diffusion, sampler)()
    assert len(calls) == benchmark_cases.network_calls(sampler, 4)
    assert sampler in benchmark_cases.USUAL_TIMESTEPS


@pytest.mark.slow
def test_the_table_and_the_file_agree(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    load_script("scripts/video_benchmark.py").main(
        [*TINY_FLAGS, "--out", "b.json", "--profile", "p.txt"]
    )
    table = capsys.readouterr().out.splitlines()
    report = json.loads(Path("b.json").read_text())
    rows = report["rows"]
    kinds = ["forward", "training step", *[f"sampling {name}" for name in SAMPLERS]]
    by_kind = {row["what"].partition(",")[0]: row for row in rows}
    assert list(by_kind) == [*kinds, "data", "masks"]
    assert report["torch"] in table[0] and len(table) == 2 + len(rows)
    for row, line in zip(rows, table[2:], strict=True):
        assert line.startswith("small") and row["what"] in line
        assert f"{row['seconds']:.4g}" in line
        assert 0 < row["fastest"] <= row["seconds"]
        if row["precision"]:
            assert row["gflops"] == pytest.approx(row["gflop"] / row["seconds"])
            assert row["ratio"] == pytest.approx(row["gflops"] / row["conv_limit"])
            assert f"{row['ratio']:.2f}" in line and row["gemm_limit"] > 0 and row["peak_gb"] > 0
        if row["unit"]:
            assert f"{row['rate']:.4g} {row['unit']}" in line
    assert by_kind["training step"]["gflop"] > 2.9 * by_kind["forward"]["gflop"]
    assert by_kind["sampling ddim"]["gflop"] == pytest.approx(50 * by_kind["forward"]["gflop"])
    profile = Path("p.txt").read_text()
    assert "small, fp32: one forward call" in profile and "aten::" in profile


def test_bf16_is_measured_beside_float32(tmp_path, monkeypatch):
    limits, convolutions = [], set()

    def record_limits(device, dtype):
        limits.append(dtype)
        return 1.0, 1.0

    def record_output(module, args, output):
        if isinstance(module, torch.nn.Conv2d):
            convolutions.add((len(limits), output.dtype))

    monkeypatch.setattr(speed, "limits", record_limits)
    options = {"batch_size": 1, "max_frames": 1, "repeats": 1, "precision": "fp32,bf16"}
    config = BenchmarkConfig("small", "forward", **options, out=str(tmp_path / "b.json"))
    with torch.nn.modules.module.register_module_forward_hook(record_output):
        fp32, bf16 = benchmark.run_benchmark(config)["rows"]
    assert (fp32["precision"], bf16["precision"]) == ("fp32", "bf16")
    assert fp32["gflop"] == pytest.approx(bf16["gflop"])
    assert limits == [torch.float32] * 2 + [torch.bfloat16] * 2  # before and after each
    timed = {(1, torch.float32), (3, torch.bfloat16)}
    assert timed <= convolutions and not {(1, torch.bfloat16), (3, torch.float32)} & convolutions


def test_equal_networks_share_their_rows_and_large_ones_are_left_out(tmp_path, monkeypatch):
    measured = []

    def note(workload):
        measured.append((workload.name, workload.size))
        return []

    monkeypatch.setattr(benchmark, "NETWORK_CASES", {"forward": note, "train": note})
    out = str(tmp_path / "b.json")
    config = BenchmarkConfig(measure="forward,train,masks", device="cpu", out=out, repeats=1)
    rows = benchmark.run_benchmark(config)["rows"]
    names = [name for name, _ in measured]
    assert names == ["mazes_cwvae/minerl", "mazes_cwvae/minerl", "carla_no_traffic"]
    assert [row["size"] for row in rows[1:]] == ["mazes_cwvae", "minerl", "carla_no_traffic"]
    assert rows[0]["size"] == "carla_no_traffic" and "needs more memory" in rows[0]["note"]


def test_compile_times_the_compiled_network(tmp_path, monkeypatch):
    compiled = []

    def compile_network(model):
        compiled.append(model)
        return model

    monkeypatch.setattr(benchmark_cases, "compile_network", compile_network)
    config = BenchmarkConfig(
        "small", "forward", 1, 1, repeats=1, compile=True, out=str(tmp_path / "b")
    )
    assert len(benchmark.run_benchmark(config)["rows"]) == 1 and len(compiled) == 1


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_data_items_have_the_size_of_the_training_command(tmp_path, suffix):
    size = Size(32, T=6, max_frames=3, suffix=suffix)
    item = benchmark_cases.make_data(tmp_path, size)[0, 0]
    assert item["frames"].shape == (3, 3, 32, 32)
    batch = Workload("tiny", size, "fp32", CPU, BenchmarkConfig()).items()
    for key, value in item.items():
        assert batch[key].shape[1:] == value.shape and batch[key].dtype == value.dtype


@pytest.mark.parametrize("flags, words", [
    ("--sizes huge", "--sizes 'huge' is unknown: choose from mazes_cwvae, minerl"),
    ("--measure nothing", "--measure 'nothing' is unknown"),
    ("--precision fp8", "--precision 'fp8' is unknown"),
    ("--repeats 0", "--repeats 0: must be at least 1"),
    ("--device nowhere", "--device nowhere cannot be used here"),
])  # fmt: skip
def test_mistakes_are_told_in_one_line(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        load_script("scripts/video_benchmark.py").main(flags.split())
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_script_ends_with_that_line(tmp_path):
    done = run_script("video_benchmark.py", "--sizes", "huge", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "choose from" in done.stderr
