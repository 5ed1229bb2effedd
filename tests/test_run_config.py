"""config.json beside the checkpoints: what it says, starting from it, --dry_run, resume commands."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import torch

from improved_diffusion import dist_util
from improved_diffusion.training import runs
from train_runs import ROOT, environment, flags, make_videos, train


@pytest.fixture
def videos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_videos(tmp_path / "videos")


@pytest.fixture
def parser(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import video_train

    return video_train.create_argparser()


def parse(parser, *words):
    from improved_diffusion.script_util import parse_with_config

    return parse_with_config(parser, list(words))


@pytest.mark.slow
def test_config_json_says_what_ran_where_and_starts_the_same_run_again(videos, tmp_path):
    done = train(tmp_path, *flags(videos, resume_id="first", max_steps=1, lr=0.002), ranks=2)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "checkpoints" / "first" / "config.json"
    content = json.loads(path.read_text())
    assert content["run_id"] == "first" and content["launcher"] == "mpi"
    assert content["global_batch_size"] == 4 and content["device"] == "cpu"
    assert content["hosts"] == [os.uname().nodename] * 2
    assert content["versions"]["torch"] == torch.__version__
    assert content["versions"]["code"].startswith("0.")
    assert content["options"]["image_size"] == 32 and content["options"]["lr"] == 0.002

    done = train(tmp_path, f"--config={path}", "--batch_size=1", "--resume_id=second", ranks=2)
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "checkpoints" / "second" / "config.json").read_text())
    assert again["options"] == content["options"] | {"batch_size": 1, "resume_id": "second"}


def test_a_dry_run_prints_the_resolved_options_and_makes_nothing(videos, tmp_path):
    done = train(tmp_path, *flags(videos, T=-1, resume_id="run"), "--dry_run")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["options"]["T"] == 8 and content["options"]["image_size"] == 32
    assert content["global_batch_size"] == 2
    assert not (tmp_path / "checkpoints").exists()


def write(folder, options):
    path = folder / "config.json"
    path.write_text(json.dumps({"options": options}))
    return str(path)


def test_flags_win_over_the_file_and_the_file_over_defaults(parser, tmp_path):
    path = write(
        tmp_path,
        {"dataset": "x", "lr": 0.5, "use_checkpoint": True, "fps": None, "resume_id": "old"},
    )
    args = parse(parser, "--config", path, "--lr", "0.25")
    assert (args.dataset, args.lr, args.use_checkpoint, args.fps) == ("x", 0.25, True, None)
    assert args.resume_id == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_such_option": 1}, "unknown options no_such_option"),
        ({"precision": "fp8"}, "precision cannot be 'fp8'"),
        ({"lr": None}, "lr cannot be None"),
        ([1], "not the config.json of a training run"),
    ],
)
def test_a_bad_file_is_told_in_one_line(parser, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        parse(parser, "--config", write(tmp_path, options))


def test_a_missing_file_and_a_wrong_type_are_told(parser, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="--config nowhere.json: no such file"):
        parse(parser, "--config", "nowhere.json")
    with pytest.raises(SystemExit):
        parse(parser, "--config", write(tmp_path, {"dataset": "x", "lr": "much"}))
    assert "--lr: invalid float value: 'much'" in capsys.readouterr().err


def test_a_data_set_is_required_where_the_file_has_none(parser, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(parser, "--config", write(tmp_path, {"lr": 1.0}))
    assert "required: --dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "start"),
    [
        ({}, "python"),
        ({"PMI_RANK": "0"}, "mpiexec -n 4 python"),
        (
            {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"},
            "torchrun --standalone --nproc_per_node=4",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
            "torchrun --nnodes=2 --nproc_per_node=2",
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"},
            "srun --mpi=none -n 4 --wait=5 python",
        ),
    ],
)
def test_the_resume_command_has_the_launcher_and_replaces_an_old_resume_id(
    monkeypatch, variables, start
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist_util._world, "size", 4)
    words = ["train.py", "--T=3", "--resume_id", "a", "--resume_checkpoint=x y", "--lr", "1"]
    monkeypatch.setattr(sys, "argv", words)
    kept = "--T=3 '--resume_checkpoint=x y' --lr 1"
    assert runs.resume_command("p/b") == f"{start} train.py {kept} --resume_id p/b"
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", "/my runs")
    assert runs.resume_command("b").startswith(f"DIFFUSION_BLOB_LOGDIR='/my runs' {start} train.py")


@pytest.mark.slow
def test_the_printed_resume_command_resumes(videos, tmp_path):
    done = train(tmp_path, *flags(videos, max_steps=2), "--resume_id=a b")
    command = done.stderr.strip().splitlines()[-1].removeprefix("to resume: ")
    assert f"should it be killed: {command}" in done.stderr
    words = [sys.executable, *shlex.split(command)[1:], "--max_steps=3"]
    again = subprocess.run(
        words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stderr
    folder = tmp_path / "checkpoints" / "a b"
    assert f"folder: {folder}, at step 2" in again.stderr
    assert (folder / "model_000003.pt").is_file()
