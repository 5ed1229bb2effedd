"""Checkpoint files: round trips, foreign and broken files, and what survives a killed save."""

import argparse
import errno
import os

import pytest
import torch

from improved_diffusion.data import checkpoints, paths
from train_runs import load_run, newest_step

CONFIG = {"num_channels": 32, "dataset": "bouncy_balls", "image_size": 32, "use_fp16": False}


def state(value):
    return {"weight": torch.full((2, 3), float(value)), "count": torch.tensor(int(value))}


def save(folder, step, **options):
    checkpoints.save_run(
        str(folder),
        step,
        state(step),
        {"0.9999": state(step + 0.5)},
        {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "position": 4 * step},
        CONFIG,
        **options,
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def numbered(step):
    return [f"{kind}_{step:06d}.pt" for kind in ("ema_0.9999", "model", "opt")]


LATEST = [f"{kind}_latest.pt" for kind in ("ema_0.9999", "model", "opt")]


def test_a_save_writes_the_documented_files_and_loads_back(tmp_path):
    save(tmp_path, 7)
    assert names(tmp_path) == sorted(numbered(7) + LATEST)
    weights = checkpoints.load_weights(str(tmp_path / "ema_0.9999_latest.pt"))
    assert torch.equal(weights.state_dict["weight"], state(7.5)["weight"])
    assert (weights.config, weights.step) == (CONFIG, 7)
    run = load_run(str(tmp_path))
    assert run.step == 7 and run.opt_state["position"] == 28 and run.config == CONFIG
    assert torch.equal(run.model_state["weight"], state(7)["weight"])
    assert torch.equal(run.ema_states["0.9999"]["weight"], state(7.5)["weight"])


def test_latest_is_another_name_of_the_newest_set(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    for name in ("model", "ema_0.9999", "opt"):
        assert (tmp_path / f"{name}_latest.pt").samefile(tmp_path / f"{name}_000002.pt")


def test_latest_is_a_copy_where_links_are_impossible(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert names(tmp_path) == sorted(numbered(1) + numbered(2) + LATEST)
    assert checkpoints.load_weights(str(tmp_path / "model_latest.pt")).step == 2


def test_saving_a_step_again_leaves_no_temporary_file(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 1)
    checkpoints._link(str(tmp_path / "opt_000001.pt"), str(tmp_path / "opt_latest.pt"))
    assert names(tmp_path) == sorted(numbered(1) + LATEST)


def test_keep_removes_the_oldest_numbered_sets(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == sorted(numbered(3) + numbered(10) + LATEST)


def test_latest_only_leaves_only_latest_and_resumes(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, latest_only=True)
        assert names(tmp_path) == sorted(LATEST)
        assert newest_step(str(tmp_path)) == step
    assert load_run(str(tmp_path)).opt_state["position"] == 8


@pytest.mark.parametrize("latest_only", [False, True])
def test_a_complete_set_is_loadable_wherever_a_save_is_killed(tmp_path, monkeypatch, latest_only):
    """Stop the second save before its 1st, 2nd, ... change of the disk."""

    class Killed(BaseException):
        pass

    def die_after(count, action):
        def counted(*args, **kwargs):
            if budget[0] == 0:
                raise Killed
            budget[0] -= 1
            return action(*args, **kwargs)

        return counted

    budget = [-1]
    for module, name in ((checkpoints, "_write"), (checkpoints, "_link"), (paths, "remove")):
        monkeypatch.setattr(module, name, die_after(budget, getattr(module, name)))
    changes = 0
    for changes in range(20):
        folder = tmp_path / str(changes)
        budget[0] = -1
        save(folder, 1, latest_only=latest_only)
        budget[0] = changes
        try:
            save(folder, 2, latest_only=latest_only)
            break
        except Killed:
            run = load_run(str(folder))
            assert run.step == (2 if changes >= 3 else 1)
            assert (
                run.model_state["count"] == run.step and run.opt_state["position"] == 4 * run.step
            )
            assert run.ema_states["0.9999"]["weight"][0, 0] == run.step + 0.5
            budget[0] = -1
            checkpoints.end_killed_saves(str(folder))
            kept = (
                [] if latest_only else [name for s in range(run.step) for name in numbered(s + 1)]
            )
            assert names(folder) == sorted(kept + LATEST)
            assert load_run(str(folder)).step == run.step
    assert changes == (10 if latest_only else 7)


def test_a_folder_without_a_complete_set_has_no_resume_step(tmp_path):
    assert newest_step(str(tmp_path / "new")) is None
    save(tmp_path, 3)
    for name in ("opt_000003.pt", "opt_latest.pt"):
        (tmp_path / name).unlink()
    assert newest_step(str(tmp_path)) is None
    with pytest.raises(ValueError, match="no whole set to go on from"):
        load_run(str(tmp_path))
    assert checkpoints.load_newest(str(tmp_path / "new")) is None


def test_latest_files_of_two_steps_are_no_set(tmp_path):
    save(tmp_path / "a", 1, latest_only=True)
    save(tmp_path / "b", 2, latest_only=True)
    (tmp_path / "b" / "model_latest.pt").replace(tmp_path / "a" / "model_latest.pt")
    assert newest_step(str(tmp_path / "a")) is None


def test_published_format_with_a_namespace_and_half_precision_loads(tmp_path):
    path = tmp_path / "ema_0.9999_000100.pt"
    content = {
        "state_dict": {"weight": torch.ones(2).half(), "index": torch.arange(3)},
        "config": argparse.Namespace(num_channels=128, T=1000),
        "step": 100,
    }
    torch.save(content, path)
    weights = checkpoints.load_weights(str(path))
    assert weights.state_dict["weight"].dtype == torch.float32
    assert weights.state_dict["index"].dtype == torch.int64
    assert weights.config == {"num_channels": 128, "T": 1000} and weights.step == 100


def test_saved_tensors_are_contiguous(tmp_path):
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    checkpoints.save_run(str(tmp_path), 1, {"w": weight}, {}, {"m": [weight]}, {})
    loaded = torch.load(tmp_path / "model_000001.pt", weights_only=True)["state_dict"]["w"]
    assert loaded.is_contiguous() and torch.equal(loaded, weight)
    assert torch.load(tmp_path / "opt_000001.pt", weights_only=True)["m"][0].is_contiguous()


def test_missing_file_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="model_latest.pt: no such checkpoint file"):
        checkpoints.load_weights(str(tmp_path / "model_latest.pt"))


@pytest.mark.parametrize("size", [0, 100, 1500])
def test_truncated_file_is_one_line(tmp_path, size):
    save(tmp_path, 1)
    path = tmp_path / "model_000001.pt"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        ValueError, match="model_000001.pt: truncated, or not a checkpoint"
    ) as caught:
        checkpoints.load_weights(str(path))
    assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self):
        return os.system, ("echo pwned",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.ones(1)}, "lacks state_dict, config, step"),
        ({"state_dict": {}, "step": 1}, "lacks config"),
        ([1, 2], "holds a list"),
        ({"state_dict": Evil()}, "truncated, or not a checkpoint"),
    ],
)
def test_foreign_file_is_one_line(tmp_path, content, message, capfd):
    path = tmp_path / "foreign.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        checkpoints.load_weights(str(path))
    assert "\n" not in str(caught.value)
    assert "pwned" not in capfd.readouterr().out


def test_full_disk_is_one_line_and_leaves_the_old_set(tmp_path, monkeypatch):
    save(tmp_path, 1)

    class FullFile:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    real = paths.atomic_write
    import contextlib

    @contextlib.contextmanager
    def full(path):
        with real(path) as file:
            yield FullFile(file)

    monkeypatch.setattr(paths, "atomic_write", full)
    with pytest.raises(OSError, match="cannot write .*model_000002.pt: No space left on device"):
        save(tmp_path, 2)
    assert names(tmp_path) == sorted(numbered(1) + LATEST)
    assert newest_step(str(tmp_path)) == 1


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match="cannot write .*/file/run/model_000001.pt: (Not a directory|File exists)"
    ):
        save(tmp_path / "file" / "run", 1)
