"""Decodes truncated JPEG files and measures how many of their rows are missing.

Downloads end early, and some cameras omit the end marker. PIL refuses both, or accepts both by a process-wide switch.
Here the end marker is appended, and the same file is decoded with two different continuations. Rows in which the two
results differ are not determined by the bytes of the file: they are missing.
"""

import io
import re
from collections.abc import Callable

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

END_OF_IMAGE = b"\xff\xd9"
ROOM = b"\0\0"  # end of a partial download whose space was allocated in advance; as codes, zeros are valid pixels
CONTINUATION = bytes(number * 167 % 255 for number in range(1, 255))  # arbitrary bytes without a marker
SCAN = re.compile(rb"\xff\xda..([\x01-\x04])", re.DOTALL)  # marker, length, number of components
DETAILS = 64  # DCT coefficients per block


def completed(data: bytes, opened: Callable[[io.BytesIO], JpegImageFile]) -> tuple[Image.Image, float] | None:
    """Decodes a truncated JPEG; returns the image and the share of its rows that are missing (gray or without detail).

    Returns None if the file has its end marker, so that it is damaged in another way.

    Args:
        data: content of the JPEG file.
        opened: opens a JPEG from a file object.

    Raises:
        OSError: the file cannot be decoded.
    """
    stripped = data.rstrip(b"\0")
    if stripped.endswith(END_OF_IMAGE):
        return None
    data = stripped + b"\0" if data.endswith(ROOM) else data  # a single zero may belong to the pixels
    data = data.rstrip(b"\xff")  # the first half of a marker
    image, other = (opened(io.BytesIO(data + continuation + END_OF_IMAGE)) for continuation in (b"", CONTINUATION))
    pixels, others = np.asarray(image), np.asarray(other)
    if not _has_all_scans(data, [component for component, *_ in image.layer]):
        return image, 1.0
    differ = (pixels != others).reshape(len(pixels), -1).any(axis=1)
    return image, float(1 - np.argmax(differ) / len(differ)) if differ.any() else 0.0


def _has_all_scans(data: bytes, components: list[int]) -> bool:
    """Returns whether the scans contain all coefficients of all components; progressive files store them in steps."""
    bits = dict.fromkeys(components, np.full(DETAILS, 16))
    for scan in SCAN.finditer(data):
        count = scan[1][0]
        header = data[scan.end() : scan.end() + 2 * count + 3]
        if len(header) < 2 * count + 3:
            break
        first, last, precision = header[2 * count :]
        for component in header[: 2 * count : 2]:
            if component in bits:
                bits[component] = bits[component].copy()
                bits[component][first : last + 1] = precision & 15
    return all((left == 0).all() for left in bits.values())
