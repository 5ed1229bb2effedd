"""One process at a time trains a run: who is refused, who takes over, and what is left."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import fake_blobfile
from improved_diffusion.data import paths
from improved_diffusion.training import run_lock
from improved_diffusion.training.run_lock import EXPIRY_S, LOCK_NAME, RunLock
from train_runs import SCRIPT, environment, flags, make_loop, make_videos, train


def write(folder, age_s=0.0, **changes):
    """A lock as another process writes it; what its holder calls itself is `changes`."""
    path = Path(folder, LOCK_NAME)
    values = json.loads(run_lock._text(run_lock._myself())) | changes
    path.write_text(json.dumps(values))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_a_lock_names_its_holder_and_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    lock = RunLock(str(tmp_path))
    lock.acquire()
    content = json.loads((tmp_path / LOCK_NAME).read_text())
    assert (content["pid"], content["job"]) == (os.getpid(), "77")
    assert content["host"] and content["time"]
    lock.check()
    lock.release()
    assert names(tmp_path) == []


def test_a_living_process_of_this_machine_keeps_its_run_however_old_its_lock(tmp_path):
    write(tmp_path, age_s=10 * EXPIRY_S, token="other")
    with pytest.raises(BlockingIOError, match=f"is held by process {os.getpid()} on ") as caught:
        RunLock(str(tmp_path)).acquire()
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == [LOCK_NAME]


@pytest.mark.parametrize("way", ["killed", "zombie", "reused number"])
def test_a_process_of_this_machine_that_is_gone_is_followed_at_once(tmp_path, way):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = paths.process_start(child.pid)
    assert started
    write(tmp_path, pid=child.pid, started="1" if way == "reused number" else started)
    if way != "reused number":
        child.kill()
    if way == "killed":
        child.wait()
    elif way == "zombie":
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    RunLock(str(tmp_path)).acquire()
    child.kill()
    child.wait()
    assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert names(tmp_path) == [LOCK_NAME]


ELSEWHERE = {"host": "far", "machine": "another"}


def test_a_process_elsewhere_counts_until_its_heartbeat_is_old(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    write(tmp_path, age_s=EXPIRY_S - 30, **ELSEWHERE)
    with pytest.raises(BlockingIOError, match=r"on far, since .*start again in (29|30|31) s"):
        RunLock(str(tmp_path)).acquire()
    write(tmp_path, age_s=EXPIRY_S + 30, **ELSEWHERE)
    RunLock(str(tmp_path)).acquire()


def test_the_age_is_told_by_the_file_systems_clock(tmp_path, monkeypatch):
    write(tmp_path, **ELSEWHERE)
    monkeypatch.setattr(time, "time", lambda: 4e9)  # this machine's is far ahead
    with pytest.raises(BlockingIOError):
        RunLock(str(tmp_path)).acquire()


def test_the_same_slurm_job_takes_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    write(tmp_path, **ELSEWHERE, job="78")
    with pytest.raises(BlockingIOError, match="SLURM job 78"):
        RunLock(str(tmp_path)).acquire()
    write(tmp_path, **ELSEWHERE, job="77")
    RunLock(str(tmp_path)).acquire()


def test_two_containers_of_one_host_do_not_judge_each_other_by_process_numbers(tmp_path):
    write(tmp_path, machine="the other container's", pid=2**22)
    with pytest.raises(BlockingIOError):
        RunLock(str(tmp_path)).acquire()


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("links", [True, False])
def test_of_many_that_want_it_at_once_one_gets_it(tmp_path, monkeypatch, stale, links):
    if stale:
        write(tmp_path, token="gone", pid=2**22)
    if not links:

        def refuse(source, target):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refuse)
    winners, losers = [], []
    barrier = threading.Barrier(8)

    def want():
        lock = RunLock(str(tmp_path))
        barrier.wait()
        try:
            lock.acquire()
            winners.append(lock)
        except BlockingIOError as error:
            losers.append(str(error))

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1 and len(losers) == 7
    winners[0].check()
    winners[0].release()
    assert names(tmp_path) == []


def test_an_illegible_lock_counts_until_it_is_old(tmp_path):
    path = tmp_path / LOCK_NAME
    path.write_bytes(b"\x00\x00")
    with pytest.raises(BlockingIOError, match="an unknown host"):
        RunLock(str(tmp_path)).acquire()
    os.utime(path, (time.time() - EXPIRY_S - 1,) * 2)
    RunLock(str(tmp_path)).acquire()


def test_what_a_process_left_that_was_killed_while_it_took_over_is_cleaned(tmp_path):
    write(tmp_path, pid=2**22)
    for name in (f"{LOCK_NAME}.claim.tmp", f"{LOCK_NAME}.abc.tmp"):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (time.time() - 100,) * 2)
    RunLock(str(tmp_path)).acquire()
    assert names(tmp_path) == [LOCK_NAME]


def test_the_heartbeat_sets_the_time_and_stops_a_process_that_lost_its_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_S", 0.05)
    told = []
    monkeypatch.setattr(signal, "SIGTERM", signal.SIGURG)
    previous = signal.signal(signal.SIGURG, lambda number, frame: told.append(number))
    lock = RunLock(str(tmp_path))
    lock.acquire()
    path = tmp_path / LOCK_NAME
    os.utime(path, (1e9, 1e9))
    deadline = time.monotonic() + 20
    while path.stat().st_mtime < 1.1e9:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    write(tmp_path, token="other", host="far")
    while not told:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    signal.signal(signal.SIGURG, previous)
    with pytest.raises(BlockingIOError, match="was taken over by process .* on far"):
        lock.check()
    lock.release()
    assert names(tmp_path) == [LOCK_NAME]  # the other's


def test_in_a_blob_store_the_second_is_refused_and_the_old_is_followed(monkeypatch):
    store = fake_blobfile.install(monkeypatch)
    monkeypatch.setattr(run_lock, "SETTLE_S", 0.0)
    lock = RunLock("gs://bucket/run")
    lock.acquire()
    with pytest.raises(BlockingIOError, match="gs://bucket/run is held by process"):
        RunLock("gs://bucket/run").acquire()
    lock.release()
    assert not store.blobs
    values = json.loads(run_lock._text(run_lock._myself())) | ELSEWHERE
    store.write("gs://bucket/run/run.lock", json.dumps(values).encode())
    store.clock += EXPIRY_S + 1
    RunLock("gs://bucket/run").acquire()
    assert list(store.blobs) == ["gs://bucket/run/run.lock"]


# ---------------------------------------------------------------- the command


@pytest.fixture
def videos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_videos(tmp_path / "videos")


@pytest.mark.slow
def test_a_second_job_of_a_run_says_who_holds_it_and_leaves_its_files_alone(videos, tmp_path):
    loop = make_loop(videos, resume_id="run", max_steps=2)
    half = tmp_path / "checkpoints" / "run" / ".opt_000002.pt.abc.tmp"
    half.write_bytes(b"the first job is writing this")
    done = train(tmp_path, *flags(videos, resume_id="run"))
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert f"checkpoints/run is held by process {os.getpid()} on" in done.stderr
    assert half.exists()
    half.unlink()
    loop.run_loop()
    done = train(tmp_path, *flags(videos, resume_id="run"))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_killed_job_is_followed_at_once(videos, tmp_path):
    command = [sys.executable, SCRIPT, *flags(videos, max_steps=0, resume_id="run")]
    folder = tmp_path / "checkpoints" / "run"
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=-3) as first:
        while not (folder / "model_000002.pt").exists():
            assert first.poll() is None
            time.sleep(0.1)
        first.kill()
    assert (folder / LOCK_NAME).exists()
    done = train(tmp_path, *flags(videos, max_steps=6, resume_id="run"))
    assert done.returncode == 0, done.stderr
    assert "is gone" in done.stderr and not (folder / LOCK_NAME).exists()
