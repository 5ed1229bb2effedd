"""What training and sampling cost on this machine, beside what the machine could do at most.

One run in one process measures the network, the training step, the samplers, the reading of training
items and the drawing of masks; beside the network's speed stand a 3x3 convolution's and a matrix
product's, timed right before and after in the same arithmetic.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import statistics
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from improved_diffusion import fp16_util
from improved_diffusion.config import TrainConfig, check_known
from improved_diffusion.data import paths
from improved_diffusion.data.dataset_specs import DatasetSpec
from improved_diffusion.data.frame_masks import draw_frames
from improved_diffusion.data.rng_util import make_generator
from improved_diffusion.data.video_datasets import TrainDataset, get_train_dataset
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.nn import compile_network
from improved_diffusion.resample import create_schedule_sampler
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.sampling.samplers import SAMPLERS
from improved_diffusion.script_util import create_model_and_diffusion
from improved_diffusion.study import speed
from improved_diffusion.study.options import BenchmarkConfig

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
USUAL_STEPS = {"ddpm": 1000, "ddim": 50, "dpmpp2m": 20, "heun": 20}
MEASURED_STEPS = 3  # of a sampler; the rest is scaled
NUM_VIDEOS, NUM_ITEMS, NUM_DRAWS = 3, 32, 1000

# Activations (frames x pixels x channels) of one training step that 24 GiB do not hold.
CPU_LIMIT = 20 * 128 * 128 * 128
NOT_ON_A_CPU = {
    "train": "not run on a CPU: needs more memory",
    "sampling": "not run on a CPU: forward calls say how long it takes",
}


@dataclass(frozen=True)
class Size:
    """The network and the data of one training command; batch_size is that of one measured call."""

    image_size: int
    T: int  # frames of a training video
    num_channels: int = 128
    num_res_blocks: int = 1
    max_frames: int = 20
    batch_size: int = 1
    suffix: str = ".npy"  # of the data set's files

    @property
    def network(self) -> Size:
        """The same without what the network does not see: equal where the calls are the same."""
        return dataclasses.replace(self, T=0, suffix="")


SIZES = {
    "mazes_cwvae": Size(64, T=300),
    "minerl": Size(64, T=500),
    "carla_no_traffic": Size(128, T=1000, suffix=".pt"),
    "small": Size(32, T=100, num_channels=32, max_frames=8, batch_size=8),
}


@dataclass(frozen=True)
class Row:
    """One line of the table; None where there is nothing to say.

    `seconds` is the median and `fastest` the least of the repeats, of one call, update, trajectory,
    item or draw; `ratio` is gflops over conv_limit; `rate` counts `unit` per second.
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
    peak_gb: float | None = None
    rate: float | None = None
    unit: str = ""
    note: str = ""


# ---------------------------------------------------------------- the network


@dataclass(frozen=True)
class Setting:
    """One network in one arithmetic on one device."""

    name: str  # of the sizes that have this network
    size: Size
    precision: str
    device: torch.device
    config: BenchmarkConfig

    def build(self, timestep_respacing: str = "") -> tuple[nn.Module, SpacedDiffusion]:
        """A fresh network on the device, and the process."""
        model, diffusion = create_model_and_diffusion(
            image_size=self.size.image_size,
            num_channels=self.size.num_channels,
            num_res_blocks=self.size.num_res_blocks,
            use_checkpoint=self.config.use_checkpoint,
            timestep_respacing=timestep_respacing,
        )
        return model.to(self.device), diffusion

    def autocast(self) -> Any:
        """The context of the arithmetic."""
        return fp16_util.autocast(self.device, precision=self.precision, use_fp16=False)

    def items(self) -> dict[str, Tensor]:
        """A batch as TrainDataset gives it: half of the frames observed, the others latent."""
        size, shape = self.size, (self.size.batch_size, self.size.max_frames)
        frames = torch.randint(256, (*shape, 3, size.image_size, size.image_size))
        observed = torch.arange(size.max_frames) < size.max_frames // 2
        observed = observed.float().expand(shape)[..., None, None, None]
        return {
            "frames": frames.to(torch.uint8),
            "frame_indices": torch.arange(size.max_frames).expand(shape),
            "obs_mask": observed,
            "latent_mask": 1 - observed,
        }


def on_device(items: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Items as the network takes them: their frames as "x0", float in [-1, 1]."""
    batch = {key: value.to(device) for key, value in items.items()}
    batch["x0"] = batch.pop("frames").float() / 127.5 - 1
    return batch


class TrainStep:
    """Calls are updates as train_util.TrainLoop makes them, alone, in float32 or bf16.

    In it: items to the device, timesteps and noise, forward pass, loss, backward pass, gradient
    norm, AdamW, moving averages. Not in it: reading the items, logging, saving.

    Args:
        model: the network, changed by each call.
        diffusion: the process to train on.
        config: of its options lr, weight_decay, ema_rate, precision, schedule_sampler, batch_size
            and seed count.
        items: a batch as TrainDataset gives it, on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        config: TrainConfig,
        items: dict[str, Tensor],
        device: torch.device,
    ) -> None:
        self.model, self.diffusion, self.config = model.train(), diffusion, config
        self.items, self.device = items, device
        self.position = 0
        self.params = dict(model.named_parameters())
        self.emas = {
            rate: {name: param.detach().clone() for name, param in self.params.items()}
            for rate in config.ema_rates
        }
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay, foreach=True
        )
        self.sampler = create_schedule_sampler(config.schedule_sampler, diffusion.num_timesteps)

    def __call__(self) -> float:
        """Make one update; returns the norm of its gradient."""
        generator = make_generator(self.config.seed, self.position, 0)
        torch.manual_seed(generator.initial_seed())
        self.position += self.config.batch_size
        t, weights = self.sampler.sample(self.config.batch_size, generator)
        self.optimizer.zero_grad(set_to_none=True)
        (self._losses(t.to(self.device)) * weights.to(self.device)).mean().backward()
        grads = [param.grad for param in self.params.values() if param.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))
        self.optimizer.step()
        for rate, ema in self.emas.items():
            fp16_util.update_ema(ema, self.params.values(), float(rate))
        return norm

    def _losses(self, t: Tensor) -> Tensor:
        batch = on_device(self.items, self.device)
        return self.diffusion.training_losses(
            self._network,
            batch["x0"],
            t,
            model_kwargs=batch,
            noise=torch.randn_like(batch["x0"]),
            latent_mask=1 - batch["obs_mask"],
            eval_mask=batch["latent_mask"],
        )["loss"]

    def _network(self, *args: Any, **kwargs: Any) -> Tensor:
        with fp16_util.autocast(self.device, precision=self.config.precision, use_fp16=False):
            return self.model(*args, **kwargs)


def forward_step(setting: Setting, model: nn.Module) -> Callable[[], Tensor]:
    """One call of the network without gradients, as sampling makes it."""
    model.eval()
    batch = on_device(setting.items(), setting.device)
    x = torch.randn_like(batch["x0"])
    t = torch.full((setting.size.batch_size,), 500.0, device=setting.device)

    @torch.inference_mode()
    def step() -> Tensor:
        with setting.autocast():
            return model(x, t, **batch)

    return step


def sampling_step(
    setting: Setting, model: nn.Module, diffusion: SpacedDiffusion, sampler: str
) -> Callable[[], Tensor]:
    """All steps of `diffusion`, from noise to frames."""
    model.eval()
    batch = on_device(setting.items(), setting.device)

    @torch.inference_mode()
    def step() -> Tensor:
        with setting.autocast():
            return SAMPLERS[sampler](
                diffusion, model, tuple(batch["x0"].shape), eta=0.0, model_kwargs=batch
            )

    return step


def network_calls(sampler: str, steps: int) -> int:
    """How often a sampler calls the network."""
    return 2 * steps - 1 if sampler == "heun" else steps


def measure_forward(setting: Setting) -> list[Row]:
    """One row: a call of the network."""
    model, _ = setting.build()
    gflop = speed.count_gflop(forward_step(setting, model))
    return [_measure(setting, "forward", forward_step(setting, _final(setting, model)), gflop)]


def measure_train(setting: Setting) -> list[Row]:
    """One row: an update, see TrainStep."""
    config = TrainConfig(
        dataset="benchmark", batch_size=setting.size.batch_size, precision=setting.precision
    )
    model, diffusion = setting.build()
    gflop = speed.count_gflop(TrainStep(model, diffusion, config, setting.items(), setting.device))
    step = TrainStep(_final(setting, model), diffusion, config, setting.items(), setting.device)
    return [_measure(setting, "training step", step, gflop)]


def measure_sampling(setting: Setting) -> list[Row]:
    """A row for each sampler: a trajectory of its usual number of steps, scaled from a few."""
    size = setting.size
    model, diffusion = setting.build(str(MEASURED_STEPS))
    gflop = speed.count_gflop(forward_step(setting, model))
    model = _final(setting, model)
    latent = size.max_frames - size.max_frames // 2
    note = f"scaled from {MEASURED_STEPS} steps; makes {latent} of {size.max_frames} frames"
    rows = []
    for sampler, steps in USUAL_STEPS.items():
        calls = network_calls(sampler, steps)
        scale = calls / network_calls(sampler, MEASURED_STEPS)
        step = sampling_step(setting, model, diffusion, sampler)
        what = f"sampling {sampler}, {steps} steps"
        row = _measure(setting, what, step, gflop * calls, scale=scale)
        assert row.seconds is not None
        rate = size.batch_size * latent / row.seconds
        rows.append(dataclasses.replace(row, rate=rate, unit="frames/s", note=note))
    return rows


def _final(setting: Setting, model: nn.Module) -> nn.Module:
    """The network as it is to be timed; its operations are counted before, in the plain one."""
    return compile_network(model) if setting.config.compile else model


def _measure(
    setting: Setting, what: str, step: Callable[[], Any], gflop: float, *, scale: float = 1.0
) -> Row:
    """The row of `scale` calls of `step`: limits, one call to warm up, the repeats, limits again."""
    logger.info("%s, %s: %s", setting.name, setting.precision, what)
    device, dtype = setting.device, DTYPES[setting.precision]
    limits = [speed.limits(device, dtype)]
    resettable = speed.reset_peak_memory(device)
    step()
    seconds = [scale * one for one in speed.timed(step, setting.config.repeats)]
    peak = speed.peak_memory_gb(device) if resettable else None
    limits.append(speed.limits(device, dtype))
    conv, gemm = (statistics.mean(pair) for pair in zip(*limits, strict=True))
    median = statistics.median(seconds)
    return Row(
        setting.name,
        what,
        setting.precision,
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

        def step() -> None:
            for key in keys:
                data[key]

        step()
        seconds = speed.timed(step, repeats)
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

    def step() -> None:
        for _ in range(NUM_DRAWS):
            draw_frames(size.T, size.max_frames, rng)

    return _rate_row(name, "masks", speed.timed(step, repeats), NUM_DRAWS, "draws/s")


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


# ---------------------------------------------------------------- one run


NETWORK_MEASURES: dict[str, Callable[[Setting], list[Row]]] = {
    "forward": measure_forward,
    "train": measure_train,
    "sampling": measure_sampling,
}
DATA_MEASURES: dict[str, Callable[[str, Size, int], Row]] = {
    "data": measure_data,
    "masks": measure_masks,
}


def run_benchmark(config: BenchmarkConfig) -> dict[str, Any]:
    """Measure what `config` asks for, write it as JSON (and the profile), and return the same.

    {"torch", "device", "threads", "options", "rows"}; rows are Row as dictionaries.

    Raises ValueError for an unknown name, a device that is not there or an impossible size.
    """
    measures = choose("measure", config.measure, [*NETWORK_MEASURES, *DATA_MEASURES])
    precisions = choose("precision", config.precision, DTYPES)
    sizes = resolve_sizes(config)
    device = speed.open_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    names_of: dict[Size, list[str]] = {}
    for name, size in sizes.items():
        names_of.setdefault(size.network, []).append(name)
    settings = [
        Setting("/".join(names), size, precision, device, config)
        for size, names in names_of.items()
        for precision in precisions
    ]
    rows: list[Row] = []
    for setting in settings:
        for measure in (name for name in NETWORK_MEASURES if name in measures):
            rows += _network_rows(setting, measure)
    for name, size in sizes.items():
        for measure in (name for name in DATA_MEASURES if name in measures):
            rows.append(DATA_MEASURES[measure](name, size, config.repeats))
    if config.profile is not None:
        with paths.atomic_write(config.profile) as file:
            file.write("\n".join(map(_profile, settings)).encode())
    report = speed.describe_machine(device) | {
        "options": vars(config),
        "rows": list(map(vars, rows)),
    }
    with paths.atomic_write(config.out) as file:
        file.write(json.dumps(report, indent=2).encode())
    return report


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


def _profile(setting: Setting) -> str:
    model, _ = setting.build()
    step = forward_step(setting, _final(setting, model))
    return speed.profile_table(step, f"{setting.name}, {setting.precision}: one forward call")


def _network_rows(setting: Setting, measure: str) -> list[Row]:
    size = setting.size
    activations = size.batch_size * size.max_frames * size.image_size**2 * size.num_channels
    too_large = setting.device.type == "cpu" and activations >= CPU_LIMIT
    if too_large and measure in NOT_ON_A_CPU:
        return [Row(setting.name, measure, setting.precision, note=NOT_ON_A_CPU[measure])]
    return NETWORK_MEASURES[measure](setting)


# ---------------------------------------------------------------- tables


COLUMNS = {
    "size": "{}", "what": "{}", "precision": "{}", "seconds": "{:.4g}", "GFLOP": "{:.4g}",
    "GFLOP/s": "{:.4g}", "conv limit": "{:.4g}", "GEMM limit": "{:.4g}", "ratio": "{:.2f}",
    "peak GB": "{:.2f}", "rate": "{}", "note": "{}",
}  # fmt: skip
FIELDS = ("size what precision seconds gflop gflops conv_limit gemm_limit ratio peak_gb").split()


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
    return "\n".join([title.format(**report), *speed.aligned(lines)])
