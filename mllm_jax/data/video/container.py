"""Video containers, opened by PyAV at this one place, and the choice of the track.

PyAV is imported when a file is opened, so that videos which are already in memory do not need it.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any

from mllm_jax.data.media import source_name

# FFmpeg's names of containers and streams that hold their frames themselves. Playlists (HLS, DASH, ffconcat, SDP, ...)
# open other files and sockets, scripts run programs, and images and their patterns (image2) are no videos.
FORMATS = (
    *("mov", "matroska", "mpegts", "mpeg", "avi", "flv", "asf", "ogg", "mxf", "nut", "ivf", "rm", "dv", "wtv", "gif"),
    *("apng", "h264", "hevc", "obu", "m4v", "mpegvideo", "mjpeg", "yuv4mpegpipe"),
)
IMAGES = ("bmp", "mjpeg", "png", "tiff", "webp")  # codecs of a cover that is not marked as one


def pyav():
    try:
        import av
    except ImportError as error:
        raise ImportError("reading video files needs PyAV: pip install -e '.[video]'") from error
    return av


def open_container(source: str | bytes) -> Any:
    """Opens a regular file, or the bytes of one, in one of `FORMATS`; never another file or the network.

    Its tags are not read, since they may be in any encoding. Raises FileNotFoundError or ValueError, naming the file.
    """
    name, av = source_name(source), pyav()
    if isinstance(source, str):
        if not os.path.exists(source):
            raise FileNotFoundError(f"{name}: no such video")
        if not os.path.isfile(source):  # a pipe or a device may never end
            raise ValueError(f"{name}: not a readable video (no regular file)")
    # Without a prefix, a path may name another protocol ("concat:a|b").
    file, protocols = (io.BytesIO(source), "") if isinstance(source, bytes) else (f"file:{source}", "file")
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": protocols}
    try:
        return av.open(file, options=options, metadata_errors="replace")
    except av.error.ArgumentError as error:
        formats = ", ".join(FORMATS)
        raise ValueError(f"{name}: not a readable video. Convert it to one of FFmpeg's formats {formats}.") from error


@contextlib.contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Names the file in FFmpeg's errors, and in those of PyAV where a damaged file changes its number of streams."""
    try:
        yield
    except (pyav().FFmpegError, IndexError) as error:
        raise ValueError(f"{name}: not a readable video ({error})") from error


def video_stream(container: Any, track: int | None, name: str) -> Any:
    """The video track with this number, or FFmpeg's choice among those that are no images and can be decoded."""
    attached = pyav().stream.Disposition.attached_pic
    tracks = [stream for stream in container.streams.video if not stream.disposition & attached]
    if not tracks:
        raise ValueError(f"{name}: holds no video track")
    if track is None:
        decodable = [stream for stream in tracks if stream.codec_context is not None]
        films = [stream for stream in decodable if stream.codec_context.name not in IMAGES] or decodable
        best = container.streams.best("video")
        stream = best if best in films else max(films, key=lambda stream: stream.width * stream.height, default=None)
    elif 0 <= track < len(tracks):
        stream = tracks[track]
    else:
        raise ValueError(f"{name}: track={track} is not one of its {len(tracks)} video tracks. Count them from 0.")
    if stream is None or stream.codec_context is None:
        raise ValueError(f"{name}: FFmpeg has no decoder for its video track. Convert it to H.264 or VP9.")
    return stream


def indexed_gap(container: Any, stream: Any) -> int | None:
    """Ticks between two frames by the container's index. None where it does not list all frames at an even distance.

    It holds the times at which frames are decoded. Where these are even, those at which they are shown are even too,
    except in AVI, which states none of the latter. An index of key frames alone answers nothing, nor does one with
    frames that an edit list hides.
    """
    entries = stream.index_entries
    if len(entries) < 2 or len(entries) != stream.frames:
        return None
    if container.format.name == "avi" and stream.codec_context.has_b_frames:
        return None
    gap, before = entries[1].timestamp - entries[0].timestamp, None
    for entry in entries:
        if entry.is_discard or not entry.size or (before is not None and entry.timestamp - before != gap):
            return None
        before = entry.timestamp
    return gap if gap > 0 else None
