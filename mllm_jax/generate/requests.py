"""Answers to conversations: messages in, text out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mllm_jax.data.pipeline.packing import collate, smallest_budget
from mllm_jax.generate.decode import generate_ids
from mllm_jax.model.dual_encoder import DualConfig
from mllm_jax.types import Array, Batch

Conversation = str | Sequence[dict[str, Any]] | Mapping[str, Any]


def generate(
    vlm: Any,
    conversations: Sequence[Conversation],
    max_new_tokens: int = 32,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    key: Array | None = None,
    content_tokens: bool = True,
) -> list[str]:
    """The answer to every conversation; all are read and answered as one batch.

    Args:
      vlm: of `mllm_jax.load_pretrained`.
      conversations: each a list of messages ([{"role": "user", "content": [{"type": "image", "image": "a.png"},
        {"type": "text", "text": "What is it?"}]}]), a string, which is a message of the user, or {"messages", "tools"}
        where the model may call functions.
      max_new_tokens: of each answer; it ends before at a token that ends a turn.
      temperature, top_k, top_p, key: see `generate_ids`. Greedy by default; `**vlm.processor.generation.sampling` is
        what the model's generation_config.json asks for.
      content_tokens: answers show tokens as `<|box_start|>`, see `Processor.decode`.
    Raises:
      ValueError: the model has no processor, or a conversation cannot be read.
    """
    single = conversations and isinstance(conversations[0], dict) and "messages" not in conversations[0]
    if isinstance(conversations, str | Mapping) or single:
        raise ValueError("conversations is a list of conversations, each a string or a list of messages")
    if not conversations:
        return []
    stop = answering_processor(vlm).stop_ids
    batch = read_prompts(vlm, conversations)
    ids = generate_ids(vlm, batch, max_new_tokens, temperature, top_k, top_p, stop=stop, key=key)
    return [vlm.processor.decode(until(row, stop), content_tokens) for row in ids]


def read_prompts(vlm: Any, conversations: Sequence[Conversation]) -> Batch:
    """Conversations as a batch of prompts, one per row, no larger than the largest of them."""
    processor = answering_processor(vlm)
    examples = [processor(**_request(conversation), generate=True) for conversation in conversations]
    return collate([[example] for example in examples], smallest_budget(examples), **vlm.config.layout)


def stream_text(processor: Any, stop: Sequence[int], write: Callable[[str], None]) -> Callable[[np.ndarray], None]:
    """An `on_token` for one row, which writes its text as it grows: complete characters, up to the stop token."""
    tokens, written = [], ""

    def on_token(token: np.ndarray) -> None:
        nonlocal written
        tokens.append(int(token[0]))
        text = processor.decode(until(tokens, stop))
        if not text.endswith("\ufffd"):  # an incomplete character of several tokens
            write(text[len(written) :])
            written = text

    return on_token


def until(tokens, stop: Sequence[int]):
    """The tokens before the first one that stops."""
    end = np.flatnonzero(np.isin(tokens, stop))
    return tokens[: end[0]] if len(end) else tokens


def answering_processor(vlm: Any) -> Any:
    """Returns the processor of a model. ValueError where it writes no texts or reads no messages."""
    if isinstance(vlm.config, DualConfig):
        raise ValueError(
            f"a dual encoder, of family {vlm.config.family}, writes no texts; see encode_image and classify"
        )
    if vlm.processor is None:
        raise ValueError(
            "the model was loaded from a folder without a tokenizer and chat template, so it cannot read messages: put "
            "tokenizer.json and chat_template.jinja beside config.json, or call generate_ids with tokens"
        )
    return vlm.processor


def _request(conversation: Conversation) -> dict[str, Any]:
    if isinstance(conversation, Mapping):
        return {"messages": conversation["messages"], "tools": conversation.get("tools")}
    return {"messages": [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation}
