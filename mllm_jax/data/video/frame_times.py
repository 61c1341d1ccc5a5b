"""Presentation times and rate of the frames of a video file, from the times of its packets. Nothing is decoded."""

import dataclasses
import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

Packet = tuple[int | None, int | None, int | None]  # presentation time, decoding time and duration in ticks
ROUNDED = 1.5  # ticks by which times that were rounded to ticks may miss an even grid
MILLISECOND = 0.001  # times are often rounded to milliseconds and then stored in finer ticks


@dataclasses.dataclass(frozen=True)
class FrameTimes:
    """The frames of a file as a grid in time: frame i is what is shown i / fps seconds after the first frame.

    frames: number of frames.
    fps: frames per second; the mean where the rate varies.
    tick: seconds of a unit of time.
    shown: i64[n] rising times at which the decoder's frames are shown, in ticks. None: the file states none that can be
        relied on, and frame i is the i-th that the decoder gives.
    even: True where the times are an even grid (up to their rounding), so that frame i is the i-th.
    """

    frames: int
    fps: float
    tick: Fraction
    shown: np.ndarray | None
    even: bool

    @property
    def gap(self) -> float:
        """Mean time between two frames in ticks."""
        return 1 / (self.fps * float(self.tick))

    def numbers(self, indices: Sequence[int]) -> list[int]:
        """Returns for every frame of the grid the place in `shown` of the frame that is then on the screen."""
        if self.shown is None or self.even:
            return list(indices)
        # Half a tick, as `shown` is rounded to ticks and i / fps is not. Less if a frame lasts about a tick.
        rounding = min(0.5, self.gap / 10)
        times = np.asarray(indices, np.float64) / self.fps / float(self.tick)
        return (np.searchsorted(self.shown - self.shown[0], times + rounding, "right") - 1).tolist()


def even_times(first: int, gap: int, frames: int, tick: Fraction, stated: Sequence[Fraction | None]) -> FrameTimes:
    """The times of `frames` frames that follow one another every `gap` ticks. `stated`: see `measured_times`."""
    shown = first + gap * np.arange(frames, dtype=np.int64)
    seconds = gap * max(frames - 1, 1) * tick
    return FrameTimes(frames, _rate(max(frames - 1, 1), seconds, ROUNDED * tick, stated), tick, shown, True)


def measured_times(
    packets: Sequence[Packet], tick: Fraction, stated: Sequence[Fraction | None], reorders: bool
) -> FrameTimes:
    """The times of a file's frames, from all its packets in stored order.

    The rate is one that the file states if the packets' times agree with it, otherwise that of the times: containers
    state the rate of another file, that of their clock, or none. For evenly spaced frames it is one over their
    distance; otherwise the number of frames over the time from the first to the end of the last.

    Args:
        packets: one per frame, at least one.
        tick: seconds of a unit of time.
        stated: the rates that the file states in frames per second, the most credible first.
        reorders: whether the decoder returns frames in another order than their packets.

    Raises ValueError if neither times nor durations nor a rate are stated.
    """
    frames = len(packets)
    pts, dts, durations = zip(*packets)
    times = pts if None not in pts else dts if None not in dts else None
    if times is None or not _rises(dts) or min(times) == max(times):
        return FrameTimes(frames, _rate_without_times(durations, tick, stated), tick, None, False)
    shown = np.unique(np.array(times, np.int64))
    # AVI stores no times: times from the order of the packets are wrong if the decoder changes the order.
    known = times is pts and not (reorders and _rises(pts))
    gap = int(shown[-1] - shown[0]) / max(frames - 1, 1)
    rounding = min(max(ROUNDED, MILLISECOND / float(tick)), gap / 4)
    even = len(shown) == frames and bool(np.abs(shown - shown[0] - gap * np.arange(frames)).max() <= rounding)
    if even:
        fps = _rate(frames - 1, int(shown[-1] - shown[0]) * tick, Fraction(rounding) * tick, stated)
    else:
        last = durations[times.index(max(times))] or gap
        fps = float(frames / ((int(shown[-1] - shown[0]) + Fraction(last)) * tick))
    return FrameTimes(frames, fps, tick, shown if known else None, even)


def _rises(times: Sequence[int | None]) -> bool:
    """Returns whether the times never go back, as they do where a file was put together from several."""
    return all(one <= two for one, two in itertools.pairwise(time for time in times if time is not None))


def _rate(count: int, seconds: Fraction, rounding: Fraction, stated: Sequence[Fraction | None]) -> float:
    """The first stated rate at which `count` frames last `seconds`, up to their rounding; otherwise count / seconds."""
    agreed = (rate for rate in stated if rate and abs(count / rate - seconds) <= rounding)
    return float(next(agreed, count / seconds))


def _rate_without_times(durations: Sequence[int | None], tick: Fraction, stated: Sequence[Fraction | None]) -> float:
    frames = len(durations)
    if all(durations):
        return _rate(frames, sum(durations) * tick, frames * tick, stated)
    if rates := [rate for rate in stated if rate]:
        return float(rates[0])
    if frames == 1:
        return 1.0  # one frame is at time 0 at any rate
    raise ValueError("it states neither a frame rate nor the times of its frames")
