"""The times of frames from those of packets, in closed form."""

import fractions

import numpy as np
import pytest

from mllm_jax.data.video.frame_times import even_times, measured_times

MS = fractions.Fraction(1, 1000)
NTSC = fractions.Fraction(30000, 1001)


def packets(times, duration=0):
    return [(time, time, duration) for time in times]


def rounded(rate, frames, tick=MS):
    return [round(i / rate / tick) for i in range(frames)]


@pytest.mark.parametrize(
    "times, tick, stated, fps",
    [
        (range(0, 1980, 33), MS, [1000, None, 30], 1000 / 33),  # a browser's recording that states its clock
        (rounded(3, 10), MS, [30], 3),  # Matroska that states another rate
        (rounded(NTSC, 500), MS, [NTSC], 30000 / 1001),  # rounded to milliseconds
        (rounded(NTSC, 500), MS, [30, NTSC], 30000 / 1001),
        (rounded(240, 500), MS, [240], 240),
        (range(6006, 6006 + 90 * 3003, 3003), fractions.Fraction(1, 90000), [90000, NTSC], 30000 / 1001),
        (range(-5, 15), fractions.Fraction(1, 10), [None, None], 10),  # a tick a frame
        ([90 * time for time in rounded(25, 50)], fractions.Fraction(1, 90000), [None], 25),
    ],
)
def test_even_times(times, tick, stated, fps):
    found = measured_times(packets(times), tick, stated, reorders=False)
    assert found.fps == pytest.approx(fps, rel=1e-12)
    assert found.frames == len(times) and found.even
    assert found.numbers(range(len(times))) == list(range(len(times)))
    np.testing.assert_array_equal(found.shown, times)


def test_even_times_of_an_index():
    found = even_times(2048, 1024, 20, fractions.Fraction(1, 10240), [None, fractions.Fraction(10)])
    assert (found.frames, found.fps) == (20, 10.0)
    assert found.shown.tolist() == list(range(2048, 2048 + 20 * 1024, 1024))


def test_a_rate_that_varies_is_the_mean_and_frames_are_those_on_the_screen():
    times = [0, 100, 200, 1200, 1300, 2300]
    found = measured_times(packets([500 + time for time in times], 100), MS, [10], reorders=False)
    assert (found.frames, found.fps, found.even) == (6, 2.5, False)  # 6 frames in 2.4 s
    assert found.numbers(range(6)) == [0, 2, 2, 3, 4, 4]  # at 0, .4, .8, 1.2, 1.6 and 2 s
    unknown = measured_times(packets(times, None), MS, [10], reorders=False)
    assert unknown.fps == pytest.approx(6 / (2.3 + 2.3 / 5))  # the last is taken to last as long as the others


def test_rounded_times_of_a_rate_that_varies_are_not_missed():
    """A third of a second is 333 ms in the file: at 1 / 3 s that frame is on the screen, not the one before."""
    exact = [fractions.Fraction(time, 3) for time in (0, 1, 2, 3, 6, 9, 12)]
    times = [round(time * 1000) for time in exact]
    found = measured_times(packets(times, 667), MS, [None], reorders=False)
    assert found.fps == pytest.approx(1.5, rel=1e-4)
    assert found.numbers(range(7)) == [
        sum(time <= fractions.Fraction(i * 2, 3) for time in exact) - 1 for i in range(7)
    ]
    ticks = measured_times(packets([0, 1, 2, 4, 5, 6, 7], 1), fractions.Fraction(1, 10), [None], reorders=False)
    assert ticks.numbers(range(7)) == [0, 1, 2, 2, 3, 4, 5]  # at 0, 8 / 7, 16 / 7, ... 48 / 7 ticks


def test_packets_stored_in_another_order_than_frames_are_shown_in():
    stored = [(0, -2, 10), (30, -1, 10), (10, 0, 10), (20, 1, 10), (40, 2, 10)]
    found = measured_times(stored, MS, [100], reorders=True)
    assert (found.frames, found.fps) == (5, 100.0)
    np.testing.assert_array_equal(found.shown, range(0, 50, 10))


@pytest.mark.parametrize(
    "packets, reorders, fps",
    [
        ([(None, None, 100)] * 20, True, 10),  # an elementary stream
        ([(None, time, 0) for time in range(0, 2000, 100)], True, 10),
        (packets(range(0, 2000, 100)), True, 10),  # AVI: made up in the order of the packets
        (packets([*range(0, 1000, 100), *range(0, 1000, 100)], 100), False, 10),  # two files put together
        (packets([7] * 20, 0), False, 25),
        ([(None, None, 0)] * 20, False, 25),
    ],
)
def test_without_times_frames_are_counted(packets, reorders, fps):
    found = measured_times(packets, MS, [None, fractions.Fraction(25)], reorders)
    assert (found.frames, found.shown) == (20, None)
    assert found.fps == pytest.approx(fps)
    assert found.numbers([0, 7, 19]) == [0, 7, 19]


def test_one_frame():
    for duration, stated, fps in ((100, [None], 10), (33, [30], 30), (0, [25], 25), (None, [None], 1)):
        found = measured_times([(0, 0, duration)], MS, stated, reorders=False)
        assert (found.frames, found.fps, found.numbers([0])) == (1, fps, [0])
    with pytest.raises(ValueError, match="neither a frame rate"):
        measured_times([(None, None, 0)] * 2, MS, [None], reorders=False)
