"""Answers the prompts of a file."""

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

ANSWERS = ("chosen", "response", "completion")  # fields that contain the answer to a "prompt"


def answers(
    vlm: Any, path: str, start: list[dict[str, Any]], batch_size: int, settings: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Answers the prompts of a file in order.

    Args:
      vlm: model from `mllm_jax.load_pretrained`.
      path: text file with one prompt per line, or records of any format and layout that `mllm_jax.data.sources` reads.
        An answer at the end of a record is ignored, and may be missing.
      start: messages that precede those of each prompt, unless it has a system message.
      batch_size: number of prompts per batch.
      settings: arguments of `generate`.
    Yields:
      {"id", "prompt", "answer"}, or {"id", "error"} if a prompt cannot be read.
    Raises:
      OSError, ValueError: the file cannot be read.
    """
    pending: list[dict[str, Any]] = []
    for prompt in read_prompt_file(path, start):
        if "error" in prompt:
            yield from _generate_answers(vlm, pending, settings)
            yield prompt
            pending = []
        else:
            pending.append(prompt)
        if len(pending) == batch_size:
            yield from _generate_answers(vlm, pending, settings)
            pending = []
    yield from _generate_answers(vlm, pending, settings)


def read_prompt_file(path: str, start: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the prompts of a file as {"id", "messages", "tools"} or {"id", "error"}.

    Args and Raises: as in `answers`.
    """
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
                conversation = read_record(_add_answer(record), shard.name(index), find)
                if conversation["messages"][0]["role"] == DOCUMENT:
                    raise BadRecord("no question", conversation["id"], "it is a document")
            except BadRecord as error:
                yield {"id": error.id, "error": str(error)}
                continue
            messages = conversation["messages"][:-1]
            first = [] if messages[0]["role"] == "system" else start
            yield {"id": conversation["id"], "messages": [*first, *messages], "tools": conversation.get("tools")}


def _add_answer(record: Any) -> Any:
    """Returns the record with a placeholder answer if it ends with a question, because `read_record` needs one."""
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


def _generate_answers(vlm: Any, prompts: list[dict[str, Any]], settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the prompts with their answers. After an error, each prompt is answered alone to find the faulty ones."""
    if not prompts:
        return
    try:
        texts = generate(
            vlm, [{name: prompt[name] for name in ("messages", "tools")} for prompt in prompts], **settings
        )
    except (OSError, ValueError) as error:
        if len(prompts) == 1:
            yield {"id": prompts[0]["id"], "error": describe_error(error)}
            return
        for prompt in prompts:
            yield from _generate_answers(vlm, [prompt], settings)
        return
    for prompt, answer in zip(prompts, texts):
        question = texts_of(prompt["messages"][-1].get("content") or "")
        yield {"id": prompt["id"], "prompt": " ".join(question), "answer": answer}


def as_line(answer: Mapping[str, Any]) -> str:
    """Returns an answer as one line of JSON."""
    return json.dumps(answer, ensure_ascii=False)
