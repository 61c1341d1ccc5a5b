"""Scores answers against the true ones."""

import re
from collections import Counter
from collections.abc import Sequence

from mllm_jax.evaluate.report import Answer
from mllm_jax.train.evaluators.base import shares


def normalize(text: str) -> str:
    """Returns the text in lower case, with single spaces and without a final full stop."""
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").rstrip().casefold()


def exact_match(prediction: str, answer: str) -> bool:
    """Returns whether both texts are equal, ignoring case, spaces and a final full stop."""
    return normalize(prediction) == normalize(answer)


def scores(answers: Sequence[Answer]) -> dict[str, float]:
    """Returns the share of exact matches per kind of question, and of all questions as "all"."""
    matches = Counter(answer.kind for answer in answers if exact_match(answer.answer, answer.truth))
    return shares(matches, Counter(answer.kind for answer in answers))
