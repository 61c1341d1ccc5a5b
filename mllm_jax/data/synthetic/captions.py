"""Captions of scenes that name what is there, each beside one that names something else: pairs of answers.

What is true is known here, so that the share of false things that a model names can be counted (CHAIR, arXiv
1809.02156), and falls where it learns to prefer the truthful one.
"""

import math
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

from mllm_jax.data.synthetic.scenes import COLORS, SHAPES, Scenes

THINGS = [f"{color} {shape}" for color in COLORS for shape in SHAPES]  # in the order in which captions name them


class Captions:
    """A random-access set of {"messages": [user, assistant], "rejected", "facts": str, "kind": "caption", "id": str}.

    Args:
        false: share of the captions that end with an absent thing, as many name some that are found in the wild. They
            are for learning to say so: pairs are for `false=0`.
        options: of `Scenes`.
    """

    def __init__(self, split: str = "train", seed: int = 0, false: float = 0.0, **options: Any):
        self.false, self.scenes = false, Scenes(split, seed, {"caption": 1.0}, **options)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.scenes[index]
        r, (question, answer) = Random(f"{item['id']}/false"), item["messages"]
        there = sorted(answer["content"].split(", "), key=THINGS.index)
        false = r.choice([thing for thing in THINGS if thing not in there])
        more, place = [*there, false], r.randrange(len(there))
        rejected = r.choice([more, [*there[:place], false, *there[place + 1 :]]])
        said = more if r.random() < self.false else there
        return item | {
            "messages": [question, answer | {"content": ", ".join(said)}],
            "rejected": ", ".join(rejected),
            "facts": ", ".join(there),
        }


class Named(NamedTuple):
    """What a caption names."""

    things: int
    false: int  # of these, the ones that are not there
    missed: int  # things that are there and not named

    @property
    def there(self) -> int:
        return self.things - self.false + self.missed


class Share(NamedTuple):
    value: float
    error: float  # standard error, over captions: these are drawn independently, what one of them names is not


def count_named(said: str, true: str) -> Named:
    """What is said beside what is true. A thing that is named twice and is there once is false once."""
    said, true = (Counter(filter(None, map(str.strip, text.split(",")))) for text in (said, true))
    right = (said & true).total()
    return Named(said.total(), said.total() - right, true.total() - right)


def false_share(captions: Sequence[Named]) -> Share:
    """Of the things that captions name, those that are not there: CHAIR_i, where a thing is a color and a shape."""
    return _share([named.false for named in captions], [named.things for named in captions])


def recall(captions: Sequence[Named]) -> Share:
    """Of the things that are there, those that captions name."""
    return _share([named.there - named.missed for named in captions], [named.there for named in captions])


def _share(parts: Sequence[int], wholes: Sequence[int]) -> Share:
    """The ratio of two sums, and its standard error by linearization."""
    value = sum(parts) / max(sum(wholes), 1)
    return Share(value, math.hypot(*(part - value * whole for part, whole in zip(parts, wholes))) / max(sum(wholes), 1))
