"""Plots of notebooks are self-contained HTML."""

import re

import numpy as np
from PIL import Image

from mllm_jax.evaluate.plots import curves, images, overlay, table


def test_overlay_is_reddest_where_most_is_attended_to():
    """A grid of 2 x 3 over a gray image, which is enlarged."""
    share = np.array([[0.0, 0.1, 0.2], [0.5, 0.05, 0.0]])
    seen = np.asarray(overlay(Image.new("RGB", (48, 32), (128, 128, 128)), share, side=96), int)
    assert seen.shape == (64, 96, 3)
    red = (seen[..., 0] - seen[..., 2]).reshape(2, 32, 3, 32).mean(axis=(1, 3))
    assert red[0, 0] == 0 == red[1, 2] and red[1, 0] > 50
    assert red[1, 0] > red[0, 2] > red[0, 1] > red[1, 1] > 0


def test_an_even_share_is_drawn():
    seen = np.asarray(overlay(Image.new("RGB", (16, 16)), np.full((1, 1), 0.25)))
    assert np.ptp(seen.reshape(-1, 3), axis=0).max() == 0


def test_images_and_videos():
    video = np.zeros((4, 8, 6, 3), np.uint8)
    video[2:] = 255  # two different frames, each twice
    shown = images([(Image.new("RGB", (5, 8)), "<b> & so on"), (video, "a clip")])
    assert shown.count('<img src="data:image/png;base64,') == 2 and "&lt;b&gt; &amp; so on" in shown


def test_curves_lie_within_the_plot():
    lines = {"one": [(1, 4.0), (50, 2.0), (100, 0.0)], "other": [(1, 1.0)]}
    drawn = curves("loss", lines)
    points = [
        [tuple(map(float, at.split(","))) for at in line.split()] for line in re.findall(r'points="(.*?)"', drawn)
    ]
    assert sorted(map(len, points)) == [1, 3] and all(0 < x < 620 and 0 < y < 230 for line in points for x, y in line)
    long = max(points, key=len)
    assert [y for _, y in long] == sorted(y for _, y in long)  # what falls is drawn lower
    assert all(f">{name}</text>" in drawn for name in ("loss", "one", "other", "step", "100", "4"))
    assert "nan" not in curves("nothing yet", {"empty": []})


def test_table():
    drawn = table([{"mesh": "fsdp", "weights": 1_234_567}, {"mesh": "a < b", "weights": 12}])
    assert drawn.count("<tr>") == 3 and "1.23M" in drawn and "a &lt; b" in drawn
    assert drawn.count("text-align:right") == 3
