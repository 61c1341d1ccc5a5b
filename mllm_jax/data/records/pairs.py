"""A chosen and a rejected answer to one question, as they are published."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_jax.data.records.fields import PAIR, Bad
from mllm_jax.data.records.messages import ROLES, WEIGHTS

REJECTED = PAIR[1:]
USERS, ASSISTANTS = (tuple(name for name in ROLES if ROLES[name] == role) for role in ("user", "assistant"))


def unpacked(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose "text" is a pair as JSON, with the fields of that pair; any other as it is."""
    text = record.get("text")
    if not isinstance(text, str) or not text.startswith("{") or '"rejected"' not in text:
        return record
    try:
        return {key: value for key, value in record.items() if key != "text"} | json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise Bad("not a pair", f'"text" is not JSON: {error!s:.80}') from error


def with_chosen(turns: Sequence[Any], record: Mapping[str, Any]) -> tuple[list[Any], str | None, frozenset[str]]:
    """The turns with the chosen answer at their end, the rejected answer, and the fields that hold them.

    None stands for the rejected answer where the record has none.
    """
    turns = list(turns)
    name = next((name for name in REJECTED if isinstance(record.get(name), str | list | Mapping)), None)
    if name is None:
        return turns, None, frozenset()
    rejected, chosen = record[name], record.get("chosen")
    if isinstance(chosen, list) and _asks(chosen):  # complete conversations, regardless of other fields
        turns = list(chosen)
    elif chosen is not None and not _ends_with(turns, answer_text(chosen)):
        turns = [*turns, {"role": "assistant", "content": answer_text(chosen)}]
    last = turns[-1] if turns else None
    if not isinstance(last, Mapping) or last.get("role", last.get("from")) not in ASSISTANTS:
        raise Bad("not a pair", 'there is a rejected answer but no chosen one, such as "chosen"')
    if isinstance(rejected, list) and _asks(rejected) and not _same(rejected[:-1], turns[:-1]):
        raise Bad("not a pair", "the answers are to different questions")
    text = answer_text(rejected)
    if answer_text([last]) == text:
        raise Bad("not a pair", "both answers are the same")
    if any(last.get(name, True) not in (1, None) for name in WEIGHTS):
        raise Bad("not a pair", "the chosen answer has a weight, and must have none")
    return turns, text, frozenset((name, *(("chosen",) if chosen is not None else ())))


def answer_text(answer: Any) -> str:
    """The text of an answer: itself, or that of the last of messages."""
    if isinstance(answer, list) and len(answer) > 1 and not _asks(answer):
        raise Bad("not a pair", "an answer must be one message")
    message = answer[-1] if isinstance(answer, list) and answer else answer
    if isinstance(message, Mapping):
        if any(message.get(name) for name in ("tool_calls", "function_call")):
            raise Bad("not a pair", "an answer must be a text, and not call a tool")
        answer = message.get("content", message.get("value"))
        if isinstance(answer, list) and all(
            isinstance(part, Mapping) and part.get("type") == "text" for part in answer
        ):
            answer = "".join(str(part.get("text")) for part in answer)
    if not isinstance(answer, str):
        raise Bad("not a pair", "an answer must be a text")
    return answer


def _ends_with(turns: Sequence[Any], answer: str) -> bool:
    """Returns whether the turns end with this answer. Raises Bad where they end with another one."""
    last = turns[-1] if turns else None
    if not isinstance(last, Mapping) or last.get("role", last.get("from")) not in ASSISTANTS:
        return False
    if answer_text([last]) != answer:
        raise Bad("not a pair", 'the conversation ends with another answer than "chosen"')
    return True


def _asks(messages: Sequence[Any]) -> bool:
    """Returns whether messages hold a question, too."""
    return any(isinstance(turn, Mapping) and turn.get("role", turn.get("from")) in USERS for turn in messages)


def _same(rejected: Sequence[Any], chosen: Sequence[Any]) -> bool:
    """Returns whether two conversations ask the same, apart from a system prompt in one of them."""
    is_system = lambda turn: isinstance(turn, Mapping) and turn.get("role", turn.get("from")) == "system"
    return [turn for turn in rejected if not is_system(turn)] == [turn for turn in chosen if not is_system(turn)]
