"""Converts conversations to tokens and loss weights, with any chat template.

Text of users is data: a control token spelled out in a message (`<|im_end|>`, `<|image_pad|>`) becomes the ordinary
tokens of its letters. Only the template writes control tokens.
"""

import datetime
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mllm_jax.common.errors import value_text
from mllm_jax.data.text.bounded_jinja import TooMuch
from mllm_jax.data.text.chat_template import CONTENT_TOKENS, ChatTemplate, Messages
from mllm_jax.data.text.marks import Marked, render_marked
from mllm_jax.data.text.tokenizer import MARKS, Guard, Tokenizer
from mllm_jax.data.text.turns import ANSWER, QUESTION, Turns

# Control tokens of every tokenizer that has them.
_USUAL = {"<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "<mask>", "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"}
_USUAL |= {"<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>"}
_VISION = re.compile(r"image|img|video|vision|audio", re.IGNORECASE)
_SYSTEM = {"role": "system", "content": "system"}
_FUNCTION = {"name": "look", "arguments": {"place": "here"}}
_CALL = {"id": "call00000", "type": "function", "function": _FUNCTION}
_RESULT = {"role": "tool", "name": "look", "tool_call_id": "call00000", "content": "result"}
_ABOUT = ("weight", CONTENT_TOKENS)  # fields of a message that are hidden from templates
_WRITTEN = ("content", "reasoning_content", "tool_calls")  # the fields of a message that an assistant writes


class _Span(NamedTuple):
    """Characters of a rendered conversation that are trained on."""

    start: int
    end: int
    weight: float  # loss weight


class ChatFormat:
    """Chat template together with the tokenizer of its output.

    control: added tokens that texts of messages never produce: tokens that the template writes outside of answers,
      placeholders of images and videos, and tokens for the beginning, end and padding of texts. Other added tokens,
      such as `<think>` or `<|box_start|>`, are content: answers may contain them.
    ends: control tokens that end a turn. If the template ends no turn, the tokenizer's eos_token is appended to each
      answer.
    end: token after the last answer. None: the template writes none.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, control: Iterable[str] = (), stop: Collection[int] = ()
    ):
        """Learns the tokens of the template.

        Args:
          control: further control tokens.
          stop: ids of tokens that end a turn in any case.
        """
        self.tokenizer, self.template = tokenizer, template
        added = tokenizer.added
        always = {*control, *tokenizer.special_tokens().values(), *_USUAL}
        always |= {token for token, special in added.items() if special and _VISION.search(token)}
        self._guard = tokenizer.guard  # for texts of the assistant
        self._behind = ""  # appended to answers if the template does not end turns
        self._as_text, self._as_parts = self._read_forms()
        self._turns = Turns.learn(tokenizer, self._probe, {token for token in added if tokenizer.id(token) in stop})
        eos = tokenizer.special_tokens().get("eos_token")
        if self._turns.unended and eos in added:
            self._behind, self._turns.last = eos, eos
            self._turns.ends.add(eos)
        self.ends, self.end = self._turns.ends, self._turns.last
        self.control = frozenset(added.keys() & (always | self.ends | self._structure()))
        self._guard = Guard(self.control)

    def tokenize(
        self,
        messages: Messages,
        generate: bool = False,
        tools: list[dict[str, Any]] | None = None,
        placeholders: Collection[str | None] = (),
        fill: Callable[[list[str]], Iterable[str]] = list,
        user_content_tokens: bool = False,
        **variables,
    ) -> tuple[list[int], list[float]]:
        """Returns the tokens of a conversation, and for each the loss weight of predicting it.

        An assistant's turn has the "weight" of its message (default 1), from the beginning of its text, reasoning or
        tool calls through the token or text that ends it. All other tokens have weight 0. Answers are tokenized
        separately from the text before them, so that training and generation have the same prompt tokens.

        Args:
          messages: conversation in Hugging Face's format; "tool_calls" and "reasoning_content" are supported. A message
            with "content_tokens": True may contain content tokens, whatever its role.
          generate: whether to append the prompt for an answer. All weights are 0 then.
          tools: descriptions of functions that the model may call, as JSON schemas.
          placeholders: tokens that `fill` replaces.
          fill: takes all placeholders of the rendered conversation in order, and returns the replacement of each.
          user_content_tokens: whether texts of users may contain content tokens, as answers do.
          variables: further variables of the template.

        Raises:
          ValueError: the template refuses the conversation or omits or repeats a part of it, or writes no end of turn.
        """
        weights = [_weight(message, number) for number, message in enumerate(messages)]
        messages = [self._fitted(message) for message in messages]
        marked = self._render(messages, generate, tools, user_content_tokens, **variables)
        if (
            tools
            and marked.rendered == self._render(messages, generate, None, user_content_tokens, **variables).rendered
        ):
            raise ValueError(f"tools={tools!r:.80}: {_LEFT_OUT}")
        _check_all_written(messages, marked, generate)
        spans = [] if generate else list(self._spans(messages, marked, weights))
        text, spans = self._filled(marked.rendered, spans, placeholders, fill)
        return self._cut(text, spans)

    def _render(
        self, messages: Messages, generate: bool, tools: Any = None, user_content_tokens: bool = False, **variables
    ) -> Marked:
        guarded = [self._guarded(message, user_content_tokens) for message in messages]
        tools = _each_text(tools, self.tokenizer.guard)
        clock = {"strftime_now": datetime.datetime.now().strftime}  # one clock for all renderings that are compared
        variables = clock | self.tokenizer.special_tokens() | variables

        def render(messages: Messages) -> str:
            return self.template.render([*map(self._ended, messages)], generate, tools, **variables)

        return render_marked(render, guarded)

    def _ended(self, message: dict[str, Any]) -> dict[str, Any]:
        """Returns a message with the end of its turn, if it is an answer and the template does not write one."""
        content = message.get("content")
        if not self._behind or message.get("role") != "assistant" or content is None or message.get("tool_calls"):
            return message
        if isinstance(content, str):
            return message | {"content": content + self._behind}
        last = max((place for place, part in enumerate(content) if _is_text(part)), default=None)
        ended = lambda place, part: part | {"text": part["text"] + self._behind} if place == last else part
        return message | {"content": [ended(*each) for each in enumerate(content)]}

    def _guarded(self, message: dict[str, Any], user_content_tokens: bool) -> dict[str, Any]:
        """Returns a message with guarded texts: against control tokens if it may contain content tokens, else all."""
        full, speakers = self.tokenizer.guard, ["assistant", "user"][: 1 + user_content_tokens]
        allowed = message.get("role") in speakers or message.get(CONTENT_TOKENS)
        guard = lambda key: self._guard if allowed and key in _WRITTEN else full
        return {key: _each_text(value, guard(key)) for key, value in message.items() if key not in _ABOUT}

    def _fitted(self, message: dict[str, Any]) -> dict[str, Any]:
        """Returns a message whose content has the form that the template supports: a text, or a list of parts."""
        content, role = message.get("content"), message.get("role")
        if isinstance(content, str) and role in self._as_parts - self._as_text:
            return message | {"content": [{"type": "text", "text": content}]}
        texts = isinstance(content, list | tuple) and all(_is_text(part) for part in content)
        if texts and role in self._as_text - self._as_parts:
            return message | {"content": "".join(part["text"] for part in content)}
        return message

    def _read_forms(self) -> tuple[set[str], set[str]]:
        """Returns the roles whose content may be a text, and the roles whose content may be a list of parts."""
        self._as_text, self._as_parts = forms = set(), set()
        as_text = lambda message: message
        as_parts = lambda message: message | {"content": [{"type": "text", "text": message["content"]}]}
        for message, before, after in ((QUESTION, [], []), (ANSWER, [QUESTION], []), (_SYSTEM, [], [QUESTION])):
            for form, roles in zip((as_text, as_parts), forms):
                others = lambda messages: [self._fitted(other) for other in messages]
                marked = self._probe([*others(before), form(message), *others(after)], fitted=True)
                if marked is not None and len(before) in marked.places():
                    roles.add(message["role"])
        return forms

    def _probe(self, messages: Messages, generate: bool = False, fitted: bool = False) -> Marked | None:
        """Renders a small conversation; returns None if the template refuses it."""
        try:
            return self._render(messages if fitted else [self._fitted(one) for one in messages], generate)
        except ValueError as error:
            if isinstance(error.__cause__, TooMuch):
                raise
            return None

    def _structure(self) -> set[str]:
        """Returns the added tokens that the template writes outside of the assistant's turns."""
        calls = [_CALL, _CALL | {"function": _FUNCTION | {"arguments": '{"place": "here"}'}}]
        thought = {"role": "assistant", "reasoning_content": "reason"}
        called = [thought | {"tool_calls": [call], "content": text} for call in calls for text in ("", None, "so")]
        conversations = [
            *([_SYSTEM, *turns] for turns in ([QUESTION], [QUESTION, ANSWER, QUESTION, ANSWER])),
            *([QUESTION, ANSWER] * times for times in (1, 2)),
            *([QUESTION, call, _RESULT, *last] for call in called for last in ([], [ANSWER], [QUESTION])),
        ]
        outside, inside = set(), set()
        for conversation in conversations:
            if (marked := self._probe(conversation)) is None:
                continue
            bodies: list[tuple[int | None, int | None]] = [
                (self._turns.body_start(marked.rendered, place), self._turns.end(marked.rendered, place))
                for number, place in marked.places().items()
                if conversation[number]["role"] == "assistant"
            ]
            if any(None in body for body in bodies):
                continue
            for start, end, token in self._turns.tokens(marked.rendered):
                in_body = any(first <= start and end <= last for first, last in bodies)
                (inside if in_body and token not in self.ends else outside).add(token)
        source = self.template.source + (self.template.tool_source or "")
        special = {token for token, special in self.tokenizer.added.items() if special and token in source}
        return {token for token in outside | (special - inside) if token.strip()}

    def _spans(self, messages: Messages, marked: Marked, weights: Sequence[float]) -> Iterator[_Span]:
        """Yields the trained span of every answer whose weight is not 0."""
        places, text = marked.places(), marked.rendered
        for number, (message, weight) in enumerate(zip(messages, weights)):
            if message.get("role") != "assistant" or not weight:
                continue
            name = f"messages[{number}]={value_text(message.get('content'))}"
            if (place := places.get(number)) is None:
                raise ValueError(f"{name}: this answer cannot be located in the rendered conversation. Give it a text.")
            start = place.start if place.starts_with_content else self._turns.body_start(text, place)
            if start is None:
                raise ValueError(f"{name}: the chat template writes no header before this turn. Give it a text.")
            end = self._turns.end(text, place)
            if end is None:
                raise ValueError(
                    f"{name}: the chat template writes no end-of-turn token after the assistant's text. Use a template "
                    "that does, or name the token as eos_token_id in generation_config.json."
                )
            yield _Span(start, end, weight)

    def _filled(
        self,
        text: str,
        spans: Sequence[_Span],
        placeholders: Collection[str | None],
        fill: Callable[[list[str]], Iterable[str]],
    ) -> tuple[str, list[_Span]]:
        """Replaces the placeholders of a text; returns it with its spans moved accordingly."""
        slots = [token for token in self._turns.tokens(text) if token[2] in placeholders]
        replacements = list(fill([token for *_, token in slots]))
        parts, end, ends, shifts = [], 0, [0], [0]
        for (start, stop, _), replacement in zip(slots, replacements, strict=True):
            parts += [text[end:start], replacement]
            end = stop
            ends.append(stop)
            shifts.append(shifts[-1] + len(replacement) - (stop - start))
        moved = lambda offset: offset + shifts[bisect_right(ends, offset) - 1]
        spans = [span._replace(start=moved(span.start), end=moved(span.end)) for span in spans]
        return "".join([*parts, text[end:]]), spans

    def _cut(self, text: str, spans: Sequence[_Span]) -> tuple[list[int], list[float]]:
        """Tokenizes a rendered text, split at the bounds of spans; returns its tokens and their loss weights."""
        # The space before an answer is tokenized with its first word.
        spans = [span._replace(start=span.start - text.endswith(" ", 0, span.start)) for span in spans]
        bounds = sorted((offset, weight) for span in spans for offset, weight in ((span[0], span[2]), (span[1], 0.0)))
        tokens, weights, weight, begins, place = [], [], 0.0, True, 0
        for start, end, special in self.tokenizer.pieces(text):
            while start < end:
                while place < len(bounds) and bounds[place][0] <= start:
                    weight, place = bounds[place][1], place + 1
                stop = end if special is not None or place == len(bounds) else min(end, bounds[place][0])
                piece = text[start:stop]
                ids = [special] if special is not None else self.tokenizer.encode(piece.translate(MARKS), begins)
                begins = self.tokenizer.begins_after(piece) if special is not None else begins and not ids
                tokens += ids
                weights += [weight] * len(ids)
                start = stop
        return tokens, weights


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _weight(message: Mapping[str, Any], number: int) -> float:
    """Returns the loss weight of a message. Raises ValueError unless it is a finite number >= 0."""
    weight = message.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ValueError(f"messages[{number}].weight={weight!r}: not a number >= 0. Correct or remove it.")
    return float(weight)


_TWICE = "the chat template writes it twice. Use a chat template that writes it once."
_LEFT_OUT = "the chat template leaves it out. Remove it, or use a chat template that writes it."


def _check_all_written(messages: Messages, marked: Marked, generate: bool) -> None:
    """Raises ValueError if a rendered conversation lacks a text of its messages, or contains it twice.

    A template may leave out texts of an answer before the last question, or in a prompt, such as earlier reasoning, if
    it writes other texts of that answer.
    """
    times = Counter(mark.text for mark in marked.marks if mark.opens)
    question = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=-1)
    rendered = {text.message for number, text in enumerate(marked.texts) if times[number]}
    for number, text in enumerate(marked.texts):
        answer = messages[text.message]["role"] == "assistant"
        past = (
            answer and text.field != "tool_calls" and (generate or text.message < question) and text.message in rendered
        )
        twice = times[number] > 1 and text.field != "tool_calls"  # a result may repeat the name of its tool
        if twice or not (times[number] or past or text.empty):
            name = f"messages[{text.message}].{text.field} ({messages[text.message]['role']})"
            field = f"{name}={value_text(messages[text.message][text.field])}"
            raise ValueError(f"{field}: {_TWICE if twice else _LEFT_OUT}")


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Returns a copy of nested dicts and lists with `change` applied to texts and to keys that are no identifiers."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        plain = lambda key: not isinstance(key, str) or key.isidentifier()
        return {key if plain(key) else change(key): _each_text(item, change) for key, item in value.items()}
    return [_each_text(item, change) for item in value] if isinstance(value, (list, tuple)) else value
