"""Scoring: the documented pickle, its cache, array jobs, comparisons, and what is refused."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import make_folder_dataset, run_script
from improved_diffusion import frechet_video_distance
from improved_diffusion.data import file_lock
from improved_diffusion.data.video_datasets import get_test_dataset
from improved_diffusion.evaluation import captions, gallery, metric_tables, metrics
from improved_diffusion.evaluation import evaluate as evaluation
from improved_diffusion.evaluation import features as extractors
from improved_diffusion.evaluation.cache import Cache
from improved_diffusion.evaluation.measurements import Measurements, Workshop
from improved_diffusion.evaluation.options import EvalConfig, FvdConfig, GifConfig
from improved_diffusion.evaluation.scored_set import ScoredSet
from improved_diffusion.registry import FRAME_METRICS
from improved_diffusion.sampling.results import EvalDir
from improved_diffusion.script_util import config_from_args

T, OBSERVED, NUM_VIDEOS = 12, 3, 3


class Moments(torch.nn.Module):
    """Stands for I3D in a TorchScript file: some means of each video."""

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool = False):
        means = torch.cat([x.mean(dim=(2, 3, 4)), x[:, :, -1].mean(dim=(2, 3))], dim=1)
        return torch.cat([means, torch.zeros(x.shape[0], 394)], dim=1)


@pytest.fixture(scope="module")
def i3d(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "i3d_torchscript.pt"
    torch.jit.script(Moments()).save(str(path))
    return str(path)


@pytest.fixture
def eval_dir(tmp_path, monkeypatch) -> EvalDir:
    """Samples of 3 videos, 2 each: the truth with noise, observed frames exact. No weights."""
    monkeypatch.setenv("METRIC_WEIGHTS_DIR", str(tmp_path / "no-weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-weights"))
    make_folder_dataset(tmp_path / "data", T=T, num_train=5)
    return make_eval_dir(tmp_path, "autoreg")


def make_eval_dir(tmp_path: Path, name: str, num_videos: int = NUM_VIDEOS, **stored) -> EvalDir:
    directory = EvalDir(tmp_path / "results" / name)
    dataset = str(tmp_path / "data")
    directory.write_configs(
        {"image_size": 32, "dataset": dataset},
        {
            "T": T,
            "obs_length": OBSERVED,
            "observed_frames": list(range(OBSERVED)),
            "dataset": dataset,
            "dataset_partition": "test",
        }
        | stored,
    )
    for video in range(num_videos):
        for sample in range(2):
            directory.save_sample(video, sample, noisy(tmp_path, video, sample))
    return directory


def noisy(tmp_path: Path, video: int, sample: int) -> np.ndarray:
    frames = truth(tmp_path, video).astype(int)
    noise = np.random.default_rng([video, sample]).integers(-9, 20, frames[OBSERVED:].shape)
    frames[OBSERVED:] += noise
    return np.clip(frames, 0, 255).astype(np.uint8)


def truth(tmp_path: Path, video: int, partition: str = "test") -> np.ndarray:
    return np.load(tmp_path / f"data/{partition}/{video}.npy").transpose(0, 3, 1, 2)


def outcome(*folders: EvalDir, **options) -> evaluation.Outcome:
    return evaluation.evaluate(configure(*folders, **options))


def configure(*folders: EvalDir, **options) -> EvalConfig:
    """The options of an evaluation, those that metrics own among them, by their flags' names."""
    paths = tuple(str(folder.path) for folder in folders)
    return config_from_args(EvalConfig, {"eval_dir": paths, "modes": ("psnr",)} | options)


def evaluate(eval_dir: EvalDir, **options) -> dict[str, np.ndarray]:
    result = outcome(eval_dir, **options)
    result.raise_failures()
    (path,) = result.tables
    return metric_tables.read_table(path)


def info(eval_dir: EvalDir, name: str = "metrics_3-2-12.json") -> dict:
    return json.loads((eval_dir.path / name).read_text())


def count_calls(monkeypatch, mode: str) -> list[int]:
    """Replaces a metric by one that takes down its calls."""
    calls: list[int] = []
    original = FRAME_METRICS[mode].compute

    def counting(self, samples, truth):
        calls.append(len(samples))
        return original(self, samples, truth)

    monkeypatch.setattr(FRAME_METRICS[mode], "compute", counting)
    return calls


def count_features(monkeypatch) -> list[tuple[int, ...]]:
    calls: list[tuple[int, ...]] = []

    def counting(videos, **options):
        calls.append(videos.shape)
        return frechet_video_distance.video_features(videos, **options)

    monkeypatch.setattr(extractors, "video_features", counting)
    return calls


# ---------------------------------------------------------------- the table


def test_the_pickle_has_the_documented_name_and_shape(eval_dir, tmp_path):
    table = evaluate(eval_dir, modes=("psnr", "ssim"))
    assert (eval_dir.path / "metrics_3-2-12.pkl").exists()
    assert set(table) == {"psnr", "ssim"}
    assert table["psnr"].shape == table["ssim"].shape == (3, 2, T - OBSERVED)
    assert table["psnr"].dtype == np.float64
    expected = metrics.psnr(noisy(tmp_path, 2, 1)[OBSERVED:], truth(tmp_path, 2)[OBSERVED:])
    np.testing.assert_allclose(table["psnr"][2, 1], expected)
    beside = info(eval_dir)
    assert beside["videos"] == [0, 1, 2] and beside["samples"] == [0, 1]
    assert beside["frames"] == list(range(OBSERVED, T)) and beside["T"] == T
    row = beside["metrics"]["psnr"]
    per_video = table["psnr"].mean(axis=(1, 2))
    assert row["n"] == 3 and row["mean"] == pytest.approx(per_video.mean())
    assert row["standard_error"] == pytest.approx(per_video.std(ddof=1) / np.sqrt(3))


def test_fvd_and_kvd_are_those_of_whole_videos_one_number_per_sample(eval_dir, tmp_path, i3d):
    table = evaluate(eval_dir, modes=("fvd", "kvd"), i3d_weights=i3d)
    real = features([truth(tmp_path, video) for video in range(3)], i3d)
    for sample in range(2):
        fake = features([noisy(tmp_path, video, sample) for video in range(3)], i3d)
        expected = frechet_video_distance.frechet_distance(fake, real)
        assert table["fvd"][sample] == pytest.approx(expected) and expected > 0
        kernel = frechet_video_distance.kernel_distance(fake, real)
        assert table["kvd"][sample] == pytest.approx(kernel)
    assert table["fvd"].shape == (2,) and table["fvd"][0] != table["fvd"][1]
    row = info(eval_dir)["metrics"]["fvd"]
    assert row["n"] == 3 and row["mean"] == pytest.approx(table["fvd"].mean())
    assert row["settings"]["backend"] == "torch" and row["settings"]["resize"] == "legacy"
    assert len(row["settings"]["weights_sha256"]) == 64


def features(videos: list[np.ndarray], i3d: str, **options) -> np.ndarray:
    return frechet_video_distance.video_features(np.stack(videos), weights=i3d, **options)


def test_videos_and_samples_that_were_scored_are_named_in_array_order(eval_dir, tmp_path):
    for sample in (0, 1):
        (eval_dir.path / f"samples/sample_0001-{sample}.npy").unlink()
    (eval_dir.path / "samples/sample_0002-0.npy").unlink()
    table = evaluate(eval_dir)
    expected = metrics.psnr(noisy(tmp_path, 2, 1)[OBSERVED:], truth(tmp_path, 2)[OBSERVED:])
    np.testing.assert_allclose(table["psnr"][1, 0], expected)
    beside = info(eval_dir, "metrics_2-1-12.json")
    assert beside["videos"] == [0, 2] and beside["samples"] == [1]


def test_a_shorter_T_and_obs_length_can_be_given(eval_dir):
    assert evaluate(eval_dir, obs_length=5)["psnr"].shape == (3, 2, T - 5)
    assert evaluate(eval_dir, T=8)["psnr"].shape == (3, 2, 8 - OBSERVED)
    assert (eval_dir.path / "metrics_3-2-8.pkl").exists()


def test_frames_beyond_the_truth_are_left_out(eval_dir, tmp_path, caplog, i3d):
    caplog.set_level("INFO")
    longer = make_eval_dir(tmp_path, "longer", num_videos=0, T=T + 2)
    for video in range(2):
        frames = noisy(tmp_path, video, 0)
        longer.save_sample(video, 0, np.concatenate([frames, frames[:2]]))
    table = evaluate(longer, modes=("psnr", "fvd"), i3d_weights=i3d)
    assert table["psnr"].shape == (2, 1, T - OBSERVED)
    fake = features([noisy(tmp_path, video, 0) for video in range(2)], i3d)
    real = features([truth(tmp_path, video) for video in range(2)], i3d)
    expected = frechet_video_distance.frechet_distance(fake, real)
    assert table["fvd"][0] == pytest.approx(expected)
    assert "scoring the 12 of 14 frames" in caplog.text
    assert info(longer, "metrics_2-1-14.json")["frames_with_truth"] == T


# ---------------------------------------------------------------- the cache


def test_a_second_run_computes_nothing_and_a_new_sample_only_itself(
    eval_dir, tmp_path, monkeypatch, i3d
):
    frames, videos = count_calls(monkeypatch, "psnr"), count_features(monkeypatch)
    options = {"modes": ("psnr", "fvd", "kvd"), "i3d_weights": i3d}
    before = evaluate(eval_dir, **options)
    assert len(frames) == 6 and len(videos) == 6 + 3
    evaluate(eval_dir, **options)
    assert len(frames) == 6 and len(videos) == 9
    eval_dir.save_sample(1, 0, noisy(tmp_path, 1, 7))
    after = evaluate(eval_dir, **options)
    assert len(frames) == 7 and len(videos) == 10
    changed = (before["psnr"] != after["psnr"]).any(axis=-1)
    assert changed.sum() == 1 and changed[1, 0]
    assert before["fvd"][0] != after["fvd"][0] and before["fvd"][1] == after["fvd"][1]


def change_prediction(tmp_path: Path) -> None:
    """Another truth of video 0, beyond the frames that its samples observe."""
    path = tmp_path / "data/test/0.npy"
    frames = np.load(path)
    frames[OBSERVED:] = 255 - frames[OBSERVED:]
    np.save(path, frames)


def test_another_truth_is_another_result(eval_dir, tmp_path, i3d):
    options = {"modes": ("psnr", "fvd"), "i3d_weights": i3d}
    before = evaluate(eval_dir, **options)
    change_prediction(tmp_path)
    after = evaluate(eval_dir, **options)
    assert (before["psnr"][0] != after["psnr"][0]).all() and (before["fvd"] != after["fvd"]).all()
    np.testing.assert_array_equal(before["psnr"][1:], after["psnr"][1:])


def test_one_video_is_in_memory_at_a_time(eval_dir, monkeypatch, i3d):
    videos = count_features(monkeypatch)
    evaluate(eval_dir, modes=("fvd",), i3d_weights=i3d, batch_size=3)
    assert set(videos) == {(1, T, 3, 32, 32)}


@pytest.mark.parametrize(
    "mode, change",
    [
        ("ssim", {"ssim_data_range": 2.0}),
        ("fvd", {"resize": "half-pixel"}),
        ("kvd", {"T": 10}),
        ("psnr", {"obs_length": 4}),
    ],
)
def test_values_of_other_settings_are_never_taken_from_the_cache(eval_dir, i3d, mode, change):
    options = {"modes": (mode,), "i3d_weights": i3d}
    first = evaluate(eval_dir, **options)[mode]
    other = evaluate(eval_dir, **options, **change)[mode]
    again = evaluate(eval_dir, **options)[mode]
    assert other.shape != first.shape or (other != first).any()
    np.testing.assert_array_equal(first, again)


def test_another_weights_file_computes_features_anew(eval_dir, tmp_path, monkeypatch, i3d):
    videos = count_features(monkeypatch)
    evaluate(eval_dir, modes=("fvd",), i3d_weights=i3d)
    other = tmp_path / "other.pt"
    shutil.copy(i3d, other)
    evaluate(eval_dir, modes=("fvd",), i3d_weights=str(other))
    assert len(videos) == 9, "the same content under another name is the same network"

    class Shifted(Moments):
        def forward(
            self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool = False
        ):
            return torch.ones(x.shape[0], 400) * x.mean(dim=(1, 2, 3, 4))[:, None]

    torch.jit.script(Shifted()).save(str(other))
    evaluate(eval_dir, modes=("fvd",), i3d_weights=str(other))
    assert len(videos) == 18


def test_a_broken_cache_file_is_computed_again(eval_dir):
    before = evaluate(eval_dir)["psnr"]
    for path in (eval_dir.path / "metrics_cache").iterdir():
        path.write_bytes(path.read_bytes()[:-8])
    np.testing.assert_array_equal(evaluate(eval_dir)["psnr"], before)


def test_metrics_are_added_to_those_that_are_there_but_not_to_stale_ones(eval_dir, tmp_path, i3d):
    assert set(evaluate(eval_dir, modes=("psnr", "ssim"))) == {"psnr", "ssim"}
    added = evaluate(eval_dir, modes=("fvd",), i3d_weights=i3d)
    assert set(added) == {"psnr", "ssim", "fvd"}
    kept = evaluate(eval_dir, modes=("psnr",))  # the file of I3D need not be there any more
    assert set(kept) == {"psnr", "ssim", "fvd"}
    eval_dir.save_sample(0, 0, noisy(tmp_path, 0, 9))
    assert set(evaluate(eval_dir, modes=("ssim",))) == {"ssim"}


def test_values_are_looked_up_in_any_order(eval_dir, tmp_path, i3d):
    """Nothing must be called before a lookup: each video's hash is taken when it is needed."""
    options = {"modes": ("psnr", "fvd"), "i3d_weights": i3d}
    config = configure(eval_dir, **options)
    table = evaluate(eval_dir, **options)
    ready, _ = Workshop(config).metrics()
    measured = Measurements(
        ScoredSet.resolve(config, eval_dir.path),
        ready,
        Cache([eval_dir.path / "metrics_cache"]),
        floor=False,
    )
    for name in ("fvd", "psnr"):
        found = measured.values(name, ready[name].settings)
        np.testing.assert_array_equal(found, table[name])
    np.save(eval_dir.path / "samples/sample_0001-0.npy", noisy(tmp_path, 1, 7))
    measured.compute(2)
    assert measured.values("psnr", {}) is not None, "it is about the videos as they were read"
    measured.compute(1)
    changed = (measured.values("psnr", {}) != table["psnr"]).any(axis=-1)
    assert changed.sum() == 1 and changed[1, 0]


# ---------------------------------------------------------------- array jobs


def test_array_tasks_fill_the_cache_and_the_last_one_writes_the_table(
    eval_dir, monkeypatch, caplog, i3d
):
    caplog.set_level("INFO")
    frames, videos = count_calls(monkeypatch, "psnr"), count_features(monkeypatch)
    options = {"modes": ("psnr", "fvd"), "i3d_weights": i3d, "batch_size": 1, "floor": True}
    for task, written in (("2", 0), ("0", 0), ("3", 0), ("1", 1)):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        assert len(outcome(eval_dir, **options).tables) == written
    assert "metrics_3-2-12.pkl waits for --array=0,1" in caplog.text
    assert "SLURM_ARRAY_TASK_ID=3 is past the last batch" in caplog.text
    assert len(frames) == 6 and len(videos) == 6 + 3 + 3 + 3
    array = metric_tables.read_table(eval_dir.path / "metrics_3-2-12.pkl")
    array_info = info(eval_dir)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    shutil.rmtree(eval_dir.path / "metrics_cache")
    alone = evaluate(eval_dir, **options)
    for mode in ("psnr", "fvd"):
        np.testing.assert_array_equal(array[mode], alone[mode])
    assert info(eval_dir) == array_info


def test_an_array_task_does_not_take_results_of_samples_made_again(
    eval_dir, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    evaluate(eval_dir)
    (eval_dir.path / "metrics_3-2-12.pkl").unlink()
    np.save(eval_dir.path / "samples/sample_0000-0.npy", noisy(tmp_path, 0, 9))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert not outcome(eval_dir, batch_size=1).tables
    assert "made again since" in caplog.text
    assert not (eval_dir.path / "metrics_3-2-12.pkl").exists()


# ---------------------------------------------------------------- floor and comparison


def test_the_floor_is_the_distance_between_disjoint_real_videos(eval_dir, tmp_path, i3d):
    evaluate(eval_dir, modes=("fvd",), i3d_weights=i3d, floor=True)
    row = info(eval_dir)["metrics"]["fvd"]
    order = np.random.RandomState(0).permutation(5)[:3]
    others = [truth(tmp_path, video, "train") for video in order]
    real = [truth(tmp_path, video) for video in range(3)]
    expected = frechet_video_distance.frechet_distance(features(real, i3d), features(others, i3d))
    assert row["floor"]["value"] == pytest.approx(expected) and row["floor"]["n"] == 3
    evaluate(eval_dir, modes=("fvd",), i3d_weights=i3d)
    assert info(eval_dir)["metrics"]["fvd"]["floor"] == row["floor"], "it stays"
    evaluate(eval_dir, modes=("fvd",), i3d_weights=i3d, resize="half-pixel")
    assert "floor" not in info(eval_dir)["metrics"]["fvd"], "it is of another resize"
    evaluate(eval_dir, modes=("fvd",), i3d_weights=i3d, floor=True)
    change_prediction(tmp_path)
    evaluate(eval_dir, modes=("fvd",), i3d_weights=i3d)
    assert "floor" not in info(eval_dir)["metrics"]["fvd"], "it is of another truth"


def test_real_against_real_is_also_told_with_the_observed_frames_shared(eval_dir, tmp_path, i3d):
    result = outcome(eval_dir, modes=("fvd",), i3d_weights=i3d, floor=True)
    real = [truth(tmp_path, video) for video in range(3)]
    others = [truth(tmp_path, v, "train") for v in np.random.RandomState(0).permutation(5)[:3]]
    for frames, counterpart in zip(others, real, strict=True):
        frames[:OBSERVED] = counterpart[:OBSERVED]
    expected = frechet_video_distance.frechet_distance(features(real, i3d), features(others, i3d))
    row = info(eval_dir)["metrics"]["fvd"]["floor"]
    assert row["shared"] == pytest.approx(expected) and row["shared"] != row["value"]
    shown = evaluation.format_table(result.tables[0])
    assert "fvd floor" not in shown
    assert f"fvd real against real, observed frames shared: {expected:.4g}"[:-1] in shown


def test_fewer_videos_in_the_other_partition_make_a_smaller_floor(eval_dir, tmp_path, i3d):
    for video in (0, 2, 3):
        (tmp_path / f"data/train/{video}.npy").unlink()
    result = outcome(eval_dir, modes=("fvd",), i3d_weights=i3d, floor=True)
    assert info(eval_dir)["metrics"]["fvd"]["floor"]["n"] == 2
    shown = evaluation.format_table(result.tables[0])
    assert (
        "fvd real against real: " in shown
        and "between 2 true videos and 2 of the train partition" in shown
    )
    (tmp_path / "data/train/1.npy").unlink()
    with pytest.raises(ValueError, match="--floor: .*no 2 videos of 12 frames"):
        outcome(eval_dir, modes=("fvd",), i3d_weights=i3d, floor=True)


def test_the_floor_of_no_distance_is_refused(eval_dir):
    with pytest.raises(ValueError, match="--floor goes with --modes fvd or kvd"):
        outcome(eval_dir, floor=True)


def test_several_directories_share_the_truth_and_one_table(
    eval_dir, tmp_path, monkeypatch, i3d, capsys
):
    other = make_eval_dir(tmp_path, "hierarchy-2")
    for video in range(3):
        for sample in range(2):
            other.save_sample(video, sample, noisy(tmp_path, video, 5 + sample))
    videos = count_features(monkeypatch)
    evaluation.run(configure(eval_dir, other, modes=("psnr", "fvd"), i3d_weights=i3d))
    assert len(videos) == 6 + 6 + 3, "the truth's features are computed once"
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:3] for row in rows[1:5]] == [
        ["autoreg", "fvd", "3"],
        ["autoreg", "psnr", "3"],
        ["hierarchy-2", "fvd", "3"],
        ["hierarchy-2", "psnr", "3"],
    ]


def test_directories_of_other_videos_or_lengths_are_not_compared_silently(
    eval_dir, tmp_path, monkeypatch, caplog, capsys
):
    fewer = make_eval_dir(tmp_path, "fewer", num_videos=2)
    calls = count_calls(monkeypatch, "psnr")
    with pytest.raises(
        ValueError, match=r"differ in videos \(\[0, 1, 2\] and \[0, 1\]\).*--allow_d"
    ):
        outcome(eval_dir, fewer)
    assert not calls, "refused before anything is computed"
    evaluation.run(configure(eval_dir, fewer, allow_differences=True))
    assert "differ in videos" in caplog.text and "fewer" in capsys.readouterr().out


def test_settings_are_compared_with_the_first_table_that_has_the_metric():
    infos = {"a": {"metrics": {}}} | {
        name: {"metrics": {"ssim": {"settings": {"data_range": value}}}}
        for name, value in (("b", 1.0), ("c", 2.0))
    }
    assert metric_tables.differences(infos) == ["b and c differ in ssim data_range (1.0 and 2.0)"]


@pytest.mark.parametrize("change", [{"resize": "half-pixel"}, {"ssim_data_range": 2.0}])
def test_metrics_of_other_settings_are_not_compared_silently(eval_dir, tmp_path, i3d, change):
    """They are in the tables from earlier runs, and would be printed side by side."""
    other = make_eval_dir(tmp_path, "other")
    options = {"modes": ("fvd", "ssim"), "i3d_weights": i3d}
    evaluate(eval_dir, **options)
    evaluate(other, **options, **change)
    (name,) = [key.removeprefix("ssim_") for key in change]
    with pytest.raises(ValueError, match=f"differ in (fvd|ssim) {name}"):
        evaluation.run(configure(eval_dir, other))


# ---------------------------------------------------------------- missing weights


def test_without_weights_the_other_metrics_are_saved_and_one_line_says_what_is_missing(
    eval_dir, tmp_path
):
    modes = ("lpips", "psnr", "fvd", "ssim", "kvd")
    done = run_script("video_eval.py", "--eval_dir", eval_dir.path, "--modes", *modes, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (error,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "lpips: no weights for LPIPS" in error and "fvd, kvd: no weights for FVD" in error
    assert error.count("fetch_metric_weights.py") == 2
    assert set(metric_tables.read_table(eval_dir.path / "metrics_3-2-12.pkl")) == {"psnr", "ssim"}
    assert {line.split()[0] for line in done.stdout.splitlines()[1:3]} == {"psnr", "ssim"}


def test_videos_too_short_for_one_metric_do_not_keep_the_others_from_it(eval_dir, i3d):
    result = outcome(eval_dir, modes=("fvd", "psnr", "kvd"), i3d_weights=i3d, T=9)
    assert set(metric_tables.read_table(*result.tables)) == {"psnr"}
    with pytest.raises(ValueError, match="not computed: fvd, kvd: .*at least 10 frames$"):
        result.raise_failures()


def test_one_video_has_no_distance_but_other_metrics(eval_dir, tmp_path, i3d):
    one = make_eval_dir(tmp_path, "one", num_videos=1)
    result = outcome(one, modes=("fvd", "psnr"), i3d_weights=i3d)
    assert set(metric_tables.read_table(*result.tables)) == {"psnr"}
    with pytest.raises(ValueError, match="not computed: fvd: .*n >= 2 videos"):
        result.raise_failures()


def test_no_table_is_written_where_nothing_can_be_computed(eval_dir):
    result = outcome(eval_dir, modes=("fvd", "lpips"))
    assert not result.tables and set(result.failures) == {"fvd", "lpips"}
    assert not list(eval_dir.path.glob("metrics_*"))


def test_lpips_is_cached_by_the_content_of_its_weights(eval_dir, tmp_path, monkeypatch):
    used = []

    def fake(samples, truth, *, device, weights):
        used.append(weights)
        return np.zeros(len(samples))

    monkeypatch.setattr(metrics, "lpips", fake)
    weights = tmp_path / "alexnet.pth"
    for content, calls in ((b"one", 6), (b"one", 6), (b"two", 12)):
        weights.write_bytes(content)
        evaluate(eval_dir, modes=("lpips",), lpips_weights=str(weights))
        assert len(used) == calls
    assert set(used) == {str(weights)}


@pytest.mark.weights
def test_the_fetched_weights_score_the_metrics_that_need_them(tmp_path):
    make_folder_dataset(tmp_path / "data", T=T)
    directory = make_eval_dir(tmp_path, "autoreg", num_videos=2)
    table = evaluate(directory, modes=("lpips", "fvd", "kvd"), num_samples=1)
    assert table["lpips"].shape == (2, 1, T - OBSERVED) and (table["lpips"] > 0).all()
    assert table["fvd"].shape == (1,) and table["fvd"][0] > 0


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_samples": 3}, "3 asked for"),
        ({"num_samples": 0}, "--num_samples 0"),
        ({"modes": ("psnrr",)}, "psnrr.*psnr, ssim, lpips, fvd, kvd"),
        ({"dataset": "nowhere"}, "nowhere"),
        ({"dataset_partition": "tset"}, "--dataset_partition 'tset'.*test, train"),
        ({"backend": "jax"}, "--backend 'jax'.*torch, tensorflow"),
        ({"resize": "area"}, "--resize 'area'.*legacy, half-pixel"),
        ({"T": 13}, "sample_0000-0.npy holds 12 frames.*not 13"),
        ({"obs_length": T}, "nothing to score"),
        ({"ssim_data_range": 0.0}, "--ssim_data_range 0"),
    ],
)
def test_mistakes_are_named(eval_dir, options, words):
    with pytest.raises(ValueError, match=words):
        evaluate(eval_dir, **options)
    assert not list(eval_dir.path.glob("metrics_*.pkl"))


def test_continuations_of_ones_own_clip_have_no_truth(eval_dir, tmp_path):
    clip = make_eval_dir(tmp_path, "clip", obs_video="/home/me/clip.mp4")
    with pytest.raises(ValueError, match=r"clip\.mp4.*no truth"):
        evaluate(clip)


def test_a_folder_without_samples_is_named(tmp_path):
    done = run_script("video_eval.py", "--eval_dir", tmp_path / "none", cwd=tmp_path)
    assert done.returncode == 1 and "no samples" in done.stderr and "Traceback" not in done.stderr


def test_an_unreadable_sample_is_named(eval_dir):
    path = eval_dir.path / "samples/sample_0001-1.npy"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="sample_0001-1.npy"):
        evaluate(eval_dir)


# ---------------------------------------------------------------- tables on disk


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_table_of_any_protocol_is_read(tmp_path, protocol):
    table = {"psnr": np.arange(6.0).reshape(1, 2, 3), "fvd": np.arange(2)}
    path = tmp_path / "metrics.pkl"
    path.write_bytes(pickle.dumps(table, protocol=protocol))
    read = metric_tables.read_table(path)
    assert set(read) == set(table)
    np.testing.assert_array_equal(read["psnr"], table["psnr"])


class Evil:
    def __reduce__(self):
        return (open, ("evil", "w"))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"psnr": Evil()}),
        pickle.dumps({"psnr": np.array([Evil()], dtype=object)}),
        pickle.dumps({"psnr": np.array(["text"])}),
        pickle.dumps([1.0]),
        pickle.dumps({"psnr": np.zeros(3)})[:-20],
        b"",
    ],
    ids=["code", "code in an array", "text", "no dict", "truncated", "empty"],
)
def test_a_pickle_of_anything_else_is_refused_and_not_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "metrics.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.pkl is no table.*delete it"):
        metric_tables.read_table(path)
    assert not Path("evil").exists()


def test_infinite_psnr_is_stored_and_counted_but_not_averaged():
    values = np.array([[[20.0, np.inf]], [[30.0, 40.0]], [[np.inf, np.inf]]])
    row = metric_tables.summarise(values)
    assert row["infinite"] == 3 and row["n"] == 2
    assert row["mean"] == pytest.approx((20 + 35) / 2)
    mean, error = metric_tables.frame_curve(values)
    np.testing.assert_allclose(mean, [25, 40])
    np.testing.assert_allclose(error, [5, np.nan])


def test_a_lock_is_waited_for_and_an_abandoned_one_taken_away(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "metrics.pkl"
    with file_lock.file_lock(path):
        (lock,) = tmp_path.glob(".metrics.pkl*")
        assert "process" in lock.read_text()
    assert not lock.exists()
    lock.write_text("process 1 on another-machine")
    monkeypatch.setattr(file_lock, "LOCK_PATIENCE_S", 0.05)
    monkeypatch.setattr(file_lock, "LOCK_LIMIT_S", 0.3)
    with file_lock.file_lock(path):
        assert "another-machine" not in lock.read_text()
    assert "waiting for process 1 on another-machine" in caplog.text
    assert "holds it too long" in caplog.text


# ---------------------------------------------------------------- scripts


def test_the_scripts_differ_in_their_default_metrics_alone():
    default = {field.name: field.default for field in dataclasses.fields(EvalConfig)}
    of_fvd = {field.name: field.default for field in dataclasses.fields(FvdConfig)}
    assert default.pop("modes") == ("psnr", "ssim", "lpips")
    assert of_fvd.pop("modes") == ("fvd", "kvd")
    assert of_fvd == default


@pytest.mark.slow
def test_both_scripts_write_the_same_file(eval_dir, tmp_path, i3d):
    done = run_script("video_eval.py", "--eval_dir", eval_dir.path, "--modes", "psnr", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[:3] == ["psnr", "3", "2"]
    args = ("--eval_dir", eval_dir.path, "--i3d_weights", i3d, "--num_samples", "2")
    done = run_script("video_eval_fvd.py", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0] for line in done.stdout.splitlines()[1:4]}
    assert rows == {"fvd", "kvd", "psnr"} and "weights_sha256" in done.stdout
    assert set(metric_tables.read_table(eval_dir.path / "metrics_3-2-12.pkl")) == rows


def test_gifs_show_observed_frames_with_a_red_border(eval_dir, tmp_path):
    import imageio.v3 as iio

    done = run_script("video_make_gif.py", "--eval_dir", eval_dir.path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((eval_dir.path / "videos").glob("sample_*.gif"))) == 6
    frames = iio.imread(eval_dir.path / "videos/sample_0000-0.gif", mode="RGB")
    top = captions.LINE_HEIGHT + 2
    corner = frames[:, top + 3, 3].astype(int)  # inside the grey frame, on the border of the video
    assert (corner[0] == [255, 0, 0]).all() and (corner[-1] != [255, 0, 0]).any()


@pytest.mark.slow
def test_a_grid_puts_the_truth_beside_the_samples(eval_dir, tmp_path):
    args = ("--eval_dir", eval_dir.path, "--grid", "--add_gt", "--format", "mp4")
    done = run_script("video_make_gif.py", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    import imageio.v3 as iio

    height, width = iio.imread(eval_dir.path / "videos/grid.mp4").shape[1:3]
    assert width == 3 * (128 + 4)  # truth and 2 samples
    assert height == 3 * (128 + 4) + 2 * (captions.LINE_HEIGHT + 2)  # 3 videos between two lines


def make_grid(*dirs, **options) -> tuple[list[list[np.ndarray]], list[str]]:
    """The last frame of each video of a grid [rows, columns], and the titles."""
    grids, titles = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "tile", lambda rows: grids.append(rows) or np.zeros((1, 8, 8, 3)))
        patch.setattr(gallery, "captioned", lambda grid, texts, notes: titles.extend(texts))
        patch.setattr(gallery, "write_video", lambda *_, **__: None)
        gallery.make_gallery(GifConfig(tuple(map(str, dirs)), grid=True, width=32, **options))
    return [[video[-1] for video in row] for row in grids[0]], titles


def test_each_row_of_a_grid_is_of_one_video_and_its_columns_are_what_their_titles_say(eval_dir):
    samples = eval_dir.path / "samples"
    (samples / "sample_0000-0.npy").unlink()  # video 0 has sample 1 alone, the others have 0 and 1
    rows, titles = make_grid(eval_dir.path, add_gt=True)
    assert titles == ["truth", "autoreg"]
    test_set = get_test_dataset(eval_dir.model_config()["dataset"])
    for video, (truth, sample) in enumerate(rows):
        np.testing.assert_array_equal(truth, test_set.read(video)[-1])
        np.testing.assert_array_equal(sample, np.load(samples / f"sample_{video:04d}-1.npy")[-1])


def test_a_grid_of_other_data_is_refused(eval_dir, tmp_path):
    other = make_eval_dir(tmp_path, "other")
    config = json.loads(other.sample_config_path.read_text())
    other.sample_config_path.write_text(json.dumps(config | {"dataset_partition": "train"}))
    with pytest.raises(ValueError, match="differ in dataset_partition .*cannot stand side by side"):
        make_grid(eval_dir.path, other.path)
    other.sample_config_path.write_text(json.dumps(config | {"obs_video": "mine.mp4"}))
    with pytest.raises(ValueError, match="continues a clip of your own: leave out --add_gt"):
        make_grid(other.path, add_gt=True)
    eval_dir.save_truth(0, {"frames": 1, "sha256": "of another video"})
    with pytest.raises(ValueError, match="of another video 0 than"):
        make_grid(eval_dir.path, add_gt=True)


@pytest.mark.slow
def test_a_grid_puts_several_directories_side_by_side(eval_dir, tmp_path):
    import shutil

    import imageio.v3 as iio

    other = shutil.copytree(eval_dir.path, tmp_path / "other")
    for path in (other / "samples").glob("sample_*-1.npy"):
        path.unlink()
    args = ("--eval_dir", eval_dir.path, other, "--grid", "--add_gt", "--out", tmp_path / "a.gif")
    options = ("--num_videos", "2", "--every", "5", "--width", "40")
    done = run_script("video_make_gif.py", *args, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    length = len(np.load(eval_dir.path / "samples/sample_0000-0.npy"))
    frames = iio.imread(tmp_path / "a.gif", mode="RGB")
    size = 32 + 4  # enlarged by no whole factor
    grid = frames[:, -2 * size - captions.LINE_HEIGHT - 2 : -captions.LINE_HEIGHT - 2]
    assert grid.shape == (-(-length // 5), 2 * size, 3 * size, 3)
    np.testing.assert_array_equal(grid[:, :, size : 2 * size], grid[:, :, 2 * size :])

    done = run_script("video_make_gif.py", *args[:3], cwd=tmp_path)
    assert done.returncode and "several --eval_dir, and --out, go with --grid" in done.stderr
    short = np.load(other / "samples/sample_0000-0.npy")[:-1]
    np.save(other / "samples/sample_0000-0.npy", short)
    done = run_script("video_make_gif.py", *args, cwd=tmp_path)
    assert done.returncode and "samples of video 0 differ in shape" in done.stderr
