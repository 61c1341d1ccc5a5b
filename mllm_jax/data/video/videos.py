"""Reads videos (files, arrays or lists of images) as a few resized frames with their times.

Each frame is resized as soon as it is read, so that a video is never held at full size.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mllm_jax.data.media import source_name
from mllm_jax.data.video.reader import open_file
from mllm_jax.data.vision.images import load_image, resized, shrunk_size, smart_resize

EVEN, MOTION = SAMPLINGS = ("even", "motion")  # selection of frames: evenly spread, or denser where they differ
CANDIDATES, MOST = 8, 2048  # number of compared frames per selected frame, and limit of their total
SMALL = (32, 32)  # size in pixels at which frames are compared


@dataclasses.dataclass(frozen=True)
class Video:
    """Video whose pixels are not read yet.

    frames, fps: number of frames, and frames per second. Frame i of a file is the frame shown i / fps seconds after the
        first one (up to the rounding of its times), also if the frame rate varies.
    height, width: size of an upright frame in pixels.
    name: path, or a description of the video.
    read: yields the frames with the given increasing numbers, as upright RGB.
    broken: numbers of frames that could not be decoded and were replaced by the frames before them. Filled by `read`.
    """

    frames: int
    fps: float
    height: int
    width: int
    name: str
    read: Callable[[Sequence[int]], Iterator[Image.Image]]
    broken: set[int] = dataclasses.field(default_factory=set)


def open_video(source: Any, fps: float, track: int | None = None) -> Video:
    """Opens a video without reading its frames.

    Args:
      source: path or bytes of a video file, an array u8[t h w 3], or a list of images of one size.
      fps: frames per second of an array or a list. Files contain their own rate.
      track: number of the video track of a file with several. None: FFmpeg's choice.

    Raises:
      ValueError: the source is no video, is empty or damaged. The message names the file.
      FileNotFoundError: the file is missing.
    """
    if isinstance(source, (str, os.PathLike, bytes)):
        file = open_file(source if isinstance(source, bytes) else os.fspath(source), track)
        times = file.times
        return Video(times.frames, times.fps, file.height, file.width, file.name, file.read, file.broken)
    if not isinstance(source, (np.ndarray, list, tuple)) or len(source) == 0:
        raise ValueError(f"a video must be a path, bytes, u8[t h w 3] or a list of images, got {source_name(source)}")
    if fps <= 0:
        raise ValueError(f"fps={fps}: not positive. Set it to the frame rate of the video.")
    first = load_image(source[0])

    def read(indices):
        for index in indices:
            frame = load_image(source[index])
            if frame.size != first.size:
                raise ValueError(
                    f"frame {index} of a video is {frame.size}, but its first frame is {first.size}. Resize its frames."
                )
            yield frame

    return Video(len(source), float(fps), first.height, first.width, source_name(source), read)


def frame_count(frames: int, fps: float, target_fps: float, min_frames: int, max_frames: int, multiple: int = 1) -> int:
    """Returns the number of frames to read: `target_fps` per second, within `min_frames`, `max_frames` and `frames`.

    The bounds are rounded inwards to multiples of `multiple`, and the number is rounded down. `multiple` is 1 for
    Qwen3-VL, where the tail is padded instead.
    """
    low = math.ceil(min_frames / multiple) * multiple
    high = math.floor(min(max_frames, frames) / multiple) * multiple
    return max(1, int(min(max(frames / fps * target_fps, low), high)) // multiple * multiple)


def sample_frames(frames: int, count: int) -> list[int]:
    """Returns `count` frame numbers spread evenly from the first to the last of `frames` (halves round to even)."""
    return np.linspace(0, frames - 1, count).round().astype(int).tolist()


def moving_frames(video: Video, count: int) -> list[int]:
    """Returns `count` increasing frame numbers from the first to the last, denser where frames differ.

    Half of the density follows time and half motion, the mean absolute difference between consecutive candidates.
    Candidates are `CANDIDATES * count` evenly spread frames (at most MOST), read once and reduced to SMALL.
    """
    candidates = sample_frames(video.frames, min(video.frames, max(count, min(CANDIDATES * count, MOST))))
    motion, before = np.zeros(len(candidates)), None
    for place, frame in enumerate(video.read(candidates)):
        small = np.asarray(frame.convert("L").resize(SMALL, Image.Resampling.BOX), np.float64)
        motion[place] = 0 if before is None else np.abs(small - before).mean()
        before = small
    if not motion.any():
        return sample_frames(video.frames, count)
    time = np.arange(len(candidates)) / max(1, len(candidates) - 1)
    passed = (time + np.cumsum(motion) / motion.sum()) / 2  # 0 at the first, 1 at the last
    places, order = np.searchsorted(passed, np.linspace(0, 1, count) - 1e-9), np.arange(count)
    places = np.maximum.accumulate(places - order) + order  # no candidate twice
    return [candidates[place] for place in np.minimum(places, len(candidates) - count + order)]


def patch_times(indices: Sequence[int], fps: float, temporal_patch: int) -> list[float]:
    """Returns the time of every temporal patch in seconds: mean of its first and last frame, also in a short tail."""
    last = len(indices) - 1
    starts = range(0, len(indices), temporal_patch)
    return [(indices[start] / fps + indices[min(start + temporal_patch - 1, last)] / fps) / 2 for start in starts]


def video_size(
    frames: int, height: int, width: int, factor: int, temporal_patch: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Returns the (height, width) of a video's frames; `min_pixels` and `max_pixels` bound all `frames` together.

    This is `smart_resize` for videos, as in Qwen3-VL (arXiv 2511.21631): frames with a side under `factor` are first
    scaled up to it. Raises ValueError for an aspect ratio over 200.
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


def read_video(
    video: Video, indices: Sequence[int], size: tuple[int, int], temporal_patch: int
) -> Iterator[np.ndarray]:
    """Yields the temporal patches of a video, u8[t h w 3] at `size`; t is `temporal_patch`, or less in the last one."""
    frames = []
    for frame in video.read(indices):
        frames.append(resized(frame, size))
        if len(frames) == temporal_patch:
            yield np.stack(frames)
            frames = []
    if frames:
        yield np.stack(frames)
