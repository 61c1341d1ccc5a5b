"""A chosen and a rejected answer to one question, as an Example with their images only once. No jax."""

import difflib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from mllm_jax.common.settings import Config, Positive
from mllm_jax.data.records.records import BadData, BadRecord
from mllm_jax.types import Example, TokenBlend


class Reference(NamedTuple):
    """Log-probabilities of a reference model for a record's answers, and the `content_hash` of what it read."""

    content_hash: int
    log_probs: tuple[float, float]  # of the chosen answer, of the rejected one


@dataclass(frozen=True)
class Pairs(Config):
    """Reads a record with a chosen and a rejected answer.

    diff_token_weight: weight of the tokens in which the answers differ; of the others it is 1.
    references: stored log-probabilities by record id. None: there are none.
    """

    diff_token_weight: Positive = 1.0
    references: Mapping[str, Reference] | None = None
    one_example_per_row: ClassVar[bool] = False  # several may share a row

    def __call__(self, processor: Any, record: Mapping[str, Any], budget: Any = None) -> Example:
        """An Example of two conversations, that of the chosen answer first.

        Raises:
          BadRecord: there is one answer only. BadData: there is no reference for it, or one of something else.
        """
        others = [with_rejected(record)]
        tools = record.get("tools")
        example = processor(record["messages"], budget=budget, kind=record["kind"], others=others, tools=tools)
        if self.diff_token_weight != 1:
            example = example._replace(weight=weighted(example, self.diff_token_weight))
        return example if self.references is None else self._with_reference(example, record["id"])

    def _with_reference(self, example: Example, name: str) -> Example:
        found, again = self.references.get(name), "run python -m mllm_jax.train.algorithms.reference again"
        if found is None:
            raise BadData(f"{name} has no log-probabilities in the file of config.train.preference; {again}")
        if found.content_hash != content_hash(example):
            raise BadData(
                f"{name} is not what it was when its log-probabilities were computed: the record, the tokenizer, the "
                f"size of its images or the weight of its tokens has changed; {again}"
            )
        return example._replace(reference=np.array(found.log_probs, np.float32))


def with_rejected(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a record, with its rejected answer at their end. Raises BadRecord where it has none."""
    if record.get("rejected") is None:
        raise BadRecord("no pair", record["id"], 'this run needs a "chosen" and a "rejected" answer')
    *asked, answer = record["messages"]
    kept = {name: value for name, value in answer.items() if name in ("role", "weight")}  # the rest is the chosen one's
    return [*asked, kept | {"content": record["rejected"]}]


def together(conversations: Sequence[Example]) -> Example:
    """Conversations about the same images as one Example; of each the last answer alone is learned."""
    join = lambda arrays: np.concatenate(list(arrays))
    mixed = conversations[0].mix is not None
    first = conversations[0]
    return first._replace(
        tokens=join(one.tokens for one in conversations),
        weight=join(last_run(one.weight) for one in conversations),
        position=join(one.position for one in conversations),
        vision_index=join(one.vision_index for one in conversations),
        mix=TokenBlend(*map(join, zip(*(one.mix for one in conversations)))) if mixed else None,
        lengths=tuple(len(one.tokens) for one in conversations),
    )


def last_run(weight: np.ndarray) -> np.ndarray:
    """Weights without all but the last run of those that are not 0."""
    counts = np.flatnonzero(weight)
    gaps = np.flatnonzero(np.diff(counts) > 1)
    start = counts[gaps[-1] + 1] if len(gaps) else 0
    return np.where(np.arange(len(weight)) >= start, weight, 0).astype(np.float32)


def weighted(example: Example, diff_token_weight: float) -> np.ndarray:
    """Weights f32[n] in which the tokens that differ between two answers count `diff_token_weight` times."""
    parts = np.split(np.arange(len(example.tokens)), np.cumsum(example.lengths)[:-1])
    chosen, rejected = (part[example.weight[part] != 0] for part in parts)
    weight = example.weight.copy()
    for places, same in zip((chosen, rejected), same_tokens(example.tokens[chosen], example.tokens[rejected])):
        weight[places[~same]] *= diff_token_weight
    return weight


def same_tokens(a: Sequence[int], b: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """bool[len(a)], bool[len(b)]: the tokens that both sequences share, in order."""
    same = np.zeros(len(a), bool), np.zeros(len(b), bool)
    for block in difflib.SequenceMatcher(None, list(a), list(b), autojunk=False).get_matching_blocks():
        same[0][block.a : block.a + block.size] = True
        same[1][block.b : block.b + block.size] = True
    return same


def content_hash(example: Example) -> int:
    """A number that changes with tokens, weights, and sizes of images, but not with pixels."""
    grids = np.array([image.grid for image in example.images], np.int32)
    found = 0
    for part in (example.tokens, example.weight, example.vision_index, grids, np.array(example.lengths)):
        found = zlib.crc32(np.ascontiguousarray(part).tobytes(), found)
    return found
