"""Comparison of answers with the truth."""

import re
from collections import Counter
from collections.abc import Sequence

from mllm_jax.evaluate.report import Answer
from mllm_jax.train.evaluators.base import shares


def normalize(text: str) -> str:
    """Lower case, single blanks, no full stop at the end."""
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").rstrip().casefold()


def exact_match(prediction: str, answer: str) -> bool:
    """Returns whether both texts are equal, ignoring case, spaces and a final full stop."""
    return normalize(prediction) == normalize(answer)


def scores(answers: Sequence[Answer]) -> dict[str, float]:
    """Share of exact matches of every kind of question and, as "all", of all."""
    right = Counter(answer.kind for answer in answers if exact_match(answer.answer, answer.truth))
    return shares(right, Counter(answer.kind for answer in answers))
