"""Asks a model the questions of a source, and pairs its answers with the true ones."""

from collections.abc import Iterator, Sequence
from typing import Any

from mllm_jax.data.records import grounding
from mllm_jax.data.records.content import parts_of, texts_of
from mllm_jax.evaluate.report import Answer
from mllm_jax.generate.requests import generate


def ask(
    vlm: Any, records: Sequence[dict[str, Any]], batch_size: int = 32, max_new_tokens: int = 32
) -> Iterator[Answer]:
    """Yields the greedy answer to the last question of every conversation, given the true turns before it.

    Args:
      vlm: model with a processor, from `mllm_jax.load_pretrained`.
      records: {"messages", "kind", "id"}, see data/records/records.py. Documents have no question and are skipped.
      batch_size: number of conversations per batch.
      max_new_tokens: maximum number of tokens of an answer.
    """
    for start in range(0, len(records), batch_size):
        chunk = [records[i] for i in range(start, min(start + batch_size, len(records)))]
        if not (chunk := [record for record in chunk if len(record["messages"]) > 1]):
            continue
        prompts = [{"messages": record["messages"][:-1], "tools": record.get("tools")} for record in chunk]
        answers = generate(vlm, prompts, max_new_tokens=max_new_tokens)
        for record, text in zip(chunk, answers):
            messages = grounding.written(record["messages"], vlm.processor.spec.grounding)
            *_, question, truth = (parts_of(message.get("content") or "") for message in messages)
            image = next((item[item["type"]] for item in question if item["type"] != "text"), None)
            yield Answer(record["kind"], " ".join(texts_of(question)), " ".join(texts_of(truth)), text.strip(), image)
