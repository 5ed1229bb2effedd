"""scripts/configs: files to start from."""

import json
import re
import shlex

import pytest
import torch

from helpers import ROOT, call_main, make_folder_dataset

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(
    r"^(?:mpiexec -n 4 )?python scripts/video_train.py (--num_workers 10 .*)$", README, re.M
)
FILES = sorted((ROOT / "scripts" / "configs").glob("*.json"))


def resolved(capsys, *words):
    """The options that the command would train with."""
    call_main("video_train.py", *words, "--dry_run")
    return json.loads(capsys.readouterr().out)["options"]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.partition("--dataset=")[2].split()[0])
def test_a_file_stands_for_each_published_command(command, capsys):
    name = command.partition("--dataset=")[2].split()[0]
    file = ROOT / "scripts" / "configs" / f"{name}.json"
    typed = resolved(capsys, *shlex.split(command))
    assert typed["dataset"] == name and typed["max_frames"] == 20 and typed["num_workers"] == 10
    assert resolved(capsys, "--config", str(file)) == typed


def test_there_are_three_published_commands():
    assert len(COMMANDS) == 3


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_is_one_that_training_takes(file, capsys):
    """With a data set that is built in, where the file names none."""
    options = json.loads(file.read_text())["options"]
    words = [] if "dataset" in options else ["--dataset", "bouncy_balls"]
    found = resolved(capsys, "--config", str(file), *words)
    assert {key: found[key] for key in options} == options


def test_a_run_starts_from_the_fast_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    folder = make_folder_dataset(tmp_path / "data", size=16)
    call_main(
        "video_train.py",
        *f"--config {ROOT}/scripts/configs/fast.json --dataset {folder} --resume_id fast".split(),
        *"--max_frames 4 --batch_size 2 --num_channels 32 --num_res_blocks 1".split(),
        *"--num_workers 0 --sample_interval 0 --max_steps 2 --save_latest_only True".split(),
    )
    saved = torch.load("checkpoints/fast/model_latest.pt")
    assert saved["step"] == 2 and saved["config"]["optimizer"] == "muon"
