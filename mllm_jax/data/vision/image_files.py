"""Opens image files as PIL images without decoding their pixels, and reads their EXIF orientation.

The first bytes of a file select its reader, among formats that are decoded in this process; none starts a program.
PIL refuses some files that every browser shows. The causes are filtered out here, since PIL's process-wide switches
would also affect threads that decode other images.
"""

import bisect
import io
import os
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile

from mllm_jax.data.vision.truncated_jpeg import ROOM, completed

FORMATS = ("AVIF", "BMP", "GIF", "JPEG2000", "PPM", "QOI", "TIFF", "WEBP")  # besides JPEG, PNG and HEIC
JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
HEIC = re.compile(rb"....ftyp(?!avi[fs])(?:hei[cfmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL)
NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}  # struct formats of EXIF types that fit into an entry


def open_file(source: str | os.PathLike | bytes) -> Image.Image:
    """Opens an image file without decoding its pixels.

    Raises ValueError if the package for HEIC is missing, and any error of PIL's readers for a damaged file.
    """
    opened = lambda: io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb", buffering=0)
    with opened() as file:
        start = file.read(32)
    if start.startswith(PNG):
        image = Image.open(io.BufferedReader(_PngChunks(opened())), formats=["PNG"])
        image.filename = "" if isinstance(source, bytes) else os.fspath(source)
        return image
    source = opened() if isinstance(source, bytes) else source
    if start.startswith(JPEG):
        return _Jpeg(source)
    if HEIC.match(start) and b"avif" not in start:
        return _heic(source)
    return Image.open(source, formats=FORMATS)


def truncated_image(image: Image.Image) -> tuple[Image.Image, float] | None:
    """Decodes a truncated JPEG file; returns it with the missing share of its rows, or None if it is not truncated."""
    if not isinstance(image, JpegImageFile) or image.fp is None:
        return None
    image.fp.seek(0)
    return completed(image.fp.read(), _Jpeg)


def orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation in the header, 1 (upright) to 8; missing or invalid values count as upright."""
    try:
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # PNG's override decodes the pixels first
    except Exception:
        value = None
    if value is None:
        value = _stated(image.info.get("exif"))
    return int(value) if value in range(1, 9) else 1


def _stated(exif: bytes | None) -> int | None:
    """Returns the orientation from its EXIF entry only: PIL's reader stops at the first damaged entry."""
    try:
        exif = re.sub(rb"^(Exif\0\0)+", b"", exif)
        order = {b"II": "<", b"MM": ">"}[exif[:2]]
        (first,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, first)
        for entry in range(first + 2, first + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(order + "HHI", exif, entry)
            if tag == ExifTags.Base.Orientation and values == 1:
                return struct.unpack_from(order + NUMBERS[kind], exif, entry + 8)[0]
    except (TypeError, KeyError, struct.error):  # it is missing, of another type, or cut off
        pass
    return None


class _Jpeg(JpegImageFile):
    """JPEG, or the first image of an MPO.

    The resolution is not read, since an invalid one would fail the image. A file ending in zeros counts as truncated.
    """

    def _read_dpi_from_exif(self) -> None:
        pass

    def load(self) -> Any:
        if self.tile:
            self.fp.seek(-len(ROOM), os.SEEK_END)
            if self.fp.read() == ROOM:
                raise OSError("image file is truncated (it ends in zeros)")
        return super().load()


def _heic(source: str | os.PathLike | BinaryIO) -> Image.Image:
    try:
        import pillow_heif
    except ImportError as error:
        raise ValueError("HEIC needs pillow-heif. Run pip install -e '.[heic]'.") from error
    return pillow_heif.HeifImageFile(source)


class _Chunk(NamedTuple):
    kind: bytes | None  # None: the signature, or all data from a damaged chunk on
    offset: int  # in the file
    size: int  # bytes, including header and checksum


class _Segment(NamedTuple):
    first: int  # position of its first byte in the filtered stream
    offset: int  # in the file
    size: int


class _PngChunks(io.RawIOBase):
    """Bytes of a PNG file without the chunks that neither pixels nor orientation need.

    PIL fails an image for a text or a color profile of more than 1 MB, and for a wrong checksum of such a chunk.
    EXIF and XMP after the pixels are moved before them, since the orientation is needed before the pixels are decoded.
    """

    NEEDED = {None, b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
    TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts that may contain the orientation
    LONGEST = 2**20  # limit of such a text in bytes, uncompressed
    MOST = 2**17  # limit of chunks that are parsed; later data is kept unfiltered

    def __init__(self, file: BinaryIO):
        super().__init__()
        self._file, self._position, self._segments = file, 0, []
        chunks = list(self._chunks())
        pixels = next((number for number, chunk in enumerate(chunks) if chunk.kind == b"IDAT"), len(chunks))
        needed = lambda part: [chunk for chunk in part if chunk.kind in self.NEEDED]
        moved = [chunk for chunk in chunks if chunk.kind not in self.NEEDED and self._tells(chunk)]
        start = _Chunk(None, 0, len(PNG))
        for _, offset, size in [start, *needed(chunks[:pixels]), *moved, *needed(chunks[pixels:])]:
            last = self._segments[-1] if self._segments else _Segment(0, offset, 0)
            if last.offset + last.size == offset:
                self._segments[-1:] = [last._replace(size=last.size + size)]
            else:
                self._segments.append(_Segment(last.first + last.size, offset, size))

    def _chunks(self) -> Iterator[_Chunk]:
        end, offset, count = self._file.seek(0, os.SEEK_END), len(PNG), 0
        while offset < end:
            self._file.seek(offset)
            head = self._file.read(8)
            if not head[4:].isalpha() or len(head) < 8 or count == self.MOST:
                yield _Chunk(None, offset, end - offset)
                return
            size = min(12 + int.from_bytes(head[:4], "big"), end - offset)
            yield _Chunk(head[4:], offset, size)
            offset, count = offset + size, count + 1

    def _tells(self, chunk: _Chunk) -> bool:
        """Returns whether a chunk is intact and may contain the orientation."""
        kind, offset, size = chunk
        if kind not in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") or size > self.LONGEST:
            return False
        self._file.seek(offset + 4)
        data = self._file.read(size - 4)
        if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "big"):
            return False
        return kind == b"eXIf" or (data[4:].startswith(self.TEXTS) and self._is_short(kind, data[4:-4]))

    def _is_short(self, kind: bytes, text: bytes) -> bool:
        rest = text.partition(b"\0")[2]
        if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] == b"\0"):
            return True
        packed = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
        unpacker = zlib.decompressobj()
        try:
            unpacker.decompress(packed, self.LONGEST)
        except zlib.error:
            return False
        return not unpacker.unconsumed_tail

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        last = self._segments[-1]
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: last.first + last.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        number = bisect.bisect_right(self._segments, self._position, key=lambda segment: segment.first) - 1
        first, offset, size = self._segments[number]
        inside = self._position - first
        self._file.seek(offset + inside)
        data = self._file.read(max(0, min(len(buffer), size - inside)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
