"""A stop signal at any moment of the training command, from its first line to its exit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from improved_diffusion.training import signals
from train_runs import SCRIPT, assert_same_run, environment, flags, make_videos, train

CAUGHT = 1 << (signal.SIGUSR1 - 1)


def listens(pid: int) -> bool:
    """Whether a process has a handler for SIGUSR1: its script's first line is done."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    (mask,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(int(mask, 16) & CAUGHT)


def start(folder, **options):
    command = [sys.executable, SCRIPT, *flags("videos", resume_id="run", **options)]
    process = subprocess.Popen(
        command, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 10
    while process.poll() is None and not listens(process.pid) and time.monotonic() < deadline:
        time.sleep(0.002)
    return process


def listened_s(folder, **options) -> float:
    """How long the command runs from its first line to its exit."""
    process = start(folder, **options)
    began = time.monotonic()
    process.communicate(timeout=200)
    assert process.returncode == 0
    return time.monotonic() - began


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_a_signal_at_the_first_line_says_to_start_again(tmp_path, number):
    make_videos(tmp_path / "videos")
    process = start(tmp_path)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == signals.EXIT_INTERRUPTED
    assert said == f"{signal.Signals(number).name}: leaving\n"


@pytest.mark.slow
def test_a_signal_at_any_moment_gives_75_or_0_and_loses_nothing(tmp_path):
    make_videos(tmp_path / "videos")
    options = {"save_interval": 1, "keep_checkpoints": 1}
    train(tmp_path, *flags("videos", resume_id="unbroken", **options, max_steps=14))
    rng, codes = random.Random(0), []
    lasts = listened_s(tmp_path, **options, max_steps=2)
    for moment in range(24):
        limit = 2 + moment // 2  # every second start has nothing left to do but to close
        process = start(tmp_path, **options, max_steps=limit)
        time.sleep(rng.uniform(0, lasts))
        process.send_signal(rng.choice([signal.SIGUSR1, signal.SIGTERM]))
        _, said = process.communicate(timeout=200)
        codes.append(process.returncode)
        assert process.returncode in (0, signals.EXIT_INTERRUPTED), said
        assert "Traceback" not in said
    print("exit codes:", codes)
    done = train(tmp_path, *flags("videos", resume_id="run", **options, max_steps=14))
    assert done.returncode == 0, done.stderr
    runs = tmp_path / "checkpoints"
    assert_same_run(runs / "run", runs / "unbroken")
    names = [sorted(path.name for path in (runs / run).iterdir()) for run in ("run", "unbroken")]
    assert names[0] == names[1]


@pytest.mark.parametrize("when", ["closing", "leaving"])
@pytest.mark.slow
def test_a_signal_after_the_last_step_leaves_exit_code_0(tmp_path, when):
    make_videos(tmp_path / "videos")
    script = tmp_path / "late.py"
    script.write_text(
        f"""
import os, signal, sys
from improved_diffusion.training import signals
signals.watch()
sys.path.insert(0, {os.path.dirname(SCRIPT)!r})
import video_train
from improved_diffusion import dist_util, logger
from improved_diffusion.script_util import run_main
owner, name = (logger.RunLogger, "close") if {when!r} == "closing" else (dist_util, "cleanup")
real = getattr(owner, name)

def signalled(*args):
    os.kill(os.getpid(), signal.SIGUSR1)
    real(*args)

setattr(owner, name, signalled)
run_main(video_train.main)
"""
    )
    done = train(tmp_path, *flags("videos", max_steps=1), script=str(script))
    assert done.returncode == 0 and "SIGUSR1" in done.stderr, done.stderr


def test_nothing_changes_the_exit_code_at_the_very_end(tmp_path):
    code = """
import atexit, os, signal, sys
from improved_diffusion.training import signals
signals.watch()
signals.end(0)
atexit.register(os.kill, os.getpid(), signal.SIGUSR1)
class Last:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM):
        kill(pid, number)
sys.last = Last()
sys.exit(0)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_second_ctrl_c_ends_at_once_and_an_echo_does_not(monkeypatch):
    with signals.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received() == signal.SIGINT
        monkeypatch.setattr(signals, "SAME_KEY_PRESS_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signals.received() == 0
