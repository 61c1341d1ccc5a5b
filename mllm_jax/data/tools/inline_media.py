"""Records that need no other file: images and videos as the bytes of their files."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm_jax.data.media import resolve
from mllm_jax.data.records.records import BadRecord
from mllm_jax.data.vision.images import load_image, open_image

LARGEST = 2**28  # bytes of a video: a larger one would be read in full to show a few frames


def embedded(record: dict[str, Any]) -> dict[str, Any]:
    """The record with bytes in place of paths, images in memory and arrays, which become PNG.

    A video in memory becomes the list of its frames. Raises BadRecord where an image has no readable header, a file is
    gone or a video is too large.
    """

    def content(value: Any) -> Any:
        return value if isinstance(value, str) else [_part(part, record["id"]) for part in value]

    return record | {"messages": [m | {"content": content(m["content"])} for m in record["messages"]]}


def _part(part: dict[str, Any], name: str) -> dict[str, Any]:
    try:
        if part["type"] == "image":
            return part | {"image": _image(part["image"])}
        return part | {"video": _video(part["video"], name)} if part["type"] == "video" else part
    except FileNotFoundError as error:
        raise BadRecord("missing file", name, str(error)) from error
    except BadRecord:
        raise
    except (OSError, ValueError) as error:
        raise BadRecord("not readable", name, str(error)) from error


def _image(source: Any) -> bytes:
    source = resolve(source)
    open_image(source)  # raises ValueError if it is not an image
    if isinstance(source, bytes):
        return source
    if isinstance(source, str | os.PathLike):
        return Path(source).read_bytes()
    return _png(load_image(source))


def _video(source: Any, name: str) -> bytes | list[bytes]:
    if isinstance(source, np.ndarray | list | tuple):
        return [_image(frame) for frame in source]
    source = resolve(source)
    size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
    if size > LARGEST:
        raise BadRecord("video too large to embed", name, f"{size} bytes, over {LARGEST}")
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
