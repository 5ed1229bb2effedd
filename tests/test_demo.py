"""The demonstration runs through, from nothing to gifs."""

import functools

import numpy as np
import pytest

from helpers import ROOT, call_main, make_checkpoint
from improved_diffusion import bouncy_balls
from improved_diffusion.data import paths, ray_mazes
from improved_diffusion.data.video_datasets import get_test_dataset
from improved_diffusion.study import demo
from improved_diffusion.study.options import DemoConfig

SIZES = (
    "--num_videos 2 --T 9 --obs_length 5 --timesteps 2 --queries 1 --warm_up_updates 1 "
    "--maze_indices 0 --maze_T 100 --maze_timesteps 2"
).split()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current directory that holds small data sets and a network for mazes that knows nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    few = functools.partial(bouncy_balls.make_dataset, num_train=2, num_test=2)
    monkeypatch.setattr(bouncy_balls, "make_dataset", few)  # made on first use, whoever that is
    laps = tmp_path / "datasets" / "maze_laps_32"
    ray_mazes.make_dataset("maze_laps", laps, num_train=1, num_test=2)
    for dataset, T in (("maze_laps", 240), ("bouncy_balls", 100)):
        path = tmp_path / f"checkpoints/pretrained/{dataset}/ema_0.99_latest.pt"
        make_checkpoint(path, dataset, image_size=32, T=T, max_frames=8)
    configs = tmp_path / "scripts/configs"
    configs.parent.mkdir()
    configs.symlink_to(ROOT / "scripts/configs")
    return tmp_path


def squared_errors(frames, truth):
    """[n] of frames [n, 3, H, W], whose decibels are the mean of those of the channels."""
    errors = (frames / 255 - truth / 255) ** 2
    with np.errstate(divide="ignore"):  # a frame that comes back as it was
        return np.exp(np.log(errors.mean(axis=(2, 3))).mean(axis=1))


def decibels(errors):
    return -10 * np.log10(errors)


@pytest.mark.slow
def test_laps_of_mazes_are_continued_with_and_without_recalling(folder, capsys):
    observed, period, T = 60, 45, 150
    call_main("video_demo.py", "--minutes", "0", *SIZES, "--maze_indices", "1", "--maze_T", T)
    table = capsys.readouterr().out.split("lap 1 was observed")[1].splitlines()[2:5]
    (gif,) = folder.glob("results/pretrained/maze_laps/**/laps.gif")
    truth = get_test_dataset("maze_laps", T=T).read(1)
    np.testing.assert_array_equal(truth[period:], truth[:-period])
    names = ["autoreg", "recall-autoreg", "last observed frame repeated"]
    samples = [next(gif.parent.glob(f"{name}_*")) for name in names[:2]]
    videos = [np.load(paths.sample_path(sampled, 1, 0)) for sampled in samples]
    videos.append(truth[[observed - 1] * T])
    for line, name, video in zip(table, names, videos, strict=True):
        errors = squared_errors(video[observed:], truth[observed:]).reshape(2, period)
        *laps, too_short = line.removeprefix(name).split()
        np.testing.assert_allclose(
            [float(lap) for lap in laps], decibels(errors.mean(1)), atol=0.06
        )
        assert too_short == "-"
    assert (gif.parent / "report.html").exists()
    assert not list(folder.glob("checkpoints/demo*"))  # nothing was trained


@pytest.mark.slow
def test_a_network_is_trained_and_stands_beside_a_repeated_frame_and_a_pretrained_one(
    folder, capsys
):
    call_main("video_demo.py", "--minutes", "0.0001", *SIZES)
    printed = capsys.readouterr().out
    for name in ("after 0 updates ", "after 1 updates "):
        (row,) = [line for line in printed.splitlines() if line.startswith(name)]
        assert len(row.split()) == 3 + 7 + 1  # the bound beside an error for each log SNR
    trained, pretrained = printed.split("16x16, frame")[1].split("32x32, frame")
    for name, table, size in (("trained just now", trained, 16), ("pretrained", pretrained, 32)):
        ours, repeated, difference = (
            line for line in table.splitlines() if line.startswith((name, "last ", "difference"))
        )
        truth = get_test_dataset("bouncy_balls", T=9, image_size=size)
        errors = [squared_errors(truth.read(video)[5:], truth.read(video)[4]) for video in (0, 1)]
        expected = decibels(np.array(errors)).mean(axis=0)
        *by_frame, mean = (float(number) for number in repeated.split()[4:])
        np.testing.assert_allclose(by_frame, expected[[0, 1, 3]], atol=0.06)  # frames 1, 2 and 4
        assert mean == pytest.approx(expected.mean(), abs=0.006)
        gap = float(ours.split()[-1]) - float(repeated.split()[-1])
        assert float(difference.split()[4]) == pytest.approx(gap, abs=0.02)
    assert len(list(folder.glob("results/demo/**/samples/*.npy"))) == 2
    assert list(folder.glob("results/demo/**/videos/grid.gif"))


def test_training_goes_on_until_its_time_is_up(folder, monkeypatch):
    """A clock that a chunk of n updates moves by 2 n seconds; training itself is left out."""
    now, made = [0.0], []

    def run(chosen_train, *_):
        made.append(chosen_train.max_steps)
        now[0] += 2 * (made[-1] - (made[-2] if made[1:] else 0))

    monkeypatch.setattr(demo.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(demo, "train_run", run)
    monkeypatch.setattr(demo, "updates_made", lambda: made[-1] if made else 0)
    config = DemoConfig(minutes=4.0, warm_up_updates=20)
    demo.train(config, demo.parse_recipe("video_train.py", demo._training_words(config)))
    assert made == [20, 70, 120]  # of 240 s; looks at the clock after 100


def test_a_network_that_is_not_there_is_named(folder):
    with pytest.raises(FileNotFoundError, match="--maze_checkpoint nothing.pt: no such file"):
        call_main("video_demo.py", "--maze_checkpoint", "nothing.pt")
    (folder / "checkpoints").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match="start in the repository's root"):
        call_main("video_demo.py")
    assert not (folder / "results").exists()
