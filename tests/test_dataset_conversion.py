import dataclasses
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import train_one_step
from improved_diffusion.bouncy_balls import render, simulate
from improved_diffusion.data import video_io
from improved_diffusion.data.dataset_conversion import convert_release
from improved_diffusion.data.video_datasets import get_test_dataset
from improved_diffusion.registry import DATASETS

SCRIPTS = Path(__file__).parents[1] / "datasets"
T = 8


@pytest.fixture
def videos():
    """Three uint8 [8, 64, 64, 3]."""
    return [render(simulate(np.random.default_rng(i), T, size=64)) for i in range(3)]


@pytest.fixture(autouse=True)
def short_videos_in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mazes_cwvae", "minerl", "carla_town02_no_traffic"):
        monkeypatch.setitem(DATASETS, name, dataclasses.replace(DATASETS[name], T=T))


def write_release(folder, videos):
    """{train,test}/ of mp4 files whose order by number is not the order by name."""
    for partition in ("train", "test"):
        for i, video in enumerate(videos):
            (folder / partition).mkdir(parents=True, exist_ok=True)
            video_io.write_video(folder / partition / f"clip_{8 + i}.mp4", video)
    return folder


def run_script(name, *argv):
    """Run a script of datasets/ as a command; its exit code."""
    old = sys.argv
    sys.argv = [name, *map(str, argv)]
    try:
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    finally:
        sys.argv = old
    return caught.value.code


def test_an_unfinished_conversion_takes_no_videos_of_another_release(tmp_path, videos):
    first = write_release(tmp_path / "first", videos)
    (first / "test/clip_9.mp4").write_bytes(b"broken")
    with pytest.raises(ValueError, match="clip_9"):
        convert_release("mazes_cwvae", first)
    with pytest.raises(ValueError, match="holds videos of .*first, not of .*second: go on"):
        convert_release("mazes_cwvae", write_release(tmp_path / "second", videos[:2]))
    write_release(first, videos)
    assert (convert_release("mazes_cwvae", first) / "test/2.npy").exists()


@pytest.mark.parametrize("script, name", [("mazes.py", "mazes_cwvae"), ("minerl.py", "minerl")])
def test_a_folder_of_mp4_files_becomes_the_data_set(tmp_path, videos, script, name):
    source = write_release(tmp_path / "release", videos)
    assert run_script(script, "--source", source) in (0, None)
    data = get_test_dataset(name)
    assert len(data) == 3
    for i, video in enumerate(videos):
        frames = data.read(i).transpose(0, 2, 3, 1)
        clip = source / "test" / f"clip_{8 + i}.mp4"
        np.testing.assert_array_equal(frames, video_io.read_video(clip))
        assert np.abs(frames.astype(float) - video).mean() < 6
    assert Path(train_one_step(name)).is_file()


@pytest.mark.parametrize("script, name", [("mazes.py", "mazes_cwvae"), ("minerl.py", "minerl")])
def test_converting_a_second_time_does_nothing(tmp_path, videos, script, name, caplog):
    source = write_release(tmp_path / "release", videos)
    caplog.set_level("INFO")
    run_script(script, "--source", source)
    before = {path: path.stat().st_mtime_ns for path in DATASETS[name].root.rglob("*")}
    assert run_script(script, "--source", source) in (0, None)
    assert {path: path.stat().st_mtime_ns for path in DATASETS[name].root.rglob("*")} == before
    assert f"exists: nothing to do; remove it to convert {name} again" in caplog.text


def test_an_interrupted_conversion_goes_on_and_never_looks_finished(tmp_path, videos):
    source = write_release(tmp_path / "release", videos)
    last = source / "test" / "clip_10.mp4"
    whole = last.read_bytes()
    last.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"clip_10\.mp4: broken"):
        convert_release("minerl", source)
    root = DATASETS["minerl"].root
    assert not root.exists()
    done = {p: p.stat().st_mtime_ns for p in root.parent.rglob("*.npy")}
    assert len(done) == 5
    last.write_bytes(whole)
    convert_release("minerl", source)
    assert len(list(root.rglob("*.npy"))) == 6
    for path, mtime in done.items():
        moved = root / path.relative_to(root.with_name("minerl_navigate-torch.partial"))
        assert moved.stat().st_mtime_ns == mtime


def test_a_prepared_tensorflow_dataset_becomes_the_data_set(tmp_path, videos, monkeypatch):
    source = tmp_path / "minerl_navigate" / "1.0.0"
    source.mkdir(parents=True)
    (source / "dataset_info.json").write_text("{}")
    splits = {"train": videos, "test": videos[:1]}
    builder = types.SimpleNamespace(
        info=types.SimpleNamespace(
            splits={k: types.SimpleNamespace(num_examples=len(v)) for k, v in splits.items()}
        ),
        as_dataset=lambda split: [{"video": video} for video in splits[split]],
    )
    fake = types.SimpleNamespace(
        builder_from_directory=lambda folder: builder if folder == str(source) else None,
        as_numpy=lambda examples: examples,
    )
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    convert_release("minerl", source)
    assert len(get_test_dataset("minerl")) == 1
    train = get_test_dataset("minerl", partition="train")
    np.testing.assert_array_equal(train.read(2), videos[2].transpose(0, 3, 1, 2))


def test_without_tensorflow_datasets_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match="pip install tensorflow-datasets"):
        convert_release("minerl", tmp_path)


def test_wrong_sources_are_refused(tmp_path, videos):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder.*--source"):
        convert_release("minerl", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no video files; --source must hold train/"):
        convert_release("minerl", tmp_path)
    source = write_release(tmp_path / "release", [videos[0][:5]])
    with pytest.raises(ValueError, match=r"clip_8\.mp4: has 5 frames, need 8"):
        convert_release("minerl", source)


def test_a_users_mistake_is_one_line_and_an_exit_code(tmp_path, capsys):
    assert run_script("mazes.py", "--source", tmp_path / "nowhere") == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "nowhere: no such folder" in lines[0]


def test_the_last_hundred_carla_videos_are_the_test_set(tmp_path):
    for i in range(1, 104):
        (tmp_path / f"video_{i}.pt").touch()
    assert run_script("carla/make_train_test_split.py", "--dir", tmp_path) in (0, None)
    train = (tmp_path / "video_train.csv").read_text().splitlines()
    test = (tmp_path / "video_test.csv").read_text().splitlines()
    assert train == [",path", "0,video_1.pt", "1,video_2.pt", "2,video_3.pt"]
    assert (len(test), test[0]) == (101, ",path")
    assert (test[1], test[100]) == ("0,video_4.pt", "99,video_103.pt")


def test_carla_files_are_trained_on_with_their_split_which_is_written_once(tmp_path):
    root = DATASETS["carla_town02_no_traffic"].root
    root.mkdir(parents=True)
    video = torch.zeros(T, 128, 128, 3, dtype=torch.uint8)
    for i in range(102):
        torch.save(video, root / f"video_{i}.pt")
    run_script("carla/make_train_test_split.py", "--dir", root)
    before = {path: path.stat().st_mtime_ns for path in root.iterdir()}
    run_script("carla/make_train_test_split.py", "--dir", root)
    assert {path: path.stat().st_mtime_ns for path in root.iterdir()} == before
    assert Path(train_one_step("carla_town02_no_traffic")).is_file()


def test_too_few_carla_videos_are_refused(tmp_path, capsys):
    (tmp_path / "video_0.pt").touch()
    assert run_script("carla/make_train_test_split.py", "--dir", tmp_path) == 1
    assert "has 1 files video_<n>.pt" in capsys.readouterr().err
    assert run_script("carla/make_train_test_split.py", "--dir", tmp_path / "nowhere") == 1
    assert not list(tmp_path.glob("*.csv"))
