"""The demonstration runs through, from nothing to gifs."""

import pytest

from improved_diffusion.bouncy_balls import make_dataset
from test_readme import load_script


@pytest.mark.slow
def test_the_demo_trains_samples_scores_and_writes_gifs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_dataset(tmp_path / "datasets" / "bouncing_balls_100", num_train=8, num_test=4)
    load_script("scripts/video_demo.py").main(["--minutes", "0.02", "--num_videos", "1"])
    assert len(list(tmp_path.glob("results/**/samples/*.npy"))) == 2  # by two strategies
    assert len(list(tmp_path.glob("results/**/videos/*.gif"))) >= 2
    printed = capsys.readouterr().out
    assert "psnr" in printed and "last observed frame repeated" in printed
