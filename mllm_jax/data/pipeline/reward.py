"""Inputs of reward models and prompts of PPO: questions, answers, a turn that asks for a verdict. No jax.

The verdict is asked for by one more user turn after the answer, with the facts of a record (Fact-RLHF, arXiv
2309.14525). The tokens before it are those that the answering model reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mllm_jax.data.pipeline.packing import Budget
from mllm_jax.data.pipeline.preference import together, with_rejected
from mllm_jax.data.records import grounding
from mllm_jax.data.records.records import DOCUMENT, BadRecord
from mllm_jax.data.vision.token_blend import alone
from mllm_jax.types import Example

FACTS = "{facts}"


def verdict(prompt: str, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turn that asks for a verdict, with the facts of a record; none where the prompt is empty.

    Raises:
      BadRecord: the prompt asks for facts, and the record has none.
    """
    if FACTS in prompt and not record.get("facts"):
        raise BadRecord("no facts", record["id"], f'config.algorithm.prompt names {FACTS}, and there is no "facts"')
    return [{"role": "user", "content": prompt.replace(FACTS, record.get("facts", ""))}] if prompt else []


@dataclass(frozen=True)
class RewardPairs:
    """Reads a record with a chosen and a rejected answer for a reward model: the verdict's turn follows both.

    prompt: text of that turn; {facts} stands for the facts of the record.
    """

    prompt: str
    references: ClassVar[None] = None
    one_example_per_row: ClassVar[bool] = False

    def __call__(self, processor: Any, record: Mapping[str, Any], budget: Budget | None = None) -> Example:
        """An Example of two conversations, that of the chosen answer first. Raises BadRecord: no pair, or no facts."""
        turn = verdict(self.prompt, record)
        chosen, rejected = ([*messages, *turn] for messages in (record["messages"], with_rejected(record)))
        return processor(chosen, budget=budget, kind=record["kind"], others=[rejected], tools=record.get("tools"))


@dataclass(frozen=True)
class PpoPrompts:
    """A record as a question that is to be answered, and as what a reward model reads after the answer.

    An Example of two parts that one row holds alone: up to where the answer begins, and from its end to the verdict's.
    prompt: as in `RewardPairs`.
    """

    prompt: str
    references: ClassVar[None] = None
    one_example_per_row: ClassVar[bool] = True

    def __call__(self, processor: Any, record: Mapping[str, Any], budget: Budget) -> Example:
        """Raises BadRecord: a document, which asks nothing, or no facts."""
        messages = record["messages"]
        if messages[0]["role"] == DOCUMENT:
            raise BadRecord("no question", record["id"], "PPO answers questions, and this is a document")
        tools = record.get("tools")
        rest = self._rest(processor, messages, verdict(self.prompt, record), tools)
        room = budget._replace(tokens=budget.tokens - len(rest.tokens))
        asked = processor(messages[:-1], generate=True, budget=room, kind=record["kind"], tools=tools)
        if asked.mix is not None:
            rest = rest._replace(mix=alone(rest.vision_index).mix)
        return together([asked, rest])

    def _rest(self, processor: Any, messages: list[dict[str, Any]], turn: list[dict[str, Any]], tools: Any) -> Example:
        """The tokens behind the answer; positions are counted from the first of them."""
        answer = {name: value for name, value in messages[-1].items() if name != "weight"}
        messages = grounding.written([*messages[:-1], answer, *turn], processor.spec.grounding)
        tokens, weight = processor.tokenize(messages, tools=tools)
        tokens = np.array(tokens[1 + int(np.flatnonzero(weight)[-1]) :], np.int32)
        count = len(tokens)
        return Example(
            tokens=tokens,
            weight=np.zeros(count, np.float32),
            position=np.repeat(np.arange(count, dtype=np.int32)[:, None], 3, axis=1),
            vision_index=np.full(count, -1, np.int32),
            images=(),
        )
