"""The demonstration runs through, from nothing to gifs."""

import pytest

from helpers import call_main, make_checkpoint
from improved_diffusion.bouncy_balls import make_dataset
from improved_diffusion.data import ray_mazes

SIZES = (
    "--num_videos 1 --T 6 --obs_length 2 --max_frames 4 --step_size 2 --timesteps 2 "
    "--warm_up_updates 2 --maze_T 100 --maze_timesteps 2"
).split()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current directory that holds small data sets and a network for mazes that knows nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    make_dataset(tmp_path / "datasets" / "bouncing_balls_100", num_train=2, num_test=2)
    laps = tmp_path / "datasets" / "maze_laps_32"
    ray_mazes.make_dataset("maze_laps", laps, num_train=1, num_test=1)
    path = "checkpoints/pretrained/maze_laps/ema_0.99_latest.pt"
    make_checkpoint(tmp_path / path, "maze_laps", image_size=32, T=240)
    return tmp_path


def test_laps_of_mazes_are_continued_with_and_without_recalling(folder, capsys):
    call_main("video_demo.py", "--minutes", "0", *SIZES)
    printed = capsys.readouterr().out
    rows = [
        line.split() for line in printed.splitlines() if line.startswith(("autoreg ", "recall"))
    ]
    table = [
        row for row in rows if len(row) == 4 and row[-1] == "-"
    ]  # three laps, the last too short
    assert [row[0] for row in table] == ["autoreg", "recall-autoreg"]
    (gif,) = folder.glob("results/pretrained/maze_laps/**/laps.gif")
    assert (gif.parent / "report.html").exists()
    assert not list(folder.glob("checkpoints/demo*"))  # nothing was trained


@pytest.mark.slow
def test_the_demo_trains_samples_scores_and_writes_gifs(folder, capsys):
    call_main("video_demo.py", "--minutes", "0.0001", *SIZES)
    balls = "results/demo/**"
    assert len(list(folder.glob(f"{balls}/samples/*.npy"))) == 2  # by two strategies
    assert len(list(folder.glob(f"{balls}/videos/*.gif"))) >= 2
    printed = capsys.readouterr().out
    assert "psnr" in printed and "last observed frame repeated" in printed


def test_a_network_that_is_not_there_is_named(folder):
    with pytest.raises(
        FileNotFoundError, match="nothing.pt is not there: start in the repository's root"
    ):
        call_main("video_demo.py", "--maze_checkpoint", "nothing.pt")
    assert not (folder / "results").exists()
