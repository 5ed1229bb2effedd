"""Training that is killed with SIGKILL at random moments and resumed equals an unbroken run.

test_crashes.py does 20 rounds; for more, run `python tests/kill_and_resume.py --kills 100 --ranks 2`,
which prints one line per kill and ends with exit code 1 where the final files differ. A tiny network
is trained on videos made on the spot, in a temporary folder, with a checkpoint after every step.
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

from train_runs import (
    MPIEXEC,
    SCRIPT,
    assert_same_run,
    column,
    environment,
    flags,
    load_run,
    make_videos,
    newest_step,
)


def start(folder: Path, run_id: str, ranks: int, **options: object) -> subprocess.Popen[bytes]:
    """Start the training command in `folder`, under mpiexec where `ranks` > 1."""
    kept = {} if options.get("save_latest_only") else {"keep_checkpoints": 2}
    settings = {"save_interval": 1, "num_workers": 1, **kept, **options}
    launch = [MPIEXEC, "-n", str(ranks)] if ranks > 1 else []
    command = [*launch, sys.executable, SCRIPT, *flags("videos", resume_id=run_id, **settings)]
    with open(folder / f"{run_id}.log", "ab") as log:
        return subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log)


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
    return newest_step(str(folder / "checkpoints" / run_id)) or 0


def killed_once(folder: Path, rng: random.Random, ranks: int, **options: object) -> str:
    """Kill a run within its first steps, or on its way there; what happened.

    What is left must be no checkpoint at all, or a whole one that is not older than before.
    """
    before = step_of(folder, "killed")
    process = start(folder, "killed", ranks, **options)
    began = time.monotonic()
    if rng.random() < 0.7:  # else it may still be starting
        while step_of(folder, "killed") == before and process.poll() is None:
            time.sleep(0.02)
    time.sleep(rng.uniform(0, 2))
    number = kill_all(process)
    after = step_of(folder, "killed")
    run = folder / "checkpoints" / "killed"
    half = [path.name for path in run.glob("*") if path.name.endswith(".tmp")]
    assert after >= before and (after == 0 or load_run(str(run)).step == after)
    return (
        f"{number} processes killed after {time.monotonic() - began:.1f} s at step {after} "
        f"(it began at {before}); half-written: {', '.join(half) or 'nothing'}"
    )


def kill_and_compare(folder: Path, kills: int, seed: int, ranks: int, **options: object) -> None:
    """Kill so often, then finish; parameters, tables and the names of all files must be equal."""
    make_videos(folder / "videos")
    rng = random.Random(seed)
    for kill in range(1, kills + 1):
        print(f"kill {kill}: {killed_once(folder, rng, ranks, **options)}", flush=True)
    runs = [folder / "checkpoints" / name for name in ("killed", "unbroken")]
    for run in runs:
        code = start(folder, run.name, ranks, **options).wait()
        print(f"{run.name}: exit code {code}, at step {step_of(folder, run.name)}", flush=True)
        assert code == 0, (folder / f"{run.name}.log").read_text()
    assert_same_run(*runs)
    assert column(runs[0], "loss") == column(runs[1], "loss")
    names = [sorted(path.name for path in run.iterdir()) for run in runs]
    assert names[0] == names[1], names
    print("parameters, averages, optimiser, position, losses and file names: equal", flush=True)


def main() -> None:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="number of kills")
    parser.add_argument("--steps", type=int, default=150, help="steps of the whole run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--ranks", type=int, default=1, help="processes, under mpiexec if several")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        kill_and_compare(Path(name), args.kills, args.seed, args.ranks, max_steps=args.steps)


if __name__ == "__main__":
    main()
