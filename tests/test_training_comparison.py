"""scripts/video_compare_training.py: training, measuring, sampling and the shares of masks."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import call_main, make_folder_dataset
from improved_diffusion.config import DiffusionConfig
from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.registry import MASK_DISTRIBUTIONS
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.sampling.trained_model import create_diffusion
from improved_diffusion.study import held_out, mask_shares, training_comparison

SCRIPT = "video_compare_training.py"
COMMON = (
    "--dataset data --max_frames 4 --batch_size 2 --num_workers 0 --num_channels 32 "
    "--num_res_blocks 1 --diffusion_steps 16 --noise_schedule cosine --attention_resolutions 4"
)
RUNS = ["published:", "filled: --mask_distribution filled"]


@pytest.fixture(autouse=True)
def videos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    torch.set_num_threads(1)
    return make_folder_dataset(Path("data"))


def compare(*words, runs=RUNS, common=COMMON):
    call_main(
        SCRIPT, "--common", common, "--runs", *runs, "--queries", 2, "--device", "cpu", *words
    )


def measurements(out="results/comparison"):
    with open(f"{out}/errors.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- the command


@pytest.mark.slow
def test_runs_are_trained_measured_and_drawn_and_go_on_from_there(capsys):
    compare("--updates", 2, "--every", 1)
    rows = measurements()
    assert [(row["run"], row["updates"]) for row in rows] == [
        ("published", "1"), ("published", "2"), ("filled", "1"), ("filled", "2"),
    ]  # fmt: skip
    for row in rows:
        values = [float(row[str(level)]) for level in held_out.LEVELS]
        assert all(0 < value < 4 for value in values) and float(row["bits/dim"]) > 0
    assert Path("results/comparison/errors.png").stat().st_size > 10_000
    assert "| published | 2 |" in capsys.readouterr().out
    compare("--updates", 3, "--every", 1, runs=RUNS[1:])
    again = measurements()  # of this run, and beside it of the other one
    assert [row for row in again if row["updates"] != "3"] == rows[2:] + rows[:2]
    assert [row["run"] for row in again if row["updates"] == "3"] == ["filled"]
    assert torch.load("checkpoints/comparison/filled/model_latest.pt")["step"] == 3


@pytest.mark.slow
def test_the_same_weights_are_measured_alike_wherever_a_run_was_stopped():
    compare("--updates", 2, "--every", 2, "--out", "once", runs=RUNS[:1])
    compare("--updates", 2, "--every", 1, "--out", "often", runs=RUNS[:1])
    (once,), (_, often) = measurements("once"), measurements("often")
    once.pop("seconds"), often.pop("seconds")
    assert once == often


@pytest.mark.slow
def test_runs_may_begin_with_given_weights_which_their_measurements_are_of():
    compare("--updates", 1, "--out", "first", runs=RUNS[:1])
    start = "checkpoints/first/published/model_latest.pt"
    tuned = [f"tuned: --lr 0 --resume_checkpoint {start}"]
    for updates in (1, 2):
        compare("--updates", updates, "--every", 1, "--out", "tuned", runs=tuned)
    errors = [
        [float(row[str(level)]) for level in held_out.LEVELS]
        for row in measurements("first") + measurements("tuned")
    ]
    assert errors[0] == errors[1] == errors[2]  # nothing was learnt at a rate of 0
    weights = torch.load(start)
    weights["step"] = 7
    torch.save(weights, start)
    with pytest.raises(ValueError, match="made with other options"):
        compare("--updates", 3, "--every", 1, "--out", "tuned", runs=tuned)


@pytest.mark.slow
def test_a_run_that_was_trained_for_another_comparison_is_not_measured_as_this_ones():
    compare("--updates", 2, "--out", "one/same", runs=RUNS[:1])
    with pytest.raises(
        ValueError, match="same/published holds a run that two/same/.* says nothing of"
    ):
        compare("--updates", 2, "--every", 1, "--out", "two/same", runs=RUNS[:1])


@pytest.mark.slow
def test_a_run_ends_after_its_time():
    compare("--updates", 50, "--every", 1, "--seconds", 1e-3, runs=RUNS[:1])
    assert [row["updates"] for row in measurements()] == ["1"]


@pytest.mark.slow
def test_samples_are_scored_and_their_drift_drawn():
    compare(
        *"--updates 1 --num_videos 2 --timesteps 2 --strategies autoreg --modes psnr".split(),
        runs=RUNS[:1],
    )
    folder = Path("results/comparison/published/autoreg_4_2_8_2")
    assert len(list((folder / "samples").glob("*.npy"))) == 2
    (table,) = folder.glob("metrics_*.pkl")
    assert np.load(table, allow_pickle=True)["psnr"].shape == (2, 1, 6)
    assert Path("results/comparison/drift.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (["published"], "give each run a name of its own"),
        (["a:", "a:"], "give each run a name of its own"),
        (["a:", "b: --max_frames 3"], "their errors do not compare"),
        (["a: --resume_id x"], "leave out --resume_id"),
        (["a: --config nowhere.json"], "nowhere.json: no such file"),
    ],
)
def test_a_mistake_is_told_in_one_line(runs, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        compare(runs=runs)
    assert not Path("checkpoints").exists()


def test_no_runs_are_a_mistake():
    with pytest.raises(ValueError, match="--runs is empty"):
        call_main(SCRIPT)


@pytest.mark.slow
def test_results_of_other_options_are_not_mixed_with_new_ones():
    compare("--updates", 1, runs=["a:"])
    with pytest.raises(ValueError, match="a.json: made with other options: give another --out"):
        compare("--updates", 2, runs=["a: --lr 0.5"])


@pytest.mark.parametrize(
    ("names", "curves"),
    [(["fast", "fast-1", "fast-12"], 1), (["lr", "lr-v", "lr-v-1"], 2), (["v1", "v2"], 2)],
)
def test_seeds_of_one_run_are_drawn_alike(names, curves):
    assert len(set(map(training_comparison.without_seed, names))) == curves


# ---------------------------------------------------------------- what is measured


def constant_denoiser(value, steps=1000):
    """A process whose network always says that clean frames are `value`."""
    process = create_diffusion(
        DiffusionConfig(diffusion_steps=steps, noise_schedule="cosine", predict_xstart=True)
    )
    return Denoiser(lambda x, t, **kwargs: torch.full_like(x, value), process)


def test_the_error_is_that_of_the_latent_frames_alone():
    frames = np.full((1, 3, 3, 8, 8), 255, np.uint8)
    frames[:, 0] = 0  # observed: -1 after scaling, of which nothing may be counted
    batch = FrameBatch.from_uint8(frames, np.arange(3)[None], num_observed=1)
    *errors, bits = held_out.query_errors(constant_denoiser(0.5), batch, (0, 0))
    assert errors == pytest.approx([0.25] * len(held_out.LEVELS)) and bits > 0


def test_the_levels_are_those_of_the_process():
    process = constant_denoiser(0.0).diffusion
    t = held_out.nearest_timesteps(process)
    levels = process.snr(t).log().tolist()
    assert levels == pytest.approx(held_out.LEVELS, abs=0.05)


# ---------------------------------------------------------------- shares of masks


def test_the_shares_of_all_distributions_stand_in_a_table(capsys):
    call_main(SCRIPT, "--mask_shares", "30x4", "12x6", "--draws", 50)
    rows = capsys.readouterr().out.strip().splitlines()
    assert len(rows) == 2 + 2 * len(MASK_DISTRIBUTIONS)
    assert rows[2].startswith("| 30, 4 | published |")


def test_shares_are_counted_as_they_are_defined(monkeypatch):
    items = iter(10 * [([], [1, 2]), ([1, 2], [3, 4]), ([1, 2], [3]), ([1], [2, 3, 4])])
    monkeypatch.setitem(
        MASK_DISTRIBUTIONS._entries, "toy", (lambda T, max_frames, rng: next(items), "")
    )
    shares = mask_shares.mask_shares("toy", 9, 4, draws=8, seed=0)
    # like a query: 2 of 4 observed and as many latent
    assert shares[:4] == (0.25, 0.25, 0.5, 13 / 16)


@pytest.mark.parametrize(
    ("T", "max_frames", "nothing", "query"), [(300, 20, 0.70, 0.035), (100, 8, 0.74, 0.016)]
)
def test_the_published_shares_are_those_that_were_found_before(T, max_frames, nothing, query):
    shares = mask_shares.mask_shares("published", T, max_frames, draws=4000, seed=0)
    assert (
        abs(shares.nothing_observed - nothing) < 0.03 and abs(shares.like_a_query - query) < 0.012
    )


@pytest.mark.parametrize("text", ["300", "300x", "0x20", "axb"])
def test_sizes_that_are_none_are_told(text):
    with pytest.raises(ValueError, match="such as 300x20"):
        mask_shares.parse_sizes(text)
