"""The log's sinks: whole rows in progress.csv, and a wandb that cannot stop a run."""

import csv
import os
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from improved_diffusion import logger
from improved_diffusion.logger import ProgressFile, RunLogger, WandbRun


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


def test_rows_are_weighted_means_since_the_last_row(tmp_path):
    log = RunLogger(str(tmp_path), "id", {}, 0)
    log.add("loss", 1.0)
    log.add("loss", 4.0, count=2)
    assert log.dump(10) == {"loss": 3.0}
    log.add("loss", 5.0)
    log.dump(20)
    assert rows(tmp_path / "progress.csv") == [
        {"step": "10", "loss": "3.0"},
        {"step": "20", "loss": "5.0"},
    ]


def test_a_new_key_becomes_a_column_and_a_missing_one_stays_empty(tmp_path):
    path = str(tmp_path / "progress.csv")
    progress = ProgressFile(path, 0)
    progress.append({"step": 1, "loss": 1.5})
    progress.append({"step": 2, "loss_q3": 2.5})
    progress.append({"step": 3, "loss": 3.5})
    assert [list(row.values()) for row in rows(path)] == [
        ["1", "1.5", ""],
        ["2", "", "2.5"],
        ["3", "3.5", ""],
    ]


def test_a_resumed_run_drops_rows_after_its_step_and_a_torn_one(tmp_path):
    path = tmp_path / "progress.csv"
    path.write_text("step,loss\n10,1.0\n20,2.0\n30,3.0\n40,4.")
    ProgressFile(str(path), 20).append({"step": 30, "loss": 3.25})
    assert [row["loss"] for row in rows(path)] == ["1.0", "2.0", "3.25"]


def test_a_table_that_cannot_be_written_is_named(tmp_path):
    progress = ProgressFile(str(tmp_path / "run" / "progress.csv"), 0)
    progress.append({"step": 1})
    (tmp_path / "run" / "progress.csv").unlink()
    (tmp_path / "run").rmdir()
    with pytest.raises(OSError, match="cannot write .*progress.csv: No such file"):
        progress.append({"step": 2})


def test_disabled_wandb_is_not_even_imported(tmp_path):
    code = (
        "import sys; from improved_diffusion.logger import RunLogger;"
        f"RunLogger({str(tmp_path)!r}, 'id', {{}}, 0).close(); assert 'wandb' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_login_and_mode_wandb_goes_offline_under_the_runs_id(tmp_path):
    code = (
        "import logging; logging.basicConfig(level=20);"
        "from improved_diffusion.logger import RunLogger;"
        f"log = RunLogger({str(tmp_path)!r}, 'some/where/ab12cd34', {{'lr': 1}}, 0);"
        "log.add('loss', 1.0); log.dump(1); log.close()"
    )
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "WANDB_SILENT": "true"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("logging offline") == 1
    (folder,) = Path(tmp_path, "wandb").glob("offline-run-*-ab12cd34")
    assert (folder / "run-ab12cd34.wandb").stat().st_size > 0


def test_wandb_that_fails_is_told_once_and_forgotten(monkeypatch, caplog):
    class Broken:
        def log(self, *args, **kwargs):
            raise RuntimeError("server on fire\ndetails")

    run = WandbRun("id", {})
    run._run, run._works = Broken(), True
    run.log({"loss": 1.0}, 1)
    run.log({"loss": 1.0}, 2)
    run.log_videos([], 2)
    run.finish()
    assert [record.getMessage() for record in caplog.records] == [
        "wandb: cannot log (server on fire): going on without it"
    ]


class Finished:
    def finish(self):
        pass


def test_a_server_that_never_answers_is_given_up(monkeypatch, caplog):
    modes = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        wandb = types.SimpleNamespace(
            api=types.SimpleNamespace(api_key="key"),
            setup=lambda: types.SimpleNamespace(settings=types.SimpleNamespace(base_url=url)),
            init=lambda mode="online", **options: modes.append(mode) or Finished(),
        )
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        monkeypatch.delenv("WANDB_MODE")
        monkeypatch.setattr(logger, "WANDB_ANSWER_LIMIT_S", 0.3)
        WandbRun("id", {}).finish()
    assert modes == ["offline"]
    assert "timed out" in caplog.text and "logging offline" in caplog.text


def test_training_does_not_wait_for_wandb_to_start(monkeypatch):
    release, logged = threading.Event(), []

    class Run:
        def log(self, row, step):
            logged.append((step, row))

        def finish(self):
            logged.append("finished")

    def slow_start(self, wandb_id, config):
        assert release.wait(10)
        self._run = Run()

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(WandbRun, "_start", slow_start)
    run = WandbRun("id", {})
    run.log({"loss": 1.0}, 1)
    run.log({"loss": 2.0}, 2)
    assert logged == []
    release.set()
    run.finish()
    assert logged == [(1, {"loss": 1.0}), (2, {"loss": 2.0}), "finished"]


HANGING_WANDB = """
import atexit, os, threading, time
from types import SimpleNamespace

def hang(*args, **kwargs):
    time.sleep(3600)

def nothing(*args, **kwargs):
    pass

where = os.environ["HANGS_IN"]
api = SimpleNamespace(api_key=None)
run = SimpleNamespace(
    log=hang if where == "log" else nothing, finish=hang if where == "finish" else nothing
)

def init(*args, **kwargs):
    if where == "init":
        hang()
    if where == "exit":
        atexit.register(hang)
        threading.Thread(target=hang).start()
    return run
"""


@pytest.mark.parametrize("where", ["init", "log", "finish", "exit"])
def test_a_wandb_that_hangs_does_not_keep_a_process_that_is_done(tmp_path, where):
    (tmp_path / "wandb.py").write_text(HANGING_WANDB)
    code = f"""
import sys
from improved_diffusion.training import signals
signals.watch()
from improved_diffusion import logger
logger.WANDB_FINISH_LIMIT_S = signals.EXIT_LIMIT_S = 0.5
log = logger.RunLogger({str(tmp_path)!r}, "id", {{}}, 0)
log.add("loss", 1.0)
log.dump(1)
log.close()
signals.end(75)
sys.exit(75)
"""
    python_path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {"HANGS_IN": where, "WANDB_MODE": "offline", "PYTHONPATH": python_path}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 75, done.stderr
    told = "wandb: not finished after 0 s: leaving without it" in done.stderr
    assert told == (where != "exit")
    assert rows(tmp_path / "progress.csv") == [{"step": "1", "loss": "1.0"}]
