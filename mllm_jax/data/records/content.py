"""Accessors for the content of a message: a text, or a list of parts such as {"type": "text", "text": ...}."""

from collections.abc import Sequence
from typing import Any

Content = str | Sequence[dict[str, Any]]


def parts_of(content: Content) -> Sequence[dict[str, Any]]:
    """Returns the parts of a content; a text becomes one part."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def texts_of(content: Content) -> list[str]:
    """Returns the texts of a content, in order."""
    return [part["text"] for part in parts_of(content) if part["type"] == "text"]
