"""Texts of others as terminals and logs may show them: ids, kinds, names of files, answers of a model."""

import re

# Control characters, with which a text moves the cursor, colors what follows or renames the window; marks that turn
# the direction of what follows; lone surrogates, which no stream can write.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with all that is no visible character as an escape of Python, as "\\x1b" or "\\n"."""
    return text if text.isprintable() else _HIDDEN.sub(_escaped, text)


def printable_lines(text: str) -> str:
    """The same, but for the ends of lines and tabs."""
    return text if text.isprintable() else re.sub(r"[^\n\t]+", lambda line: printable(line[0]), text)


def _escaped(match: re.Match) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode()
