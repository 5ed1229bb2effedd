"""The report of evaluation directories: what is in the page, what it says is missing, what it refuses."""

import html
import json
import os
import re
import shutil
from pathlib import Path

import html5lib
import numpy as np
import pytest

import toy_runs
from helpers import run_script
from improved_diffusion.data import paths
from improved_diffusion.data.video_datasets import get_test_dataset
from improved_diffusion.evaluation import evaluate
from improved_diffusion.evaluation.comparison import video_differences
from improved_diffusion.evaluation.intervals import half_sample, mean_interval
from improved_diffusion.evaluation.metric_tables import (
    ScoreTable,
    plus_minus,
    summarise,
    write_table,
)
from improved_diffusion.evaluation.options import EvalConfig, ReportConfig
from improved_diffusion.evaluation.report import sprites
from improved_diffusion.evaluation.report.numbers import Strategy
from improved_diffusion.evaluation.report.page import difference_tables, score_tables, write_report
from improved_diffusion.registry import SAMPLE_METRICS
from improved_diffusion.sampling.provenance import latent_counts
from improved_diffusion.sampling.results import EvalDir


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two strategies on three videos, of the first two samples each, scored."""
    checkpoint = toy_runs.make_toy(tmp_path_factory.mktemp("report"))
    found = []
    for mode in ("autoreg", "hierarchy-2"):
        options = {"inference_mode": mode, "subset_size": 3, "num_samples": 2}
        found.append(toy_runs.sample(checkpoint, **options).path)
    evaluate.evaluate(EvalConfig(eval_dir=tuple(map(str, found)), modes=("psnr", "ssim")))
    return found


def report(folders, **options) -> str:
    """The page of a report."""
    out = folders[0].parent / "report.html"
    config = ReportConfig(eval_dir=tuple(map(str, folders)), out=str(out), **options)
    assert write_report(config) == out
    return out.read_text()


def page_data(page: str) -> dict:
    """What the page's script works on."""
    return json.loads(re.search(r'id="report-data">(.*?)</script>', page, re.S)[1])


def unpacked(stored: dict) -> np.ndarray:
    """The frames of sprites, uint8 [T, 3, H, W], cut out as the page does."""
    import base64
    import io

    from PIL import Image

    H, W, frames = stored["height"], stored["width"], []
    for picture in stored["pictures"]:
        file = io.BytesIO(base64.b64decode(picture.partition(",")[2]))
        pixels = np.asarray(Image.open(file).convert("RGB"))
        assert max(pixels.shape) <= sprites.MAX_SIDE
        for row in range(pixels.shape[0] // H):
            for column in range(stored["columns"]):
                frames.append(pixels[row * H : (row + 1) * H, column * W : (column + 1) * W])
    return np.stack(frames[: stored["length"]]).transpose(0, 3, 1, 2)


def test_the_page_is_valid_and_needs_nothing_else(folders):
    page = report(folders)
    html5lib.HTMLParser(strict=True).parse(page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(set(ids)) == len(ids)
    assert not re.search(r'(src|href)="(?!data:)', page) and "@import" not in page


def test_all_samples_and_their_truth_are_in_it_bit_for_bit(folders):
    data = page_data(report(folders))
    assert len(data["samples"]) == 6 and len(data["truth"]) == 3
    truth = get_test_dataset(EvalDir(folders[0]).sample_config()["dataset"], T=toy_runs.T)
    for shown in data["samples"]:
        for folder, stored in zip(folders, shown["videos"], strict=True):
            file = paths.sample_path(folder, shown["video"], shown["sample"])
            np.testing.assert_array_equal(unpacked(stored), np.load(file))
        stored = data["truth"][str(shown["video"])]
        np.testing.assert_array_equal(unpacked(stored), truth.read(shown["video"]))


@pytest.mark.parametrize(
    "T, size", [(1, 8), (700, 8), pytest.param(9, 1500, marks=pytest.mark.slow)]
)
def test_frames_of_any_number_and_size_fit_into_pictures_that_browsers_draw(T, size):
    video = np.random.default_rng(0).integers(0, 9, (T, 3, size, size), dtype=np.uint8)
    np.testing.assert_array_equal(unpacked(sprites.sprites(video)._asdict()), video)


def test_the_schedule_is_the_one_that_was_sampled(folders):
    data = page_data(report(folders))
    for shown in data["samples"]:
        for folder, number in zip(folders, shown["schedules"], strict=True):
            recorded = EvalDir(folder).record(shown["video"], shown["sample"])["schedule"]
            assert data["schedules"][number] == recorded
    made = [frame for _, latent in data["schedules"][0] for frame in latent]
    assert sorted(made) == list(range(toy_runs.OBSERVED, toy_runs.T))


def test_scores_and_paired_differences_are_those_of_the_tables(folders):
    page = report(folders)
    tables = [evaluate.metric_tables.read_table(next(f.glob("metrics_*.pkl"))) for f in folders]
    text = html.unescape(page).replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-")
    shown = plus_minus(summarise(tables[0]["psnr"]))
    assert f"<td>{shown}<small>n = 3</small></td>" in text
    for first, other in (tables, tables[::-1]):
        found = mean_interval(video_differences(first["psnr"], other["psnr"]))
        said = "not told apart" if found.holds_zero else "better" if found.low > 0 else "worse"
        assert f"<td>{found:+}<small>n = 3, {said}</small></td>" in text


def test_metrics_of_several_numbers_have_a_table_with_a_head_for_each():
    columns = SAMPLE_METRICS["lap_psnr"].columns
    strategies = []
    for seed, name in enumerate(("one", "two")):
        values = np.random.default_rng(seed).normal(20, 1, (4, 2, len(columns)))
        values[..., 1] = np.nan
        rows = [{"name": c} | summarise(values[..., i]) for i, c in enumerate(columns)]
        info = {"metrics": {"lap_psnr": {"columns": rows}}}
        table = ScoreTable({"lap_psnr": values}, info)
        strategies.append(Strategy(name, {}, None, [], table, {}, {}))
    (scores,) = score_tables(strategies)
    assert scores.heads == list(columns) and scores.caption.startswith("LAP_PSNR (dB)")
    (differences,) = difference_tables(strategies, strategies[0])
    ((name, cells),) = differences.rows
    assert differences.heads == list(columns[:6]), "those of references do not differ"
    first, second = (s.table.values["lap_psnr"][..., :1] for s in strategies)
    found = mean_interval(video_differences(first, second))
    assert name == "two" and cells[1] == ("-", "")
    assert cells[0][0].split() == f"{found:+}".replace("-", "\N{MINUS SIGN}").split()


def scored_by_fvd(name: str, n: int, values: np.ndarray) -> Strategy:
    """A strategy whose FVD is, of any videos, the mean of their values [n]."""
    sampled = half_sample(lambda chosen: values[chosen].mean(), n)
    row = {"n": n, "mean": values.mean(), "standard_error": None, "settings": {}}
    if sampled is not None:
        found = sampled.interval()
        row["interval"] = {"low": found.low, "high": found.high, "at_half": found.at_half}
        row["interval"]["of_halves"] = sampled.of_halves.tolist()
    table = ScoreTable({"fvd": values[:1]}, {"metrics": {"fvd": row}})
    return Strategy(name, {}, None, [], table, {}, {})


def test_distances_are_compared_in_pairs_and_no_better_is_said_where_zero_is_inside():
    hard = 100 * np.random.default_rng(0).standard_normal(12)  # videos differ more than strategies
    noise = np.random.default_rng(1).standard_normal((2, 12))
    shown = [
        scored_by_fvd(name, 12, hard + own)
        for name, own in (("base", 0.0), ("like it", 2 * noise[0]), ("worse", 5 + noise[1]))
    ]
    (table,) = difference_tables(shown, shown[0])
    (equal, equal_said), (worse, worse_said) = (cells[0] for _, cells in table.rows)
    assert equal_said == "n = 12, not told apart" and worse_said == "n = 12, worse"
    value, low, high = map(float, re.findall(r"[+\d.]+", worse))
    exact = mean_interval(5 + noise[1])
    assert value == pytest.approx(exact.value, abs=0.05)
    assert high - low == pytest.approx(exact.high - exact.low, rel=0.3), "what is shared cancels"
    (turned,) = difference_tables(shown, shown[2])
    assert turned.rows[0][1][0][1] == "n = 12, better"


def test_distances_of_few_videos_and_of_old_tables_have_no_difference(folders, tmp_path):
    few = [scored_by_fvd(name, 7, np.arange(7.0)) for name in ("one", "two")]
    (table,) = difference_tables(few, few[0])
    assert table.rows == [("two", [("-", "fewer than 8 videos")])]
    values, info = scored_by_fvd("old", 9, np.arange(9.0)).table
    del info["metrics"]["fvd"]["interval"]["of_halves"]
    old = tmp_path / folders[0].name
    old.mkdir()
    for name in ("samples", "truth", "model_config.json", "sample_config.json"):
        (old / name).symlink_to(folders[0] / name)
    write_table(old / "metrics_9-1-12.pkl", values, info | {"samples": [0]})
    assert "autoreg: differences in fvd, whose table was written before" in report([old])


def test_a_page_that_would_be_too_large_says_what_it_left_out(folders, caplog):
    whole = report(folders)
    limit = len(whole) * 0.75e-6
    page = report(folders, max_mb=limit)
    shown = page_data(page)["samples"]
    assert 0 < len(shown) < 6 and len(page.encode()) <= limit * 1e6
    left = [f"{video} (sample 1)" for video in sorted(EvalDir(folders[0]).samples())][-1]
    assert left in page and left in caplog.text
    with pytest.raises(ValueError, match=r"--max_mb 0.001: without any video") as refused:
        report(folders, max_mb=0.001)
    bare = float(re.search(r"has ([\d.]+) MB", str(refused.value))[1])
    assert "No videos" in report(folders, max_mb=1.02 * bare + 0.01)


def test_what_earlier_versions_did_not_record_is_named(folders, tmp_path):
    other, old = (tmp_path / folder.name for folder in folders)
    for made, folder in ((other, folders[0]), (old, folders[1])):
        made.mkdir()
        for name in ("samples", "truth", "model_config.json", "sample_config.json"):
            (made / name).symlink_to(folder / name)
    stored = json.loads((folders[0] / "sample_config.json").read_text())
    page = report([old])
    assert "hierarchy-2: the folder does not say how long sampling took, the version" in page
    assert "hierarchy-2: no scores" in page
    assert "autoreg, hierarchy-2: no scores" in report([other, old]), "each sentence once"
    assert page_data(page)["schedules"], "the schedule follows from the stored options"
    adaptive = tmp_path / "adaptive"
    adaptive.mkdir()
    (adaptive / "samples").symlink_to(folders[0] / "samples")
    options = {"inference_mode": "adaptive-autoreg", "distance": "l2"}
    (adaptive / "sample_config.json").write_text(json.dumps(stored | options))
    page = report([adaptive])
    assert "adaptive-autoreg: the schedule of samples" in page
    assert page_data(page)["samples"][0]["schedules"] == [None]


def test_without_the_data_set_the_truth_is_left_out_and_other_data_are_refused(folders, tmp_path):
    gone, other = tmp_path / "gone", tmp_path / "other"
    for folder, dataset in ((gone, "mazes_cwvae"), (other, None)):
        folder.mkdir()
        stored = json.loads((folders[0] / "sample_config.json").read_text())
        if dataset is None:
            dataset = str(toy_runs.make_folder_dataset(tmp_path / "data", T=toy_runs.T, num_test=5))
            videos = sorted((tmp_path / "data/test").glob("*.npy"))
            for video in videos:
                np.save(video, 255 - np.load(video))
        (folder / "sample_config.json").write_text(json.dumps(stored | {"dataset": dataset}))
        for name in ("samples", "truth"):
            (folder / name).symlink_to(folders[0] / name)
    page = report([gone])
    assert "The truth:" in page and page_data(page)["truth"] == {}
    with pytest.raises(ValueError, match="continue another video|observes other frames"):
        report([other])
    with pytest.raises(ValueError, match="differ in dataset"):
        report([folders[0], other])


def test_user_mistakes_are_one_line_and_write_nothing(folders, tmp_path):
    for words, told in (
        (("--eval_dir", tmp_path / "none"), "no samples in"),
        (("--eval_dir", folders[0], "--max_mb", "0"), "--max_mb 0.0: must be above 0"),
    ):
        done = run_script("video_report.py", *words, cwd=tmp_path)
        assert done.returncode == 1 and told in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "report.html").exists()


def test_text_of_users_is_shown_and_never_run(folders, tmp_path):
    title, name = (f"</script><script>alert({number})</script>" for number in (1, 2))
    stored = json.loads((folders[0] / "sample_config.json").read_text())
    (tmp_path / "sample_config.json").write_text(json.dumps(stored | {"inference_mode": name}))
    (tmp_path / "samples").symlink_to(folders[0] / "samples")
    page = report([tmp_path], title=title)
    for text in (title, name):
        assert text not in page and html.escape(text) in page
    assert [strategy["name"] for strategy in page_data(page)["strategies"]] == [name]


def test_bounds_of_different_sums_are_not_compared(folders, tmp_path):
    others = []
    for name, folder, stratified in zip("ab", folders, (False, True), strict=True):
        other = tmp_path / name
        other.mkdir()
        for shared in ("samples", "truth", "sample_config.json", "model_config.json"):
            (other / shared).symlink_to(folder / shared)
        (other / "elbos").mkdir()
        for video in EvalDir(folder).samples():
            steps = len(latent_counts(EvalDir(folder)))
            np.save(other / f"elbos/elbo_{video:04d}.npy", np.ones(steps))
        options = {"T": toy_runs.T, "stratified": stratified}
        (other / "elbo_config.json").write_text(json.dumps(options))
        others.append(other)
    assert "an unbiased estimate" in report(others[1:])
    with pytest.raises(ValueError, match="bounds of these directories differ in stratified"):
        report(others)


def test_it_is_said_where_samples_are_younger_than_their_scores(folders, tmp_path):
    other = tmp_path / "autoreg"
    shutil.copytree(folders[0], other)
    assert "after its scores" not in report([other])
    (sample, *_) = (other / "samples").glob("*.npy")
    later = sample.stat().st_mtime + 9
    os.utime(sample, (later, later))
    assert "samples were made, or made again, after its scores" in report([other])
