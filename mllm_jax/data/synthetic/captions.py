"""Captions of scenes that name their objects, each paired with one that names an absent object.

The truth is known here, so that the fraction of false objects that a model names can be counted (CHAIR, arXiv
1809.02156); it falls as the model learns to prefer truthful captions.
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
        false: fraction of captions that end with an absent object, as in web data. They are for supervised training:
          pairs
            need `false=0`.
        options: arguments of `Scenes`.
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
    """Objects that a caption names."""

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
    """Counts named and true objects. An object that is named twice and exists once is false once."""
    said, true = (Counter(filter(None, map(str.strip, text.split(",")))) for text in (said, true))
    right = (said & true).total()
    return Named(said.total(), said.total() - right, true.total() - right)


def false_share(captions: Sequence[Named]) -> Share:
    """Fraction of named objects that do not exist: CHAIR_i, where an object is a color and a shape."""
    return _share([named.false for named in captions], [named.things for named in captions])


def recall(captions: Sequence[Named]) -> Share:
    """Fraction of existing objects that captions name."""
    return _share([named.there - named.missed for named in captions], [named.there for named in captions])


def _share(parts: Sequence[int], wholes: Sequence[int]) -> Share:
    """The ratio of two sums, and its standard error by linearization."""
    value = sum(parts) / max(sum(wholes), 1)
    return Share(value, math.hypot(*(part - value * whole for part, whole in zip(parts, wholes))) / max(sum(wholes), 1))
