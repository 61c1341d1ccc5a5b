"""Content of a message: a text, or a list of parts, of which texts are {"type": "text", "text": ...}."""

from collections.abc import Sequence
from typing import Any

Content = str | Sequence[dict[str, Any]]


def parts_of(content: Content) -> Sequence[dict[str, Any]]:
    """The parts of a content; a text alone is one part."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def texts_of(content: Content) -> list[str]:
    """The texts of a content, in order."""
    return [part["text"] for part in parts_of(content) if part["type"] == "text"]
