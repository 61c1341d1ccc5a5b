"""Finds the texts of a conversation in the output of a chat template.

A template may trim texts, reorder them, write them twice, or leave them out. So the conversation is rendered a second
time with invisible marks around its texts, and the output must be the same apart from the marks. If it is not, such as
for marks around white space that a template trims, they are placed differently and it is rendered again.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mllm_jax.data.text.bounded_jinja import TooMuch
from mllm_jax.data.text.chat_template import Messages

# Noncharacters of Unicode, which are removed from texts of people (tokenizer.MARKS). A mark is OPEN or CLOSE, and
# the number of its text in hexadecimal DIGITS.
OPEN, CLOSE, DIGITS = "\ufdd1", "\ufdd2", "".join(map(chr, range(0xFDE0, 0xFDF0)))
_MARK = re.compile(f"([{OPEN}{CLOSE}])([{DIGITS}]+)")
_NUMBER = str.maketrans(DIGITS, "0123456789abcdef")
_DIGIT = str.maketrans("0123456789abcdef", DIGITS)
_TAG = re.compile(r"(<[^<>\s]{1,64}>|\[/?[A-Z_]{1,32}\])")  # as "</think>", at which templates may cut an answer
_EVERY = "whitespace"


class Text(NamedTuple):
    """A text of a conversation that has marks."""

    message: int
    field: str  # of the message
    first: bool  # the field begins with it
    empty: bool = False  # but for white space


class Mark(NamedTuple):
    offset: int
    opens: bool
    text: int  # its number


class Place(NamedTuple):
    """Offsets of the texts of a message in a rendered conversation."""

    before: int  # end of the previous message's text, or start of the conversation
    start: int
    end: int
    after: int  # start of the next message's text, or end of the conversation
    starts_with_content: bool  # at the start is the beginning of the message's content
    ends_with_content: bool


class Marked(NamedTuple):
    """A rendered conversation, and where its texts begin and end in it."""

    rendered: str
    marks: list[Mark]  # in order
    texts: list[Text]

    def places(self) -> dict[int, Place]:
        """Returns the first place of the texts of each message; a message without one is missing.

        Only the name of a tool may occur twice, since a template may repeat it beside the result.
        """
        found: dict[int, list] = {}  # the fields of each Place
        seen: set[tuple[bool, int]] = set()
        offsets = [0, *(mark.offset for mark in self.marks), len(self.rendered)]
        for number, (offset, opens, place) in enumerate(self.marks):
            if (opens, place) in seen:
                continue
            seen.add((opens, place))
            text = self.texts[place]
            own = found.setdefault(text.message, [offsets[number], offset, 0, 0, text.first, False])
            own[2:4], own[5] = (offset, offsets[number + 2]), text.field == "content"
        return {message: Place(*fields) for message, fields in found.items()}


class _Placement(NamedTuple):
    """A rule for the places of marks.

    outside: characters at the ends of a text that stay outside of the marks.
    apart: whether the parts of an answer between tags have separate marks.
    empty: whether empty texts have marks.
    """

    outside: str
    apart: bool
    empty: bool


# A few are enough for all that templates do; those that change the least come first.
_PLACEMENTS = [
    _Placement(outside, apart, empty)
    for empty, apart, outside in itertools.product((True, False), (False, True), ("", "\n", _EVERY))
]


def render_marked(render: Callable[[Messages], str], messages: Messages) -> Marked:
    """Renders a conversation with and without marks.

    Args:
      render: the template, of messages whose texts hold no noncharacters but guards.

    Raises:
      ValueError: the template refuses the conversation, or changes its texts so that they cannot be found again.
    """
    rendered = render(messages)
    for placement in _PLACEMENTS:
        texts: list[Text] = []
        marked = [_with_marks(message, number, placement, texts) for number, message in enumerate(messages)]
        try:
            found = _without_marks(render(marked), texts)
        except ValueError as error:
            if isinstance(error.__cause__, TooMuch):
                raise
            continue  # the template looks into the text
        if found.rendered == rendered and _in_pairs(found.marks):
            return found
    raise ValueError("the chat template changes the texts of messages, so that they cannot be found in its output")


def _in_pairs(marks: Sequence[Mark]) -> bool:
    """Returns whether every text that begins also ends: templates may cut off a part."""
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
    """A copy of a message with marks around its texts, which are added to `texts`."""
    answer = message.get("role") == "assistant"
    apart = placement._replace(apart=placement.apart and answer)
    marked = dict(message)

    def mark(text: str, field: str, first: bool = True, placement: _Placement = apart) -> str:
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
        whole = placement._replace(apart=False, empty=False)
        marked["reasoning_content"] = mark(message["reasoning_content"], "reasoning_content", False, whole)
    if isinstance(message.get("tool_calls"), list):
        whole = placement._replace(apart=False)
        call = lambda name: mark(name, "tool_calls", False, whole)
        marked["tool_calls"] = [_call(each, call) for each in message["tool_calls"]]
    return marked


def _call(call: Any, mark: Callable[[str], str]) -> Any:
    """A call of a tool whose name has marks."""
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        return call | {"function": _call(call["function"], mark)}
    if isinstance(call, dict) and isinstance(call.get("name"), str):
        return call | {"name": mark(call["name"])}
    return call


def _mark(text: str, about: Text, placement: _Placement, texts: list[Text]) -> Iterator[str]:
    """The text with marks around it, or around each of its parts between tags."""
    parts = _TAG.split(text) if placement.apart else [text]
    if not any(part.strip() for part in parts[::2]):
        parts = [text]  # only tags
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
