"""Decoding of the wanted frames of a video file, by their times or by their numbers."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from mllm_jax.data.video.container import open_container, pyav
from mllm_jax.data.video.frame_times import FrameTimes

FAR = 24  # frames ahead from which on it is quicker to seek
END = object()  # of a file's frames


def decode(packet: Any) -> list[Any] | None:
    """The frames that a packet completes. None: it is broken."""
    try:
        return packet.decode()
    except pyav().error.EOFError:  # the decoder gave its last frame
        return []
    except pyav().FFmpegError:
        return None


class Decoder:
    """Decodes an open file in the order in which frames are shown.

    breaks: places at which packets are broken, one or several in a row, by the times of the first.
    """

    def __init__(self, source: str | bytes, track: int):
        self._source, self._track = source, track
        self._files = contextlib.ExitStack()

    def close(self) -> None:
        self._files.close()

    def start(self, threads: str) -> None:
        """Goes to the first frame. `threads`: SLICE, or AUTO, which is faster.

        With AUTO, what comes after a broken frame at the end of a file is lost.
        """
        self._files.close()
        self._container = self._files.enter_context(open_container(self._source))
        self._stream = self._container.streams[self._track]
        self._stream.thread_type = self.threads = threads
        self.frames, self.breaks = self._frames(seeking=False), set()

    def seek(self, time: int) -> None:
        """Goes to the last key frame before `time`, in ticks; in some containers, to one before or after it."""
        self._container.seek(time, stream=self._stream)
        self.frames = self._frames(seeking=True)

    def _frames(self, seeking: bool) -> Iterator[Any]:
        """Yields frames, and None where one is broken. `seeking`: what is before a key frame cannot be decoded."""
        whole = True
        for packet in self._container.demux(self._stream):
            if seeking and not packet.is_keyframe:
                continue
            seeking, frames = False, decode(packet)
            if frames is None and whole:
                self.breaks.add((packet.dts, packet.pts))
            whole = frames is not None
            yield from frames if whole else [None]


class Counted:
    """Finds the frames of a file by their number."""

    def __init__(self, decoder: Decoder):
        self._decoder, self._number, self._shown, self._exact = decoder, -1, None, False
        decoder.start("SLICE")  # no frame may be lost without notice

    def __call__(self, number: int) -> tuple[Any, bool]:
        """Returns frame `number`, or the last before it that can be decoded, and whether it is the frame itself."""
        while self._number < number:
            frame = next(self._decoder.frames, END)
            if frame is END:
                return self._shown, False
            self._number, self._exact, self._shown = self._number + 1, frame is not None, frame or self._shown
        return self._shown, self._exact


class Timed:
    """Finds the frames of a file by the time at which they are shown."""

    def __init__(self, decoder: Decoder, times: FrameTimes):
        self._decoder, self._times = decoder, times
        self._number, self._far = 0, FAR
        decoder.start("AUTO")
        self._begin()

    def __call__(self, number: int) -> tuple[Any, bool]:
        """Returns the frame at place `number` of the file's times, or the nearest that can be decoded.

        And whether it is the frame itself.
        """
        if number - self._number > self._far:
            self._seek(number)
        exact = self._advance(number)
        if not exact and self._coming is None and self._decoder.threads == "AUTO":
            self._decoder.start("SLICE")
            self._seek(number)
            exact = self._advance(number)
        return self._shown or self._coming, exact

    def _begin(self) -> None:
        self._shown, self._coming = None, self._next()

    def _next(self) -> Any:
        """The next frame with a presentation time. None: the file has ended."""
        return next((frame for frame in self._decoder.frames if frame is not None and frame.pts is not None), None)

    def _advance(self, number: int) -> bool:
        """Reads on until the next frame is later than `number`. Returns whether that frame itself is on the screen."""
        low, high = self._bounds(number)
        while self._coming is not None and self._coming.pts < high:
            self._shown, self._coming = self._coming, self._next()
        self._number = number
        return self._shown is not None and self._shown.pts >= low

    def _bounds(self, number: int) -> tuple[float, float]:
        """The times between which a frame is closer to `number` than to its neighbors."""
        before, time, after = (
            self._times.shown[place] if 0 <= place < len(self._times.shown) else math.copysign(math.inf, place)
            for place in (number - 1, number, number + 1)
        )
        return (before + time) / 2, (time + after) / 2

    def _seek(self, number: int) -> None:
        """Goes to a key frame at or before frame `number`, or to the beginning where none is found."""
        (_, high), time = self._bounds(number), int(self._times.shown[number])
        here, back = self._coming and self._coming.pts, 0
        while time - back > self._times.shown[0]:
            try:
                self._decoder.seek(time - back)
            except pyav().FFmpegError:  # this file can only be read from its beginning
                break
            self._begin()
            if self._coming is not None and self._coming.pts < high:
                if here is not None and self._coming.pts <= here:  # key frames are rarer than that
                    self._far *= 2
                return
            back = 2 * back or math.ceil(FAR * self._times.gap)
        self._decoder.start(self._decoder.threads)
        self._far = math.inf
        self._begin()
