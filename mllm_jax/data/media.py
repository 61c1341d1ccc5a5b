"""Resolves the name of an image or a video, as a record or a message gives it, to a path or to bytes.

A name is a path, a `file://` URI, a `data:` URI, or base64 of a file. Nothing is downloaded.
"""

import base64
import os
import re
import unicodedata
import urllib.parse
from pathlib import Path
from typing import Any

from PIL import Image

LONGEST_NAME = 160  # characters of a name in an error; a data URI has millions
LONGEST_PATH = 4096  # characters of a path on Linux
FILE = "file://"
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
DATA = re.compile(r"\s*data:([^,]*),", re.IGNORECASE)
# First bytes of the formats that are accepted as base64 without a prefix: PNG, JPEG, GIF, RIFF (WebP, AVI), BMP, TIFF,
# Matroska, and ISO media (MP4, HEIC, AVIF) after the length of their first box.
SIGNATURES = re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF|BM....\0\0|II\*\0|MM\0\*|\x1aE\xdf\xa3|\0...ftyp", re.DOTALL)
URL_SAFE = str.maketrans("-_", "+/")


class BadName(ValueError):
    """Error for a name that resolves to no file: `BadName(reason, detail)`, with one of a few short reasons."""


def source_name(source: Any) -> str:
    """Returns the name of an image or a video for errors: its path, shortened if long, or a description in `<>`."""
    if isinstance(source, Image.Image):
        source = getattr(source, "filename", "") or f"<{source.mode} image {source.width}x{source.height}>"
    if not isinstance(source, str | os.PathLike):
        return f"<{type(source).__name__}>"
    name = os.fspath(source)
    if len(name) <= LONGEST_NAME:
        return name
    half = LONGEST_NAME // 2
    return f"{name[:half]}...{name[-half:]} ({len(name)} characters)"


def resolve(source: Any) -> Any:
    """Resolves the image or video of a message: a data URI or base64 to bytes, the name of an existing file to a path.

    Returns any other source unchanged. Raises ValueError, naming the source, for a URL of another machine and for a
    damaged data URI.
    """
    if not isinstance(source, str):
        return source
    try:
        if (data := _of_data_uri(source)) is not None:
            return data
        if (path := next(filter(os.path.isfile, _spellings(source)), None)) is not None:
            return path
    except BadName as error:
        raise ValueError(": ".join(error.args)) from error
    data = _of_base64(source)
    return source if data is None else data


def locate(root: Path, name: Any) -> str | bytes:
    """Returns the absolute path of an existing file below `root`, or the bytes that the name encodes. Raises BadName.

    Args:
        root: resolved path, that is, without symbolic links.
        name: absolute path or path relative to `root`. Links must stay below `root`.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise BadName("not a path", repr(name)[:LONGEST_NAME])
    if (data := _of_data_uri(name)) is not None:
        return data
    outside = None
    for path in _spellings(name):
        try:
            real = os.path.realpath(root / path)
        except ValueError as error:  # lone surrogates, which no file system can hold
            raise BadName("not a path", repr(source_name(name))) from error
        inside = Path(real).is_relative_to(root)
        if inside and os.path.isfile(real):
            return real
        outside = outside or (None if inside else real)
    if (data := _of_base64(name)) is not None:
        return data
    if outside is None:
        raise BadName("missing file", source_name(name))
    detail = f"{source_name(name)} is {source_name(outside)}, the root {root}; set the root to a folder above both"
    raise BadName("path leaves the data root", detail)


def embedded_file(name: Any) -> bytes | None:
    """Returns the bytes that a name encodes as a data URI or as base64; None for any other name. Raises BadName."""
    if not isinstance(name, str):
        raise BadName("not a path", repr(name)[:LONGEST_NAME])
    data = _of_data_uri(name)
    return _of_base64(name) if data is None else data


def _of_data_uri(name: str) -> bytes | None:
    """Returns the bytes of a data URI of any type; None for any other name. Raises BadName if it is damaged."""
    if (match := DATA.match(name)) is None:
        return None
    data = urllib.parse.unquote_to_bytes(name[match.end() :])
    try:
        if match[1].rpartition(";")[2].strip().lower() == "base64":
            data = _decoded(data.decode("ascii", "replace"))
    except ValueError as error:
        raise BadName("not a readable data URI", f"{source_name(name)} is {error}") from error
    if not data:
        raise BadName("not a readable data URI", f"{source_name(name)} holds no bytes")
    return data


def _of_base64(text: str) -> bytes | None:
    """Returns the bytes of base64 without a prefix if they begin like an image or a video; else None."""
    try:
        head = "".join(text[:64].split())[:16]
        return _decoded(text) if SIGNATURES.match(_decoded(head)) else None
    except ValueError:
        return None


def _decoded(text: str) -> bytes:
    """Decodes base64, also with line breaks, in the URL-safe alphabet, or without padding. Raises ValueError."""
    text = "".join(text.split()).translate(URL_SAFE).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise ValueError(f"not base64 ({error})") from error


def _spellings(name: str) -> list[str]:
    """Returns the paths that a name may mean, the likeliest first; none if it is too long for a path.

    Names from other systems have backslashes (Windows), a `file://` prefix with or without `%20` for a space, or
    decomposed accents (macOS). Raises BadName for a URL of another machine.
    """
    if name[: len(FILE)].lower() == FILE:
        rest = name[len(FILE) :]
        rest = rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
        names = [rest, urllib.parse.unquote(rest)]
    elif SCHEME.match(name):
        raise BadName("not a local file", f"{source_name(name)}; download it and name the file")
    else:
        names = [name]
    if len(name) > LONGEST_PATH:
        return []
    names += [name.replace("\\", "/") for name in names]
    names += [unicodedata.normalize(form, name) for name in names for form in ("NFC", "NFD")]
    return list(dict.fromkeys(names))
