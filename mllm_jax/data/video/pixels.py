"""Converts decoded frames to upright RGB."""

from typing import Any

import numpy as np
from PIL import Image

UNSPECIFIED = 2  # code of ITU-T H.273 for an unspecified matrix, primaries or transfer function
MATRICES = (0, 1, UNSPECIFIED, 4, 5, 6, 7, 9)  # codes of H.273 for matrices that FFmpeg converts to RGB
RESERVED = (3, *range(18, 256))  # codes of H.273 for matrices without a meaning

Orientation = tuple[int, int, bool]  # see `orientation_of`


def upright(frame: Any, orientation: Orientation) -> Image.Image:
    """Returns a decoded frame as an image, rotated and mirrored."""
    columns, rows, swap = orientation
    pixels = _rgb(frame)
    pixels = pixels.swapaxes(0, 1) if swap else pixels
    return Image.fromarray(np.ascontiguousarray(pixels[::rows, ::columns]))


def orientation_of(frame: Any) -> Orientation:
    """Returns (column step, row step, swap): steps of 1, or -1 to mirror, applied after swapping columns and rows.

    They encode the eight combinations of quarter turns and mirroring; other angles are rounded. A display matrix
    [[a, b, u], [c, d, v], [x, y, w]] displays the pixel at (column, row) at (a column + c row, b column + d row). A
    clockwise quarter turn has a = d = 0, b = 1, c = -1, and so (-1, 1, True).
    """
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # next to side data unknown to this PyAV, such as EXIF, only the rotation is available
        turns = round(frame.rotation / 90) % 4  # counterclockwise
        return ((1, 1, False), (1, -1, True), (-1, -1, False), (-1, 1, True))[turns]
    if matrix is None:
        return 1, 1, False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    swap = abs(b) + abs(c) > abs(a) + abs(d)
    column, row = (c, b) if swap else (a, d)
    return -1 if column < 0 else 1, -1 if row < 0 else 1, swap


def _rgb(frame: Any) -> np.ndarray:
    """Converts a frame to u8[h w 3] by its matrix and range. No tone mapping: HDR looks flat, as in FFmpeg.

    A frame without a matrix counts as BT.601 at any size, as in FFmpeg: videos of unknown origin were most often
    written by FFmpeg from RGB, and models were trained on its output.
    """
    # The conversion ignores these fields, but some versions of PyAV refuse their reserved values.
    frame.color_primaries = frame.color_trc = UNSPECIFIED
    if frame.colorspace in RESERVED:
        frame.colorspace = UNSPECIFIED
    return frame.to_ndarray(format="rgb24", threads=1)  # more threads would be started for every frame


def has_known_matrix(frame: Any) -> bool:
    """Returns whether FFmpeg can convert the frame's colors to RGB. It cannot convert YCgCo and ICtCp."""
    return frame.format.is_rgb or frame.colorspace in (*MATRICES, *RESERVED)
