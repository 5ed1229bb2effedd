"""The study: its commands, what is run again, the classes of frames, the report."""

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
from improved_diffusion.data import paths, walks
from improved_diffusion.evaluation.metric_tables import ScoreTable, read_info, read_table
from improved_diffusion.sampling.results import EvalDir
from improved_diffusion.study import study, study_report
from improved_diffusion.study.commands import in_place_of, run_script
from improved_diffusion.study.options import StudyConfig
from test_readme import load_script

SIZES = {"obs_length": 4, "T": 10, "max_frames": 4, "step_size": 2, "num_videos": 2}


def make_mazes(root: Path, num_test: int = 3, T: int = 12) -> None:
    """A data set in the form of memory_mazes: walks there and back on a line, 64x64."""
    rng = np.random.default_rng(0)
    for folder in ("train", "test", "poses/train", "poses/test"):
        (root / folder).mkdir(parents=True)
    for index in range(num_test):
        x = 0.6 * np.minimum(np.arange(T), T - 1 - np.arange(T))
        poses = np.stack([x, np.zeros(T), np.full(T, index)], axis=1).astype(np.float32)
        for partition in ("train", "test"):
            frames = rng.integers(0, 255, (T, 64, 64, 3), dtype=np.uint8)
            np.save(root / partition / f"{index}.npy", frames)
            np.save(root / "poses" / partition / f"{index}.npy", poses)


@pytest.fixture
def config(tmp_path, monkeypatch) -> StudyConfig:
    """A tiny study of memory_mazes in a fresh current directory."""
    monkeypatch.chdir(tmp_path)
    make_mazes(tmp_path / "datasets/memory_mazes")
    make_checkpoint(tmp_path / "checkpoints/run/ema_0.9_latest.pt", "memory_mazes")
    return study.resolve(
        StudyConfig(
            dataset="memory_mazes",
            checkpoint="checkpoints/run/ema_0.9_latest.pt",
            strategies="autoreg,hierarchy-2",
            ddpm_strategies="autoreg",
            solver_steps=2,
            ddpm_steps=3,
            elbo_videos=1,
            elbo_respacing="2",
            modes=("psnr", "ssim"),
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


# ---------------------------------------------------------------- the commands


@pytest.mark.parametrize("dataset", study.PRESETS)
def test_every_command_of_a_preset_parses(dataset):
    commands = study.commands(study.resolve(StudyConfig(dataset=dataset)))
    assert len({command.name for command in commands}) == len(commands)
    for command in commands:
        script = f"scripts/{command.script}"
        load_script(script).create_argparser().parse_args(command.words)
        assert command.line == shlex.join(["python", script, *command.words])


def test_a_command_comes_after_what_it_needs_and_options_win_over_the_preset():
    config = study.resolve(StudyConfig(dataset="bouncy_balls", strategies="autoreg", T=60))
    assert (config.T, config.obs_length, config.out) == (60, 10, "results/study/bouncy_balls")
    names = [command.name for command in study.commands(config)]
    chain = "schedule.autoreg sample.dpmpp2m_20.autoreg_optimal fvd.dpmpp2m_20.optimal".split()
    assert sorted(chain, key=names.index) == chain
    first = names.index("sample.dpmpp2m_20.autoreg")
    assert first < names.index("scores.dpmpp2m_20") < names.index("plot.dpmpp2m_20")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dataset": "minerl"}, "'minerl' has no study: choose from memory_mazes, bouncy_balls"),
        ({"strategies": "gibbs"}, "--strategies gibbs"),
        ({"strategies": "goal-directed-autoreg", "step_size": 2}, "--strategies goal-directed"),
        ({"step_size": 10}, "--step_size 10 is illegal"),
        ({"modes": ("mse",)}, "--modes 'mse' is unknown"),
    ],
)
def test_impossible_studies_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        study.resolve(StudyConfig(**{"dataset": "memory_mazes"} | options))


# ---------------------------------------------------------------- running


@pytest.mark.slow
def test_a_whole_study_runs_once_and_reports_what_it_found(config, ran, monkeypatch):
    monkeypatch.setattr(walks, "GAP_FRAMES", 2)
    study.run(config, run_script=ran)
    assert len(ran) == len(study.commands(config)) == 13
    report = study_report.write_report(config).read_text()
    for row in ("dpmpp2m_2 | autoreg", "dpmpp2m_2 | hierarchy-2", "ddpm_3 | autoreg"):
        assert f"| {row} | " in report
    assert "scripts/video_nll.py" in report
    first, cell = study.cells(config)[:2]
    bits, of_first = (
        np.load(study.eval_dir(config, c) / "elbos/elbo_0002.npy").sum() / (6 * 3 * 32**2)
        for c in (cell, first)
    )
    assert f"| {of_first:.4g}, n = 1 |" in report
    assert f"| {bits:.4g} ({bits - of_first:+.4g}), n = 1 |" in report

    path = paths.metrics_path(study.eval_dir(config, cell), 2, 1, 10)
    values, info = read_table(path)["psnr"][:, 0], read_info(path)
    # The walk's 12 true frames stand at 0, 1 ... 5, 5 ... 0: the study sees frames 0 to 9, and
    # frames 8 and 9 return to the observed 3 and 2.
    columns = [info["frames"].index(frame) for frame in (8, 9)]
    row = re.search(
        r"returns to observed \| dpmpp2m_2 \| hierarchy-2 \| 4 \| 2 \| ([\d.]+)", report
    )
    assert float(row[1]) == pytest.approx(values[:, columns].mean(), rel=1e-3)

    study.run(config, run_script=ran)
    assert len(ran) == 13


@pytest.mark.slow
def test_only_chosen_commands_run_each_with_a_record_of_its_own(config, ran):
    study.run(config, ["sample.*.autoreg"], run_script=ran)
    assert ran == ["video_sample.py"] * 2
    records = sorted(path.name for path in Path(config.out, "steps").iterdir())
    assert records == ["sample.ddpm_3.autoreg.json", "sample.dpmpp2m_2.autoreg.json"]
    report = study_report.write_report(config).read_text()
    times = re.findall(r"\| autoreg \| - \| - \| - \| (\S+) \|", report)
    assert len(times) == 2 and all(float(seconds) >= 0 for seconds in times)
    with pytest.raises(ValueError, match="--only 'sampel.*' matches no command"):
        study.run(config, ["sampel.*"], run_script=ran)


def test_a_command_without_its_result_runs_again_and_another_checkpoint_is_refused(config, ran):
    only = ["sample.dpmpp2m_2.autoreg"]
    study.run(config, only, run_script=ran)
    sample = paths.sample_path(study.eval_dir(config, study.cells(config)[0]), 0, 0).parent
    sample.rename(sample.with_name("moved"))
    study.run(config, only, run_script=ran)
    assert len(ran) == 2
    make_checkpoint(Path(config.checkpoint), "memory_mazes", lr=0.5)
    with pytest.raises(ValueError, match="another checkpoint .*: give another --out"):
        study.run(config, only, run_script=ran)


def test_more_videos_add_to_the_time_of_those_that_are_there(config, ran):
    only, name = ["sample.dpmpp2m_2.autoreg"], "sample.dpmpp2m_2.autoreg"
    study.run(dataclasses.replace(config, num_videos=1), only, run_script=ran)
    path = Path(config.out, "steps", f"{name}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": [1000.0]}))
    study.run(config, only, run_script=ran)
    assert len(ran) == 2
    assert 500 < float(study.command_time(config, name, per=2)) < 560


def test_ddpm_is_compared_with_the_same_strategy_and_the_solver_with_its_first(config):
    cells = study.cells(dataclasses.replace(config, ddpm_strategies="autoreg,hierarchy-2"))
    auto, hierarchy, *ddpm = cells
    found = [study.reference(cells, cell) for cell in cells]
    assert {c.sampler for c in ddpm} == {"ddpm"} and found == [auto, auto, auto, hierarchy]
    assert study.reference(ddpm, ddpm[1]) == ddpm[0]


def test_samples_of_more_videos_are_refused(config, ran):
    eval_dir = EvalDir(study.eval_dir(config, study.cells(config)[0]))
    for video in range(config.num_videos + 1):
        eval_dir.save_sample(video, 0, np.zeros((config.T, 3, 32, 32), np.uint8))
    with pytest.raises(ValueError, match="samples of more than .* videos"):
        study.run(config, run_script=ran)
    assert not ran


def test_the_time_of_all_sittings_of_a_command_counts(config):
    name = "sample.dpmpp2m_2.autoreg"
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
    with pytest.raises(ValueError, match="trained on bouncy_balls, not on memory_mazes"):
        study.run(config, run_script=ran)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    with pytest.raises(ValueError, match="SLURM_ARRAY_TASK_ID"):
        study.run(config, run_script=ran)
    assert not ran


def test_the_script_lists_commands_and_runs_none(config, capsys):
    arguments = ["memory_mazes", "--checkpoint", config.checkpoint, "--list", "--only", "gif.ddpm*"]
    load_script("scripts/video_study.py").main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [["gif.ddpm_100", "-", "python"]]
    assert not Path("results").exists()


@pytest.mark.slow
def test_the_script_runs_a_command_in_a_process_of_its_own(config):
    only = ["--only", "sample.ddpm*"]
    sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    arguments = ["memory_mazes", "--checkpoint", config.checkpoint, "--out", "study", *sizes]
    options = ["--strategies", "autoreg", "--ddpm_strategies", "autoreg", "--ddpm_steps", "2"]
    done = helpers.run_script("video_study.py", *arguments, *options, *only, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert "$ python scripts/video_sample.py checkpoints/run" in done.stderr
    assert len(list(Path("study/ddpm_2").glob("autoreg*/samples/*.npy"))) == SIZES["num_videos"]


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


# ---------------------------------------------------------------- classes of frames


def test_near_poses_share_a_place_and_a_heading_modulo_a_turn():
    pose = np.array([1.0, 1.0, np.radians(179)])
    others = [
        ([1.0, 1.0, np.radians(-179)], True),  # two degrees away
        ([1.0, 1.0, np.radians(179) + 6 * np.pi], True),
        ([1.49, 1.0, np.radians(179)], True),
        ([1.0, 1.51, np.radians(179)], False),
        ([1.0, 1.0, np.radians(158)], False),
    ]
    near = study_report.near_poses(np.array([pose, *(other for other, _ in others)]))
    assert near[0, 0] and near[0, 1:].tolist() == [expected for _, expected in others]
    np.testing.assert_array_equal(near, near.T)


def test_frames_return_to_observed_ones_to_sampled_ones_or_to_none():
    x = np.arange(60.0)  # each frame at a place of its own
    x[30], x[45] = 3, 12  # back to an observed place, to a sampled one
    x[50] = 3  # to both kinds, 3 and 30: to an observed one
    x[51] = 40  # too soon after frame 40
    x[7] = 4  # observed itself
    classes = study_report.frame_classes(np.stack([x, 0 * x, 0 * x], axis=1), obs_length=10)
    where = {name: np.flatnonzero(frames).tolist() for name, frames in classes.items()}
    assert where["returns to observed"] == [30, 50]
    assert where["returns to sampled"] == [45]
    assert where["new"] == [i for i in range(10, 60) if i not in (30, 45, 50)]


# ---------------------------------------------------------------- the report


def test_scores_stand_beside_their_paired_difference_from_the_first_strategy(config):
    rng = np.random.default_rng(0)
    first = 20 + 5 * rng.normal(size=(2, 1, 6))
    second = first + np.array([1.0, 3.0])[:, None, None]  # videos differ more than strategies do
    cells = study.cells(config)
    info = {
        "metrics": {"fvd": {"mean": 7.0, "standard_error": None, "floor": {"value": 5, "n": 2}}}
    }
    scores = {
        cells[0]: ScoreTable({"psnr": first, "fvd": np.array([7.0])}, info),
        cells[1]: ScoreTable({"psnr": second}, {}),
        cells[2]: ScoreTable({"psnr": second}, {}),
    }
    lines = study_report.score_table(
        study.resolve(StudyConfig("memory_mazes", modes=("psnr", "fvd"))), scores
    ).splitlines()
    values = [line.split(" | ") for line in lines[2:]]
    assert values[0][3] == "7" and values[1][3] == "-"
    assert values[1][2].endswith(" (+2.0 ± 1.0)")
    assert values[2][2] == values[1][2]  # DDPM beside the same strategy, with the same scores here
    assert values[3][:4] == ["| true videos", "real against real", "-", "5 (n = 2)"]


def test_a_distance_stands_beside_its_paired_difference_with_an_interval(config):
    cells = study.cells(config)[:2]
    of_halves = np.random.default_rng(0).normal(10, 1, 50)
    tables = {}
    for cell, shift in zip(cells, (0.0, 5.0), strict=True):
        interval = {"low": 8.0, "high": 12.0, "of_halves": (of_halves + shift).tolist()}
        row = {"n": 8, "mean": 10 + shift, "standard_error": None, "interval": interval}
        tables[cell] = ScoreTable({"fvd": np.array([10 + shift])}, {"metrics": {"fvd": row}})
    lines = study_report.score_table(
        study.resolve(StudyConfig("memory_mazes", modes=("fvd",))), tables
    ).splitlines()
    first, second = (line.split(" | ")[2] for line in lines[2:])
    assert first == "10.0 [8.0, 12.0]" and second == "15.0 [8.0, 12.0] (+5.0000 [+5.0000, +5.0000])"
