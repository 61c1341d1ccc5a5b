"""Prompts of a file, answered one after the other."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mllm_jax.common.errors import describe_error
from mllm_jax.data.records.content import texts_of
from mllm_jax.data.records.messages import CALL, ROLES
from mllm_jax.data.records.records import DOCUMENT, BadRecord, read_record
from mllm_jax.data.sources import kind_of, open_source
from mllm_jax.generate.requests import generate

ANSWER = {"messages": {"role": "assistant", "content": "."}, "conversations": {"from": "gpt", "value": "."}}

ANSWERS = ("chosen", "response", "completion")  # fields of answers to a prompt


def answers(
    vlm: Any, path: str, start: list[dict[str, Any]], batch_size: int, settings: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Answers every prompt of a file, in its order.

    Args:
      vlm: of `mllm_jax.load_pretrained`.
      path: a text with one prompt a line, or records of any kind and layout that `mllm_jax.data.sources` reads. An
        answer at the end of a record is not read, and may be absent.
      start: messages before those of each prompt.
      batch_size: prompts that are answered at once.
      settings: of `generate`.
    Yields:
      {"id", "prompt", "answer"}, or {"id", "error"} where a prompt cannot be read.
    Raises:
      OSError, ValueError: the file cannot be read.
    """
    waiting: list[dict[str, Any]] = []
    for read in read_prompt_file(path, start):
        if "error" in read:
            yield from _answered(vlm, waiting, settings)
            yield read
            waiting = []
        else:
            waiting.append(read)
        if len(waiting) == batch_size:
            yield from _answered(vlm, waiting, settings)
            waiting = []
    yield from _answered(vlm, waiting, settings)


def read_prompt_file(path: str, start: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The prompts of a file, as {"id", "messages", "tools"} or {"id", "error"}; arguments and errors of `answers`."""
    if Path(path).is_file() and kind_of(Path(path)) is None:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield {
                    "id": str(number),
                    "messages": [*start, {"role": "user", "content": line.strip()}],
                    "tools": None,
                }
        return
    for shard in open_source(path).shards:
        for index in range(len(shard)):
            try:
                record, find = shard.read(index)
                read = read_record(_with_answer(record), shard.name(index), find)
                if read["messages"][0]["role"] == DOCUMENT:
                    raise BadRecord("no question", read["id"], "it is a document")
            except BadRecord as error:
                yield {"id": error.id, "error": str(error)}
                continue
            own = read["messages"][:-1]
            before = [] if own[0]["role"] == "system" else start
            yield {"id": read["id"], "messages": [*before, *own], "tools": read.get("tools")}


def _with_answer(record: Any) -> Any:
    """The record with an answer, which layouts need, where it ends with a question."""
    if isinstance(record, str):
        record = {"prompt": record}
    if not isinstance(record, Mapping):
        return record
    if (
        isinstance(record.get("prompt"), str)
        and len(record.keys() & {*ANSWER, "chosen", "response", "completion"}) == 0
    ):
        question = {"role": "user", "content": record["prompt"]}
        record = {name: value for name, value in record.items() if name != "prompt"} | {"messages": [question]}
    for field, answer in ANSWER.items():
        turns = record.get(field)
        if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
            role = ROLES.get(str(turns[-1].get("role", turns[-1].get("from"))))
            if role not in ("assistant", CALL):
                record = {**record, field: [*turns, answer]}
    return record


def _answered(vlm: Any, prompts: list[dict[str, Any]], settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The prompts with their answers; one that cannot be read leaves the others theirs."""
    if not prompts:
        return
    try:
        said = generate(vlm, [{name: prompt[name] for name in ("messages", "tools")} for prompt in prompts], **settings)
    except (OSError, ValueError) as error:
        if len(prompts) == 1:
            yield {"id": prompts[0]["id"], "error": describe_error(error)}
            return
        for prompt in prompts:
            yield from _answered(vlm, [prompt], settings)
        return
    for prompt, answer in zip(prompts, said):
        asked = texts_of(prompt["messages"][-1].get("content") or "")
        yield {"id": prompt["id"], "prompt": " ".join(asked), "answer": answer}


def as_line(answer: Mapping[str, Any]) -> str:
    """An answer as one line of JSON."""
    return json.dumps(answer, ensure_ascii=False)
