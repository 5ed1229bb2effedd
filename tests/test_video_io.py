import os
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion.bouncy_balls import render, simulate
from improved_diffusion.data import video_io
from improved_diffusion.data.frame_batch import to_uint8
from improved_diffusion.data.video_io import open_video, read_video, write_video

T, SIZE = 40, 64


@pytest.fixture(scope="module")
def video():
    """uint8 [40, 64, 64, 3], every frame different."""
    return render(simulate(np.random.default_rng(0), T, size=SIZE))


def encode(path, frames, codec, **options):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def save(path, video):
    """Write `video` in the format that the suffix tells."""
    if path.suffix == ".npy":
        np.save(path, video)
    elif path.suffix == ".npz":
        np.savez_compressed(path, video=video, other=np.zeros(3))
    elif path.suffix == ".pt":
        torch.save(torch.from_numpy(video), path)
    elif path.suffix == ".gif":
        write_video(path, video)
    else:
        codec = {".mp4": "libx264", ".avi": "mpeg4", ".webm": "libvpx-vp9"}[path.suffix]
        encode(path, video, codec, g="12")
    return path


LOSSLESS = [".npy", ".npz", ".pt"]
SUFFIXES = [*LOSSLESS, ".gif", ".mp4", ".avi", ".webm"]
INDICES = [25, 3, 3, 39, 0, 24, 12]


def encode_turned(path, frames, degrees):
    """An .mp4 of a phone that was held turned: the frames as its sensor sees them, and a mark."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.set_display_rotation(degrees)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_phone_held_sideways_films_upright_videos(tmp_path, video, degrees):
    upright = video[:4, :, :48]
    path = tmp_path / "phone.mp4"
    encode_turned(path, np.rot90(upright, -degrees // 90, axes=(1, 2)), degrees)
    assert open_video(path).shape == (4, 64, 48)
    assert np.abs(read_video(path).astype(int) - upright).mean() < 8


def test_every_format_is_tested():
    assert sorted(SUFFIXES) == sorted(video_io.READERS)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_video_comes_back(tmp_path, video, suffix):
    path = save(tmp_path / f"0{suffix}", video)
    frames = read_video(path)
    assert frames.dtype == np.uint8 and frames.shape == video.shape
    assert open_video(path).shape[0] == T
    if suffix in LOSSLESS:
        np.testing.assert_array_equal(frames, video)
    # Every frame resembles itself more than its neighbours.
    errors = np.abs(frames[:, None].astype(float) - video[None]).mean(axis=(2, 3, 4))
    np.testing.assert_array_equal(errors.argmin(axis=1), np.arange(T))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_chosen_frames_equal_those_of_the_whole_video(tmp_path, video, suffix):
    path = save(tmp_path / f"0{suffix}", video)
    np.testing.assert_array_equal(read_video(path, INDICES), read_video(path)[INDICES])


@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("b_frames.mp4", "libx264", {"g": "12", "bf": "3"}),
        ("open_gop.mp4", "libx264", {"x264-params": "keyint=12:open-gop=1:bframes=3"}),
        ("b_frames.avi", "libx264", {"g": "12", "bf": "3"}),
    ],
)
def test_seeking_is_exact_in_files_with_reordered_frames(tmp_path, video, name, codec, options):
    import av

    encode(tmp_path / name, video, codec, **options)
    with av.open(str(tmp_path / name)) as container:
        truth = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert len(truth) == T
    for index in range(T):
        np.testing.assert_array_equal(read_video(tmp_path / name, [index])[0], truth[index])


def test_frames_of_an_array_file_are_read_without_the_rest(tmp_path, video, monkeypatch):
    path = save(tmp_path / "0.npy", video)
    load, opened = np.load, []

    def record(*args, **kwargs):
        opened.append(load(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(np, "load", record)
    frames = read_video(path, [5])
    assert isinstance(opened[0], np.memmap)
    assert not np.shares_memory(frames, opened[0]) and frames.nbytes == video[:1].nbytes


def bytes_from_disk():
    """Bytes that this process made the kernel fetch from storage."""
    with open("/proc/self/io") as file:
        return int(dict(line.split(": ") for line in file.read().splitlines())["read_bytes"])


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_no_more_than_the_chosen_frames_comes_from_the_disk(tmp_path, suffix):
    video = np.random.default_rng(0).integers(0, 256, (300, 64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / f"0{suffix}", video)
    open_video(path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = bytes_from_disk()
    indices = range(7, 300, 15)
    np.testing.assert_array_equal(read_video(path, indices), video[indices])
    assert bytes_from_disk() - before < video.nbytes / 4


def test_a_file_that_changed_is_indexed_again(tmp_path, video):
    path = save(tmp_path / "0.mp4", video)
    assert open_video(path).shape[0] == T
    save(path, video[:10])
    assert open_video(path).shape[0] == 10


@pytest.mark.parametrize("index", [-1, T])
def test_an_index_outside_the_video_is_refused(tmp_path, video, index):
    path = save(tmp_path / "0.npy", video)
    with pytest.raises(ValueError, match=rf"0\.npy: has 40 frames, none of index {index}"):
        read_video(path, [index])


@pytest.mark.parametrize("step", [1, 2, 2.5, 30 / 7, 39, 100])
def test_subsampling_takes_the_frames_at_multiples_of_the_step(tmp_path, video, step):
    whole = video_io.open_video(save(tmp_path / "0.npy", video))
    part = video_io.subsample(whole, step)
    expected = [int(i * step + 1e-9) for i in range(T) if i * step <= T - 1]
    assert part.shape == (len(expected), SIZE, SIZE)
    np.testing.assert_array_equal(part.read(range(len(expected))), video[expected])
    with pytest.raises(ValueError, match="none of index"):
        part.read([len(expected)])


def test_the_frame_rate_is_known_where_the_file_says(tmp_path, video):
    paths = [save(tmp_path / f"0{suffix}", video) for suffix in SUFFIXES]
    rates = {path.suffix: video_io.open_video(path).fps for path in paths}
    assert rates == {
        ".npy": None,
        ".npz": None,
        ".pt": None,
        ".gif": 10.0,
        ".mp4": 25.0,
        ".avi": 25.0,
        ".webm": 25.0,
    }


# ---------------------------------------------------------------- broken files


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_empty_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"0{suffix}"
    path.touch()
    with pytest.raises(ValueError, match=rf"0\{suffix}: the file is empty"):
        read_video(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_truncated_file_is_refused(tmp_path, video, suffix):
    path = save(tmp_path / f"0{suffix}", video)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"0\{suffix}: broken \{suffix} file") as caught:
        read_video(path)
    assert "\n" not in str(caught.value)


def test_an_mp4_whose_header_is_whole_but_frames_are_missing_is_refused(tmp_path, video):
    path = tmp_path / "0.mp4"
    import av

    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height = stream.width = SIZE
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert open_video(path).shape[0] == T
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(ValueError, match=r"0\.mp4: broken .mp4 file \(truncated: \d+ of 40 frames"):
        read_video(path)


def ffmpeg(*words) -> None:
    """Do what users do with their clips."""
    program = imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run([program, "-v", "error", "-y", *map(str, words)], check=True)


def test_a_clip_that_was_cut_or_copied_without_encoding_it_again_is_whole(tmp_path, video):
    source = tmp_path / "0.mp4"
    write_video(source, np.concatenate([video] * 3), fps=25)
    whole = read_video(source)
    cut, copied = tmp_path / "cut.mp4", tmp_path / "copied.avi"
    ffmpeg("-ss", "0.6", "-i", source, "-c", "copy", cut)
    ffmpeg("-i", source, "-c", "copy", copied)
    found = read_video(cut)  # which begins at a key frame before, that players do not show
    start = len(whole) - len(found)
    assert abs(start - 15) <= 1
    np.testing.assert_array_equal(found, whole[start:])
    np.testing.assert_array_equal(read_video(cut, [7, 2]), whole[[start + 7, start + 2]])
    assert len(read_video(copied)) == len(whole) and open_video(copied).fps == pytest.approx(25)


def test_a_webm_whose_last_frame_stays_long_is_whole(tmp_path, video):
    source, made = tmp_path / "0.gif", tmp_path / "0.webm"
    images = [Image.fromarray(frame) for frame in video]
    durations = [50] * (len(video) - 1) + [2000]
    images[0].save(source, save_all=True, append_images=images[1:], duration=durations)
    ffmpeg("-i", source, "-pix_fmt", "yuv420p", made)
    assert len(read_video(made)) == len(video)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_text_under_a_videos_name_is_refused(tmp_path, suffix):
    path = tmp_path / f"0{suffix}"
    path.write_text("<html>404 not found</html>\n" * 20)
    with pytest.raises(ValueError, match=rf"0\{suffix}: (broken|not a)"):
        read_video(path)


@pytest.mark.parametrize(
    "shape, dtype, found",
    [
        ((6, 64, 64, 4), np.uint8, r"uint8 \[6, 64, 64, 4\]"),
        ((6, 3, 64, 64), np.uint8, r"uint8 \[6, 3, 64, 64\]"),
        ((6, 64, 64), np.uint8, r"uint8 \[6, 64, 64\]"),
        ((6, 64, 64, 3), np.float64, r"float64 \[6, 64, 64, 3\]"),
    ],
)
@pytest.mark.parametrize("suffix", LOSSLESS)
def test_arrays_of_another_layout_are_refused(tmp_path, suffix, shape, dtype, found):
    path = save(tmp_path / f"0{suffix}", np.zeros(shape, dtype))
    with pytest.raises(ValueError, match=rf"0\{suffix}: holds {found}, need uint8 \[T, H, W, 3\]"):
        read_video(path)


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_a_video_without_frames_is_refused(tmp_path, suffix):
    path = save(tmp_path / f"0{suffix}", np.zeros((0, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="has no frames"):
        read_video(path)


class Mine:
    """Would be made by the unpickler, if it were allowed to."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_pickled_objects_are_never_loaded(tmp_path, suffix):
    path = tmp_path / f"0{suffix}"
    objects = np.array([Mine()], dtype=object)
    if suffix == ".npy":
        np.save(path, objects, allow_pickle=True)
    elif suffix == ".npz":
        np.savez(path, video=objects)
    else:
        torch.save(Mine(), path)
    with pytest.raises(ValueError, match=rf"0\{suffix}: broken"):
        read_video(path)


def test_an_npz_of_several_arrays_without_a_video_is_refused(tmp_path, video):
    np.savez(tmp_path / "0.npz", a=video, b=video)
    with pytest.raises(ValueError, match=r"0\.npz: has the arrays \['a', 'b'\]"):
        read_video(tmp_path / "0.npz")
    np.savez(tmp_path / "1.npz", a=video)
    np.testing.assert_array_equal(read_video(tmp_path / "1.npz"), video)


def test_a_pt_file_of_something_else_is_refused(tmp_path):
    torch.save({"video": torch.zeros(2)}, tmp_path / "0.pt")
    with pytest.raises(ValueError, match="holds a dict, need a uint8 tensor"):
        read_video(tmp_path / "0.pt")


def test_a_pt_file_in_the_old_format_is_read(tmp_path, video):
    torch.save(torch.from_numpy(video), tmp_path / "0.pt", _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(read_video(tmp_path / "0.pt"), video)


def test_missing_files_and_unknown_formats_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"0\.npy: no such file"):
        read_video(tmp_path / "0.npy")
    with pytest.raises(ValueError, match=r"0\.txt: unknown video format; use \.avi, "):
        read_video(tmp_path / "0.txt")


# ---------------------------------------------------------------- frames


def test_values_are_rounded_and_clipped():
    values = np.arange(256)
    exact = values / 127.5 - 1
    np.testing.assert_array_equal(to_uint8(exact), values)
    np.testing.assert_array_equal(to_uint8(exact + 0.49 / 127.5), values)
    np.testing.assert_array_equal(to_uint8(exact - 0.49 / 127.5), values)
    x = torch.tensor([-7.0, 7.0], dtype=torch.bfloat16, requires_grad=True)
    np.testing.assert_array_equal(to_uint8(x), np.array([0, 255], np.uint8))


def test_frames_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([0.0, float("nan")]))


def test_the_centre_is_cropped_and_resized_without_aliasing():
    frames = np.zeros((2, 128, 192, 3), np.uint8)
    frames[:, :, :32] = frames[:, :, -32:] = 255  # what the crop takes away
    frames[:, ::2, 32:-32] = 200  # stripes that would alias
    resized = video_io.centre_crop_resize(frames, 32)
    assert resized.shape == (2, 32, 32, 3) and resized.dtype == np.uint8
    np.testing.assert_allclose(resized[:, 2:-2].astype(float), 100, atol=3)


def test_the_right_size_is_left_as_it_is(video):
    np.testing.assert_array_equal(video_io.centre_crop_resize(video, SIZE), video)


def test_observed_frames_get_a_red_border(video):
    frames = np.ascontiguousarray(video.transpose(0, 3, 1, 2))
    before = frames.copy()
    is_observed = np.arange(T) < 3
    bordered = video_io.add_border(frames, is_observed)
    red = np.array([255, 0, 0])[:, None]
    marked = bordered[:3]
    for edge in (marked[:, :, 0], marked[:, :, -1], marked[..., 0], marked[..., -1]):
        np.testing.assert_array_equal(edge, np.broadcast_to(red, edge.shape))
    np.testing.assert_array_equal(bordered[3:], frames[3:])
    np.testing.assert_array_equal(bordered[:, :, 4:-4, 4:-4], frames[:, :, 4:-4, 4:-4])
    np.testing.assert_array_equal(frames, before)
    assert bordered.dtype == np.uint8


# ---------------------------------------------------------------- writing


def test_a_gif_has_the_frame_rate_and_loops(tmp_path, video):
    from PIL import Image

    write_video(tmp_path / "a.gif", video, fps=20)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["duration"] == 50 and image.info["loop"] == 0
    assert np.abs(read_video(tmp_path / "a.gif").astype(float) - video).mean() < 1


@pytest.mark.parametrize("side", [62, 32])
def test_an_mp4_keeps_even_sizes_and_the_frame_rate(tmp_path, video, side):
    import av

    write_video(tmp_path / "a.mp4", video[:, :side, :side], fps=5)
    frames = read_video(tmp_path / "a.mp4")
    assert frames.shape == (T, side, side, 3)
    assert np.abs(frames.astype(float) - video[:, :side, :side]).mean() < 6
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 5


def test_writing_leaves_nothing_half_written(tmp_path, video, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_video(tmp_path / "a.gif", video[:3])
    assert list(tmp_path.iterdir()) == []


def test_another_format_is_not_written(tmp_path, video):
    with pytest.raises(ValueError, match=r"a\.png: videos are written as \.gif or \.mp4"):
        write_video(tmp_path / "a.png", video)
