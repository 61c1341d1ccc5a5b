"""Comparison and counting of answers."""

import pytest

from mllm_jax.evaluate.metrics import exact_match, scores
from mllm_jax.evaluate.report import Answer


@pytest.mark.parametrize("said", ["A red square", "a  red\nsquare", " A RED SQUARE. "])
def test_case_blanks_and_a_full_stop_do_not_count(said):
    assert exact_match(said, "a red square.")


@pytest.mark.parametrize("said", ["", "red square", "a red square..", "a red, square"])
def test_other_answers_are_wrong(said):
    assert not exact_match(said, "a red square")


def test_scores_are_shares_by_kind():
    answers = [Answer("color", "?", "red", "Red."), Answer("color", "?", "red", "blue"), Answer("", "?", "2", "2")]
    assert scores(answers) == {"all": 2 / 3, "color": 0.5, "other": 1.0}
    assert scores([]) == {"all": 0.0}
