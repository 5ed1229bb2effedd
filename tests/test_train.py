"""Training from end to end: alone, over ranks, stopped and resumed, and when things go wrong."""

import contextlib
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from improved_diffusion import dist_util, fp16_util
from improved_diffusion.data import checkpoints
from improved_diffusion.nn import ema_decay, update_ema
from improved_diffusion.training import signals
from improved_diffusion.training.options import TrainConfig
from improved_diffusion.training.train_step import learning_rate
from train_runs import (
    ROOT,
    SCRIPT,
    assert_same_run,
    column,
    environment,
    equal,
    flags,
    make_loop,
    newest_step,
    train,
    wake_up,
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# ---------------------------------------------------------------- the command


def test_the_command_trains_saves_and_says_how_to_resume(videos, tmp_path):
    done = train(tmp_path, *flags(videos))
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "checkpoints").iterdir()
    kinds = ("model", "ema_0.9", "ema_0.99", "opt")
    expected = {f"{kind}_{step}.pt" for kind in kinds for step in ("000002", "000004", "latest")}
    assert {path.name for path in folder.iterdir()} == expected | {"progress.csv", "config.json"}
    assert column(folder, "step") == ["1", "2", "3", "4"]
    assert all(
        math.isfinite(float(x)) for x in column(folder, "loss") + column(folder, "grad_norm")
    )
    for line in (
        "ranks: 1, device: cpu",
        f"run id: {folder.name}",
        "batch size: 2 per rank, 2 over",
        "parameters: ",
    ):
        assert line in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("to resume: python") and last.endswith(f"--resume_id {folder.name}")
    assert checkpoints.load_weights(str(folder / "model_latest.pt")).config["image_size"] == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "no_such_set"}, "no_such_set"),
        ({"T": 100}, "need T=100"),
        ({"num_channels": 33}, "--num_channels 33"),
        ({"diffusion_steps": 20}, "--noise_schedule cosine"),
        ({"use_fp16": True}, "--precision bf16"),
        (
            {"resume_checkpoint": "nowhere/model_latest.pt"},
            "nowhere/model_latest.pt: no such checkpoint",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(videos, monkeypatch, options, message):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import video_train

    monkeypatch.setattr(sys, "argv", ["video_train.py", *flags(**{"dataset": videos, **options})])
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(dist_util.cleanup)
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            video_train.main()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_mistake_ends_the_command_without_a_traceback(tmp_path):
    done = train(tmp_path, *flags("no_such_set"))
    assert done.returncode == 1
    assert done.stderr.startswith("video_train.py: error: unknown data set 'no_such_set'")
    assert len(done.stderr.splitlines()) == 1


def test_running_out_of_gpu_memory_is_one_line(tmp_path):
    script = tmp_path / "full.py"
    script.write_text(
        "import torch\n"
        "from improved_diffusion.script_util import run_main\n"
        "def main():\n"
        "    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has')\n"
        "run_main(main)\n"
    )
    done = train(tmp_path, script=str(script))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "Tried to allocate 9 GiB): try a smaller --batch_size" in done.stderr


def test_help_explains_signals_and_exit_codes(tmp_path):
    done = train(tmp_path, "--help")
    assert done.returncode == 0
    assert "SIGUSR1" in done.stdout and f"exit with code {signals.EXIT_INTERRUPTED}" in done.stdout


@pytest.mark.slow
def test_a_run_that_cannot_make_its_folder_says_so_in_one_line(videos, tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    done = train(tmp_path, *flags(videos))
    assert done.returncode == 1
    assert (
        "cannot make the run's folder checkpoints/" in done.stderr
        and "DIFFUSION_BLOB_LOGDIR" in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_a_folder_that_is_not_writable_is_named(videos, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match="folder checkpoints/run: not writable: set DIFFUSION_BLOB_"):
        make_loop(videos, resume_id="run")


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(videos, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    done = train(tmp_path, *flags(videos, resume_id="full"), preexec_fn=limit)
    assert done.returncode == 1
    assert "cannot write checkpoints/full/model_000002.pt: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    left = {path.name for path in (tmp_path / "checkpoints" / "full").iterdir()}
    assert left == {"progress.csv", "config.json"}


# ---------------------------------------------------------------- resuming


def test_resume_equals_an_unbroken_run_bit_for_bit(videos):
    options = {"schedule_sampler": "loss-second-moment", "weight_decay": 0.01, "ema_warmup": True}
    dropout = {"dropout": 0.1}
    make_loop(videos, dropout, resume_id="whole", **options).run_loop()
    make_loop(videos, dropout, resume_id="parts", max_steps=2, **options).run_loop()
    make_loop(videos, dropout, resume_id="parts", num_workers=1, **options).run_loop()
    assert_same_run("checkpoints/whole", "checkpoints/parts")
    assert column("checkpoints/whole", "loss") == column("checkpoints/parts", "loss")


@pytest.mark.slow
def test_annealing_goes_on_where_it_was(videos):
    make_loop(videos, resume_id="whole", lr_anneal_steps=3, max_steps=0).run_loop()
    make_loop(videos, resume_id="parts", lr_anneal_steps=3, max_steps=1).run_loop()
    make_loop(videos, resume_id="parts", lr_anneal_steps=3, max_steps=0).run_loop()
    rates = [float(rate) for rate in column("checkpoints/parts", "lr")]
    assert rates == pytest.approx([0.001, 0.001 * 2 / 3, 0.001 / 3])
    assert_same_run("checkpoints/whole", "checkpoints/parts")


def test_an_empty_folder_starts_at_step_0_and_says_so(videos, caplog):
    caplog.set_level("INFO")
    loop = make_loop(videos, resume_id="some/where/new")
    assert loop.step == 0 and loop.run.folder == "checkpoints/some/where/new"
    assert "holds no complete checkpoint: starting at step 0" in caplog.text


def test_resuming_another_network_is_refused_and_another_rate_is_told(videos, caplog):
    make_loop(videos, resume_id="run", max_steps=1).run_loop()
    with pytest.raises(ValueError, match="--num_res_blocks 2 differs .* give --num_res_blocks 1"):
        make_loop(videos, {"num_res_blocks": 2}, resume_id="run")
    caplog.set_level("INFO")
    make_loop(videos, resume_id="run", lr=0.5)
    assert "--lr was 0.001 before, is 0.5 now" in caplog.text


def test_resume_checkpoint_starts_a_new_run_from_the_weights(videos):
    make_loop(videos, resume_id="old", max_steps=2).run_loop()
    path = "checkpoints/old/ema_0.9_000002.pt"
    loop = make_loop(videos, resume_checkpoint=path)
    assert loop.step == 0 and loop.run.run_id != "old" and not loop.train_step.optimizer.state
    weights = checkpoints.load_weights(path).state_dict
    assert equal(dict(loop.train_step.network.state_dict()), weights)
    assert all(equal(ema, weights) for ema in loop.train_step.emas.values())


def test_a_run_that_began_with_given_weights_goes_on_by_the_same_command(videos, caplog):
    caplog.set_level("INFO")
    make_loop(videos, resume_id="old", max_steps=1).run_loop()
    path = "checkpoints/old/model_000001.pt"
    same = {"resume_id": "tuned", "resume_checkpoint": path}
    first = make_loop(videos, **same, max_steps=2)
    assert f"starting at step 0 with the weights of {path}" in caplog.text
    assert equal(
        dict(first.train_step.network.state_dict()), checkpoints.load_weights(path).state_dict
    )
    first.run_loop()
    for file in Path("checkpoints/old").glob("*.pt"):
        file.unlink()  # what a run began with may be gone when it goes on
    for options in (same, {"resume_id": "tuned"}):
        again = make_loop(videos, **options, max_steps=2)
        assert again.step == 2 and again.run.options["resume_checkpoint"] == path
        again.run.close()


def test_a_run_is_not_said_to_begin_with_other_weights_than_it_did(videos):
    make_loop(videos, resume_id="old", max_steps=1).run_loop()
    path = "checkpoints/old/model_000001.pt"
    make_loop(videos, resume_id="own", max_steps=1).run_loop()
    with pytest.raises(ValueError, match=f"--resume_checkpoint {path}.*/own began with random"):
        make_loop(videos, resume_id="own", resume_checkpoint=path)


def test_weights_that_mean_something_else_start_no_run(videos, caplog):
    caplog.set_level("INFO")
    make_loop(videos, resume_id="old", max_steps=1).run_loop()
    path = "checkpoints/old/model_000001.pt"
    with pytest.raises(ValueError, match=f"--num_heads 1 differs from the network in {path}: give"):
        make_loop(videos, {"num_heads": 1}, resume_checkpoint=path)
    make_loop(videos, {"dropout": 0.25}, resume_checkpoint=path)
    assert f"--dropout is 0.25, in {path} it was 0" in caplog.text


def test_files_that_a_killed_save_left_are_removed_on_resuming(videos):
    make_loop(videos, resume_id="run", max_steps=1).run_loop()
    folder = Path("checkpoints/run")
    before = {path.name for path in folder.iterdir()}
    mine = folder / ".hidden.tmp"
    for name in (".opt_000002.pt.ab_12x.tmp", "ema_0.99_latest.pt.77.tmp", mine.name):
        (folder / name).write_bytes(b"half")
    make_loop(videos, resume_id="run").run.close()
    assert {path.name for path in folder.iterdir()} == before | {mine.name}


def test_the_folder_root_comes_from_the_environment(videos, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", str(tmp_path / "elsewhere"))
    make_loop(videos, resume_id="run", max_steps=1).run_loop()
    assert (tmp_path / "elsewhere" / "run" / "model_000001.pt").is_file()


# ---------------------------------------------------------------- one step


def awake_loop(videos, **options):
    loop = make_loop(videos, **options)
    wake_up(loop.train_step.network)
    return loop


def items(loop):
    """A batch of training items, as the loader would give it."""
    keys = [(0, index % len(loop.data)) for index in range(loop.config.batch_size)]
    return torch.utils.data.default_collate([loop.data[key] for key in keys])


def gradients(loop):
    loop.train_step.optimizer.step = lambda: None
    loop.run_step(items(loop))
    return [param.grad for param in loop.train_step.network.parameters()]


@pytest.mark.parametrize("microbatch", [1, 2])
def test_microbatches_leave_the_gradients_as_they_are(videos, microbatch):
    whole = gradients(awake_loop(videos, batch_size=3))
    parts = gradients(awake_loop(videos, batch_size=3, microbatch=microbatch))
    largest = max(grad.abs().max() for grad in whole)
    assert largest > 0
    assert all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-6 * largest)
        for a, b in zip(whole, parts, strict=True)
    )


@pytest.mark.parametrize("pad", [True, False])
def test_padding_counts_in_the_loss_only_where_it_is_another_videos(videos, pad, monkeypatch):
    loop = make_loop(videos, pad_with_random_frames=pad)
    seen = {}

    def losses(batch, t, noise, *, mask):
        seen.update(x=batch.frames, loss=mask, eval=batch.latent_mask)
        weights = loop.train_step.network.parameters()
        loss = sum(param.sum() for param in weights) * torch.ones(len(t))
        return {"loss": loss, "eval-mse": loss}

    monkeypatch.setattr(loop.train_step.denoiser, "losses", losses)
    mask = {
        "obs_mask": torch.tensor([1.0, 0, 0]).expand(2, -1).reshape(2, 3, 1, 1, 1),
        "latent_mask": torch.tensor([0.0, 1, 0]).expand(2, -1).reshape(2, 3, 1, 1, 1),
    }
    frames = torch.full((2, 3, 3, 32, 32), 255, dtype=torch.uint8)
    loop.run_step({"frames": frames, "frame_indices": torch.zeros(2, 3, dtype=torch.int64), **mask})
    assert seen["loss"][0].flatten().tolist() == [0, 1, float(pad)]
    assert seen["eval"][0].flatten().tolist() == [0, 1, 0]
    assert seen["x"][0, :, 0, 0, 0].tolist() == [1, 1, float(pad)]


def test_bf16_trains_float32_weights(videos):
    loop = make_loop(videos, precision="bf16", max_steps=1)
    loop.run_loop()
    assert {param.dtype for param in loop.train_step.network.parameters()} == {torch.float32}
    plain = make_loop(videos, max_steps=1)
    plain.run_loop()
    assert not equal(
        loop.train_step.optimizer.state_dict(), plain.train_step.optimizer.state_dict()
    )


def test_the_average_follows_its_formula():
    average, weights = {"w": torch.ones(2)}, torch.tensor([3.0, 5.0])
    update_ema(average, [weights], 0.75)
    assert torch.allclose(average["w"], torch.tensor([1.5, 2.0]))
    assert ema_decay(0.9999, 1, warmup=False) == 0.9999
    assert ema_decay(0.9999, 1, warmup=True) == 2 / 11
    assert ema_decay(0.5, 1000, warmup=True) == 0.5


def test_the_rate_warms_up_then_anneals():
    config = TrainConfig(dataset="x", lr=1.0, lr_warmup_steps=4, lr_anneal_steps=10)
    rates = [learning_rate(config, step, config.lr) for step in (0, 1, 3, 5, 9)]
    assert rates == pytest.approx([0.25, 0.5 * 0.9, 0.7, 0.5, 0.1])


@pytest.mark.parametrize(("limit", "clipped"), [(1e-3, True), (1e3, False), (0.0, False)])
def test_a_gradient_longer_than_the_limit_is_cut_to_it(videos, limit, clipped):
    def norm(grads):
        return float(torch.cat([grad.flatten() for grad in grads]).norm())

    plain = gradients(awake_loop(videos))
    loop = awake_loop(videos, grad_clip=limit, log_interval=9)
    cut = gradients(loop)
    assert 1e-2 < norm(plain) < 1e2
    assert norm(cut) == pytest.approx(limit if clipped else norm(plain), rel=1e-4)
    loop.log.add("x", 0)
    assert loop.log.dump(1)["grad_norm"] == pytest.approx(norm(plain), rel=1e-4)  # before the cut


def test_the_loss_scale_grows_slowly_and_halves_on_overflow():
    scale = fp16_util.LossScale(0.001)
    start = scale.value
    scale.update(torch.tensor(1.0))
    assert scale.value == start / 2
    for _ in range(1000):
        scale.update(torch.tensor(0.0))
    assert float(scale.value) == pytest.approx(float(start))


def test_the_loss_scale_leaves_the_gradients_as_they_are(videos):
    plain, scaled = (awake_loop(videos) for _ in range(2))
    scaled.train_step.loss_scale = fp16_util.LossScale(0.001)
    assert equal(gradients(plain), gradients(scaled))
    assert scaled.train_step.loss_scale.log2 == fp16_util.LossScale.INITIAL_LOG2 + 0.001


def test_a_loss_scale_below_one_ends_the_run_in_one_line(videos):
    loop = make_loop(videos)
    loop.train_step.loss_scale = fp16_util.LossScale(0.001)
    loop.train_step.loss_scale.log2.fill_(0.5)
    spoil(loop, {0})
    with pytest.raises(ValueError, match="the float16 loss scale fell below 2.0: .* --use_fp16"):
        loop.run_step(items(loop))


def test_an_overflow_skips_the_update_and_halves_the_loss_scale(videos, caplog):
    loop = make_loop(videos)
    loop.train_step.loss_scale = fp16_util.LossScale(0.001)
    loop.train_step.loss_scale.log2.fill_(200.0)
    loop.run_step(items(loop))
    assert (loop.step, loop.train_step.loss_scale.log2) == (0, 199.0)
    assert not caplog.records


def spoil(loop, bad_steps):
    """Let the loss be NaN in the calls that `bad_steps` names, counted from 0."""
    real, calls = loop.train_step.denoiser.losses, iter(range(1000))

    def training_losses(*args, **kwargs):
        terms = real(*args, **kwargs)
        return {**terms, "loss": terms["loss"] * math.nan} if next(calls) in bad_steps else terms

    loop.train_step.denoiser.losses = training_losses


def test_a_loss_that_is_not_finite_is_skipped_and_told(videos, caplog):
    loop = make_loop(videos, max_steps=3)
    spoil(loop, {1})
    before = {name: param.clone() for name, param in loop.train_step.params.items()}
    loop.run_loop()
    assert loop.step == 3 and loop.train_step.position == 8
    assert all(param.isfinite().all() for param in loop.train_step.params.values()) and not equal(
        before, loop.train_step.params
    )
    (warning,) = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert warning.startswith("step 1, rank 0: loss nan at timestep")


def test_a_loss_that_stays_not_finite_ends_the_run_with_the_timesteps(videos):
    loop = make_loop(videos)
    spoil(loop, set(range(1, 100)))
    with pytest.raises(
        ValueError, match="step 1, rank 0: loss nan at timestep .* 5 times in a row"
    ):
        loop.run_loop()


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_samples_are_drawn_at_their_interval(videos, precision):
    loop = make_loop(videos, sample_interval=2, max_steps=3, precision=precision)
    loop.run_loop()
    names = sorted(path.name for path in Path(loop.run.folder, "samples").iterdir())
    assert names == [f"sample_000002_{i}.gif" for i in range(4)]
    assert loop.train_step.network.training


@pytest.mark.slow
def test_drawing_samples_does_not_change_the_run(videos):
    make_loop(videos, {"dropout": 0.1}, resume_id="with", sample_interval=1, max_steps=2).run_loop()
    make_loop(
        videos, {"dropout": 0.1}, resume_id="without", sample_interval=0, max_steps=2
    ).run_loop()
    assert_same_run("checkpoints/with", "checkpoints/without")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_video_ends_the_run_in_one_line(videos, num_workers):
    loop = make_loop(videos, num_workers=num_workers)
    path = Path(videos, "train", "3.npy")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="3.npy") as caught:
        loop.run_loop()
    assert "\n" not in str(caught.value)


def test_a_foreign_optimiser_file_is_refused(videos):
    loop = make_loop(videos, resume_id="run", max_steps=1)
    config = loop.run.options
    checkpoints.save_run(
        loop.run.folder, 1, loop.train_step.network.state_dict(), {}, {"state": {}}, config
    )
    with pytest.raises(ValueError, match="opt_.*another program's: .*--resume_checkpoint"):
        make_loop(videos, resume_id="run")


def test_weights_of_another_network_are_refused(videos):
    make_loop(videos, resume_id="old", max_steps=1).run_loop()
    path = "checkpoints/old/model_latest.pt"
    with pytest.raises(ValueError, match=f"{path}: weights of another network"):
        make_loop(videos, {"num_res_blocks": 2}, resume_checkpoint=path)


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_a_signal_lets_the_step_finish_and_saves(videos, number):
    loop = make_loop(videos, max_steps=0, save_interval=100)
    real = loop.train_step.optimizer.step

    def update():
        real()
        if loop.step == 2:  # while the third update is made
            os.kill(os.getpid(), number)

    loop.train_step.optimizer.step = update
    before = signal.getsignal(number)
    assert loop.run_loop() is True
    assert newest_step(loop.run.folder) == loop.step == 4
    assert signal.getsignal(number) is before


@pytest.mark.slow
def test_a_signal_to_the_whole_process_group_saves_and_exits_with_the_documented_code(
    videos, tmp_path
):
    command = [sys.executable, SCRIPT, *flags(videos, max_steps=0, num_workers=2, resume_id="run")]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(tmp_path / "checkpoints" / "run" / "model_000002.pt", process)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == signals.EXIT_INTERRUPTED, errors
    assert "to resume:" in errors and "Traceback" not in errors


def wait_for(path, process, limit_s=60):
    """Wait until a running process has made a file."""
    deadline = time.monotonic() + limit_s
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_compile_trains_the_compiled_network(videos, monkeypatch):
    calls = []

    def compile_network(network):
        def compiled(*args, **kwargs):
            calls.append(network)
            return network(*args, **kwargs)

        return compiled

    monkeypatch.setattr("improved_diffusion.training.train_step.compile_network", compile_network)
    make_loop(str(videos), max_steps=1).run_loop()
    assert not calls
    loop = make_loop(str(videos), max_steps=2, compile=True)
    loop.run_loop()
    assert calls == [loop.train_step.ddp, loop.train_step.ddp]
