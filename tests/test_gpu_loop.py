"""The loop that does not wait for its GPU, as far as a CPU can show it.

A fused AdamW skips and clips by itself on a CPU too: with it the loop runs ahead as on a GPU. And
nothing can be read from the meta device, which stands in for one that has not computed yet.
"""

import errno
import functools
import threading
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from improved_diffusion import dist_util, fp16_util
from improved_diffusion.config import DataConfig, DiffusionConfig, ModelConfig
from improved_diffusion.data import checkpoints, dataset_files
from improved_diffusion.sampling.trained_model import create_diffusion, create_model
from improved_diffusion.training import optimizers, start, train_data, train_step, transfer
from improved_diffusion.training.options import LaunchConfig, TrainConfig
from train_runs import MODEL, TRAIN, assert_same_run, column, equal, load_run, make_loop

TIMES = ("seconds_waiting_for_data", "steps_per_second", "peak_memory_gb")


@pytest.fixture
def fused(monkeypatch):
    """AdamW as it is on a GPU."""

    def adamw(params, config, options):
        decay, betas = config.weight_decay, options.betas
        return torch.optim.AdamW(params, config.lr, betas, weight_decay=decay, fused=True)

    monkeypatch.setattr(optimizers, "_adamw", adamw)


def spoil(loop, call: int) -> None:
    """Let the loss of one call of the network, counted from 0, be NaN."""
    real, calls = loop.train_step.denoiser.losses, iter(range(1000))

    def losses(*args, **kwargs):
        factor = float("nan") if next(calls) == call else 1.0
        return {name: value * factor for name, value in real(*args, **kwargs).items()}

    loop.train_step.denoiser.losses = losses


def logged(run_id: str) -> dict[str, list[str]]:
    header = Path(f"checkpoints/{run_id}/progress.csv").read_text().splitlines()[0].split(",")
    return {name: column(f"checkpoints/{run_id}", name) for name in header if name not in TIMES}


# ---------------------------------------------------------------- running ahead


@pytest.mark.slow
def test_a_loop_that_runs_ahead_computes_and_logs_what_one_that_waits_does(
    videos, fused, monkeypatch
):
    """With a skipped update, which counts for no rate, average or row, and with a resume."""
    options = {"lr_anneal_steps": 9, "ema_warmup": True, "weight_decay": 0.01, "log_interval": 2}
    options |= {"max_steps": 6, "save_interval": 4}
    for run_id in ("waits", "ahead"):
        with monkeypatch.context() as patch:
            if run_id == "waits":
                patch.setattr(train_step, "can_skip", lambda optimizer: False)
            loop = make_loop(videos, {"dropout": 0.1}, resume_id=run_id, **options)
            assert loop.train_step._runs_ahead == (run_id == "ahead")
            spoil(loop, 2)
            loop.run_loop()
    assert loop.step == 6 and loop.train_step.position == 14
    assert_same_run("checkpoints/waits", "checkpoints/ahead")
    assert logged("waits") == logged("ahead") and len(logged("ahead")["step"]) == 3
    Path("checkpoints/ahead").rename("checkpoints/resumed")
    for path in Path("checkpoints/resumed").glob("*_*[6t].pt"):
        path.unlink()  # the sets of step 6
    make_loop(videos, {"dropout": 0.1}, resume_id="resumed", **options).run_loop()
    assert_same_run("checkpoints/waits", "checkpoints/resumed")
    assert logged("resumed") == logged("waits")


def test_ahead_means_that_the_update_before_is_finished_with_the_next(videos, fused):
    loop = make_loop(videos)
    step, batches = loop.train_step, loop._batches()
    assert step.begin(next(batches)) is None and step.step == 0
    assert step.begin(next(batches)).done and step.step == 1
    with pytest.raises(AssertionError, match="an update is under way"):
        step.state_dict()
    assert step.finish().done and step.step == 2 and step.finish() is None


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_the_fused_optimiser_clips_as_the_host_does(videos, fused, monkeypatch, limit):
    weights = []
    for ahead in (True, False):
        if not ahead:
            monkeypatch.setattr(train_step, "can_skip", lambda optimizer: False)
        loop = make_loop(videos, grad_clip=limit, lr=1.0)
        # One step of Adam is blind to the gradient's size: epsilon, not large, shows it.
        loop.train_step.optimizer.param_groups[0]["eps"] = 1.0
        loop.run_step(next(loop._batches()))
        loop.train_step.finish()
        weights.append(torch.cat([p.detach().flatten() for p in loop.train_step.params.values()]))
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-9)


def test_a_muon_or_learning_timesteps_let_the_host_decide(videos, fused):
    for options in ({"optimizer": "muon"}, {"schedule_sampler": "loss-second-moment"}):
        loop = make_loop(videos, **options)
        assert loop.train_step.begin(next(loop._batches())).done and loop.step == 1


# ---------------------------------------------------------------- nothing is asked for


class Reads(TorchDispatchMode):
    """Counts numbers that leave their tensor, each of which makes the host wait on a GPU."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


MORE = {"grad_clip": 0.1, "microbatch": 1, "ema_warmup": True}


@pytest.mark.parametrize("options", [{}, pytest.param(MORE, marks=pytest.mark.slow)])
def test_no_number_is_read_between_two_rows_of_the_log(videos, fused, options):
    """Shown to count: a float() of a tensor."""
    loop = make_loop(videos, log_interval=10, save_interval=10, **options)
    batches = loop._batches()
    loop.run_step(next(batches))  # tables are made
    with Reads() as reads:
        for _ in range(4):
            loop.run_step(next(batches))
        assert reads.number == 0 and loop.step == 4
        float(loop.train_step.params["time_embed.0.bias"].sum())
        assert reads.number == 1


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.slow
def test_updates_go_on_while_the_device_has_computed_nothing(monkeypatch, half):
    """On the meta device whatever reads a value raises; only the readback's is given here."""
    monkeypatch.setattr(train_step, "can_skip", lambda optimizer: True)
    numbers = [0.0, 0.0, 20.0 if half else 0.0, 1.0, *[0.5] * 6]
    monkeypatch.setattr(transfer.Readback, "read", lambda self: numbers)
    torch.manual_seed(0)
    network = create_model(ModelConfig(image_size=32, **MODEL))
    config = TrainConfig(dataset="x", batch_size=2, grad_clip=1.0, ema_rate="0.9,0.99")
    diffusion = create_diffusion(DiffusionConfig(diffusion_steps=40))
    step = train_step.TrainStep(network, diffusion, config, torch.device("meta"))
    if half:
        step.loss_scale = fp16_util.LossScale(0.001, "meta")
    mask = torch.tensor([1.0, 0, 0]).expand(2, 3).reshape(2, 3, 1, 1, 1)
    items = {
        "frames": torch.zeros(2, 3, 3, 32, 32, dtype=torch.uint8),
        "frame_indices": torch.arange(3).expand(2, 3),
        "obs_mask": mask,
        "latent_mask": 1 - mask,
    }
    real = step.optimizer.step

    def unfused():  # a fused optimiser knows no meta device
        step.optimizer.found_inf = step.optimizer.grad_scale = None
        real()

    step.optimizer.step = unfused
    assert step.begin(items) is None
    update = step.begin(items)
    assert (update.done, update.grad_norm, step.step) == (True, 1.0, 1)
    with pytest.raises(RuntimeError, match="meta"):
        float(next(iter(step.params.values())).sum())


# ---------------------------------------------------------------- checkpoints


@pytest.mark.slow
def test_a_checkpoint_is_written_while_training_goes_on_and_holds_its_own_step(videos, monkeypatch):
    options = {"save_interval": 2, "max_steps": 3}
    make_loop(videos, resume_id="whole", **options).run_loop()
    loop, steps = make_loop(videos, resume_id="slow", **options), []
    third = threading.Event()

    def write(path, content, real=checkpoints._write):
        if "000002" in path:
            assert third.wait(timeout=60)
        steps.append(loop.step)
        real(path, content)

    real = loop.train_step.finish

    def finish():
        update = real()
        if loop.step == 3:
            third.set()
        return update

    monkeypatch.setattr(checkpoints, "_write", write)
    monkeypatch.setattr(loop.train_step, "finish", finish)
    loop.run_loop()
    assert steps == [3] * 8  # four files of each set, the first while the third update was made
    for step in ("000002", "000003"):
        for kind in ("model", "ema_0.9", "ema_0.99", "opt"):
            slow, whole = (
                torch.load(f"checkpoints/{run}/{kind}_{step}.pt", weights_only=True)
                for run in ("slow", "whole")
            )
            assert equal({**slow, "config": 0}, {**whole, "config": 0}), (kind, step)


def test_what_the_writing_raises_ends_the_run_naming_the_file(videos, monkeypatch):
    def write(value, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", write)
    loop = make_loop(videos, resume_id="full", save_interval=1, max_steps=50)
    with pytest.raises(OSError, match="cannot write checkpoints/full/model_000001.pt: No space"):
        loop.run_loop()
    assert loop.step < 50
    left = {path.name for path in Path("checkpoints/full").iterdir()}
    assert left == {"progress.csv"}  # no lock, no half of a file


def test_a_run_that_fails_waits_for_its_checkpoint_and_lets_go(videos, monkeypatch):
    loop = make_loop(videos, resume_id="run", save_interval=1)
    closed = []
    monkeypatch.setattr(loop.log, "close", lambda: closed.append(True))
    real = loop.train_step.begin

    def begin(*args):
        if loop.step == 1:
            raise ValueError("ill")
        return real(*args)

    monkeypatch.setattr(loop.train_step, "begin", begin)
    with pytest.raises(ValueError, match="ill"):
        loop.run_loop()
    assert closed and load_run("checkpoints/run").step == 1
    assert not Path("checkpoints/run/run.lock").exists()


# ---------------------------------------------------------------- arithmetic


def products() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_on_a_gpu_all_but_training_is_exact_in_float32():
    before = products()
    gpu = torch.device("cuda")
    with fp16_util.autocast(gpu, precision="fp32", use_fp16=False):
        assert products() == (False, False)
    with fp16_util.autocast(gpu, precision="fp32", use_fp16=False, tf32=True):
        assert products() == (True, True)
    assert products() == before


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_training_rounds_where_it_is_told_to_and_never_on_a_cpu(videos, monkeypatch, tf32, on_gpu):
    """In the backward pass, too."""
    loop, seen = make_loop(videos, tf32=tf32), []
    next(iter(loop.train_step.params.values())).register_hook(lambda grad: seen.append(products()))
    if on_gpu:
        real = fp16_util.arithmetic
        gpu = torch.device("cuda")
        monkeypatch.setattr(fp16_util, "arithmetic", lambda _, **kinds: real(gpu, **kinds))
    before = products()
    loop.run_step(next(loop._batches()))
    assert seen == [(tf32, tf32) if on_gpu else before] and products() == before


@pytest.mark.parametrize("able", [True, False])
def test_automatic_precision_is_bf16_where_the_cpu_has_it_and_is_stored(videos, monkeypatch, able):
    monkeypatch.setattr(fp16_util, "has_bf16", lambda device: able)
    train = TrainConfig(dataset=videos, precision="auto")
    resolved, _, _ = start.resolve_train_options(train, DataConfig(), ModelConfig(image_size=32))
    assert resolved.precision == ("bf16" if able else "fp32")
    assert fp16_util.resolve_precision("fp32", "cpu") == "fp32"


# ---------------------------------------------------------------- the start


def test_rank_0_alone_looks_at_videos(videos, monkeypatch):
    """What it tells the others makes the same data, whatever is there when they look."""
    told = []

    def broadcast(value, *, what):
        if dist_util.is_main():
            told.append(value)
            return value
        return told.pop(0)

    monkeypatch.setattr(dist_util, "broadcast_object", broadcast)
    train = TrainConfig(dataset=videos, valid_interval=1, **{k: TRAIN[k] for k in ("T",)})

    def found():
        options, _, spec = start.resolve_train_options(train, DataConfig(), ModelConfig())
        sets = [
            start._on_all_ranks(functools.partial(make, spec, options), what="x")
            for make in (training, held_out)
        ]
        return options, spec, [data.files.paths for data in sets]

    def training(spec, options, **names):
        return start.get_train_dataset(spec, **names, **train_data.item_options(options))

    def held_out(spec, options, **names):
        return start.held_out_items(spec, options, None, **names)

    first = found()
    monkeypatch.setattr(dist_util, "is_main", lambda: False)
    for name in ("_index_entries", "sorted_files"):
        monkeypatch.setattr(dataset_files, name, None)
    assert found() == first and not told


def test_a_gpu_has_a_data_worker_of_its_own(monkeypatch):
    monkeypatch.setattr(dist_util, "cores", lambda: 1)
    asked = [(-1, True), (-1, False), (0, True), (3, False)]
    assert [train_data._num_workers(*pair) for pair in asked] == [1, 0, 0, 3]


def test_an_impossible_time_out_is_refused():
    assert LaunchConfig().collective_timeout == 2.0
    with pytest.raises(ValueError, match="--collective_timeout 0: must be above 0"):
        LaunchConfig(collective_timeout=0)
