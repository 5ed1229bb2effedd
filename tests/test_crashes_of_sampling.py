"""Sampling and evaluation that are killed at random moments, or run out of disk, and go on."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from improved_diffusion.evaluation import evaluate
from improved_diffusion.evaluation.options import EvalConfig
from improved_diffusion.sampling.results import EvalDir
from toy_runs import make_toy, sample

ROUNDS = 20
UNLIMITED = resource.getrlimit(resource.RLIMIT_FSIZE)[1]


def start(work: Callable[[], Any], limit: int | None = None) -> int:
    """The id of a process that does `work`, with files of at most `limit` bytes.

    It ends with code 0, with 3 after an OSError, whose text is left in the file `said`.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        tqdm.set_lock(threading.RLock())  # forks share tqdm's own, and a killed one would keep it
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, UNLIMITED))
        sys.stderr = open(os.devnull, "w")  # what pytest captures is a file too
        work()
        code = 0
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (UNLIMITED, UNLIMITED))
        Path("said").write_text(str(error))
        code = 3
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(seconds: float, *pids: int) -> list[int]:
    """SIGKILL; returns the exit codes: -9, or 0 of what was quicker."""
    time.sleep(seconds)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return [wait(pid) for pid in pids]


def files(folder: Path) -> dict[str, bytes]:
    """Their contents, but of records, which say how long a sample took."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "records"
    }


def score(eval_dir: EvalDir) -> None:
    evaluate.evaluate(EvalConfig((str(eval_dir.path),), modes=("psnr", "ssim"), device="cpu"))


@pytest.fixture
def checkpoint(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_toy(tmp_path, diffusion_steps=12)


@pytest.mark.slow
def test_two_jobs_on_one_folder_killed_at_random_moments_leave_an_undisturbed_run(checkpoint):
    """With different batch sizes, 20 rounds; then every file is equal bit for bit, and none is left."""
    began = time.perf_counter()
    whole = sample(checkpoint, eval_dir="whole", num_samples=2)
    took = time.perf_counter() - began
    rng, codes = random.Random(0), []
    eval_dir = EvalDir(f"killed/{whole.path.name}")
    for _ in range(ROUNDS):
        pids = [
            start(lambda size=size: sample(checkpoint, eval_dir="killed", num_samples=2, batch_size=size))
            for size in (4, 3)
        ]  # fmt: skip
        codes += kill_after(rng.uniform(0, took), *pids)
        finished = sorted((eval_dir.path / "samples").glob("sample_*.npy"))
        for path in finished:
            assert path.read_bytes() == (whole.path / "samples" / path.name).read_bytes()
        if len(finished) == 8:  # begin again with some of them
            for path in rng.sample(finished, 6):
                path.unlink()
    assert codes.count(-signal.SIGKILL) >= ROUNDS and set(codes) <= {0, -signal.SIGKILL}
    sample(checkpoint, eval_dir="killed", num_samples=2, batch_size=2)
    assert files(eval_dir.path) == files(whole.path)


@pytest.mark.slow
def test_evaluation_killed_at_random_moments_leaves_an_undisturbed_one(checkpoint):
    whole, killed = (sample(checkpoint, eval_dir=name) for name in ("whole", "killed"))
    score(whole)  # its libraries are loaded now
    shutil.rmtree(whole.path / "metrics_cache")
    began = time.perf_counter()
    score(whole)
    took = time.perf_counter() - began
    rng, codes = random.Random(1), []
    while codes.count(-signal.SIGKILL) < ROUNDS and len(codes) < 5 * ROUNDS:
        codes += kill_after(rng.uniform(0, took), start(lambda: score(killed)))
        for path in killed.path.glob("metrics_cache/*.npy"):
            if rng.random() < 0.3:  # so that something is left to do
                path.unlink()
    assert codes.count(-signal.SIGKILL) == ROUNDS and set(codes) <= {0, -signal.SIGKILL}
    score(killed)
    assert files(killed.path) == files(whole.path)


def test_sampling_on_a_full_disk_names_the_path_and_goes_on_with_room(checkpoint):
    whole = sample(checkpoint, eval_dir="whole")
    sample(checkpoint, eval_dir="full", indices=(0,))
    eval_dir = EvalDir(f"full/{whole.path.name}")
    before = files(eval_dir.path)
    assert wait(start(lambda: sample(checkpoint, eval_dir="full"), limit=20_000)) == 3
    said = Path("said").read_text()
    assert "sample_0001-0.npy" in said and "\n" not in said
    after = files(eval_dir.path)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if name.endswith(".tmp")]
    assert [name for name in after if "partial" in name], "what fits the disk is gone on with"
    sample(checkpoint, eval_dir="full")
    assert files(eval_dir.path) == files(whole.path)


def test_a_disk_without_room_for_unfinished_videos_only_warns(checkpoint, monkeypatch, caplog):
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device", "partial/sample_0000-0/step_0000.npz")

    monkeypatch.setattr(EvalDir, "save_step", full)
    assert sample(checkpoint, indices=(0,)).has_sample(0, 0)
    assert "unfinished videos are not kept: [Errno 28] No space left" in caplog.text


def test_evaluation_on_a_full_disk_names_the_path_and_goes_on_with_room(checkpoint):
    whole, full = (sample(checkpoint, eval_dir=name, indices=(0,)) for name in ("whole", "full"))
    score(whole)
    score(full)
    for name in ("whole", "full"):
        sample(checkpoint, eval_dir=name)
    before = files(full.path)
    assert wait(start(lambda: score(full), limit=100)) == 3
    said = Path("said").read_text()
    assert str(full.path) in said and "metrics" in said and "\n" not in said
    after = files(full.path)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if name.endswith((".tmp", ".lock"))]
    score(full)
    score(whole)
    assert files(full.path) == files(whole.path)
