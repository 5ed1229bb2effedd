"""What the benchmark can measure, a function each: calls of the network, updates, samplers, data, masks."""

from __future__ import annotations

import dataclasses
import functools
import logging
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from improved_diffusion.data.dataset_specs import DatasetSpec
from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.data.frame_masks import draw_frames
from improved_diffusion.data.video_datasets import TrainDataset, get_train_dataset
from improved_diffusion.nn import compile_network
from improved_diffusion.registry import SAMPLERS
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.study import estimate, speed
from improved_diffusion.study.benchmark_table import Row
from improved_diffusion.study.workload import Size, Workload
from improved_diffusion.training.options import TrainConfig
from improved_diffusion.training.train_step import TrainStep

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
USUAL_TIMESTEPS = {
    "ddpm": 1000, "ddim": 50, "dpmpp2m": 20, "heun": 20, "dpmpp3m": 10, "unipc": 10, "ipndm4": 10,
}  # fmt: skip
MEASURED_TIMESTEPS = 3  # of a sampler; the rest is scaled
NUM_VIDEOS, NUM_ITEMS, NUM_DRAWS = 3, 32, 1000


def forward_call(workload: Workload, model: nn.Module) -> Callable[[], Tensor]:
    """One call of the network without gradients, as sampling makes it."""
    model.eval()
    batch = FrameBatch.from_items(workload.items(), workload.device)
    x = torch.randn_like(batch.frames)
    t = torch.full((workload.size.batch_size,), 500.0, device=workload.device)

    @torch.inference_mode()
    def call() -> Tensor:
        with workload.autocast():
            return model(x, t, **batch.conditioning)

    return call


def sampling_call(
    workload: Workload, model: nn.Module, diffusion: SpacedDiffusion, sampler: str
) -> Callable[[], Tensor]:
    """All timesteps of `diffusion`, from noise to frames."""
    model.eval()
    batch = FrameBatch.from_items(workload.items(), workload.device)
    denoiser = Denoiser(model, diffusion, autocast=workload.autocast)

    @torch.inference_mode()
    def call() -> Tensor:
        return SAMPLERS[sampler](denoiser, batch)

    return call


def network_calls(sampler: str, timesteps: int) -> int:
    """How often a sampler calls the network."""
    return 2 * timesteps - 1 if sampler == "heun" else timesteps


def measure_forward(workload: Workload) -> list[Row]:
    """One row: a call of the network."""
    model, _ = workload.build()
    gflop = speed.count_gflop(forward_call(workload, model))
    call = forward_call(workload, timed_network(workload, model))
    return [_with_count(workload, "forward", _measure(workload, "forward", call, gflop))]


def measure_train(workload: Workload) -> list[Row]:
    """One row: an update as training makes it, without reading items, logging and saving."""
    config = TrainConfig(
        dataset="benchmark", batch_size=workload.size.batch_size, precision=workload.precision
    )
    timed = dataclasses.replace(config, compile=workload.config.compile)
    model, diffusion = workload.build()
    items = workload.items()
    # Nothing keeps this one: its averages and moments are not to count in the peak.
    gflop = speed.count_gflop(
        functools.partial(TrainStep(model, diffusion, config, workload.device), items)
    )
    update = TrainStep(model, diffusion, timed, workload.device)
    row = _measure(workload, "training step", lambda: update(items), gflop)
    return [_with_count(workload, "train", row)]


def measure_sampling(workload: Workload) -> list[Row]:
    """A row for each sampler: a trajectory of its usual number of timesteps, scaled from a few."""
    size = workload.size
    model, diffusion = workload.build(str(MEASURED_TIMESTEPS))
    gflop = speed.count_gflop(forward_call(workload, model))
    model = timed_network(workload, model)
    latent = size.max_frames - size.max_frames // 2
    note = f"scaled from {MEASURED_TIMESTEPS} steps; makes {latent} of {size.max_frames} frames"
    rows = []
    for sampler, timesteps in USUAL_TIMESTEPS.items():
        calls = network_calls(sampler, timesteps)
        scale = calls / network_calls(sampler, MEASURED_TIMESTEPS)
        call = sampling_call(workload, model, diffusion, sampler)
        what = f"sampling {sampler}, {timesteps} steps"
        row = _measure(workload, what, call, gflop * calls, scale=scale)
        assert row.seconds is not None
        rate = size.batch_size * latent / row.seconds
        rows.append(dataclasses.replace(row, rate=rate, unit="frames/s", note=note))
    return rows


def timed_network(workload: Workload, model: nn.Module) -> nn.Module:
    """The network as it is to be timed; its operations are counted before, in the plain one."""
    return compile_network(model) if workload.config.compile else model


def _with_count(workload: Workload, what: str, row: Row) -> Row:
    """Of a GPU: beside what was measured the bytes that the code moves, and the MFU."""
    if workload.device.type != "cuda":
        return row
    kernels = estimate.estimate(dataclasses.replace(workload, device=torch.device("cpu")), what)
    card = estimate.card_of(torch.cuda.get_device_name(workload.device))
    assert row.gflops is not None
    arithmetic = estimate.arithmetic(workload.precision, what)
    mfu = card.mfu(row.gflops, arithmetic) if card is not None else None
    return dataclasses.replace(row, mfu=mfu, gb=sum(kernel.bytes for kernel in kernels) / 1e9)


def _measure(
    workload: Workload, what: str, call: Callable[[], Any], gflop: float, *, scale: float = 1.0
) -> Row:
    """The row of `scale` calls of `call`: limits, one call to warm up, the repeats, limits again."""
    logger.info("%s, %s: %s", workload.name, workload.precision, what)
    device, dtype = workload.device, DTYPES[workload.precision]
    limits = [speed.limits(device, dtype)]
    resettable = speed.reset_peak_memory(device)
    call()
    seconds = [scale * one for one in speed.timed(call, workload.config.repeats)]
    peak = speed.peak_memory_gb(device) if resettable else None
    limits.append(speed.limits(device, dtype))
    conv, gemm = (statistics.mean(pair) for pair in zip(*limits, strict=True))
    median = statistics.median(seconds)
    return Row(
        workload.name,
        what,
        workload.precision,
        seconds=median,
        fastest=min(seconds),
        gflop=gflop,
        gflops=gflop / median,
        conv_limit=conv,
        gemm_limit=gemm,
        ratio=gflop / median / conv,
        peak_gb=peak,
    )


# ---------------------------------------------------------------- data and masks


def measure_data(name: str, size: Size, repeats: int) -> Row:
    """Reading training items in one process, from files of random pixels that are in the page cache."""
    logger.info("%s: data", name)
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder), size)
        keys = [divmod(number, NUM_VIDEOS) for number in range(NUM_ITEMS)]

        def call() -> None:
            for key in keys:
                data[key]

        call()
        seconds = speed.timed(call, repeats)
    return _rate_row(name, "data", seconds, NUM_ITEMS, "items/s in one process")


def make_data(folder: Path, size: Size) -> TrainDataset:
    """The training items of a few new videos of random pixels in `folder`."""
    rng = np.random.default_rng(0)
    (folder / "train").mkdir()
    for index in range(NUM_VIDEOS):
        shape = (size.T, size.image_size, size.image_size, 3)
        video = rng.integers(0, 256, shape, dtype=np.uint8)
        path = folder / "train" / f"{index}{size.suffix}"
        if size.suffix == ".pt":
            torch.save(torch.from_numpy(video), path)
        else:
            np.save(path, video)
    spec = DatasetSpec("benchmark", folder, size.T, size.image_size, size.image_size)
    return get_train_dataset(spec, T=size.T, max_frames=size.max_frames)


def measure_masks(name: str, size: Size, repeats: int) -> Row:
    """Drawing which frames a training item observes and predicts."""
    logger.info("%s: masks", name)
    rng = np.random.default_rng(0)

    def call() -> None:
        for _ in range(NUM_DRAWS):
            draw_frames(size.T, size.max_frames, rng)

    return _rate_row(name, "masks", speed.timed(call, repeats), NUM_DRAWS, "draws/s")


def _rate_row(name: str, what: str, seconds: Sequence[float], number: int, unit: str) -> Row:
    median = statistics.median(seconds)
    return Row(
        name,
        what,
        seconds=median / number,
        fastest=min(seconds) / number,
        rate=number / median,
        unit=unit,
    )


NETWORK_CASES: dict[str, Callable[[Workload], list[Row]]] = {
    "forward": measure_forward,
    "train": measure_train,
    "sampling": measure_sampling,
}
DATA_CASES: dict[str, Callable[[str, Size, int], Row]] = {
    "data": measure_data,
    "masks": measure_masks,
}
