"""Reads a chosen and a rejected answer to one question, in all published forms."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_jax.data.records.fields import PAIR, Bad
from mllm_jax.data.records.messages import ROLES, WEIGHTS

REJECTED = PAIR[1:]
USERS, ASSISTANTS = (tuple(name for name in ROLES if ROLES[name] == role) for role in ("user", "assistant"))


def unpacked(record: dict[str, Any]) -> dict[str, Any]:
    """Replaces a "text" that contains a pair as JSON by the fields of the pair; returns other records unchanged."""
    text = record.get("text")
    if not isinstance(text, str) or not text.startswith("{") or '"rejected"' not in text:
        return record
    try:
        return {key: value for key, value in record.items() if key != "text"} | json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise Bad("not a pair", f'"text" is not JSON: {error!s:.80}') from error


def with_chosen(turns: Sequence[Any], record: Mapping[str, Any]) -> tuple[list[Any], str | None, frozenset[str]]:
    """Returns the turns with the chosen answer, the rejected answer (None: no pair), and the names of its fields."""
    turns = list(turns)
    name = next((name for name in REJECTED if isinstance(record.get(name), str | list | Mapping)), None)
    if name is None:
        return turns, None, frozenset()
    rejected, chosen = record[name], record.get("chosen")
    if isinstance(chosen, list) and _asks(chosen):  # complete conversations take precedence over `turns`
        turns = list(chosen)
    elif chosen is not None and not _ends_with(turns, answer_text(chosen)):
        turns = [*turns, {"role": "assistant", "content": answer_text(chosen)}]
    last = turns[-1] if turns else None
    if not isinstance(last, Mapping) or last.get("role", last.get("from")) not in ASSISTANTS:
        raise Bad("not a pair", 'the chosen answer is missing; add "chosen"')
    if isinstance(rejected, list) and _asks(rejected) and not _same(rejected[:-1], turns[:-1]):
        raise Bad("not a pair", "the answers are to different questions")
    text = answer_text(rejected)
    if answer_text([last]) == text:
        raise Bad("not a pair", "both answers are the same")
    if any(last.get(name, True) not in (1, None) for name in WEIGHTS):
        raise Bad("not a pair", "the chosen answer has a weight; remove it")
    return turns, text, frozenset((name, *(("chosen",) if chosen is not None else ())))


def answer_text(answer: Any) -> str:
    """Returns the text of an answer that is a text, a message, or messages of which it is the last."""
    if isinstance(answer, list) and len(answer) > 1 and not _asks(answer):
        raise Bad("not a pair", "an answer must be one message")
    message = answer[-1] if isinstance(answer, list) and answer else answer
    if isinstance(message, Mapping):
        if any(message.get(name) for name in ("tool_calls", "function_call")):
            raise Bad("not a pair", "an answer must be a text without tool calls")
        answer = message.get("content", message.get("value"))
        if isinstance(answer, list) and all(
            isinstance(part, Mapping) and part.get("type") == "text" for part in answer
        ):
            answer = "".join(str(part.get("text")) for part in answer)
    if not isinstance(answer, str):
        raise Bad("not a pair", "an answer must be a text")
    return answer


def _ends_with(turns: Sequence[Any], answer: str) -> bool:
    """Returns whether the turns end with this answer. Raises Bad if they end with a different one."""
    last = turns[-1] if turns else None
    if not isinstance(last, Mapping) or last.get("role", last.get("from")) not in ASSISTANTS:
        return False
    if answer_text([last]) != answer:
        raise Bad("not a pair", 'the conversation ends with another answer than "chosen"')
    return True


def _asks(messages: Sequence[Any]) -> bool:
    """Returns whether messages contain a question."""
    return any(isinstance(turn, Mapping) and turn.get("role", turn.get("from")) in USERS for turn in messages)


def _same(rejected: Sequence[Any], chosen: Sequence[Any]) -> bool:
    """Returns whether two conversations have the same turns, except for their system prompts."""
    is_system = lambda turn: isinstance(turn, Mapping) and turn.get("role", turn.get("from")) == "system"
    return [turn for turn in rejected if not is_system(turn)] == [turn for turn in chosen if not is_system(turn)]
