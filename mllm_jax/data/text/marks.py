"""Locates the texts of messages in the conversation that a chat template renders.

A template may trim texts, reorder, repeat or omit them. So the conversation is rendered a second time with invisible
marks around its texts. Without its marks, this rendering must equal the first. If it does not (for example, marks
around white space that a template trims), the marks are placed by the next rule of `_PLACEMENTS`.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mllm_jax.data.text.bounded_jinja import TooMuch
from mllm_jax.data.text.chat_template import Messages

# Unicode noncharacters, which are removed from users' texts (tokenizer.MARKS). A mark is OPEN or CLOSE, followed by the
# index of its text in hexadecimal DIGITS.
OPEN, CLOSE, DIGITS = "\ufdd1", "\ufdd2", "".join(map(chr, range(0xFDE0, 0xFDF0)))
_MARK = re.compile(f"([{OPEN}{CLOSE}])([{DIGITS}]+)")
_NUMBER = str.maketrans(DIGITS, "0123456789abcdef")
_DIGIT = str.maketrans("0123456789abcdef", DIGITS)
_TAG = re.compile(r"(<[^<>\s]{1,64}>|\[/?[A-Z_]{1,32}\])")  # such as "</think>"; templates may split answers here
_EVERY = "whitespace"


class Text(NamedTuple):
    """Marked text of a conversation."""

    message: int  # index of the message
    field: str  # field of the message
    first: bool  # whether the field begins with it
    empty: bool = False  # whether it is empty or white space


class Mark(NamedTuple):
    offset: int  # in the rendered conversation without marks
    opens: bool
    text: int  # index of its text


class Place(NamedTuple):
    """Offsets of the texts of a message in a rendered conversation."""

    before: int  # end of the previous message's text, or the beginning of the conversation
    start: int
    end: int
    after: int  # start of the next message's text, or the end of the conversation
    starts_with_content: bool  # whether the beginning of the message's content is at `start`
    ends_with_content: bool


class Marked(NamedTuple):
    """Rendered conversation with the offsets at which its texts begin and end."""

    rendered: str
    marks: list[Mark]  # in order
    texts: list[Text]

    def places(self) -> dict[int, Place]:
        """Returns the place of each message's texts; messages without a marked text are missing.

        Only the first occurrence of a text counts: a template may repeat the name of a tool next to its result.
        """
        fields_of: dict[int, list] = {}  # message -> fields of its Place
        seen: set[tuple[bool, int]] = set()
        offsets = [0, *(mark.offset for mark in self.marks), len(self.rendered)]
        for number, (offset, opens, place) in enumerate(self.marks):
            if (opens, place) in seen:
                continue
            seen.add((opens, place))
            text = self.texts[place]
            fields = fields_of.setdefault(text.message, [offsets[number], offset, 0, 0, text.first, False])
            fields[2:4], fields[5] = (offset, offsets[number + 2]), text.field == "content"
        return {message: Place(*fields) for message, fields in fields_of.items()}


class _Placement(NamedTuple):
    """Rule for placing marks.

    outside: characters that stay outside the marks at both ends of a text.
    apart: whether the parts of an answer between tags are marked separately.
    empty: whether empty texts are marked.
    """

    outside: str
    apart: bool
    empty: bool


# Ordered from the least change to a text to the most.
_PLACEMENTS = [
    _Placement(outside, apart, empty)
    for empty, apart, outside in itertools.product((True, False), (False, True), ("", "\n", _EVERY))
]


def render_marked(render: Callable[[Messages], str], messages: Messages) -> Marked:
    """Renders a conversation and locates its texts.

    Example: with the marks of texts 0 and 1 written as `[0 ]0` and `[1 ]1`, a rendering `user: [0hi]0 bot: [1yes]1`
    locates "hi" at 6..8 and "yes" at 14..17 of `user: hi bot: yes`.

    Args:
      render: applies the template to messages whose only noncharacters are guards.

    Raises:
      ValueError: the template refuses the conversation, or changes its texts so that they cannot be located.
    """
    rendered = render(messages)
    for placement in _PLACEMENTS:
        texts: list[Text] = []
        marked = [_with_marks(message, number, placement, texts) for number, message in enumerate(messages)]
        try:
            result = _without_marks(render(marked), texts)
        except ValueError as error:
            if isinstance(error.__cause__, TooMuch):
                raise
            continue  # the template parses the text
        if result.rendered == rendered and _in_pairs(result.marks):
            return result
    raise ValueError(
        "the chat template changes the texts of messages, so that they cannot be located in its output. "
        "Use a chat template that writes texts unchanged."
    )


def _in_pairs(marks: Sequence[Mark]) -> bool:
    """Returns whether every opened mark is closed, in the same order; templates may truncate a text."""
    opened = [mark.text for mark in marks if mark.opens]
    return opened == [mark.text for mark in marks if not mark.opens]


def _without_marks(text: str, texts: list[Text]) -> Marked:
    marks, parts, end, length = [], [], 0, 0
    for match in _MARK.finditer(text):
        parts.append(text[end : match.start()])
        length, end = length + len(parts[-1]), match.end()
        marks.append(Mark(length, match[1] == OPEN, int(match[2].translate(_NUMBER), 16)))
    return Marked("".join([*parts, text[end:]]), marks, texts)


def _with_marks(message: Mapping[str, Any], number: int, placement: _Placement, texts: list[Text]) -> dict[str, Any]:
    """Returns a copy of a message with marks around its texts, which are appended to `texts`."""
    answer = message.get("role") == "assistant"
    of_content = placement._replace(apart=placement.apart and answer)
    marked = dict(message)

    def mark(text: str, field: str, first: bool = True, placement: _Placement = of_content) -> str:
        return "".join(_mark(text, Text(number, field, first), placement, texts))

    content = message.get("content")
    if isinstance(content, str) and (content or not message.get("tool_calls")):
        marked["content"] = mark(content, "content")
    elif isinstance(content, list):
        begins = itertools.chain([True], itertools.repeat(False))
        marked["content"] = [
            part | {"text": mark(part["text"], "content", next(begins))}
            if isinstance(part, dict) and isinstance(part.get("text"), str)
            else part
            for part in content
        ]
    if isinstance(message.get("reasoning_content"), str):
        undivided = placement._replace(apart=False, empty=False)
        marked["reasoning_content"] = mark(message["reasoning_content"], "reasoning_content", False, undivided)
    if isinstance(message.get("tool_calls"), list):
        of_name = placement._replace(apart=False)
        mark_name = lambda name: mark(name, "tool_calls", False, of_name)
        marked["tool_calls"] = [_call(call, mark_name) for call in message["tool_calls"]]
    return marked


def _call(call: Any, mark: Callable[[str], str]) -> Any:
    """Returns a copy of a tool call with marks around its name."""
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        return call | {"function": _call(call["function"], mark)}
    if isinstance(call, dict) and isinstance(call.get("name"), str):
        return call | {"name": mark(call["name"])}
    return call


def _mark(text: str, about: Text, placement: _Placement, texts: list[Text]) -> Iterator[str]:
    """Yields a text in parts, with marks around it or around each of its parts between tags."""
    parts = _TAG.split(text) if placement.apart else [text]
    if not any(part.strip() for part in parts[::2]):
        parts = [text]  # it consists of tags
    before = ""
    for place, part in enumerate(parts):
        inner = part.strip(None if placement.outside == _EVERY else placement.outside)
        if place % 2 or not (inner or (placement.empty and len(parts) == 1)):
            yield part
        else:
            start = part.find(inner) if inner else len(part)
            number = f"{len(texts):x}".translate(_DIGIT)
            texts.append(about._replace(first=about.first and not before.strip(), empty=not inner.strip()))
            yield f"{part[:start]}{OPEN}{number}{inner}{CLOSE}{number}{part[start + len(inner) :]}"
        before += part
