"""Layers of several kinds: what repeats is compiled once."""

import pytest

from mllm_jax.nn.stack import segments


@pytest.mark.parametrize(
    "kinds, expected",
    [
        ("aaaa", [("layers", 0, "a", 4)]),
        ("abbb", [("layers0", 0, "a", 1), ("layers1", 1, "b", 3)]),
        ("ababab", [("layers", 0, "ab", 3)]),
        ("aabaabaa", [("layers0", 0, "aab", 2), ("layers1", 6, "a", 2)]),
        ("a", [("layers", 0, "a", 1)]),
    ],
)
def test_segments(kinds, expected):
    assert [(s.name, s.start, "".join(s.pattern), s.repeats) for s in segments(tuple(kinds))] == expected


def test_slots_cover_every_layer_once():
    parts = segments(tuple("aabaabaa"))
    slots = [slot for part in parts for slot in part.slots()]
    assert [(name, list(numbers), kind) for name, numbers, kind in slots] == [
        ("layers0/slots_0", [0, 3], "a"),
        ("layers0/slots_1", [1, 4], "a"),
        ("layers0/slots_2", [2, 5], "b"),
        ("layers1", [6, 7], "a"),
    ]
