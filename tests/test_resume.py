"""What a run goes on from: averages that came and went, damaged files, and the memory it takes."""

import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from improved_diffusion import dist_util
from improved_diffusion.data import checkpoints
from train_runs import assert_same_run, column, equal, flags, load_run, make_loop, train


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# ---------------------------------------------------------------- which set


@pytest.mark.slow
def test_a_rate_that_was_dropped_does_not_start_a_run_over(videos, caplog):
    options = {"save_latest_only": True, "resume_id": "run"}
    make_loop(videos, max_steps=2, **options).run_loop()
    make_loop(videos, max_steps=4, ema_rate="0.9", **options).run_loop()
    loop = make_loop(videos, ema_rate="0.9", **options)
    assert loop.step == 4
    assert "ema_0.99_latest.pt is of step 2, not of 4: left out" in caplog.text
    assert checkpoints.load_weights("checkpoints/run/ema_0.99_latest.pt").step == 2


@pytest.mark.slow
def test_a_rate_that_comes_back_does_not_take_up_an_average_of_another_step(videos, caplog):
    options = {"save_latest_only": True, "resume_id": "run"}
    make_loop(videos, max_steps=2, **options).run_loop()
    make_loop(videos, max_steps=4, ema_rate="0.9", **options).run_loop()
    loop = make_loop(videos, **options)
    assert "--ema_rate 0.99 is new" in caplog.text
    assert equal(loop.train_step.emas["0.99"], loop.train_step.params)


@pytest.mark.parametrize("kept", ["model_latest.pt", "ema_0.9_000002.pt", "opt_latest.pt"])
def test_a_run_never_starts_at_0_over_files_of_a_run(videos, kept):
    make_loop(videos, resume_id="run", max_steps=2).run_loop()
    folder = Path("checkpoints/run")
    for path in folder.glob("*.pt"):
        if path.name != kept:
            path.unlink()
    before = (folder / kept).read_bytes(), (folder / "progress.csv").read_text()
    with pytest.raises(ValueError, match="no whole set to go on from .*another --resume_id") as e:
        make_loop(videos, resume_id="run")
    assert "\n" not in str(e.value)
    assert before == ((folder / kept).read_bytes(), (folder / "progress.csv").read_text())


def test_a_set_that_is_written_again_and_cut_off_takes_no_optimiser_of_the_one_before(
    tmp_path, monkeypatch
):
    def save(step, value):
        weights = {"w": torch.full((4,), value)}
        checkpoints.save_run(str(tmp_path), step, weights, {"0.9": weights}, {"of": value}, {})

    save(100, 1.0), save(200, 2.0)
    truncate(tmp_path / "ema_0.9_000200.pt")
    assert checkpoints.load_newest(str(tmp_path)).step == 100
    write, written = checkpoints._write, []

    def full_disk(path, content):
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(checkpoints, "_write", full_disk)
    with pytest.raises(OSError, match="No space"):
        save(200, 7.0)
    state = checkpoints.load_newest(str(tmp_path))
    assert (state.step, state.opt_state["of"], float(state.model_state["w"][0])) == (100, 1.0, 1.0)


def test_a_file_that_could_not_be_read_for_want_of_memory_is_not_passed_over(tmp_path, monkeypatch):
    weights = {"w": torch.ones(4)}
    for step in (100, 200):
        checkpoints.save_run(str(tmp_path), step, weights, {}, {}, {})
    load = checkpoints._load

    def no_memory(path, **options):
        if "100" not in path:
            raise MemoryError
        return load(path, **options)

    monkeypatch.setattr(checkpoints, "_load", no_memory)
    with pytest.raises(MemoryError):
        checkpoints.load_newest(str(tmp_path))


def test_a_first_save_that_was_killed_starts_at_0(videos, monkeypatch):
    class Killed(BaseException):
        pass

    def write(path, content, real=checkpoints._write):
        if "opt" in path:
            raise Killed
        real(path, content)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoints, "_write", write)
        make_loop(videos, resume_id="run").run_loop()
    assert Path("checkpoints/run/model_000002.pt").exists()
    loop = make_loop(videos, resume_id="run")
    assert loop.step == 0 and not list(Path("checkpoints/run").glob("*.pt"))


# ---------------------------------------------------------------- damaged files


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "ema_0.99", "opt"])
@pytest.mark.parametrize("latest_only", [False, True])
def test_a_run_goes_on_from_the_set_before_a_damaged_file(videos, caplog, latest_only, kind):
    make_loop(videos, resume_id="whole").run_loop()
    make_loop(videos, resume_id="run", max_steps=2).run_loop()
    make_loop(videos, resume_id="run", save_latest_only=latest_only).run_loop()
    name = f"{kind}_latest.pt" if latest_only else f"{kind}_000004.pt"
    truncate(Path("checkpoints/run", name))
    loop = make_loop(videos, resume_id="run")
    assert loop.step == 2
    (warning,) = [r.getMessage() for r in caplog.records if name in r.getMessage()]
    assert "truncated" in warning and "older checkpoint" in warning
    loop.run_loop()
    assert_same_run("checkpoints/run", "checkpoints/whole")
    assert column("checkpoints/run", "loss") == column("checkpoints/whole", "loss")


def test_where_every_set_is_damaged_the_run_refuses_in_one_line(videos):
    make_loop(videos, resume_id="run", max_steps=2).run_loop()
    truncate(Path("checkpoints/run/opt_000002.pt"))
    with pytest.raises(
        ValueError, match=r"no whole set .*opt_(000002|latest)\.pt: truncated"
    ) as caught:
        make_loop(videos, resume_id="run")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_damaged_newer_set_does_not_make_keep_remove_the_whole_ones(videos):
    make_loop(videos, resume_id="run", max_steps=4).run_loop()
    truncate(Path("checkpoints/run/opt_000004.pt"))
    options = {"save_interval": 1, "keep_checkpoints": 1}
    make_loop(videos, resume_id="run", max_steps=3, **options).run_loop()
    assert load_run("checkpoints/run").step == 3


@pytest.mark.parametrize("damage", [
    "letters",
    *(pytest.param(damage, marks=pytest.mark.slow) for damage in ("fields", "header", "bytes")),
])  # fmt: skip
def test_a_damaged_table_does_not_stop_a_run_and_is_kept(videos, caplog, damage):
    make_loop(videos, resume_id="run", max_steps=3).run_loop()
    path = Path("checkpoints/run/progress.csv")
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = {
        "letters": [*lines[:2], b"two,x\n", lines[3]],
        "fields": [*lines[:2], lines[2][:5] + b"\n", lines[3]],
        "header": [b"nothing\n", *lines[1:]],
        "bytes": [*lines[:2], b"\xff\x00\xfe\n", lines[3]],
    }[damage]
    path.write_bytes(b"".join(damaged))
    make_loop(videos, resume_id="run").run_loop()
    assert f"{path} has damaged lines" in caplog.text
    assert Path(f"{path}.damaged").read_bytes() == b"".join(damaged)
    assert column(path.parent, "step") == (["4"] if damage == "header" else ["1", "3", "4"])


# ---------------------------------------------------------------- memory


def test_a_resumed_run_keeps_nothing_of_the_files(videos):
    make_loop(videos, resume_id="run", max_steps=2).run_loop()
    loop = make_loop(videos, resume_id="run")
    assert loop.step == 2 and loop.run.state is None and loop.run.weights is None
    assert ".pt" not in Path("/proc/self/maps").read_text()
    loop.run_loop()


def test_other_ranks_are_told_which_set_and_map_it_themselves(videos, monkeypatch):
    make_loop(videos, resume_id="run", max_steps=2).run_loop()
    sent = []

    def broadcast_object(value, *, what):
        sent.append(len(pickle.dumps(value)))
        return value

    monkeypatch.setattr(dist_util, "broadcast_object", broadcast_object)
    make_loop(videos, resume_id="run").run.close()
    assert sent and sum(sent) < 1000


@pytest.mark.slow
def test_a_set_of_200_mb_takes_no_memory_until_it_is_used(tmp_path):
    state = {"w": torch.zeros(25_000_000)}
    opt = {"optimizer": {"exp_avg": torch.zeros(25_000_000)}}
    checkpoints.save_run(str(tmp_path), 1, state, {}, opt, {})
    code = (
        "import resource, sys, torch; from improved_diffusion.data import checkpoints\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak(); state = checkpoints.load_newest(sys.argv[1]); print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 50


# ---------------------------------------------------------------- a full disk


@pytest.mark.slow
def test_a_disk_that_was_full_has_room_again_and_the_run_goes_on(videos, tmp_path):
    make_loop(videos, resume_id="whole").run_loop()
    make_loop(videos, resume_id="run", max_steps=2).run_loop()
    folder = tmp_path / "checkpoints" / "run"
    before = {path.name: path.read_bytes() for path in folder.glob("*.pt")}
    size = (folder / "opt_000002.pt").stat().st_size

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, size - 1000))

    done = train(tmp_path, *flags(videos, resume_id="run"), preexec_fn=limit)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "cannot write checkpoints/run/opt_000004.pt: File too large" in last
    assert before == {path.name: path.read_bytes() for path in folder.glob("*.pt")}
    assert not list(folder.glob(".*")) and not (folder / "run.lock").exists()
    done = train(tmp_path, *flags(videos, resume_id="run"))
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, tmp_path / "checkpoints" / "whole")
