"""Opens video containers with PyAV and selects the video track.

PyAV is imported when a file is opened, so that videos in memory do not need it.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any

from mllm_jax.data.media import source_name

# FFmpeg's names of formats that contain their frames. Playlists (HLS, DASH, ffconcat, SDP, ...) are excluded since they
# open other files and sockets, scripts since they run programs, and image formats (image2) since they are no videos.
FORMATS = (
    *("mov", "matroska", "mpegts", "mpeg", "avi", "flv", "asf", "ogg", "mxf", "nut", "ivf", "rm", "dv", "wtv", "gif"),
    *("apng", "h264", "hevc", "obu", "m4v", "mpegvideo", "mjpeg", "yuv4mpegpipe"),
)
IMAGES = ("bmp", "mjpeg", "png", "tiff", "webp")  # codecs of covers that are not marked as attached


def pyav():
    try:
        import av
    except ImportError as error:
        raise ImportError("Video files need PyAV. Run pip install -e '.[video]'.") from error
    return av


def open_container(source: str | bytes) -> Any:
    """Opens a regular file, or the bytes of one, in one of `FORMATS`, without access to other files or the network.

    Its metadata may have any encoding, since it is not used. Raises FileNotFoundError or ValueError, naming the file.
    """
    name, av = source_name(source), pyav()
    if isinstance(source, str):
        if not os.path.exists(source):
            raise FileNotFoundError(f"{name}: no such video. Correct its path.")
        if not os.path.isfile(source):  # a pipe or a device may never end
            raise ValueError(f"{name}: not a readable video (no regular file)")
    # The prefix keeps FFmpeg from parsing a path as another protocol ("concat:a|b").
    file, protocols = (io.BytesIO(source), "") if isinstance(source, bytes) else (f"file:{source}", "file")
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": protocols}
    try:
        return av.open(file, options=options, metadata_errors="replace")
    except av.error.ArgumentError as error:
        formats = ", ".join(FORMATS)
        raise ValueError(f"{name}: not a readable video. Convert it to one of FFmpeg's formats {formats}.") from error


@contextlib.contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Names the file in errors of FFmpeg, and in PyAV's IndexError if a damaged file changes its number of streams."""
    try:
        yield
    except (pyav().FFmpegError, IndexError) as error:
        raise ValueError(f"{name}: not a readable video ({error})") from error


def video_stream(container: Any, track: int | None, name: str) -> Any:
    """Returns the video track with this number, or FFmpeg's choice among decodable tracks that are no images."""
    attached = pyav().stream.Disposition.attached_pic
    tracks = [stream for stream in container.streams.video if not stream.disposition & attached]
    if not tracks:
        raise ValueError(f"{name}: no video track. Use a file that has one.")
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
    """Returns the ticks between frames by the container's index; None unless it lists all frames at equal distances.

    The index contains decoding times. If they are even, presentation times are even, too, except in AVI, which stores
    no presentation times. An index of key frames only, or with frames that an edit list hides, is not used.
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
