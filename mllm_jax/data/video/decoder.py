"""Decodes selected frames of a video file, by their times or by their numbers."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from mllm_jax.data.video.container import open_container, pyav
from mllm_jax.data.video.frame_times import FrameTimes

FAR = 24  # number of frames ahead above which seeking is faster than decoding
END = object()  # end of a file's frames


def decode(packet: Any) -> list[Any] | None:
    """Returns the frames that a packet completes; None if it is broken."""
    try:
        return packet.decode()
    except pyav().error.EOFError:  # the decoder has no more frames
        return []
    except pyav().FFmpegError:
        return None


class Decoder:
    """Decodes a file in presentation order.

    breaks: (dts, pts) of the first packet of each run of broken packets.
    """

    def __init__(self, source: str | bytes, track: int):
        self._source, self._track = source, track
        self._files = contextlib.ExitStack()

    def close(self) -> None:
        self._files.close()

    def start(self, threads: str) -> None:
        """Goes to the first frame. `threads`: "SLICE", or "AUTO", which is faster.

        With "AUTO", frames after a broken frame at the end of a file are lost.
        """
        self._files.close()
        self._container = self._files.enter_context(open_container(self._source))
        self._stream = self._container.streams[self._track]
        self._stream.thread_type = self.threads = threads
        self.frames, self.breaks = self._frames(seeking=False), set()

    def seek(self, time: int) -> None:
        """Goes to the last key frame before `time` in ticks; in some containers, to an earlier or later key frame."""
        self._container.seek(time, stream=self._stream)
        self.frames = self._frames(seeking=True)

    def _frames(self, seeking: bool) -> Iterator[Any]:
        """Yields frames, and None for a broken packet. `seeking`: skips packets up to the first key frame."""
        intact = True
        for packet in self._container.demux(self._stream):
            if seeking and not packet.is_keyframe:
                continue
            seeking, frames = False, decode(packet)
            if frames is None and intact:
                self.breaks.add((packet.dts, packet.pts))
            intact = frames is not None
            yield from frames if intact else [None]


class Counted:
    """Finds the frames of a file by their number."""

    def __init__(self, decoder: Decoder):
        self._decoder, self._number, self._shown, self._exact = decoder, -1, None, False
        decoder.start("SLICE")  # "AUTO" may lose frames, which would shift the numbers

    def __call__(self, number: int) -> tuple[Any, bool]:
        """Returns (frame, exact): frame `number`, or the last one before it that can be decoded."""
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
        """Returns (frame, exact): the frame at index `number` of the times, or the nearest that can be decoded."""
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
        """Returns the next frame with a presentation time; None at the end of the file."""
        return next((frame for frame in self._decoder.frames if frame is not None and frame.pts is not None), None)

    def _advance(self, number: int) -> bool:
        """Decodes until the next frame is later than `number`. Returns whether the current frame is frame `number`."""
        low, high = self._bounds(number)
        while self._coming is not None and self._coming.pts < high:
            self._shown, self._coming = self._coming, self._next()
        self._number = number
        return self._shown is not None and self._shown.pts >= low

    def _bounds(self, number: int) -> tuple[float, float]:
        """Returns the interval of times that are nearer to frame `number` than to its neighbors."""
        before, time, after = (
            self._times.shown[place] if 0 <= place < len(self._times.shown) else math.copysign(math.inf, place)
            for place in (number - 1, number, number + 1)
        )
        return (before + time) / 2, (time + after) / 2

    def _seek(self, number: int) -> None:
        """Goes to a key frame at or before frame `number`, or to the beginning if none is found."""
        (_, high), time = self._bounds(number), int(self._times.shown[number])
        here, back = self._coming and self._coming.pts, 0
        while time - back > self._times.shown[0]:
            try:
                self._decoder.seek(time - back)
            except pyav().FFmpegError:  # this file can only be read from its beginning
                break
            self._begin()
            if self._coming is not None and self._coming.pts < high:
                if here is not None and self._coming.pts <= here:  # no progress: key frames are rarer than `_far`
                    self._far *= 2
                return
            back = 2 * back or math.ceil(FAR * self._times.gap)
        self._decoder.start(self._decoder.threads)
        self._far = math.inf
        self._begin()
