"""The study: its presets, its commands, what is run again, the report."""

import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import helpers
from helpers import make_checkpoint
from improved_diffusion.data import ray_mazes
from improved_diffusion.evaluation import metric_tables
from improved_diffusion.evaluation.comparison import Difference
from improved_diffusion.evaluation.intervals import Interval, mean_interval
from improved_diffusion.evaluation.metric_tables import read_table
from improved_diffusion.sampling.results import EvalDir
from improved_diffusion.study import study, study_report
from improved_diffusion.study.arms import arms, resolve
from improved_diffusion.study.commands import in_place_of, run_script
from improved_diffusion.study.options import PRESETS, StudyConfig, preset_names
from test_readme import load_script

CHECKPOINT = "checkpoints/pretrained/maze_laps/ema_0.9_latest.pt"

SIZES = {"obs_length": 60, "T": 64, "max_frames": 4, "step_size": 2, "num_videos": 2}
RECALL = "recall-autoreg --distance l2 --recall_recent 1"


@pytest.fixture
def config(tmp_path, monkeypatch) -> StudyConfig:
    """A tiny study of maze_laps in a fresh current directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "datasets/maze_laps_32"
    ray_mazes.make_dataset("maze_laps", folder, num_train=2, num_test=3)
    make_checkpoint(tmp_path / CHECKPOINT, "maze_laps", image_size=32, T=240)
    return resolve(
        StudyConfig(
            preset="maze_laps",
            strategies=("autoreg", RECALL),
            timesteps=2,
            num_samples=1,
            bound_videos=1,
            modes=("psnr", "lap_psnr"),
            **SIZES,
        )
    )


class Ran(list[str]):
    """Runs scripts in this process, and lists which."""

    def __call__(self, script: str, words: Sequence[str]) -> None:
        self.append(script)
        load_script(f"scripts/{script}").main(list(words))


@pytest.fixture
def ran() -> Ran:
    return Ran()


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize("preset", preset_names())
def test_every_command_of_a_preset_parses(preset):
    config = resolve(StudyConfig(preset, checkpoint="some.pt"))
    assert config.dataset == preset and config.num_videos == 16 and config.num_samples == 2
    commands = study.commands(config)
    assert len({command.name for command in commands}) == len(commands)
    for command in commands:
        script = f"scripts/{command.script}"
        load_script(script).create_argparser().parse_args(command.words)
        assert command.line == shlex.join(["python", script, *command.words])


def test_presets_compare_the_same_strategies():
    modes = {
        preset: [arm.mode for arm in arms(resolve(StudyConfig(preset, checkpoint="some.pt")))]
        for preset in preset_names()
    }
    assert list(modes) == ["bouncy_balls", "colour_mazes", "maze_laps"]
    assert len(set(map(tuple, modes.values()))) == 1 and len(modes["maze_laps"]) == 8


def test_options_win_over_the_preset_and_a_file_of_ones_own_is_one(tmp_path):
    config = resolve(StudyConfig("bouncy_balls", strategies=("autoreg",), T=60, checkpoint="a.pt"))
    assert (config.T, config.obs_length, config.out) == (60, 10, "results/study/bouncy_balls")
    file = tmp_path / "mine.json"
    values = json.loads((PRESETS / "bouncy_balls.json").read_text())
    file.write_text(json.dumps(values | {"checkpoint": "b.pt", "T": 30}))
    config = resolve(StudyConfig(str(file), step_size=2))
    assert (config.T, config.step_size, config.checkpoint) == (30, 2, "b.pt")
    assert config.out == "results/study/mine"


def test_a_file_that_says_too_little_or_something_unknown_is_refused(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"dataset": "bouncy_balls"}')
    with pytest.raises(ValueError, match="mine.json does not say T: add it, or give --T"):
        resolve(StudyConfig(str(file)))
    file.write_text('{"vidoes": 4}')
    with pytest.raises(
        ValueError, match="mine.json: vidoes is nothing that the file of a study says"
    ):
        resolve(StudyConfig(str(file)))
    file.write_text('{"seed": 5}')  # which would hold for nothing
    with pytest.raises(ValueError, match="seed is nothing .*--seed on the command line"):
        resolve(StudyConfig(str(file)))
    with pytest.raises(FileNotFoundError, match="minerl: no such study: choose from bouncy_balls"):
        resolve(StudyConfig("minerl"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strategies": ("gibbs",)}, "--strategies gibbs"),
        ({"strategies": ("goal-directed-autoreg",), "step_size": 2}, "--strategies goal-directed"),
        ({"strategies": ("autoreg", "autoreg")}, "two of them are autoreg_8_4_100_10: drop one"),
        ({"strategies": ("autoreg --eta 1",)}, "--eta 1"),
        ({"strategies": ("autoreg --guidance 2",)}, "give options of the strategy alone"),
        ({"step_size": 10}, "--step_size 10 is illegal"),
        ({"modes": ("mse",)}, "--modes 'mse' is unknown"),
    ],
)
def test_impossible_studies_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(StudyConfig("bouncy_balls", checkpoint="a.pt", **options))


def test_one_strategy_with_different_options_has_arms_that_say_so(config):
    config = dataclasses.replace(config, strategies=("autoreg", RECALL, f"{RECALL} --recall_gap 9"))
    names = [arm.name for arm in arms(config)]
    assert names == ["autoreg", "recall-autoreg_recent1", "recall-autoreg_recent1_gap9"]
    assert [arm.folder for arm in arms(config)] == [f"{name}_4_2_64_60" for name in names]


# ---------------------------------------------------------------- running


@pytest.mark.slow
def test_a_whole_study_runs_once_and_reports_what_it_found(config, ran):
    config = dataclasses.replace(config, T=120)  # the laps of these videos end there, or before
    study.run(config, run_script=ran)
    assert len(ran) == len(study.commands(config)) == 8
    report = study_report.write_report(config).read_text()
    assert "scripts/video_nll.py" in report and "--stratified" in report
    first, arm = arms(config)
    bits, of_first = (
        np.load(study.eval_dir(config, a) / f"elbos/elbo_{video}.npy").sum() / (60 * 3 * 32**2)
        for a in (arm, first)
        for video in [bound_video(config)]
    )
    assert f"| {of_first:.4g}, n = 1 |" in report and f"| {bits:.4g}, n = 1 |" in report
    values = read_table(study.table_path(config, first))["lap_psnr"]
    assert f"| autoreg | samples | {summary(values[..., 0])}" in report
    other = read_table(study.table_path(config, arm))["lap_psnr"]
    difference = mean_interval((other[..., 0] - values[..., 0]).ravel())
    assert f"| recall-autoreg | samples | {summary(other[..., 0])} ({difference:+})" in report
    assert "| - | last observed frame | " in report and "| - | one period earlier | inf" in report

    study.run(config, run_script=ran)
    pictures = ["video_plot.py", "video_make_gif.py", "video_report.py"]
    assert ran[8:] == pictures, "made anew, of whatever is there by now"


def bound_video(config: StudyConfig) -> str:
    """The one video whose bound was estimated, as its file names it."""
    (path,) = (study.eval_dir(config, arms(config)[0]) / "elbos").iterdir()
    return path.stem.removeprefix("elbo_")


def summary(values: np.ndarray) -> str:
    return metric_tables.plus_minus(metric_tables.summarise(values))


@pytest.mark.slow
def test_only_chosen_commands_run_each_with_a_record_of_its_own(config, ran):
    study.run(config, ["sample.*"], run_script=ran)
    assert ran == ["video_sample.py"] * 2
    records = sorted(path.name for path in Path(config.out, "steps").iterdir())
    assert records == ["sample.autoreg.json", "sample.recall-autoreg.json"]
    report = study_report.write_report(config).read_text()
    times = re.findall(r"autoreg \| - \| - \| (\S+) \|", report)
    assert len(times) == 2 and all(float(seconds) >= 0 for seconds in times)
    with pytest.raises(ValueError, match="--only 'sampel.*' matches no command"):
        study.run(config, ["sampel.*"], run_script=ran)


def test_a_command_without_its_result_runs_again_and_another_checkpoint_is_refused(config, ran):
    only = ["sample.autoreg"]
    study.run(config, only, run_script=ran)
    sample = study.eval_dir(config, arms(config)[0]) / "samples"
    sample.rename(sample.with_name("moved"))
    study.run(config, only, run_script=ran)
    assert len(ran) == 2
    make_checkpoint(Path(config.checkpoint), "maze_laps", image_size=32, T=240, lr=0.5)
    with pytest.raises(ValueError, match="another checkpoint .*: give another --out"):
        study.run(config, only, run_script=ran)


def test_more_videos_add_to_the_time_of_those_that_are_there(config, ran):
    only, name = ["sample.autoreg"], "sample.autoreg"
    study.run(dataclasses.replace(config, num_videos=1), only, run_script=ran)
    path = Path(config.out, "steps", f"{name}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": [1000.0]}))
    study.run(config, only, run_script=ran)
    assert len(ran) == 2
    assert 500 < float(study.command_time(config, name, per=2)) < 560


def test_samples_of_more_videos_are_refused(config, ran):
    eval_dir = EvalDir(study.eval_dir(config, arms(config)[0]))
    for video in range(config.num_videos + 1):
        eval_dir.save_sample(video, 0, np.zeros((config.T, 3, 32, 32), np.uint8))
    with pytest.raises(ValueError, match="samples of more than .* videos"):
        study.run(config, run_script=ran)
    assert not ran


def test_the_time_of_all_sittings_of_a_command_counts(config):
    name = "sample.autoreg"
    result = study.chosen_commands(config, [name])[0].result

    def fail(*_):
        raise ValueError("killed")

    with pytest.raises(ValueError, match="killed"):
        study.run(config, [name], run_script=fail)
    assert study.command_time(config, name) == "-"
    study.run(config, [name], run_script=lambda *_: result.mkdir(parents=True))
    path = Path(config.out, "steps", f"{name}.json")
    record = json.loads(path.read_text())
    assert record["sittings"] == len(record["seconds"]) == 2
    # A process that is killed outright leaves a sitting without its time.
    path.write_text(json.dumps(record | {"sittings": 3, "seconds": [2.0, 4.0]}))
    assert study.command_time(config, name, per=2) == ">3.0"


def test_the_wrong_surroundings_are_refused(config, ran, monkeypatch):
    make_checkpoint(Path(config.checkpoint), "bouncy_balls")
    with pytest.raises(ValueError, match="trained on bouncy_balls, not on maze_laps"):
        study.run(config, run_script=ran)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    with pytest.raises(ValueError, match="SLURM_ARRAY_TASK_ID"):
        study.run(config, run_script=ran)
    assert not ran


def test_the_script_lists_commands_and_runs_none(config, capsys):
    arguments = ["maze_laps", "--list", "--only", "gif*"]
    load_script("scripts/video_study.py").main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [["gif", "-", "python"]]
    assert CHECKPOINT in load_and_list("maze_laps", capsys)
    assert not Path("results").exists()


def load_and_list(preset: str, capsys) -> str:
    load_script("scripts/video_study.py").main([preset, "--list"])
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_script_runs_a_command_in_a_process_of_its_own(config):
    only = ["--only", "sample*"]
    sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    options = ["--strategies", "autoreg", "--timesteps", "2", "--num_samples", "1"]
    arguments = ["maze_laps", "--out", "study", *sizes, *options, *only]
    done = helpers.run_script("video_study.py", *arguments, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert "$ python scripts/video_sample.py checkpoints/pretrained" in done.stderr
    assert len(list(Path("study").glob("autoreg*/samples/*.npy"))) == SIZES["num_videos"]


def test_a_block_in_place_of_a_script_shows_and_records_its_command(caplog):
    caplog.set_level("INFO")
    before = list(sys.argv)
    with pytest.raises(KeyError), in_place_of("video_plot.py", ["--eval_dir", "a b"]):
        assert sys.argv == ["scripts/video_plot.py", "--eval_dir", "a b"]
        raise KeyError
    assert sys.argv == before
    assert "$ python scripts/video_plot.py --eval_dir 'a b'" in caplog.text


@pytest.mark.slow
def test_a_script_that_fails_is_named(config, capfd):
    folder = helpers.ROOT / "scripts"
    with pytest.raises(ValueError, match="scripts/video_plot.py ended with exit code 1"):
        run_script(folder, "video_plot.py", ["--eval_dir", "nowhere"])
    assert "video_plot.py: error: nowhere holds no metrics" in capfd.readouterr().err


# ---------------------------------------------------------------- the report


def test_scores_stand_beside_their_paired_difference_from_the_first_strategy(config):
    info = {"metrics": {"psnr": {"mean": 20.0, "standard_error": 0.5}}}
    floor = {"value": 5, "shared": 3, "n": 2}
    info["metrics"]["fvd"] = {"mean": 7.0, "standard_error": None, "floor": floor}
    first, other = arms(config)
    found = Difference("psnr", first.folder, other.folder, 2, Interval(1.5, 0.5, 2.5))
    differences = {("psnr", "", other.folder): found}
    asked = dataclasses.replace(config, modes=("psnr", "fvd"), bound_videos=0)
    table = study_report.score_table(asked, {first: info, other: info}, differences)
    assert table.splitlines()[2:] == [
        "| autoreg | 20.00 ± 0.50 | 7 | - |",
        "| recall-autoreg | 20.00 ± 0.50 (+1.5 [+0.5, +2.5]) | 7 | - |",
        "| real against real | - | 3 (n = 2) | - |",
    ]


def test_several_numbers_of_a_sample_have_a_row_each_and_those_of_the_truth_one(config):
    names = ["samples", "own last lap", "one period earlier"]
    columns = [
        {
            "name": f"lap {lap}: {name}",
            "n": 2,
            "mean": 10.0 + lap,
            "standard_error": 1.0,
            "infinite": 0,
        }
        for name in names
        for lap in (2, 3)
    ]
    columns[-1] = columns[-1] | {"mean": None, "infinite": 4}
    info = {"metrics": {"lap_psnr": {"columns": columns}}}
    first, other = arms(config)
    found = Difference("lap_psnr", first.folder, other.folder, 1, Interval(2, 1, 3))
    differences = {("lap_psnr", "lap 3: samples", other.folder): found}
    table = study_report.column_table("lap_psnr", {first: info, other: info}, differences, 2)
    assert table.splitlines() == [
        "| strategy | of | LAP_PSNR (dB) lap 2 | LAP_PSNR (dB) lap 3 |",
        "| --- | --- | --- | --- |",
        "| autoreg | samples | 12.0 ± 1.0 | 13.0 ± 1.0 |",
        "| autoreg | own last lap | 12.0 ± 1.0 | 13.0 ± 1.0 |",
        "| recall-autoreg | samples | 12.0 ± 1.0 | 13.0 ± 1.0 (+2.0 [+1.0, +3.0], n = 1) |",
        "| recall-autoreg | own last lap | 12.0 ± 1.0 | 13.0 ± 1.0 |",
        "| - | one period earlier | 12.0 ± 1.0 | inf |",
    ]
    of_fewer = study_report.column_table("lap_psnr", {first: info}, {}, 3)
    assert "| autoreg | samples | 12.0 ± 1.0, n = 2 | 13.0 ± 1.0, n = 2 |" in of_fewer
    assert study_report.column_table("lap_psnr", {first: {}, other: {}}, {}, 2) == ""
