"""Training on two ranks, killed with SIGKILL at random moments and resumed, equals an unbroken run.

Not collected by pytest: it takes minutes. Run it as `python tests/kill_and_resume.py --kills 10`; it
prints one line per kill and ends with exit code 1 where the final files differ. A tiny network is
trained on videos made on the spot, in a temporary folder, with a checkpoint after every step.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from improved_diffusion.data import checkpoints
from train_runs import MPIEXEC, SCRIPT, assert_same_run, environment, flags, make_videos


def start(folder: Path, run_id: str, steps: int) -> subprocess.Popen[bytes]:
    """Start `mpiexec -n 2` of the training command in `folder`."""
    options = {"max_steps": steps, "save_interval": 1, "keep_checkpoints": 2, "num_workers": 1}
    command = flags(str(folder / "videos"), resume_id=run_id, **options)
    with open(folder / f"{run_id}.log", "ab") as log:
        return subprocess.Popen(
            [MPIEXEC, "-n", "2", sys.executable, SCRIPT, *command],
            cwd=folder,
            env=environment(),
            stdout=log,
            stderr=log,
        )


def descendants(pid: int) -> list[int]:
    """Process `pid` and all that it started, on Linux."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        own = [int(child) for child in children.read_text().split()]
    except FileNotFoundError:
        return []
    return [pid, *(found for child in own for found in descendants(child))]


def kill_all(process: subprocess.Popen[bytes]) -> int:
    """SIGKILL to the launcher, its ranks and their data workers; returns how many."""
    pids = descendants(process.pid)
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    return len(pids)


def step_of(folder: Path, run_id: str) -> int:
    """The step that a resumed run would go on from."""
    return checkpoints.find_resume_step(str(folder / "checkpoints" / run_id)) or 0


def killed_once(folder: Path, steps: int, rng: random.Random) -> str:
    """Start, let a new checkpoint appear, then kill within the next 3 seconds; what happened."""
    before = step_of(folder, "killed")
    process = start(folder, "killed", steps)
    while step_of(folder, "killed") == before and process.poll() is None:
        time.sleep(0.02)
    delay = rng.uniform(0, 3)
    time.sleep(delay)
    number = kill_all(process)
    run = folder / "checkpoints" / "killed"
    half_written = len([path for path in run.iterdir() if path.name.endswith(".tmp")])
    return (
        f"from step {before}, {delay:.2f} s after its first checkpoint {number} processes killed; "
        f"newest complete set: step {step_of(folder, 'killed')}, half-written files: {half_written}"
    )


def main() -> None:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10, help="number of kills")
    parser.add_argument("--steps", type=int, default=150, help="steps of the whole run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_videos(folder / "videos")
        for kill in range(1, args.kills + 1):
            print(f"kill {kill}: {killed_once(folder, args.steps, rng)}", flush=True)
        for run_id in ("killed", "unbroken"):
            code = start(folder, run_id, args.steps).wait()
            print(f"{run_id}: exit code {code}, at step {step_of(folder, run_id)}", flush=True)
        assert_same_run(folder / "checkpoints" / "killed", folder / "checkpoints" / "unbroken")
        print("parameters, averages, optimiser and position: equal bit for bit")


if __name__ == "__main__":
    main()
