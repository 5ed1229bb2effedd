"""The demonstration runs through, from nothing to gifs."""

from helpers import call_main
from improved_diffusion.bouncy_balls import make_dataset

SIZES = (
    "--minutes 0 --num_videos 1 --T 6 --obs_length 2 --max_frames 4 --step_size 2 --timesteps 2 "
    "--warm_up_updates 2"
)


def test_the_demo_trains_samples_scores_and_writes_gifs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    make_dataset(tmp_path / "datasets" / "bouncing_balls_100", num_train=2, num_test=2)
    call_main("video_demo.py", *SIZES.split())
    assert len(list(tmp_path.glob("results/**/samples/*.npy"))) == 2  # by two strategies
    assert len(list(tmp_path.glob("results/**/videos/*.gif"))) >= 2
    printed = capsys.readouterr().out
    assert "psnr" in printed and "last observed frame repeated" in printed
