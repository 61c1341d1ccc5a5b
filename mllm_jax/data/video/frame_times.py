"""Computes presentation times and rate of a video's frames from the times of its packets, without decoding."""

import dataclasses
import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

Packet = tuple[int | None, int | None, int | None]  # presentation time, decoding time and duration in ticks
ROUNDED = 1.5  # ticks by which times that were rounded to ticks may deviate from an even grid
MILLISECOND = 0.001  # times are often rounded to milliseconds and then stored in finer ticks


@dataclasses.dataclass(frozen=True)
class FrameTimes:
    """Even grid of times over a file's frames: frame i of the grid is the one shown i / fps seconds after the first.

    frames: number of frames.
    fps: frames per second; the mean if the rate varies.
    tick: unit of time in seconds.
    shown: i64[n] increasing presentation times of the decoder's frames, in ticks. None: the file has no reliable times,
        and frame i is the i-th frame that the decoder returns.
    even: whether the times are an even grid (up to rounding), so that frame i is the decoder's i-th frame.
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
        """Returns the index in `shown` of the frame that is displayed at the time of each frame of the grid.

        Example with fps=1 and frames shown at 0.0, 0.4 and 2.5 seconds: grid frames 0, 1, 2 are numbers 0, 1, 1.
        """
        if self.shown is None or self.even:
            return list(indices)
        # Half a tick, since `shown` is rounded to ticks and i / fps is not. Less if a frame lasts about a tick.
        rounding = min(0.5, self.gap / 10)
        times = np.asarray(indices, np.float64) / self.fps / float(self.tick)
        return (np.searchsorted(self.shown - self.shown[0], times + rounding, "right") - 1).tolist()


def even_times(first: int, gap: int, frames: int, tick: Fraction, stated: Sequence[Fraction | None]) -> FrameTimes:
    """Returns the times of `frames` frames, one every `gap` ticks. `stated`: see `measured_times`."""
    shown = first + gap * np.arange(frames, dtype=np.int64)
    seconds = gap * max(frames - 1, 1) * tick
    return FrameTimes(frames, _rate(max(frames - 1, 1), seconds, ROUNDED * tick, stated), tick, shown, True)


def measured_times(
    packets: Sequence[Packet], tick: Fraction, stated: Sequence[Fraction | None], reorders: bool
) -> FrameTimes:
    """Returns the times of a file's frames, from all its packets in the order of the file.

    The rate is the first stated rate that agrees with the packets' times, since containers may state the rate of
    another file, the rate of their clock, or none. Otherwise it is measured: for evenly spaced frames the inverse of
    their distance, else the number of frames over the time from the first frame to the end of the last.

    Args:
        packets: times of the packets, one per frame, at least one.
        tick: unit of time in seconds.
        stated: rates that the file states in frames per second, the most reliable first.
        reorders: whether the decoder reorders frames.

    Raises ValueError if the file has neither times nor durations nor a rate.
    """
    frames = len(packets)
    pts, dts, durations = zip(*packets)
    times = pts if None not in pts else dts if None not in dts else None
    if times is None or not _rises(dts) or min(times) == max(times):
        return FrameTimes(frames, _rate_without_times(durations, tick, stated), tick, None, False)
    shown = np.unique(np.array(times, np.int64))
    # AVI stores no times. Those derived from the order of packets are wrong if the decoder reorders frames.
    reliable = times is pts and not (reorders and _rises(pts))
    gap = int(shown[-1] - shown[0]) / max(frames - 1, 1)
    rounding = min(max(ROUNDED, MILLISECOND / float(tick)), gap / 4)
    even = len(shown) == frames and bool(np.abs(shown - shown[0] - gap * np.arange(frames)).max() <= rounding)
    if even:
        fps = _rate(frames - 1, int(shown[-1] - shown[0]) * tick, Fraction(rounding) * tick, stated)
    else:
        last = durations[times.index(max(times))] or gap
        fps = float(frames / ((int(shown[-1] - shown[0]) + Fraction(last)) * tick))
    return FrameTimes(frames, fps, tick, shown if reliable else None, even)


def _rises(times: Sequence[int | None]) -> bool:
    """Returns whether the times never decrease. They do in files that were concatenated from several."""
    return all(one <= two for one, two in itertools.pairwise(time for time in times if time is not None))


def _rate(count: int, seconds: Fraction, rounding: Fraction, stated: Sequence[Fraction | None]) -> float:
    """Returns the first stated rate at which `count` frames last `seconds` (up to `rounding`), else count / seconds."""
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
    raise ValueError("it has neither a frame rate nor the times of its frames")
