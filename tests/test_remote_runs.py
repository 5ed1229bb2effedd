"""Runs in a blob store: what is transferred, and that it resumes like a local one."""

import csv
import json

import pytest
import torch

import fake_blobfile
from improved_diffusion import logger
from improved_diffusion.data import checkpoints
from improved_diffusion.logger import ProgressFile
from improved_diffusion.training import run_lock
from train_runs import column, equal, load_run, make_loop, make_videos, newest_step

RUN = "gs://bucket/runs/run"


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(run_lock, "SETTLE_S", 0.0)
    return fake_blobfile.install(monkeypatch)


def save(step, **options):
    state = {"w": torch.full((3,), float(step))}
    checkpoints.save_run(RUN, step, state, {"0.9": state}, {"position": step}, {}, **options)


def names(store):
    return sorted(path.removeprefix(f"{RUN}/") for path in store.blobs)


def test_the_table_is_not_transferred_for_every_row(store, monkeypatch):
    path = f"{RUN}/progress.csv"
    progress = ProgressFile(path, 0)
    for step in range(1, 1001):
        progress.append({"step": step, "loss": 0.5})
    assert store.writes[path] == 1 and store.reads[path] == 0
    progress.flush()
    progress.flush()
    assert store.writes[path] == 2
    assert len(store.blobs[path].splitlines()) == 1001
    monkeypatch.setattr(logger, "UPLOAD_INTERVAL_S", 0.0)
    progress.append({"step": 1001, "valid_loss": 1.0})
    assert store.writes[path] == 3
    assert store.blobs[path].splitlines()[-1] == b"1001,,1.0"
    assert ProgressFile(path, 500).columns == ["step", "loss", "valid_loss"]
    assert len(store.blobs[path].splitlines()) == 501


@pytest.mark.parametrize("latest_only", [False, True])
def test_finding_the_newest_set_downloads_no_checkpoint(store, latest_only):
    for step in (1, 2):
        save(step, latest_only=latest_only)
    store.reads.clear()
    assert newest_step(RUN) == 2
    assert set(store.reads) <= {f"{RUN}/{checkpoints.MARKER}"}
    store.reads.clear()
    state = load_run(RUN)
    assert state.step == 2 and state.ema_states["0.9"]["w"][0] == 2
    assert all(number == 1 for number in store.reads.values()) and len(store.reads) == 4


def test_a_folder_without_the_marker_resumes(store):
    save(1, latest_only=True)
    del store.blobs[f"{RUN}/{checkpoints.MARKER}"]
    assert load_run(RUN).step == 1


def test_a_marker_that_lies_is_found_out(store, caplog):
    save(1)
    save(2, latest_only=True)
    store.write(f"{RUN}/{checkpoints.MARKER}", json.dumps({"step": 7}).encode())
    assert load_run(RUN).step == 1
    assert "model_latest.pt: holds step 2, not 7" in caplog.text


def test_the_marker_is_away_while_the_latest_files_are_of_two_steps(store, monkeypatch):
    save(1, latest_only=True)

    class Killed(BaseException):
        pass

    def copy(source, target, real=checkpoints._link):
        real(source, target)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoints, "_link", copy)
        save(2, latest_only=True)
    assert load_run(RUN).step == 2
    checkpoints.end_killed_saves(RUN)
    latest = ["ema_0.9_latest.pt", checkpoints.MARKER, "model_latest.pt", "opt_latest.pt"]
    assert names(store) == sorted(latest)
    assert load_run(RUN).step == 2


@pytest.mark.slow
def test_a_remote_run_resumes_like_a_local_one(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    videos = make_videos(tmp_path / "videos")
    make_loop(videos, resume_id="run").run_loop()
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", "gs://bucket/runs")
    make_loop(videos, resume_id="run", max_steps=2).run_loop()
    make_loop(videos, resume_id="run").run_loop()
    local, remote = load_run("checkpoints/run"), load_run(RUN)
    assert equal(local.model_state, remote.model_state)
    assert equal(local.opt_state, remote.opt_state)
    table = csv.DictReader(store.blobs[f"{RUN}/progress.csv"].decode().splitlines())
    assert [row["loss"] for row in table] == column("checkpoints/run", "loss")
    assert not any(name.endswith((".tmp", ".lock")) for name in store.blobs)
