import itertools
import multiprocessing
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import train_runs
from improved_diffusion import bouncy_balls
from improved_diffusion.data import video_io
from improved_diffusion.data.dataset_files import VideoFiles
from improved_diffusion.data.dataset_specs import sorted_files
from improved_diffusion.data.video_datasets import (
    DATASETS,
    ShardedSampler,
    dataset_spec,
    get_test_dataset,
    get_train_dataset,
    prepare_dataset,
)


def numbered_video(video, length, size=32):
    """uint8 [length, size, size, 3] whose frames tell (video, frame) in two channels."""
    frames = np.zeros((length, size, size, 3), np.uint8)
    frames[..., 0] = video
    frames[..., 1] = np.arange(length)[:, None, None]
    return frames


@pytest.fixture
def folder(tmp_path):
    """A folder of one's own: train/0..4.npy of 30, 31, ... frames, test/0..11.npy of 20."""
    for partition, number, length in (("train", 5, 30), ("test", 12, 20)):
        (tmp_path / "mine" / partition).mkdir(parents=True)
        for i in range(number):
            video = numbered_video(i, length + i * (partition == "train"))
            np.save(tmp_path / "mine" / partition / f"{i}.npy", video)
    return tmp_path / "mine"


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_named(name, partition="train", videos=2, **changes):
    """Write videos of a named set below the current directory."""
    spec = DATASETS[name]
    (spec.root / partition).mkdir(parents=True, exist_ok=True)
    for i in range(videos):
        video = numbered_video(i, changes.get("T", spec.T), changes.get("size", spec.image_size))
        np.save(spec.root / partition / f"{i}.npy", video)
    return spec.root


def train_set(folder, T=20, max_frames=8, **options):
    return get_train_dataset(str(folder), T=T, max_frames=max_frames, **options)


# ---------------------------------------------------------------- which data sets there are


def test_the_published_sets_are_known_without_their_files(in_tmp):
    known = {name: (str(s.root), s.T, s.image_size) for name, s in DATASETS.items()}
    assert known == {
        "mazes_cwvae": ("datasets/gqn_mazes-torch", 300, 64),
        "minerl": ("datasets/minerl_navigate-torch", 500, 64),
        "memory_mazes": ("datasets/memory_mazes", 300, 64),
        "carla_no_traffic": ("datasets/carla/no-traffic", 1000, 128),
        "carla_with_traffic": ("datasets/carla/with-traffic", 1000, 128),
        "carla_town02_no_traffic": ("datasets/carla/town02-no-traffic", 1000, 128),
        "bouncy_balls": ("datasets/bouncing_balls_100", 100, 32),
        "colour_mazes": ("datasets/colour_mazes_32", 300, 32),
        "maze_laps": ("datasets/maze_laps_32", 240, 32),
    }
    assert dataset_spec("minerl").T == 500


def test_data_root_is_put_in_front(in_tmp, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(in_tmp / "elsewhere"))
    make_named("mazes_cwvae", "test")
    assert (in_tmp / "elsewhere/datasets/gqn_mazes-torch/test/0.npy").is_file()
    assert len(get_test_dataset("mazes_cwvae")) == 2


def test_an_unknown_name_lists_the_valid_ones():
    with pytest.raises(ValueError, match="'mazes'.*bouncy_balls.*mazes_cwvae.*minerl.*folder"):
        dataset_spec("mazes")


def test_an_impossible_image_size_is_refused():
    with pytest.raises(
        ValueError, match=r"--image_size 48: choose one of \(16, 32, 64, 128, 256\)"
    ):
        dataset_spec("minerl", image_size=48, image_sizes=(16, 32, 64, 128, 256))


@pytest.mark.parametrize(
    "name, words",
    [
        ("mazes_cwvae", "gqn_mazes-torch.*datasets/mazes.py.*DATA_ROOT"),
        ("minerl", "minerl_navigate-torch.*datasets/minerl.py.*DATA_ROOT"),
        ("carla_no_traffic", "carla/no-traffic.*datasets/README.md.*DATA_ROOT"),
    ],
)
def test_a_missing_folder_says_how_to_make_it(in_tmp, name, words):
    with pytest.raises(FileNotFoundError, match=words):
        get_train_dataset(name, T=10, max_frames=5)
    with pytest.raises(FileNotFoundError, match=words):
        get_test_dataset(name)


# ---------------------------------------------------------------- training items


def test_an_item_holds_the_drawn_frames_in_order(folder):
    dataset = train_set(folder, max_frames=8)
    padded = observed_any = 0
    for epoch, index in itertools.product(range(30), range(len(dataset))):
        item = dataset[epoch, index]
        assert {k: (v.dtype, tuple(v.shape)) for k, v in item.items()} == {
            "frames": (torch.uint8, (8, 3, 32, 32)),
            "frame_indices": (torch.int64, (8,)),
            "obs_mask": (torch.float32, (8, 1, 1, 1)),
            "latent_mask": (torch.float32, (8, 1, 1, 1)),
        }
        observed, latent = (item[k].flatten().bool() for k in ("obs_mask", "latent_mask"))
        real = observed | latent
        role = 1 * latent + 2 * ~real  # observed, latent, padding
        assert not (observed & latent).any() and latent.any() and (role.diff() >= 0).all()
        videos, numbers = item["frames"][:, 0, 0, 0].long(), item["frames"][:, 1, 0, 0].long()
        indices = item["frame_indices"]
        assert (videos[real] == index).all() and (videos[~real] != index).all()
        starts = (numbers - indices)[real]
        assert (starts == starts[0]).all() and 0 <= starts[0] <= 10 + index
        assert ((indices >= 0) & (indices < 20)).all()
        assert len(indices[real].unique()) == real.sum()
        padded += (~real).any()
        observed_any += observed.any()
    assert 0 < padded < 150 and 0 < observed_any < 150


def test_windows_start_anywhere(folder):
    dataset = train_set(folder)
    starts = set()
    for epoch in range(200):
        item = dataset[epoch, 0]
        starts.add(int(item["frames"][0, 1, 0, 0]) - int(item["frame_indices"][0]))
    assert starts == set(range(11))


def test_padding_comes_from_every_other_video(folder):
    dataset = train_set(folder)
    others = set()
    for epoch in range(100):
        item = dataset[epoch, 2]
        padding = (item["obs_mask"] + item["latent_mask"]).flatten() == 0
        others |= set(item["frames"][padding, 0, 0, 0].tolist())
    assert others == {0, 1, 3, 4}


def test_padding_can_be_nothing(folder):
    plain = train_set(folder, pad_with_random_frames=False)
    random = train_set(folder)
    padded = 0
    for epoch in range(20):
        a, b = plain[epoch, 3], random[epoch, 3]
        real = (a["obs_mask"] + a["latent_mask"]).flatten().bool()
        assert torch.equal(a["obs_mask"], b["obs_mask"])
        assert torch.equal(a["frames"][real], b["frames"][real])
        assert not a["frames"][~real].any() and not a["frame_indices"][~real].any()
        padded += (~real).any()
    assert padded > 0


def test_an_item_depends_on_seed_epoch_and_index_alone(folder):
    keys = list(itertools.product(range(3), range(5)))
    dataset = train_set(folder)
    forward = [dataset[key] for key in keys]
    again = train_set(folder)
    backward = [again[key] for key in reversed(keys)][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    other = train_set(folder, seed=1)
    assert not torch.equal(forward[0]["frame_indices"], other[0, 0]["frame_indices"])
    assert not torch.equal(forward[0]["frame_indices"], dataset[1, 0]["frame_indices"])


def test_workers_give_the_same_batches_as_one_process(folder):
    def batches(num_workers):
        sampler = ShardedSampler(5, rank=0, world_size=1, seed=0)
        loader = DataLoader(train_set(folder), 3, sampler=sampler, num_workers=num_workers)
        return list(itertools.islice(loader, 4))

    for a, b in zip(batches(0), batches(2), strict=True):
        assert a["frames"].shape == (3, 8, 3, 32, 32)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_only_the_needed_frames_are_read(folder, monkeypatch):
    dataset = train_set(folder)
    read_frames, read = video_io.OpenVideo.read, []

    def record(video, indices):
        read.append(len(indices))
        return read_frames(video, indices)

    monkeypatch.setattr(video_io.OpenVideo, "read", record)
    for epoch in range(20):
        dataset[epoch, 0]
        assert sum(read) == 8  # K, padding included
        read.clear()


def test_a_window_no_longer_than_max_frames_works(folder):
    item = train_set(folder, T=3, max_frames=8)[0, 0]
    assert (item["obs_mask"] + item["latent_mask"]).sum() == 3


def test_a_single_video_pads_with_itself(folder):
    for path in (folder / "train").glob("[1-4].npy"):
        path.unlink()
    item = train_set(folder, T=3, max_frames=8)[0, 0]
    assert (item["frames"][:, 0] == 0).all()


def test_a_video_shorter_than_T_is_named(folder, in_tmp):
    with pytest.raises(ValueError, match=r"train/0\.npy: has 30 frames, need T=31: "):
        train_set(folder, T=31)
    root = make_named("mazes_cwvae", T=7)
    with pytest.raises(ValueError, match=r"train/0\.npy: has 7 frames, need T=300: "):
        get_train_dataset("mazes_cwvae", T=300, max_frames=5)
    np.save(root / "train" / "1.npy", numbered_video(1, 5, 64))
    with pytest.raises(ValueError, match=r"train/1\.npy: has 5 frames, need T=7: "):
        get_train_dataset("mazes_cwvae", T=7, max_frames=7)


@pytest.mark.parametrize("T, max_frames", [(0, 5), (-1, 5), (5, 0)])
def test_lengths_below_one_are_refused(folder, T, max_frames):
    with pytest.raises(ValueError, match="must be at least 1"):
        train_set(folder, T=T, max_frames=max_frames)


# ---------------------------------------------------------------- order


def keys_of(rank, world_size, number, start=0, num_videos=7):
    sampler = ShardedSampler(num_videos, rank=rank, world_size=world_size, seed=0, start=start)
    return list(itertools.islice(sampler, number))


def test_ranks_share_one_permutation_per_epoch():
    ranks = [keys_of(rank, 3, 14) for rank in range(3)]
    stream = [key for keys in zip(*ranks, strict=True) for key in keys]
    assert stream == keys_of(0, 1, 42)
    for epoch in range(6):
        part = stream[7 * epoch : 7 * (epoch + 1)]
        assert {e for e, _ in part} == {epoch}
        assert sorted(index for _, index in part) == list(range(7))
    orders = {tuple(i for e, i in stream if e == epoch) for epoch in range(6)}
    assert len(orders) == 6


READ_ONE_EPOCH = """
import itertools, sys
from improved_diffusion import dist_util
from improved_diffusion.data.video_datasets import ShardedSampler, get_train_dataset

dist_util.setup_dist()
rank, world_size = dist_util.rank(), dist_util.world_size()
data = get_train_dataset("mazes_cwvae", T=12, max_frames=3, pad_with_random_frames=False)
sampler = ShardedSampler(len(data), rank=rank, world_size=world_size, seed=0)
for epoch, index in itertools.takewhile(lambda key: key[0] == 0, sampler):
    video = int(data[epoch, index]["frames"][0, 0, 0, 0])
    sys.stdout.write(f"read {rank} {video}\\n")  # in one piece: lines of two ranks may mingle
dist_util.cleanup()
"""


@pytest.mark.slow
def test_two_mpi_ranks_read_each_video_of_an_epoch_once(in_tmp):
    make_named("mazes_cwvae", T=12, videos=7)
    command = [train_runs.MPIEXEC, "-n", "2", sys.executable, "-c", READ_ONE_EPOCH]
    done = subprocess.run(
        command,
        cwd=in_tmp,
        env=train_runs.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    read = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("read")]
    assert sorted(int(video) for _, video in read) == list(range(7))
    assert {rank for rank, _ in read} == {"0", "1"}


@pytest.mark.parametrize("world_size", [1, 2, 9])
def test_a_resumed_stream_goes_on_where_it_stopped(world_size):
    whole = keys_of(0, 1, 90)
    ranks = [keys_of(rank, world_size, 4, start=13) for rank in range(world_size)]
    stream = [key for keys in zip(*ranks, strict=True) for key in keys]
    assert stream == whole[13 : 13 + 4 * world_size]


@pytest.mark.parametrize("rank, world_size, num_videos", [(2, 2, 5), (-1, 2, 5), (0, 1, 0)])
def test_impossible_shards_are_refused(rank, world_size, num_videos):
    with pytest.raises(ValueError, match="cannot shard"):
        ShardedSampler(num_videos, rank=rank, world_size=world_size, seed=0)


# ---------------------------------------------------------------- testing


def test_test_videos_come_in_the_order_of_their_numbers(folder):
    videos = get_test_dataset(str(folder))
    assert [int(videos.read(i, [0])[0, 0, 0, 0]) for i in range(12)] == list(range(12))
    assert (len(videos), videos.name, videos.T) == (12, "mine", 20)


def test_the_first_T_frames_are_the_default(folder):
    videos = get_test_dataset(str(folder), T=6)
    frames = videos.read(3)
    assert frames.shape == (6, 3, 32, 32) and frames.dtype == np.uint8
    assert frames[:, 1, 0, 0].tolist() == list(range(6))
    assert videos.read(3, [19, 0, 7])[:, 1, 0, 0].tolist() == [19, 0, 7]


def test_T_may_be_longer_than_the_test_videos(folder):
    videos = get_test_dataset(str(folder), T=50)
    assert (videos.T, videos.length(0), len(videos.read(0))) == (50, 20, 20)
    with pytest.raises(ValueError, match=r"0\.npy: has 20 frames, none of index 20"):
        videos.read(0, [20])


def test_the_training_videos_can_be_tested_on(folder):
    videos = get_test_dataset(str(folder), partition="train")
    assert len(videos) == 5 and videos.length(4) == 34


# ---------------------------------------------------------------- bouncy_balls


@pytest.fixture
def small_balls(monkeypatch):
    def make(folder):
        bouncy_balls_make(folder, num_train=3, num_test=2)

    bouncy_balls_make = bouncy_balls.make_dataset
    monkeypatch.setattr(bouncy_balls, "make_dataset", make)


def test_bouncy_balls_are_made_on_first_use(in_tmp, small_balls):
    assert len(get_train_dataset("bouncy_balls", T=100, max_frames=5)) == 3
    videos = get_test_dataset("bouncy_balls")
    assert len(videos) == 2 and videos.read(1).shape == (100, 3, 32, 32)
    truth = bouncy_balls.render(bouncy_balls.simulate(np.random.default_rng([0, 1, 1])))
    np.testing.assert_array_equal(videos.read(1).transpose(0, 2, 3, 1), truth)


def prepare_in(folder, log):
    os.chdir(folder)
    make = bouncy_balls.make_dataset

    def slow(path):
        with open(log, "a") as file:
            file.write("built\n")
        make(path, num_train=2, num_test=1)
        time.sleep(0.5)

    bouncy_balls.make_dataset = slow
    prepare_dataset(DATASETS["bouncy_balls"])
    assert len(list(DATASETS["bouncy_balls"].root.rglob("*.npy"))) == 3


def test_processes_that_start_together_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=prepare_in, args=(tmp_path, tmp_path / "log")) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0] * 4
    assert (tmp_path / "log").read_text() == "built\n"


def test_where_locks_do_not_work_the_first_to_finish_wins(in_tmp, small_balls, monkeypatch):
    import filelock

    def refuse(*args, **kwargs):
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    root = DATASETS["bouncy_balls"].root
    build = bouncy_balls.make_dataset

    def overtaken(folder):
        build(root)
        build(folder)

    monkeypatch.setattr(bouncy_balls, "make_dataset", overtaken)
    prepare_dataset(DATASETS["bouncy_balls"])
    assert len(list(root.rglob("*.npy"))) == 5
    assert [p.name for p in root.parent.iterdir() if p.name.endswith(".tmp")] == []


def test_a_build_that_cannot_be_put_in_place_says_so(in_tmp, small_balls, monkeypatch):
    def refuse(*args):
        raise PermissionError("no renaming here")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError, match="no renaming here"):
        prepare_dataset(DATASETS["bouncy_balls"])


def test_an_interrupted_build_leaves_nothing(in_tmp, monkeypatch):
    def interrupt(folder):
        (folder / "train").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(bouncy_balls, "make_dataset", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(DATASETS["bouncy_balls"])
    assert [p.name for p in (in_tmp / "datasets").iterdir() if not p.name.endswith(".lock")] == []


# ---------------------------------------------------------------- carla


def make_carla(root, num_videos, T=12):
    root.mkdir(parents=True)
    for i in range(num_videos):
        torch.save(torch.from_numpy(numbered_video(i, T, 128)), root / f"video_{i}.pt")


def test_carla_reads_the_files_that_its_lists_name(in_tmp):
    root = DATASETS["carla_no_traffic"].root
    make_carla(root, 4)
    (root / "video_train.csv").write_text(",path\n0,/old/place/video_2.pt\n1,video_0.pt\n")
    (root / "video_test.csv").write_text(",path\n0,x/video_3.pt\n")
    item = get_train_dataset("carla_no_traffic", T=10, max_frames=4)[0, 1]
    assert item["frames"].shape == (4, 3, 128, 128)
    real = (item["latent_mask"] + item["obs_mask"]).flatten().bool()
    assert set(item["frames"][real, 0, 0, 0].tolist()) == {2}
    videos = get_test_dataset("carla_no_traffic")
    assert (len(videos), videos.T) == (1, 1000)
    assert videos.read(0, [5])[0, :2, 0, 0].tolist() == [3, 5]


def test_carla_without_its_lists_says_how_to_make_them(in_tmp):
    root = DATASETS["carla_no_traffic"].root
    make_carla(root, 1)
    with pytest.raises(FileNotFoundError, match="video_test.csv.*make_train_test_split.py --dir"):
        get_test_dataset("carla_no_traffic")
    (root / "video_test.csv").write_text(",path\n0,video_9.pt\n")
    with pytest.raises(FileNotFoundError, match=r"video_9\.pt: no such file"):
        get_test_dataset("carla_no_traffic").read(0)
    (root / "video_test.csv").write_text(",path\nvideo_9.pt\n")
    with pytest.raises(ValueError, match=r"video_test\.csv: line 2 is not"):
        get_test_dataset("carla_no_traffic")


# ---------------------------------------------------------------- folders of one's own


def test_a_folder_is_as_long_as_its_shortest_video_and_as_large_as_its_files(folder):
    spec = dataset_spec(str(folder))
    assert (spec.name, spec.T, spec.image_size, spec.root) == ("mine", 20, 32, folder)


def test_formats_and_sizes_may_be_mixed_with_an_image_size(folder):
    rng = np.random.default_rng(0)
    video = bouncy_balls.render(bouncy_balls.simulate(rng, 25, size=48))
    wide = np.concatenate([video, video], axis=2)
    for name in ("a1.mp4", "b2.gif"):
        video_io.write_video(folder / "train" / name, wide)
    torch.save(torch.from_numpy(wide), folder / "train" / "c.pt")
    (folder / "train" / "notes.txt").write_text("not a video")
    (folder / "train" / "._0.npy").write_text("not a video either")
    with pytest.raises(ValueError, match=r"mine: has .* and other sizes: give --image_size"):
        dataset_spec(str(folder))
    assert dataset_spec(str(folder), image_size=32).T == 20
    videos = get_test_dataset(str(folder), image_size=32, partition="train")
    names = [path.name for path in videos.files.paths]
    assert names == ["0.npy", "1.npy", "a1.mp4", "2.npy", "b2.gif", "3.npy", "4.npy", "c.pt"]
    truth = video_io.centre_crop_resize(wide, 32).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(videos.read(7, range(25)), truth)
    for i in (2, 4):
        assert np.abs(videos.read(i, range(25)).astype(float) - truth).mean() < 6
    dataset = train_set(folder, image_size=32)
    assert {dataset[0, i]["frames"].shape for i in range(8)} == {(8, 3, 32, 32)}


def test_a_named_set_is_resized_too(in_tmp):
    make_named("mazes_cwvae", "test", T=4)
    assert get_test_dataset("mazes_cwvae").read(0).shape == (4, 3, 64, 64)
    assert get_test_dataset("mazes_cwvae", image_size=32).read(0).shape == (4, 3, 32, 32)


def test_a_folder_is_looked_through_once(folder, monkeypatch):
    opened = []
    monkeypatch.setattr(
        video_io, "open_video", lambda p, f=video_io.open_video: opened.append(p.name) or f(p)
    )
    dataset_spec(str(folder))
    assert len(opened) == 17
    train_set(folder)
    assert len(opened) == 17
    np.save(folder / "test" / "3.npy", numbered_video(3, 9))
    assert dataset_spec(str(folder)).T == 9
    assert opened[17:] == ["3.npy"]


def test_a_folder_that_cannot_be_written_to_is_fine(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    assert dataset_spec(str(folder)).T == 20
    assert not list(folder.glob(".*"))


def test_a_folder_without_videos_is_refused(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"no videos \(\.avi, .*train/ or test/"):
        dataset_spec(str(tmp_path))
    for path in (folder / "train").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no videos in the partition train"):
        train_set(folder, T=10)
    (folder / "train").rmdir()
    with pytest.raises(FileNotFoundError, match="train: no such folder"):
        train_set(folder, T=10)


def test_a_folder_may_be_called_like_a_named_set(folder, in_tmp):
    (in_tmp / "minerl").symlink_to(folder)
    assert len(get_test_dataset("./minerl")) == 12
    folder.rename(in_tmp / "bouncy_balls")
    videos = get_test_dataset(str(in_tmp / "bouncy_balls"))
    assert (len(videos), videos.name) == (12, "bouncy_balls")
    assert not (in_tmp / "datasets").exists()


# ---------------------------------------------------------------- options


def test_a_stride_takes_one_frame_in_so_many(folder, in_tmp):
    spec = dataset_spec(str(folder), frame_stride=3)
    assert spec.T == 7  # 0, 3, ..., 18 of 20
    videos = get_test_dataset(spec)
    assert videos.length(0) == 7
    assert videos.read(0)[:, 1, 0, 0].tolist() == list(range(0, 20, 3))
    item = get_train_dataset(spec, T=7, max_frames=7)[0, 0]
    steps = torch.diff(item["frames"][:, 1, 0, 0].long()) - 3 * torch.diff(item["frame_indices"])
    real = (item["obs_mask"] + item["latent_mask"]).flatten().bool()
    assert real.all() and not steps.any()
    assert dataset_spec("mazes_cwvae", frame_stride=4).T == 75
    with pytest.raises(ValueError, match=r"has 10 frames, need T=11"):
        get_train_dataset(spec, T=11, max_frames=3)


@pytest.mark.parametrize("fps, expected", [(5, range(0, 20, 2)), (4, [0, 2, 5, 7, 10, 12, 15, 17])])
def test_a_frame_rate_follows_the_files_time(tmp_path, fps, expected):
    (tmp_path / "test").mkdir()
    frames = numbered_video(0, 20)
    frames[..., 1] *= 12  # far enough apart for a lossy format
    for name in ("0.mp4", "1.gif"):
        video_io.write_video(tmp_path / "test" / name, frames, fps=10)
    videos = get_test_dataset(dataset_spec(str(tmp_path), fps=fps))
    assert videos.T == len(expected)
    for i in range(2):
        numbers = videos.read(i)[:, 1].mean(axis=(1, 2)) / 12
        np.testing.assert_allclose(numbers, list(expected), atol=0.4)


def test_impossible_frame_rates_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"0\.npy: has no frame rate: use --frame_stride"):
        dataset_spec(str(folder), fps=5)
    (tmp_path / "slow" / "test").mkdir(parents=True)
    video_io.write_video(tmp_path / "slow/test/0.mp4", numbered_video(0, 20), fps=10)
    with pytest.raises(ValueError, match=r"0\.mp4: has 10 frames a second, below --fps 12"):
        dataset_spec(str(tmp_path / "slow"), fps=12)
    assert dataset_spec(str(tmp_path / "slow"), fps=10).T == 20
    for options in ({"frame_stride": 0}, {"fps": 0.0}):
        with pytest.raises(ValueError, match="--frame_stride must be at least 1, --fps above 0"):
            dataset_spec(str(folder), **options)
    with pytest.raises(ValueError, match="exclude each other"):
        dataset_spec(str(folder), frame_stride=2, fps=5)
    with pytest.raises(ValueError, match="not for minerl"):
        dataset_spec("minerl", fps=5)


def test_a_folder_without_partitions_is_split_at_random_but_always_the_same_way(folder):
    flat = folder / "test"
    spec = dataset_spec(str(flat), test_fraction=0.25)
    train, test = (get_test_dataset(spec, partition=p).files.paths for p in ("train", "test"))
    assert [path.name for path in test] == ["6.npy", "10.npy", "11.npy"]  # on every machine
    assert sorted(test + train) == sorted(flat.glob("*.npy"))
    tiny = dataset_spec(str(flat), test_fraction=0.01)
    assert len(get_test_dataset(tiny)) == 1  # a share above 0 is at least one video
    with pytest.raises(FileNotFoundError, match="no videos in the partition test"):
        get_test_dataset(dataset_spec(str(flat), test_fraction=0.0))
    with pytest.raises(ValueError, match="--test_fraction 1.5: must be in"):
        dataset_spec(str(flat), test_fraction=1.5)


def test_broken_and_short_training_videos_can_be_left_out(folder, in_tmp, caplog):
    (folder / "train" / "3.npy").write_bytes(b"")
    spec = dataset_spec(str(folder), skip_broken=True)
    dataset = get_train_dataset(spec, T=32, max_frames=4)
    assert [path.name for path in dataset.files.paths] == ["2.npy", "4.npy"]
    *left_out, count = [record.getMessage() for record in caplog.records]
    assert count == "left out 3 of 5 training videos"
    assert len(left_out) == 3 and all(line.startswith("left out: ") for line in left_out)
    assert any("3.npy: the file is empty" in line for line in left_out)
    with pytest.raises(ValueError, match="no training video is fit for T=99"):
        get_train_dataset(spec, T=99, max_frames=4)
    root = make_named("minerl", T=20, videos=3)
    np.save(root / "train" / "1.npy", np.zeros((20, 48, 64, 3), np.uint8))
    dataset = get_train_dataset(dataset_spec("minerl", skip_broken=True), T=20, max_frames=4)
    assert [path.name for path in dataset.files.paths] == ["0.npy", "2.npy"]


def test_a_video_that_breaks_off_inside_is_replaced_and_named_once(folder, caplog):
    whole = folder / "train" / "2.npy"
    spec = dataset_spec(str(folder), skip_broken=True)
    dataset = get_train_dataset(spec, T=20, max_frames=4, pad_with_random_frames=False)
    whole.write_bytes(whole.read_bytes()[:5000])
    for epoch in range(3):
        a, b = dataset[epoch, 2], dataset[epoch, 3]
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert len(caplog.records) == 1
    text = caplog.records[0].getMessage()
    assert text.startswith("left out, number 1 of this process: ") and "train/2.npy" in text
    for path in (folder / "train").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="mine: no training video can be read"):
        dataset[0, 0]


def test_broken_test_videos_are_never_left_out(folder):
    (folder / "test" / "3.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"test/3\.npy: the file is empty"):
        dataset_spec(str(folder), skip_broken=True)


# ---------------------------------------------------------------- copies on a faster disk


def test_files_are_copied_on_first_use_and_when_they_change(folder, tmp_path):
    videos = get_test_dataset(str(folder), cache_dir=str(tmp_path / "fast"))
    assert not (tmp_path / "fast").exists()
    np.testing.assert_array_equal(videos.read(3), get_test_dataset(str(folder)).read(3))
    copies = list((tmp_path / "fast").rglob("*.npy"))
    assert [copy.name for copy in copies] == ["3.npy"]
    copies[0].write_bytes(copies[0].read_bytes().replace(b"\x03", b"\x04"))
    os.utime(copies[0], ns=(0, (folder / "test/3.npy").stat().st_mtime_ns))
    assert videos.read(3, [0])[0, 0, 0, 0] == 4  # the copy is what is read
    np.save(folder / "test" / "3.npy", numbered_video(77, 20))
    assert videos.read(3, [0])[0, 0, 0, 0] == 77


def read_cached(folder, cache_dir):
    videos = get_test_dataset(str(folder), cache_dir=str(cache_dir))
    for i in range(12):
        assert videos.read(i)[0, 0, 0, 0] == i


def test_processes_that_start_together_may_share_a_cache(folder, tmp_path):
    context = multiprocessing.get_context("fork")
    arguments = (folder, tmp_path / "fast")
    jobs = [context.Process(target=read_cached, args=arguments) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0] * 4
    files = [path for path in (tmp_path / "fast").rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == sorted(f"{i}.npy" for i in range(12))


def test_training_items_do_not_depend_on_the_cache(folder, tmp_path):
    cached = train_set(folder, cache_dir=str(tmp_path / "fast"))
    for index in range(5):
        assert torch.equal(cached[0, index]["frames"], train_set(folder)[0, index]["frames"])
    assert len(list((tmp_path / "fast").rglob("*.npy"))) == 5


# ---------------------------------------------------------------- broken files


def test_a_broken_file_is_named_at_once_in_a_folder_of_ones_own(folder):
    (folder / "train" / "3.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train/3\.npy: the file is empty"):
        train_set(folder)


def test_all_bad_files_are_named_before_training(folder, in_tmp):
    (folder / "train" / "1.npy").write_bytes(b"")
    (folder / "train" / "3.npy").write_text("text")
    (folder / "test" / "5.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="mine: 3 videos cannot be used: ") as caught:
        dataset_spec(str(folder))
    assert all(name in str(caught.value) for name in ("train/1.npy", "train/3.npy", "test/5.npy"))
    root = make_named("minerl", T=20, videos=4)
    np.save(root / "train" / "1.npy", np.zeros((20, 48, 64, 3), np.uint8))
    np.save(root / "train" / "3.npy", np.zeros((19, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="torch: 2 videos cannot be used: ") as caught:
        get_train_dataset("minerl", T=20, max_frames=4)
    assert "1.npy: is 48x64" in str(caught.value) and "3.npy: has 19 frames" in str(caught.value)


def test_files_that_a_list_names_but_are_not_there_are_named_before_training(in_tmp):
    root = DATASETS["carla_with_traffic"].root
    make_carla(root, 2)
    (root / "video_train.csv").write_text(",path\n0,video_7.pt\n1,video_0.pt\n2,video_8.pt\n")
    with pytest.raises(ValueError, match="2 videos cannot be used: .*video_7.pt: no such file"):
        get_train_dataset("carla_with_traffic", T=10, max_frames=4)


def test_headers_are_read_once_and_then_taken_from_the_index(in_tmp):
    folder = make_named("minerl", T=5, videos=3) / "train"
    assert len(get_train_dataset("minerl", T=5, max_frames=4)) == 3
    path = folder / "1.npy"
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(b"?" * len(content))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(get_train_dataset("minerl", T=5, max_frames=4)) == 3  # nobody looked into the file
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1_000_000))
    with pytest.raises(ValueError, match=r"1\.npy"):
        get_train_dataset("minerl", T=5, max_frames=4)


def test_a_broken_file_of_a_named_set_is_named_when_it_is_read(in_tmp):
    root = make_named("minerl", T=20)
    dataset = get_train_dataset("minerl", T=20, max_frames=4, pad_with_random_frames=False)
    (root / "train" / "1.npy").write_bytes((root / "train" / "1.npy").read_bytes()[:5000])
    assert dataset[0, 0]["frames"].shape == (4, 3, 64, 64)
    with pytest.raises(ValueError, match=r"train/1\.npy: broken \.npy file"):
        dataset[0, 1]


def test_a_video_of_another_size_than_its_set_is_refused(in_tmp):
    root = make_named("minerl", T=20)
    np.save(root / "train" / "1.npy", np.zeros((20, 48, 64, 3), np.uint8))
    files = VideoFiles(dataset_spec("minerl"), "train")
    with pytest.raises(ValueError, match=r"1\.npy: is 48x64, videos of minerl are 64x64"):
        files.open(1)


def test_files_are_sorted_by_their_last_number_then_by_name(tmp_path):
    names = ["b_10.npy", "walk.npy", "2020_b_9.npy", "a_10.npy", "run.npy"]
    files = sorted_files(tmp_path / name for name in names)
    expected = ["2020_b_9.npy", "a_10.npy", "b_10.npy", "run.npy", "walk.npy"]
    assert [path.name for path in files] == expected
