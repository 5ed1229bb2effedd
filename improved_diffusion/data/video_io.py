"""Reading and writing one video file; between [-1, 1] and uint8.

A video in memory is uint8 [T, H, W, 3] here, as files hold it.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import mmap
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from improved_diffusion.data.paths import atomic_write

RED = (255, 0, 0)


@dataclass(frozen=True)
class OpenVideo:
    """A video whose frames are not read yet."""

    path: Path
    shape: tuple[int, int, int]  # (T, H, W)
    read_frames: Callable[[Sequence[int]], np.ndarray]  # legal indices -> uint8 [n, H, W, 3]
    fps: float | None = None  # frames per second, where the file says

    def read(self, frame_indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 [n, H, W, 3]: n frames, in any order.

        Raises ValueError for an index outside [0, T) or a broken file.
        """
        indices = [int(index) for index in frame_indices]
        for index in indices:
            if not 0 <= index < self.shape[0]:
                raise ValueError(f"{self.path}: has {self.shape[0]} frames, none of index {index}")
        return self.read_frames(indices)


# ---------------------------------------------------------------- reading


def open_video(path: str | os.PathLike[str]) -> OpenVideo:
    """Open a video of any format in READERS; only frames asked for are read, where possible.

    Raises FileNotFoundError, or ValueError that names the file and its fault: empty, truncated,
    not of the format its suffix says, not uint8 [T, H, W, 3], without frames.
    """
    path = Path(path)
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path}: unknown video format; use {', '.join(sorted(READERS))}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty: make it again or remove it")
    video = READERS[path.suffix.lower()](path)
    if video.shape[0] == 0:
        raise ValueError(f"{path}: the video has no frames: make it again or remove it")
    return video


def read_video(
    path: str | os.PathLike[str], frame_indices: Sequence[int] | np.ndarray | None = None
) -> np.ndarray:
    """Frames of a video: uint8 [n, H, W, 3].

    Args:
        path: a file of a format in READERS.
        frame_indices: n indices in [0, T), in any order (None: all frames).

    Raises: as `open_video`, and ValueError for an index outside the video.
    """
    video = open_video(path)
    return video.read(range(video.shape[0]) if frame_indices is None else frame_indices)


def subsampled_length(length: int, step: float) -> int:
    """How many of `length` frames are left when one in `step` is taken."""
    return int((length - 1) / step + 1e-9) + 1


def subsample(video: OpenVideo, step: float) -> OpenVideo:
    """The video of the frames 0, step, 2 step, ..., rounded down; step >= 1, also fractional."""
    return OpenVideo(
        video.path,
        (subsampled_length(video.shape[0], step), *video.shape[1:]),
        lambda indices: video.read_frames([int(i * step + 1e-9) for i in indices]),
        video.fps and video.fps / step,
    )


def _broken(path: Path, error: object) -> ValueError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = lines[0].rstrip(".")
    return ValueError(f"{path}: broken {path.suffix} file ({reason}): make it again or remove it")


def _from_array(path: Path, array: Any, mapped_at: int | None = None) -> OpenVideo:
    """`array`: a numpy array or a tensor; `mapped_at`: its address where it is memory-mapped."""
    shape = tuple(array.shape)
    dtype = str(array.dtype).removeprefix("torch.")
    if dtype != "uint8" or len(shape) != 4 or shape[3] != 3:
        raise ValueError(f"{path}: holds {dtype} {list(shape)}, need uint8 [T, H, W, 3]")
    frame_bytes = shape[1] * shape[2] * shape[3]
    if mapped_at is not None:
        # Else the kernel reads ahead after each frame, in the end the whole file.
        _advise(mapped_at, shape[0] * frame_bytes, mmap.MADV_RANDOM)

    def read_frames(indices: Sequence[int]) -> np.ndarray:
        if mapped_at is not None:
            for index in indices:
                _advise(mapped_at + index * frame_bytes, frame_bytes, mmap.MADV_WILLNEED)
        return np.array(array[indices])  # a copy: nobody writes to the file or keeps it open

    return OpenVideo(path, shape[:3], read_frames)


def _advise(address: int, num_bytes: int, advice: int) -> None:
    """Tell the kernel how mapped memory will be used; only a hint, so it may be refused."""
    start = address - address % mmap.PAGESIZE
    _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + num_bytes - start), advice)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _open_npy(path: Path) -> OpenVideo:
    with open(path, "rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError(f"{path}: not a .npy file: make it again with numpy.save or remove it")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise _broken(path, error) from None
    return _from_array(path, array, array.ctypes.data if array.flags.c_contiguous else None)


def _open_npz(path: Path) -> OpenVideo:
    if not zipfile.is_zipfile(path):
        raise _broken(path, "truncated, or not a .npz file")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays.files
            name = "video" if "video" in names else names[0] if len(names) == 1 else None
            array = None if name is None else arrays[name]
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise _broken(path, error) from None
    if array is None:
        raise ValueError(f"{path}: has the arrays {names}; name the video's array `video`")
    return _from_array(path, array)


def _open_pt(path: Path) -> OpenVideo:
    import torch

    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"  # files of old torch versions cannot be memory-mapped
    try:
        video = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError) as error:
        raise _broken(path, error) from None
    if not isinstance(video, torch.Tensor):
        kind = type(video).__name__
        raise ValueError(f"{path}: holds a {kind}, need a uint8 tensor [T, H, W, 3]")
    return _from_array(path, video, video.data_ptr() if is_zip and video.is_contiguous() else None)


def _open_gif(path: Path) -> OpenVideo:
    with open(path, "rb") as file:
        file.seek(-min(64, path.stat().st_size), os.SEEK_END)
        if not file.read().rstrip(b"\0").endswith(b";"):
            raise _broken(path, "truncated: the end marker is missing")
    with _gif_image(path) as image:
        shape = (image.n_frames, image.height, image.width)
        duration = image.info.get("duration")  # of the first frame, in milliseconds
    return OpenVideo(path, shape, functools.partial(_read_gif, path), duration and 1000 / duration)


@contextmanager
def _gif_image(path: Path) -> Iterator[Any]:
    """The opened file; what goes wrong with it becomes a ValueError."""
    from PIL import Image

    bomb = Image.DecompressionBombError
    try:
        with Image.open(path, formats=["GIF"]) as image:
            yield image
    except (OSError, EOFError, ValueError, LookupError, SyntaxError, bomb) as error:
        raise _broken(path, error) from None


def _read_gif(path: Path, indices: Sequence[int]) -> np.ndarray:
    frames = {}
    with _gif_image(path) as image:
        for index in sorted(set(indices)):
            image.seek(index)
            frames[index] = np.array(image.convert("RGB"))
        return np.stack([frames[index] for index in indices])


# ---------------------------------------------------------------- reading with PyAV


class _StreamIndex(NamedTuple):
    """Where the frames of a compressed file are."""

    shape: tuple[int, int, int]
    fps: float | None
    numbers: dict[int, int]  # timestamp -> frame; empty where frames must be counted instead
    key_frames: list[int]  # the frames where decoding can start, ascending
    key_times: list[int]  # the decoding timestamps of those frames


@contextmanager
def _av_stream(path: Path) -> Iterator[tuple[Any, Any]]:
    """(container, video stream); what goes wrong with the file becomes a ValueError."""
    try:
        import av
    except ImportError:
        raise ValueError(f"{path}: reading {path.suffix} needs PyAV: pip install av") from None
    try:
        with av.open(os.fspath(path)) as container:
            stream = next(iter(container.streams.video), None)
            if stream is None or stream.codec_context is None:
                raise ValueError(f"{path}: has no video that can be decoded")
            yield container, stream
    except av.error.FFmpegError as error:
        raise _broken(path, error.strerror) from None


def _open_av(path: Path) -> OpenVideo:
    stat = path.stat()
    index = _stream_index(path, stat.st_size, stat.st_mtime_ns)
    return OpenVideo(path, index.shape, functools.partial(_read_av, path, index), index.fps)


@functools.lru_cache(maxsize=4096)
def _stream_index(path: Path, size: int, mtime_ns: int) -> _StreamIndex:
    """Read the packets' timestamps; only the first frame is decoded, which knows how the camera was held.

    Size and mtime are arguments so that a changed file is read again.
    """
    with _av_stream(path) as (container, stream):
        packets = [p for p in container.demux(stream) if p.size > 0]
        _refuse_truncated(path, stream, packets)
        shown = [p for p in packets if not p.is_discard]  # a cut file begins with some that are not
        shape = (len(shown), *_upright_size(container, stream))
        fps = float(stream.average_rate) if stream.average_rate else None
        counted = container.format.name == "avi"  # holds decoding timestamps alone
        fps = fps and fps / (_ticks_per_frame(stream, packets) if counted else 1)
    times = sorted(p.pts for p in packets if p.pts is not None)
    numbers = {time: number for number, time in enumerate(times)}
    if counted or len(shown) < len(packets) or len(numbers) < len(packets):
        return _StreamIndex(shape, fps, {}, [], [])
    keys = sorted((numbers[p.pts], p.dts) for p in packets if p.is_keyframe and p.dts is not None)
    key_frames = [number for number, _ in keys]
    return _StreamIndex(shape, fps, numbers, key_frames, [dts for _, dts in keys])


def _refuse_truncated(path: Path, stream: Any, packets: list[Any]) -> None:
    """Compare with the number of frames that the header declares, or (.webm) with the duration."""
    if len(packets) * _ticks_per_frame(stream, packets) < stream.frames - 0.5:
        raise _broken(path, f"truncated: {len(packets)} of {stream.frames} frames are there")
    duration = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
    if duration is None or not packets or not stream.average_rate:
        return
    declared = 3600 * int(duration[1]) + 60 * int(duration[2]) + float(duration[3])
    frame = 1 / stream.average_rate / stream.time_base
    end = max((p.pts or 0) + (p.duration or frame) for p in packets) * stream.time_base
    if end < declared - 2 / stream.average_rate:
        raise _broken(path, f"truncated: {float(end):.1f} of {declared:.1f} seconds are there")


def _ticks_per_frame(stream: Any, packets: list[Any]) -> float:
    """Of the header's clock: 1, but for .avi files that were copied from others with a finer one."""
    times = sorted(p.dts for p in packets if p.dts is not None)
    if not stream.average_rate or len(times) < 2:
        return 1.0
    return max(1.0, float(np.median(np.diff(times)) * stream.time_base * stream.average_rate))


def _read_av(path: Path, index: _StreamIndex, indices: Sequence[int]) -> np.ndarray:
    """Decode from the key frame before each wanted frame, once for all that share one."""
    by_key: dict[int, set[int]] = {}
    for number in sorted(set(indices)):
        by_key.setdefault(bisect.bisect_right(index.key_frames, number) - 1, set()).add(number)
    frames: dict[int, np.ndarray] = {}
    with _av_stream(path) as (container, stream):
        for key, wanted in by_key.items():
            if key >= 0:
                container.seek(index.key_times[key], stream=stream)
            for count, frame in enumerate(container.decode(stream)):
                number = index.numbers.get(frame.pts, -1) if index.numbers else count
                if number in wanted:
                    frames[number] = _upright(frame)
                    wanted.remove(number)
                if not wanted:
                    break
            if wanted:
                raise _broken(path, f"frame {min(wanted)} cannot be decoded")
    return np.stack([frames[number] for number in indices])


def _upright(frame: Any) -> np.ndarray:
    """A decoded frame as it is to be looked at, [H, W, 3]: phones store how they were held."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def _upright_size(container: Any, stream: Any) -> tuple[int, int]:
    """(height, width) of the frames as `_upright` turns them."""
    container.seek(0)
    first = next(container.decode(stream), None)
    is_turned = first is not None and first.rotation // 90 % 2 == 1
    return (stream.width, stream.height) if is_turned else (stream.height, stream.width)


READERS: dict[str, Callable[[Path], OpenVideo]] = {
    ".npy": _open_npy,
    ".npz": _open_npz,
    ".pt": _open_pt,
    ".gif": _open_gif,
    ".mp4": _open_av,
    ".avi": _open_av,
    ".webm": _open_av,
}


# ---------------------------------------------------------------- frames


def centre_crop_resize(frames: np.ndarray, size: int) -> np.ndarray:
    """uint8 [T, H, W, 3] -> [T, size, size, 3]: the largest centred square, antialiased."""
    from PIL import Image

    height, width = frames.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = frames[:, top : top + side, left : left + side]
    if side == size:
        return square
    resized = [Image.fromarray(f).resize((size, size), Image.Resampling.BICUBIC) for f in square]
    return np.stack([np.asarray(image) for image in resized])


def add_border(frames: np.ndarray, is_observed: np.ndarray) -> np.ndarray:
    """Paint a red border over the observed frames.

    Args:
        frames: [T, 3, H, W] uint8; left as they are.
        is_observed: [T] bool.

    Returns: [T, 3, H, W] uint8.
    """
    width = max(1, frames.shape[-1] // 32)
    inside = np.zeros(frames.shape[-2:], dtype=bool)
    inside[width:-width, width:-width] = True
    painted = np.asarray(is_observed)[:, None, None, None] & ~inside
    return np.where(painted, np.array(RED, dtype=np.uint8)[:, None, None], frames)


# ---------------------------------------------------------------- writing


def write_video(path: str | os.PathLike[str], frames: np.ndarray, fps: float = 10) -> None:
    """Write a .gif (endless loop) or .mp4 file (H.264; odd sizes grow by a pixel).

    Args:
        path: the file, whose suffix tells the format.
        frames: [T, H, W, 3] uint8.
        fps: frames per second.

    Raises ValueError for another suffix.
    """
    import imageio.v3 as iio

    suffix = Path(path).suffix
    if suffix == ".gif":
        # Milliseconds; a gif holds hundredths of a second.
        data = iio.imwrite("<bytes>", frames, extension=".gif", duration=1000 / fps, loop=0)
    elif suffix == ".mp4":
        data = iio.imwrite(
            "<bytes>", frames, extension=".mp4", plugin="FFMPEG", fps=fps, macro_block_size=2
        )
    else:
        raise ValueError(f"{path}: videos are written as .gif or .mp4")
    with atomic_write(path) as file:
        file.write(data)
