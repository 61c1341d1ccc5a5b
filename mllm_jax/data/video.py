"""Clips: a video file, an array or a list of pictures to a few resized frames and their times.

Frames are decoded one by one and resized at once, so a clip is never held in full size. PyAV is imported when a
file is opened; clips that are already in memory do not need it.
"""

import dataclasses
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mllm_jax.data.images import load_image, resized, shrunk_size, smart_resize, source_name


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip whose pixels are not read yet. `read(indices)` yields the frames of these rising numbers, upright RGB."""

    frames: int
    fps: float
    height: int
    width: int
    name: str
    read: Callable[[Sequence[int]], Iterator[Image.Image]]


def open_clip(source: Any, fps: float) -> Clip:
    """Opens a clip without reading its frames.

    `source`: the path of a video file, the bytes of one, an array u8[t h w 3], or a list of pictures (all of one size).
    `fps`: frames per second of an array or a list; a file says its own.
    Raises ValueError, naming the file, if it is no video, is empty or is damaged; FileNotFoundError if it is missing.
    """
    if isinstance(source, (str, os.PathLike, bytes)):
        return _open_file(source if isinstance(source, bytes) else os.fspath(source))
    if not isinstance(source, (np.ndarray, list, tuple)) or len(source) == 0:
        raise ValueError(f"a clip must be a path, bytes, u8[t h w 3] or a list of pictures, got {source_name(source)}")
    if fps <= 0:
        raise ValueError(f"a clip needs a positive fps, got {fps}")
    first = load_image(source[0])

    def read(indices):
        for index in indices:
            frame = load_image(source[index])
            if frame.size != first.size:
                raise ValueError(f"frame {index} of a clip is {frame.size}, its first frame is {first.size}")
            yield frame

    return Clip(len(source), float(fps), first.height, first.width, source_name(source), read)


def _pyav():
    try:
        import av
    except ImportError as error:
        raise ImportError("reading video files needs PyAV: pip install 'mllm_jax[video]'") from error
    return av


def _open_file(source: str | bytes) -> Clip:
    name = source_name(source)
    if isinstance(source, str) and not os.path.exists(source):
        raise FileNotFoundError(f"{name}: no such video")
    av = _pyav()
    try:
        first = next(_decode(source, [0]))
        with av.open(_file(source)) as container:
            stream = container.streams.video[0]
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{name}: not a readable video ({error})") from error
    if fps <= 0:
        raise ValueError(f"{name}: the file states no frame rate")
    return Clip(frames, fps, first.height, first.width, name, lambda indices: _decode(source, indices))


def _file(source: str | bytes) -> str | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _decode(source: str | bytes, indices: Sequence[int]) -> Iterator[Image.Image]:
    """Decodes from the start and yields the wanted frames; a container's seek does not land on exact frame numbers."""
    av = _pyav()
    wanted = iter(indices)
    index = next(wanted, None)
    frame = None
    try:
        with av.open(_file(source)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for number, frame in enumerate(container.decode(stream)):
                if number == index:
                    yield _upright(frame)
                    index = next(wanted, None)
                if index is None:
                    return
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{source_name(source)}: not a readable video ({error})") from error
    # Containers often state a frame or two more than they hold, and the last frame is always wanted.
    if frame is None or next(wanted, None) is not None:
        raise ValueError(f"{source_name(source)}: ends before frame {index}")
    yield _upright(frame)


def _upright(frame: Any) -> Image.Image:
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def frame_count(frames: int, fps: float, target_fps: float, min_frames: int, max_frames: int, multiple: int = 1) -> int:
    """How many of a clip's `frames` are read: `target_fps` a second, within the bounds and what there is.

    `multiple` rounds the bounds inwards and the count down; it is 1 for Qwen3-VL, whose odd tail is padded instead.
    """
    low = math.ceil(min_frames / multiple) * multiple
    high = math.floor(min(max_frames, frames) / multiple) * multiple
    return max(1, int(min(max(frames / fps * target_fps, low), high)) // multiple * multiple)


def sample_frames(frames: int, count: int) -> list[int]:
    """`count` frame numbers spread evenly from the first to the last of `frames` (halves round to even)."""
    return np.linspace(0, frames - 1, count).round().astype(int).tolist()


def patch_times(indices: Sequence[int], fps: float, temporal_patch: int) -> list[float]:
    """Seconds at the middle of every temporal patch: the mean of its first and last frame, the tail's last repeated."""
    last = len(indices) - 1
    starts = range(0, len(indices), temporal_patch)
    return [(indices[start] / fps + indices[min(start + temporal_patch - 1, last)] / fps) / 2 for start in starts]


def clip_size(
    frames: int, height: int, width: int, factor: int, temporal_patch: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """(height, width) at which the frames of a clip are read; the bounds count the pixels of all `frames` together.

    `smart_resize` for clips, as in Qwen3-VL (arXiv 2511.21631): sides under `factor` are first scaled up to it.
    Raises ValueError for an aspect ratio over 200.
    """
    frames = max(frames, temporal_patch)
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    rows, columns = smart_resize(height, width, factor, 0, 2**62)
    pixels = round(frames / temporal_patch) * temporal_patch * rows * columns
    if pixels > max_pixels:
        return shrunk_size(height, width, factor, max_pixels, frames)
    if pixels < min_pixels:
        scale = math.sqrt(min_pixels / (frames * height * width))
        return tuple(math.ceil(side * scale / factor) * factor for side in (height, width))
    return rows, columns


def read_clip(clip: Clip, indices: Sequence[int], size: tuple[int, int], temporal_patch: int) -> Iterator[np.ndarray]:
    """Yields the temporal patches of a clip, u8[t h w 3] at `size`; t is `temporal_patch`, or less in the tail."""
    frames = []
    for frame in clip.read(indices):
        frames.append(resized(frame, size))
        if len(frames) == temporal_patch:
            yield np.stack(frames)
            frames = []
    if frames:
        yield np.stack(frames)
