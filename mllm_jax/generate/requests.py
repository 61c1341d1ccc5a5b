"""Generates answers to conversations: reads messages, returns texts."""

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
    """Returns the answer to every conversation; all are answered as one batch.

    Args:
      vlm: model from `mllm_jax.load_pretrained`.
      conversations: each a list of messages ([{"role": "user", "content": [{"type": "image", "image": "a.png"},
        {"type": "text", "text": "What is it?"}]}]), a string (one user message), or {"messages", "tools"} if the model
        may call functions.
      max_new_tokens: maximum number of tokens of an answer. A token that ends the turn ends the answer earlier.
      temperature, top_k, top_p, key: as in `generate_ids`. Default: greedy. `**vlm.processor.generation.sampling`
        passes the settings of the model's generation_config.json.
      content_tokens: whether answers include tokens such as `<|box_start|>`, see `Processor.decode`.
    Raises:
      ValueError: the model has no processor, or a conversation cannot be read.
    """
    single = conversations and isinstance(conversations[0], dict) and "messages" not in conversations[0]
    if isinstance(conversations, str | Mapping) or single:
        raise ValueError(
            "conversations: is not a list of conversations. Pass a list of strings or of lists of messages."
        )
    if not conversations:
        return []
    stop = answering_processor(vlm).stop_ids
    batch = read_prompts(vlm, conversations)
    ids = generate_ids(vlm, batch, max_new_tokens, temperature, top_k, top_p, stop=stop, key=key)
    return [vlm.processor.decode(until(row, stop), content_tokens) for row in ids]


def read_prompts(vlm: Any, conversations: Sequence[Conversation]) -> Batch:
    """Returns the conversations as a batch of prompts, one per row, as long as the longest of them."""
    processor = answering_processor(vlm)
    examples = [processor(**_request(conversation), generate=True) for conversation in conversations]
    return collate([[example] for example in examples], smallest_budget(examples), **vlm.config.layout)


def stream_text(processor: Any, stop: Sequence[int], write: Callable[[str], None]) -> Callable[[np.ndarray], None]:
    """Returns an `on_token` for a batch of one row that passes new text to `write`, up to the stop token.

    Text is passed in complete characters; a character may consist of several tokens.
    """
    tokens, written = [], ""

    def on_token(token: np.ndarray) -> None:
        nonlocal written
        tokens.append(int(token[0]))
        text = processor.decode(until(tokens, stop))
        if not text.endswith("\ufffd"):  # an incomplete character
            write(text[len(written) :])
            written = text

    return on_token


def until(tokens, stop: Sequence[int]):
    """Returns the tokens before the first one that is in `stop`."""
    end = np.flatnonzero(np.isin(tokens, stop))
    return tokens[: end[0]] if len(end) else tokens


def answering_processor(vlm: Any) -> Any:
    """Returns the processor of a model. Raises ValueError if the model cannot generate texts or read messages."""
    if isinstance(vlm.config, DualConfig):
        raise ValueError(
            f"config.family={vlm.config.family}: a dual encoder cannot generate texts. Use encode_image or classify."
        )
    if vlm.processor is None:
        raise ValueError(
            "processor=None: the model's folder lacks a tokenizer or chat template, so it cannot read messages. Add "
            "tokenizer.json and chat_template.jinja beside config.json, or call generate_ids with tokens."
        )
    return vlm.processor


def _request(conversation: Conversation) -> dict[str, Any]:
    if isinstance(conversation, Mapping):
        return {"messages": conversation["messages"], "tools": conversation.get("tools")}
    return {"messages": [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation}
