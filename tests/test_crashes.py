"""Training that is killed, or finds its disk full, at random moments: nothing wrong is kept."""

import os
import subprocess
import sys

import pytest

from kill_and_resume import kill_and_compare
from train_runs import assert_same_run, flags, make_videos, train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("latest_only", [False, True])
def test_training_killed_20_times_equals_an_undisturbed_run(tmp_path, latest_only):
    kill_and_compare(
        tmp_path,
        kills=10,
        seed=int(latest_only),
        ranks=1,
        max_steps=16,
        save_latest_only=latest_only,
    )


@pytest.fixture
def small_disk(tmp_path):
    """A file system for three checkpoints of the tiny network, where mounting is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(disk)]
    if sys.platform != "linux" or os.getuid() != 0 or subprocess.run(mount).returncode != 0:
        pytest.skip("needs a tmpfs, which only root may mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_ends_training_in_one_line_and_with_room_it_goes_on(small_disk, tmp_path):
    make_videos(tmp_path / "videos")
    options = {"ema_rate": "0.9", "save_interval": 1, "resume_id": "run"}
    unbroken = train(tmp_path, *flags("videos", **{**options, "max_steps": 3}))
    assert unbroken.returncode == 0, unbroken.stderr
    env = {"DIFFUSION_BLOB_LOGDIR": str(small_disk)}
    run = small_disk / "run"
    first = train(tmp_path, *flags("videos", **{**options, "max_steps": 1}), variables=env)
    assert first.returncode == 0, first.stderr
    before = {path.name: path.read_bytes() for path in run.glob("*.pt")}
    ballast = small_disk / "ballast"
    stats = os.statvfs(small_disk)
    ballast.write_bytes(bytes(stats.f_bavail * stats.f_bsize - 20_000_000))
    full = train(tmp_path, *flags("videos", **{**options, "max_steps": 3}), variables=env)
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert f"cannot write {run}/" in full.stderr.strip().splitlines()[-1]
    assert "No space left on device" in full.stderr.strip().splitlines()[-1]
    assert before == {path.name: path.read_bytes() for path in run.glob("*.pt")}
    assert not list(run.glob("*.tmp")) and not list(run.glob(".*"))
    ballast.unlink()
    keep = {"keep_checkpoints": 1}
    again = train(tmp_path, *flags("videos", **{**options, **keep, "max_steps": 3}), variables=env)
    assert again.returncode == 0, again.stderr
    assert_same_run(run, tmp_path / "checkpoints" / "run")
