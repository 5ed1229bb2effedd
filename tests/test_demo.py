"""The demonstration runs through, from nothing to gifs."""

import pytest

from test_readme import load_script


@pytest.mark.slow
def test_the_demo_trains_samples_scores_and_writes_gifs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    load_script("scripts/video_demo.py").main(["--minutes", "0.02", "--num_videos", "1"])
    assert len(list(tmp_path.glob("results/**/samples/*.npy"))) == 2  # by two strategies
    assert len(list(tmp_path.glob("results/**/videos/*.gif"))) >= 2
    printed = capsys.readouterr().out
    assert "psnr" in printed and "last observed frame repeated" in printed
