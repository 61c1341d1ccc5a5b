"""Escapes untrusted texts for terminals and logs: ids, kinds, file names, answers of a model."""

import re

# Control characters, which can move the cursor, change colors or rename the window; direction marks; lone surrogates,
# which cannot be encoded.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Returns the text with control characters as Python's escapes, such as "\\x1b" or "\\n"."""
    return text if text.isprintable() else _HIDDEN.sub(_escaped, text)


def printable_lines(text: str) -> str:
    """Returns the text as `printable` does, but keeps line ends and tabs."""
    return text if text.isprintable() else re.sub(r"[^\n\t]+", lambda line: printable(line[0]), text)


def _escaped(match: re.Match) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode()
