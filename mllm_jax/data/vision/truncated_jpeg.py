"""Reads truncated JPEG files: the pixels that they contain, and the fraction that is missing.

Downloads end early, and some cameras leave out the end mark. PIL refuses both alike, or, by a switch of the whole
process, shows both alike. Here the end mark is added to the bytes, and the missing part is measured: the same file is
decoded with two different continuations, and the rows in which they differ are those that its bytes do not determine.
"""

import io
import re
from collections.abc import Callable

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

END_OF_IMAGE = b"\xff\xd9"
ROOM = b"\0\0"  # how a file ends whose download had room for all of it; as codes, zeros are pixels
CONTINUATION = bytes(number * 167 % 255 for number in range(1, 255))  # any bytes without a marker
SCAN = re.compile(rb"\xff\xda..([\x01-\x04])", re.DOTALL)  # a marker, a length, a number of components
DETAILS = 64  # coefficients of a block


def completed(data: bytes, opened: Callable[[io.BytesIO], JpegImageFile]) -> tuple[Image.Image, float] | None:
    """A JPEG that lacks its end, with its pixels decoded, and the share of its rows that are not determined.

    Those rows are gray or lack detail. None where the file does not lack its end, so that something else is wrong.

    Args:
        opened: opens a JPEG from a file.

    Raises:
        OSError: it cannot be decoded.
    """
    written = data.rstrip(b"\0")
    if written.endswith(END_OF_IMAGE):
        return None
    data = written + b"\0" if data.endswith(ROOM) else data  # one zero may well be a part of the pixels
    data = data.rstrip(b"\xff")  # half of a marker
    image, other = (opened(io.BytesIO(data + more + END_OF_IMAGE)) for more in (b"", CONTINUATION))
    pixels, others = np.asarray(image), np.asarray(other)
    if not _has_all_scans(data, [component for component, *_ in image.layer]):
        return image, 1.0
    differ = (pixels != others).reshape(len(pixels), -1).any(axis=1)
    return image, float(1 - np.argmax(differ) / len(differ)) if differ.any() else 0.0


def _has_all_scans(data: bytes, components: list[int]) -> bool:
    """Returns whether all details of all components are complete; progressive files send them one by one."""
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
