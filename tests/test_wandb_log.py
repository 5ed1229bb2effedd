"""An evaluation at wandb: tables and videos go to the run that trained the checkpoint, offline too."""

import json
from pathlib import Path

import pytest

import toy_runs
from helpers import run_script
from improved_diffusion.evaluation import evaluate, metric_tables, wandb_log
from improved_diffusion.evaluation.options import EvalConfig


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two sampled videos of the run `toy`."""
    folder = toy_runs.sample(toy_runs.make_toy(tmp_path), subset_size=2).path
    trained = json.loads((folder / "model_config.json").read_text())
    del trained["network"]  # which a process of its own does not know
    (folder / "model_config.json").write_text(json.dumps(trained))
    return folder


@pytest.mark.slow
def test_tables_and_videos_are_in_the_offline_run_of_the_checkpoint(folder, tmp_path):
    words = ("--eval_dir", folder, "--modes", "psnr", "ssim", "--log_to_wandb")
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    done = run_script("video_eval.py", *words, cwd=tmp_path, env=offline)
    assert done.returncode == 0 and "cannot" not in done.stderr, done.stderr
    (run,) = (tmp_path / "wandb").glob("offline-run-*-toy")
    (gif,) = (run / "files/media/videos").rglob("*.gif")
    assert gif.read_bytes()[:3] == b"GIF"
    (table,) = (run / "files/media/table").rglob("*.json")
    logged = json.loads(table.read_text())
    assert logged["columns"] == list(wandb_log.COLUMNS)
    info = metric_tables.read_info(next(folder.glob("metrics_*.pkl")))
    for name, metric, n, samples, mean, error, settings in logged["data"]:
        row = info["metrics"][metric]
        assert (name, n, samples) == (folder.name, 2, 1)
        assert (mean, error) == (row["mean"], row["standard_error"])
        assert json.loads(settings) == row["settings"]
    assert [row[1] for row in logged["data"]] == ["psnr", "ssim"]


class SpiedRun:
    """Stands for WandbRun and keeps what it is given."""

    def __init__(self, run_id, config):
        self.given = [("run", run_id)]
        self.runs.append(self.given)

    runs: list = []

    def log(self, row, step):
        self.given.append((row, step))

    def log_videos(self, files, step, name):
        assert all(Path(file).is_file() for file in files)
        self.given.append((name, step))

    def log_table(self, name, columns, rows):
        self.given.append((name, len(rows)))

    def finish(self):
        self.given.append("finished")


def test_numbers_have_the_names_of_checkpoint_strategy_and_metric(folder, monkeypatch):
    monkeypatch.setattr(wandb_log, "WandbRun", SpiedRun)
    monkeypatch.setattr(SpiedRun, "runs", [])
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = EvalConfig(eval_dir=(str(folder),), modes=("psnr",), log_to_wandb=True)
    evaluate.run(config)
    mean = metric_tables.read_info(next(folder.glob("metrics_*.pkl")))["metrics"]["psnr"]["mean"]
    name = f"eval/results/{folder.name}"
    assert SpiedRun.runs == [
        [
            ("run", "toy"),
            ({f"{name}/psnr": mean}, None),
            (f"{name}/videos", None),
            ("eval/results", 1),
            "finished",
        ]
    ]


def test_a_folder_that_does_not_name_its_checkpoint_is_refused_before_scoring(folder):
    stored = folder / "sample_config.json"
    values = json.loads(stored.read_text())
    del values["checkpoint_path"]
    stored.write_text(json.dumps(values))
    config = EvalConfig(eval_dir=(str(folder),), modes=("psnr",), log_to_wandb=True)
    with pytest.raises(ValueError, match="does not say checkpoint_path"):
        evaluate.run(config)
    assert not list(folder.glob("metrics_*"))
