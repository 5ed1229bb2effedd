"""Training over several processes: launchers, exact resume, equal gradients, failing ranks."""

import subprocess
import sys
import textwrap
import time

import pytest

from improved_diffusion.training import signals
from train_runs import (
    MPIEXEC,
    SCRIPT,
    assert_same_run,
    environment,
    flags,
    load_run,
    make_videos,
    rank_script,
    train,
)

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture
def videos(tmp_path):
    return make_videos(tmp_path / "videos")


@pytest.mark.slow
def test_ranks_keep_equal_parameters_and_average_their_gradients(videos, tmp_path):
    body = """
        def checked(self, *args):
            made = update(self, *args)
            grads = torch.cat([p.grad.flatten() for p in self.params.values()])
            values = torch.cat([p.detach().flatten() for p in self.params.values()])
            for name, own in (("gradients", grads), ("parameters", values)):
                both = dist_util.all_gather(own[None])
                assert torch.equal(both[0], both[1]), name
            if dist_util.is_main():
                print("equal at", self.step, flush=True)
            return made

        TrainStep.begin = checked
    """
    done = train(
        tmp_path,
        *flags(videos, microbatch=1, num_workers=1, resume_id="run"),
        ranks=2,
        script=rank_script(tmp_path, body),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"equal at {step}" for step in (1, 2, 3, 4)]
    assert (
        "ranks: 2, device: cpu" in done.stderr and "batch size: 2 per rank, 4 over" in done.stderr
    )
    assert load_run(str(tmp_path / "checkpoints" / "run")).opt_state["position"] == 16


# As on a GPU: its numbers come back with the next update, and so does the signal.
RUNS_AHEAD = """
from improved_diffusion.training import optimizers
optimizers._adamw = lambda params, config, options: torch.optim.AdamW(params, config.lr, fused=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "max_steps", "stops_at"), [("", 3, 2), (RUNS_AHEAD, 6, 4)], ids=["waits", "ahead"]
)
def test_a_signal_at_one_rank_saves_all_and_the_resumed_run_equals_an_unbroken_one(
    videos, tmp_path, before, max_steps, stops_at
):
    body = before + textwrap.dedent("""
        def stopped(self, *args):
            made = update(self, *args)
            if self.step == 1 and dist_util.rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return made

        options = sys.argv[1:]
        sys.argv[1:] = [*options, "--resume_id=whole"]
        video_train.main()
        sys.argv[1:] = [*options, "--resume_id=parts"]
        TrainStep.begin = stopped
        try:
            video_train.main()
        except SystemExit as stop:
            with open(f"exit_{os.getpid()}", "w") as file:  # lines of two ranks may mingle
                file.write(str(stop.code))
        TrainStep.begin = update
    """)
    done = train(
        tmp_path,
        *flags(videos, save_interval=100, max_steps=max_steps),
        ranks=2,
        script=rank_script(tmp_path, body),
    )
    assert done.returncode == 0, done.stderr
    codes = [path.read_text() for path in tmp_path.glob("exit_*")]
    assert codes == [str(signals.EXIT_INTERRUPTED)] * 2
    assert "to resume: mpiexec -n 2 python" in done.stderr
    assert f"parts, at step {stops_at}" in done.stderr
    assert_same_run(tmp_path / "checkpoints" / "whole", tmp_path / "checkpoints" / "parts")


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", ["ValueError('rank one is ill')", "RuntimeError('rank one is ill')"]
)
def test_a_rank_that_raises_ends_the_whole_run_with_its_message(videos, tmp_path, error):
    body = f"""
        def fails(self, *args):
            made = update(self, *args)
            if self.step == 1 and dist_util.rank() == 1:
                open("failed", "w").close()
                raise {error}
            return made

        TrainStep.begin = fails
    """
    done = train(
        tmp_path, *flags(videos, num_workers=1), ranks=2, script=rank_script(tmp_path, body)
    )
    took = time.time() - (tmp_path / "failed").stat().st_mtime
    assert done.returncode != 0 and took < 10
    assert "rank one is ill" in done.stderr


@pytest.mark.slow
def test_a_mistake_under_mpiexec_ends_all_ranks_in_one_line(videos, tmp_path):
    done = train(tmp_path, *flags(videos, T=100), ranks=2)
    assert done.returncode != 0
    assert "need T=100" in done.stderr and "Traceback" not in done.stderr


# Every pair of values of (ranks, num_workers, schedule_sampler, microbatch) occurs.
RESUME_CASES = [
    (1, 0, "uniform", -1),
    (1, 2, "loss-second-moment", 1),
    (2, 0, "loss-second-moment", 1),
    (2, 2, "uniform", 1),
    (2, 2, "loss-second-moment", -1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "workers", "sampler", "microbatch"), RESUME_CASES)
def test_resume_equals_an_unbroken_run_for_ranks_workers_samplers_and_microbatches(
    videos, tmp_path, ranks, workers, sampler, microbatch
):
    # With 2 timesteps and 1 remembered loss each the sampler leaves uniform drawing at once.
    body = """
        registry.TIMESTEP_DISTRIBUTIONS["loss-second-moment"] = functools.partial(
            resample.LossSecondMomentSampler, history=1)
        options = sys.argv[1:]
        for run_id, steps in (("whole", 3), ("parts", 1), ("parts", 3)):
            sys.argv[1:] = [*options, f"--resume_id={run_id}", f"--max_steps={steps}"]
            video_train.main()
        sys.exit()
    """
    options = {
        "num_workers": workers,
        "schedule_sampler": sampler,
        "microbatch": microbatch,
        "save_interval": 100,
        "diffusion_steps": 2,
        "noise_schedule": "cosine",
        "dropout": 0.1,
        "lr_warmup_steps": 2,
        "lr_anneal_steps": 9,
        "grad_clip": 0.5,
    }
    done = train(
        tmp_path,
        *flags(videos, **options),
        ranks=ranks if ranks > 1 else 0,
        script=rank_script(tmp_path, body),
    )
    assert done.returncode == 0, done.stderr
    whole, parts = (tmp_path / "checkpoints" / name for name in ("whole", "parts"))
    assert_same_run(whole, parts)
    state = load_run(str(parts)).opt_state
    assert state["position"] == 6 * ranks
    if sampler != "uniform":
        assert (state["schedule_sampler"]["counts"] > 1).all()


@pytest.mark.slow
def test_two_ranks_resume_exactly_with_the_options_of_the_objective_and_muon(videos, tmp_path):
    body = """
        options = sys.argv[1:]
        for run_id, steps in (("whole", 2), ("parts", 1), ("parts", 2)):
            sys.argv[1:] = [*options, f"--resume_id={run_id}", f"--max_steps={steps}"]
            video_train.main()
        sys.exit()
    """
    options = {
        "prediction": "v",
        "loss_weighting": "sigmoid",
        "schedule_sampler": "lognormal",
        "stratified_timesteps": True,
        "optimizer": "muon",
        "microbatch": 1,
        "save_interval": 100,
    }
    done = train(tmp_path, *flags(videos, **options), ranks=2, script=rank_script(tmp_path, body))
    assert done.returncode == 0, done.stderr
    assert_same_run(*(tmp_path / "checkpoints" / name for name in ("whole", "parts")))


@pytest.mark.slow
def test_every_launcher_gives_the_same_run(videos, tmp_path):
    options = flags(videos, max_steps=2, save_interval=100)
    srun = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "4712"}
    starts = {
        "mpi": [([MPIEXEC, "-n", "2", sys.executable], {})],
        "torchrun": [(TORCHRUN, {})],
        "srun": [([sys.executable], {**srun, "SLURM_PROCID": i, "SLURM_LOCALID": i}) for i in "01"],
    }
    for name, commands in starts.items():
        processes = [
            subprocess.Popen(
                [*command, SCRIPT, *options, f"--resume_id={name}"],
                cwd=tmp_path,
                env=environment(**variables),
                stderr=subprocess.PIPE,
                text=True,
            )
            for command, variables in commands
        ]
        said = "".join(process.communicate(timeout=120)[1] for process in processes)
        assert [process.returncode for process in processes] == [0] * len(processes), said
        assert f"ranks: 2, device: cpu, launcher: {name}" in said
        assert "batch size: 2 per rank, 4 over all ranks" in said
    for name in ("torchrun", "srun"):
        assert_same_run(tmp_path / "checkpoints" / "mpi", tmp_path / "checkpoints" / name)


@pytest.mark.slow
def test_another_number_of_ranks_resumes_and_says_so(videos, tmp_path):
    options = flags(videos, resume_id="run", save_interval=100)
    assert train(tmp_path, *options, "--max_steps=1", ranks=2).returncode == 0
    done = train(tmp_path, *options, "--max_steps=2")
    assert done.returncode == 0, done.stderr
    assert "2 ranks before, 1 now: the order of the data and the noise may differ" in done.stderr
    assert load_run(str(tmp_path / "checkpoints" / "run")).opt_state["position"] == 6


# The same timestep and noise for a video whatever rank it falls to; doubles all through the
# network, which asks for float32 in places.
SAME_ITEMS = """
    import train_runs

    def losses(self, batch, t, noise):
        frames = batch.frames
        keys = [int((video.double() * 127.5).round().sum()) % 2**31 for video in frames]
        draws = [torch.randn(x.shape, generator=torch.Generator().manual_seed(key), dtype=x.dtype)
                 for key, x in zip(keys, frames)]
        t = torch.tensor([key % self.diffusion.num_timesteps for key in keys])
        kind = next(self.network.parameters()).dtype
        masks = batch.obs_mask.to(kind), batch.latent_mask.to(kind)
        batch = type(batch)(frames.to(kind), *masks, batch.frame_indices)
        return real_losses(self, batch, t, torch.stack(draws).to(kind))

    def wrap(model):
        if DOUBLE:
            single = torch.Tensor.float
            torch.Tensor.float = lambda x: x if x.dtype == torch.float64 else single(x)
            for module in model.modules():
                if hasattr(module, "weight"):
                    module.register_forward_pre_hook(lambda m, inputs: (inputs[0].double(),))
            model.double()
        return real_wrap(train_runs.wake_up(model))

    def save(self, *args):
        made = update(self, *args)
        if dist_util.is_main():
            torch.save([param.grad for param in self.params.values()], f"{dist_util.world_size()}.pt")
        return made

    real_losses, real_wrap = TrainStep.losses, dist_util.wrap_ddp
    TrainStep.losses, TrainStep.begin, dist_util.wrap_ddp = losses, save, wrap
    Loop.finished = property(lambda self: self.step > 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_two_ranks_of_two_have_the_gradients_of_one_rank_of_four(videos, tmp_path, kind, tolerance):
    import torch

    script = rank_script(tmp_path, f"\n    DOUBLE = {kind == 'float64'}" + SAME_ITEMS)
    for ranks, batch_size in ((2, 2), (0, 4)):
        done = train(
            tmp_path,
            *flags(videos, batch_size=batch_size, lr=0.0),
            ranks=ranks,
            script=script,
        )
        assert done.returncode == 0, done.stderr
    two, one = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (2, 1))
    assert {grad.dtype for grad in one} == {getattr(torch, kind)}
    largest = max(float(grad.abs().max()) for grad in one)
    worst = max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True)) / largest
    print(f"{kind}: largest gradient {largest:.3g}, largest difference {worst:.3g} of it")
    assert largest > 1e-3 and worst < tolerance


@pytest.mark.slow
def test_a_collective_that_fails_or_waits_long_is_named(tmp_path):
    body = """
        import logging
        from datetime import timedelta
        logging.basicConfig(format="%(message)s")
        dist_util.COLLECTIVE_TIMEOUT, dist_util.LONG_WAIT_S = timedelta(seconds=3), 0.5
        dist_util.setup_dist()
        if dist_util.rank() == 0:
            time.sleep(6)
            os._exit(0)
        try:
            dist_util.broadcast_object(1, what="the opening of a run")
        except RuntimeError:
            print("gave up", flush=True)
            os._exit(0)
    """
    done = subprocess.run(
        [*TORCHRUN, rank_script(tmp_path, body)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "rank 1 of 2 has waited 0 s for another rank in: the opening of a run" in done.stderr
    assert "rank 1 of 2 failed after 3 s in: the opening of a run" in done.stderr
    assert "gave up" in done.stdout
