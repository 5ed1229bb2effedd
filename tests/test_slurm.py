"""README's three job scripts under a real SLURM of one node: signalled, requeued, resumed, repeated.

Needs root and Debian's slurm-wlm and munge, and takes a quarter of an hour; skipped elsewhere.
"""

import csv
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import make_checkpoint, make_folder_dataset
from train_runs import MPIEXEC, ROOT, flags, make_videos

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("slurmctld") or not shutil.which("munged") or os.getuid() != 0,
        reason="needs slurmctld, munged and root",
    ),
]

CONFIG = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ctld}
SlurmdPort={slurmd}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=pmi2
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=test Nodes=localhost Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """One node; its variables for sbatch and the rest. MpiDefault is the one that misleads."""
    folder = Path(f"/tmp/slurm_test_{os.getpid()}")  # munge wants no group-writable parent
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    config = folder / "slurm.conf"
    config.write_text(
        CONFIG.format(folder=folder, ctld=free_port(), slurmd=free_port(), cpus=os.cpu_count())
    )
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    munge = ["--foreground", "--force", "--syslog", f"--socket={folder}/munge.socket"]
    munge += [f"--key-file={key}", f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/seed"]
    environment = {name: v for name, v in os.environ.items() if not name.startswith("SLURM")}
    environment |= {"SLURM_CONF": str(config), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    started = [subprocess.Popen(["munged", *munge], **quiet)]
    time.sleep(1)
    started.append(subprocess.Popen(["slurmctld", "-D", "-f", config], **quiet))
    started.append(subprocess.Popen(["slurmd", "-D", "-N", "localhost", "-f", config], **quiet))
    try:
        deadline = time.monotonic() + 60
        while "idle" not in told(environment, "sinfo", "-h", "-o", "%T", check=False):
            assert time.monotonic() < deadline, "the node does not come up"
            time.sleep(1)
        yield environment
    finally:
        told(environment, "scancel", "--state=RUNNING", check=False)
        for process in reversed(started):
            process.terminate()
            process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def told(environment, *command, check=True, cwd=None) -> str:
    done = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, check=check, cwd=cwd
    )
    return done.stdout


def readme_script(word: str) -> str:
    """The job script of README that has `word` in it."""
    blocks = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", (ROOT / "README.md").read_text(), re.S)
    (script,) = [block for block in blocks if word in block]
    return script


def small(script: str, folder: Path) -> str:
    """README's training script for two ranks of this node, tiny, to the step in `max_steps`."""
    for old, new in (
        (r"--gres=gpu:4 ?", ""),
        (r"--cpus-per-task=8", "--cpus-per-task=1"),
        (r"--ntasks-per-node=4", "--ntasks-per-node=2"),
        (r"--ntasks=4", "--ntasks=2"),
        (r"--time=24:00:00", "--time=00:04:00"),  # SLURM signals up to a minute early
        (r"mpiexec -n 4", f"{MPIEXEC} -n 2"),
        (r"python scripts/", f"python {ROOT}/scripts/"),
    ):
        script = re.sub(old, new, script)
    options = flags(str(folder / "videos"), num_workers=1, save_interval=50, keep_checkpoints=2)
    options = [option for option in options if not option.startswith("--max_steps")]
    tiny = " ".join([*options, "--max_steps $(cat max_steps)"])
    return re.sub(r"(video_train.py) .*? (--resume_id)", rf"\1 {tiny} \2", script)


def job_field(environment, job: str, name: str) -> str:
    match = re.search(rf"\b{name}=(\S+)", told(environment, "scontrol", "show", "job", job))
    assert match, name
    return match[1]


def wait_until(condition, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(2)


@pytest.mark.parametrize("word", ["srun", "mpiexec"])
def test_a_training_job_is_signalled_requeued_and_resumed_to_its_end(slurm, tmp_path, word):
    make_videos(tmp_path / "videos")
    (tmp_path / "max_steps").write_text("1000000")
    (tmp_path / "job.sh").write_text(small(readme_script(word), tmp_path))
    job = told(slurm, "sbatch", "--parsable", "job.sh", cwd=tmp_path).strip()
    run = tmp_path / "checkpoints" / f"fdm-{job}"
    log = tmp_path / f"slurm-{job}.out"
    wait_until(lambda: job_field(slurm, job, "Restarts") != "0", 900)
    table = run / "progress.csv"  # the signal may have come before the first step, or the table
    rows = csv.DictReader(table.read_text().splitlines()) if table.exists() else []
    saved = max((int(row["step"]) for row in rows), default=0)
    last = saved + 10
    (tmp_path / "max_steps").write_text(str(last))
    told(slurm, "scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_until(lambda: job_field(slurm, job, "JobState") in ("COMPLETED", "FAILED"), 900)
    text = log.read_text()
    print(text)
    assert job_field(slurm, job, "JobState") == "COMPLETED", text
    assert job_field(slurm, job, "ExitCode") == "0:0", text
    assert "SIGUSR1: " in text and f"at step {saved}" in text
    rows = [int(row["step"]) for row in csv.DictReader((run / "progress.csv").open())]
    assert rows == list(range(1, last + 1))
    assert not (run / "run.lock").exists() and not list(run.glob("*.tmp"))


@pytest.mark.parametrize("plugin", ["none", "pmi2", "pmix"])
def test_srun_is_the_launcher_whatever_its_mpi_plugin(slurm, tmp_path, plugin):
    code = (
        "from improved_diffusion import dist_util as d; d.setup_dist();"
        "print(d.launcher(), d.rank(), d.world_size()); d.cleanup()"
    )
    command = ["srun", f"--mpi={plugin}", "-n", "2", sys.executable, "-c", code]
    done = subprocess.run(
        command, env=slurm, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    if "can not load PMIx library" in done.stderr or "Couldn't find" in done.stderr:
        pytest.skip(f"this SLURM has no {plugin}")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["srun 0 2", "srun 1 2"]


def test_an_array_of_four_submitted_twice_makes_every_sample_once(slurm, tmp_path):
    dataset = make_folder_dataset(tmp_path / "videos", num_test=8)
    make_checkpoint(tmp_path / "checkpoints" / "run" / "ema_0.9999_latest.pt", dataset, T=8)
    script = readme_script("--array")
    options = "--batch_size 2 --inference_mode hierarchy-2 --step_size 2 --obs_length 2"
    script = re.sub(r"--array=0-12 --gres=gpu:1 --mem=16G", "--array=0-3", script)
    script = re.sub(
        r"python scripts/video_sample.py (\S+)/11n992cv/(\S+) .*",
        rf"python {ROOT}/scripts/video_sample.py \1/run/\2 {options}",
        script,
    )
    (tmp_path / "job.sh").write_text(script)
    jobs = [told(slurm, "sbatch", "--parsable", "job.sh", cwd=tmp_path).strip() for _ in "12"]
    for job in jobs:
        wait_until(lambda job=job: not told(slurm, "squeue", "-h", "-j", job, check=False), 600)
    logs = {path.name: path.read_text() for path in tmp_path.glob("slurm-*.out")}
    assert len(logs) == 8
    assert not any("Traceback" in text or "error" in text for text in logs.values()), logs
    (folder,) = tmp_path.glob("results/run/*/*/samples")
    assert sorted(p.name for p in folder.iterdir()) == [f"sample_{i:04d}-0.npy" for i in range(8)]
