"""Normalizes the messages of a conversation: published forms of roles, weights, tool calls and reasoning.

A message is {"role": "system" | "user" | "assistant" | "tool", "content"}. An assistant turn may have "weight" (float,
0: in the context, without loss), "tool_calls" ([{"type": "function", "function": {"name", "arguments": dict}}]) and
"reasoning_content" (str). A message of a tool may have "name" and "tool_call_id".
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mllm_jax.data.records import fields
from mllm_jax.data.records.fields import Bad, is_empty, present, unread
from mllm_jax.data.records.parts import Messages, normal_parts

CALL = "call"  # role of turns whose content is a tool call as JSON
ROLES = (
    dict.fromkeys(("system", "developer"), "system")
    | dict.fromkeys(("user", "human"), "user")
    | dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant")
    | dict.fromkeys(("tool", "tool_response", "observation", "function", "ipython"), "tool")
    | dict.fromkeys(("function_call", "tool_call"), CALL)
)
NEXT = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}
WEIGHTS = ("weight", "loss", "train")  # names in OpenAI, ms-swift and axolotl
REASONING = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "function_call")
OF_ALL = ("role", "from", "content", "value", *WEIGHTS)  # weights are validated on every message
READ = {
    "system": frozenset(OF_ALL),
    "user": frozenset(OF_ALL),
    "assistant": frozenset((*OF_ALL, *CALLS, *REASONING)),
    "tool": frozenset((*OF_ALL, "name", "tool_call_id")),
    CALL: frozenset(OF_ALL),
}
STARTS, ENDS = "turns before the first question are left out", "turns after the last answer are left out"
TRIMMED = {STARTS: "trimmed_start", ENDS: "trimmed_end"}  # notes of a record -> names of their metrics


def normal_messages(turns: Sequence[Mapping[str, Any]]) -> tuple[Messages, tuple[str, ...]]:
    """Returns the messages of published turns, and the names of their fields that are not read.

    Raises Bad for an unknown role or an unsupported field.
    """
    messages, omitted = [], set()
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise Bad("not a conversation", f"a message must be an object, not a {type(turn).__name__}")
        turn = present(turn, kept=("content", "value"))
        published = turn.get("role", turn.get("from"))
        roles = {name: ROLES.get(turn[name]) for name in ("role", "from") if isinstance(turn.get(name), str)}
        role = _one_of(roles, "role", "from")
        if role is None:
            # The field itself may be misspelled.
            unread(fields.MESSAGE, frozenset(turn), frozenset().union(*READ.values()))
            raise Bad("wrong roles", f"unknown role {published!r:.80}; name one of {', '.join(ROLES)}")
        omitted.update(unread(fields.MESSAGE, frozenset(turn), READ[role]))
        message = _call_turn(turn) if role == CALL else _message(role, turn)
        if role == CALL and messages and messages[-1]["role"] == "assistant":
            _join(messages[-1], message)
        else:
            messages.append(message)
    return messages, tuple(sorted(omitted))


def with_system(messages: Messages, system: Any) -> Messages:
    """Prepends the system prompt of a record. Raises Bad if the messages have a different one."""
    if system is None:
        return messages
    first = {"role": "system", "content": normal_parts(system, "system")}
    if messages and messages[0]["role"] == "system":
        if messages[0] != first:
            raise Bad("two system prompts", 'the field "system" and the system message differ')
        return messages
    return [first, *messages]


def in_order(messages: Messages) -> tuple[Messages, tuple[str, ...]]:
    """Trims messages to the system prompt and the turns from the first question to the last answer; returns notes, too.

    Raises Bad unless user and assistant take turns, with messages of tools between two turns of the assistant.
    """
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    roles = [message["role"] for message in messages[len(system) :]]
    if "system" in roles:
        raise Bad("wrong roles", "a system message must come first, and alone")
    if "user" not in roles or "assistant" not in roles[roles.index("user") :]:
        published = ", ".join(roles[:8]) or "no turns"
        raise Bad("wrong roles", f'needs a question and an answer, got {published}; put a document into "text"')
    first, last = roles.index("user"), len(roles) - roles[::-1].index("assistant")
    for role, following in zip(roles[first:last], roles[first + 1 : last]):
        if following not in NEXT[role]:
            raise Bad("wrong roles", f"user and assistant must take turns, got {role}, {following}")
    notes = (STARTS,) * (first > 0) + (ENDS,) * (last < len(roles))
    return [*system, *messages[len(system) + first : len(system) + last]], notes


def tools_beside(record: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Returns the tools that a record describes, in transformers' layout; None if it has no such field."""
    name = next((name for name in ("tools", "functions") if name in record), None)
    if name is None:
        return None
    tools = parsed(record[name], name)
    tools = [parsed(tool, name) for tool in (tools if isinstance(tools, list) else [tools])]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise Bad("not a tool", f'"{name}" must be a list of objects, or its JSON text')
    bare = lambda tool: "name" in tool and "type" not in tool and "function" not in tool
    return [{"type": "function", "function": tool} if bare(tool) else dict(tool) for tool in tools] or None


def parsed(value: Any, name: str) -> Any:
    """Parses a value that Parquet and others may store as JSON text. Raises Bad, naming the field."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Bad("not valid JSON", f'"{name}" is a text, but not JSON: {error!s:.80}') from error


def _one_of(turn: Mapping[str, Any], *names: str) -> Any:
    """Returns the value of a field that has several names. Raises Bad if two of them have different values."""
    values = [turn[name] for name in names if name in turn]
    if any(value != values[0] for value in values):
        raise Bad("not a conversation", f"{' and '.join(names)} of a message differ")
    return values[0] if values else None


def _message(role: str, turn: Mapping[str, Any]) -> dict[str, Any]:
    content = _one_of(turn, "content", "value")
    if role == "tool" and isinstance(content, Mapping) and not content.keys() & {"type", "text", "image", "video"}:
        content = _json(content)  # a tool's result given as an object
    fields_of_role = dict(_of_assistant(turn)) if role == "assistant" else {}
    content = "" if content is None and "tool_calls" in fields_of_role else content
    if role == "tool":
        fields_of_role = {name: str(turn[name]) for name in ("name", "tool_call_id") if name in turn}
    return {"role": role, "content": normal_parts(content)} | fields_of_role | _weight(role, turn)


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise Bad("not a conversation", f"the answer of a tool cannot be written as JSON: {error}") from error


def _call_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a turn that consists of tool calls to an assistant turn."""
    calls = _calls(_one_of(turn, "content", "value"), "function_call")
    return {"role": "assistant", "content": "", "tool_calls": calls} | _weight("assistant", turn)


def _join(message: dict[str, Any], call: dict[str, Any]) -> None:
    """Adds the tool calls of a turn to the assistant turn before it."""
    if message.get("weight") != call.get("weight"):
        raise Bad("wrong weight", "a turn of the assistant and its tool calls must have the same weight")
    message.setdefault("tool_calls", []).extend(call["tool_calls"])


def _of_assistant(turn: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if calls := _one_of(turn, *CALLS):
        yield "tool_calls", _calls(calls, "tool_calls")
    thought = _one_of(turn, *REASONING)
    if not isinstance(thought, str | None):
        raise Bad("not a conversation", f"one of {', '.join(REASONING)} must be a text")
    if thought is not None:
        yield "reasoning_content", thought


def _weight(role: str, turn: Mapping[str, Any]) -> dict[str, float]:
    weights = {name: turn[name] for name in WEIGHTS if name in turn}
    if not weights:
        return {}
    valid = all(isinstance(value, bool | int | float) and 0 <= value < math.inf for value in weights.values())
    if not valid or len(set(map(float, weights.values()))) > 1:
        raise Bad("wrong weight", f"{weights!r:.80} must be one number that is 0 or more, or true or false")
    weight = float(next(iter(weights.values())))
    if role != "assistant":
        if weight:
            raise Bad("wrong weight", f"a turn of the {role} cannot be trained on; remove its weight")
        return {}
    return {"weight": weight}


def _calls(calls: Any, name: str) -> list[dict[str, Any]]:
    calls = parsed(calls, name)
    calls = [parsed(call, name) for call in (calls if isinstance(calls, list) else [calls])]
    if is_empty(calls):
        raise Bad("not a call of a tool", f'"{name}" is empty')
    return [_call(call, name) for call in calls]


def _call(call: Any, name: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    called = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(called, str):
        raise Bad("not a call of a tool", f'"{name}" needs objects with a "name" and "arguments"')
    arguments = function.get("arguments", function.get("parameters"))
    arguments = parsed(arguments, f"arguments of {called}") if arguments != "" else None
    if not isinstance(arguments, Mapping | None):
        raise Bad("not a call of a tool", f"the arguments of {called} must be an object")
    call_id = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return call_id | {"type": "function", "function": {"name": called, "arguments": dict(arguments or {})}}
