"""Opens video files with PyAV and reads their frames at given times."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence

from PIL import Image

from mllm_jax.data.media import source_name
from mllm_jax.data.video.container import errors_of, indexed_gap, open_container, video_stream
from mllm_jax.data.video.decoder import Counted, Decoder, Timed, decode
from mllm_jax.data.video.frame_times import FrameTimes, even_times, measured_times
from mllm_jax.data.video.pixels import Orientation, has_known_matrix, orientation_of, upright

PER_BREAK = 100  # one broken place is allowed per this number of frames of a video
PER_LOST = 10  # one lost frame is allowed per this number of requested frames

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class VideoFile:
    """Video file whose frames are not decoded yet.

    source: path, or bytes of the file.
    track: index of the video track among the file's streams.
    height, width: size of an upright frame in pixels.
    orientation: rotation and mirroring of its frames, see `orientation_of`.
    times: presentation times of its frames.
    broken: numbers of requested frames that could not be decoded. Filled by `read`.
    """

    source: str | bytes
    track: int
    height: int
    width: int
    orientation: Orientation
    times: FrameTimes
    broken: set[int] = dataclasses.field(default_factory=set)

    @property
    def name(self) -> str:
        return source_name(self.source)

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """Yields the upright RGB frames shown at the times of the increasing `indices`, see `FrameTimes`.

        Frames between distant indices are skipped by seeking. A frame that cannot be decoded is replaced by the one
        before it, and its index is added to `broken`.

        Raises:
          ValueError: the file ends too early, has more than one broken place per 100 frames, or lacks more than a tenth
            of the requested frames (one place and one frame are always allowed). The message names the file.
        """
        numbers = self.times.numbers(indices)
        if numbers and indices[-1] >= self.times.frames:
            raise ValueError(f"{self.name}: ends before frame {indices[-1]}. Request earlier frames.")
        lost, most, breaks = set(), max(1, len(set(numbers)) // PER_LOST), max(1, self.times.frames // PER_BREAK)
        with errors_of(self.name), contextlib.closing(Decoder(self.source, self.track)) as decoder:
            frame_at = Timed(decoder, self.times) if self.times.shown is not None else Counted(decoder)
            for index, number in zip(indices, numbers):
                frame, exact = frame_at(number)
                if not exact:
                    self.broken.add(index)
                    lost.add(number)
                if frame is None or len(lost) > most:
                    raise ValueError(f"{self.name}: ends before frame {index}, or is broken there. Restore the file.")
                if len(decoder.breaks) > breaks:
                    raise ValueError(
                        f"{self.name}: broken at {len(decoder.breaks)} places up to frame {index}. Restore the file."
                    )
                yield upright(frame, self.orientation)
        if lost:
            log.warning("%s: %d broken frames, replaced by the frames before them", self.name, len(lost))


def open_file(source: str | bytes, track: int | None) -> VideoFile:
    """Opens a video file and determines the presentation times of its frames. Decodes one frame.

    Reads the times of all packets without decoding them, unless the container has an index of all frames at equal
    distances and without hidden frames (MP4, MOV and AVI of a constant rate).

    Args:
      track: number among the file's video tracks, without attached images (covers). None: FFmpeg's choice
        (`av_find_best_stream`).

    Raises:
      ValueError: the file is no video or damaged. The message names the file.
      FileNotFoundError: the file is missing.
    """
    name = source_name(source)
    with errors_of(name), open_container(source) as container:
        stream = video_stream(container, track, name)
        stated = [stream.average_rate, stream.base_rate, stream.guessed_rate]
        gap, packets, first = indexed_gap(container, stream), [], None
        for packet in container.demux(stream):
            if first is None:
                frames = decode(packet)
                gap = None if frames is None else gap  # the time of the first frame is unknown
                first = next(iter(frames or ()), None)
                if gap and first is not None and first.pts is not None:
                    times = even_times(first.pts, gap, stream.frames, stream.time_base, stated)
                    break
            if packet.size and not packet.is_discard:
                packets.append((packet.pts, packet.dts, packet.duration))
        else:
            if first is None or not packets:
                raise ValueError(f"{name}: no frame of its video track can be decoded. Restore the file.")
            try:
                times = measured_times(packets, stream.time_base, stated, stream.codec_context.has_b_frames > 0)
            except ValueError as error:
                raise ValueError(f"{name}: {error}. Store it as MP4 or Matroska.") from error
        if not has_known_matrix(first):
            raise ValueError(f"{name}: its color matrix {first.colorspace} is not supported. Convert it to BT.709.")
        orientation = orientation_of(first)
        height, width = (first.width, first.height) if orientation[2] else (first.height, first.width)
        return VideoFile(source, stream.index, height, width, orientation, times)
