"""Captions of scenes that name what is there, each beside one that names something else: pairs of answers.

What is true is known here, so that the share of false things that a model names can be counted (CHAIR, arXiv
1809.02156), and falls where it learns to prefer the truthful one.
"""

from collections.abc import Iterable
from random import Random
from typing import Any, NamedTuple

from mllm_jax.data.scenes import COLOURS, SHAPES, Scenes


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
        there = answer["content"].split(", ")
        false = r.choice(
            [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES if f"{colour} {shape}" not in there]
        )
        more, place = [*there, false], r.randrange(len(there))
        rejected = r.choice([more, [*there[:place], false, *there[place + 1 :]]])
        said = more if r.random() < self.false else there
        return item | {
            "messages": [question, answer | {"content": ", ".join(said)}],
            "rejected": ", ".join(rejected),
            "facts": ", ".join(there),
        }


class Named(NamedTuple):
    """What captions name."""

    things: int
    false: int  # of these, the ones that are not there
    missed: int  # things that are there and not named

    @property
    def false_share(self) -> float:
        return self.false / max(self.things, 1)


def count_named(captions: Iterable[tuple[str, str]]) -> Named:
    """Of (said, true) captions: things named, things named that are not there, and things that are not named.

    A thing that is named twice and is there once is false once.
    """
    things = false = missed = 0
    for said, true in captions:
        named, left = [thing.strip() for thing in said.split(",")], true.split(", ")
        for thing in named:
            if thing in left:
                left.remove(thing)
            else:
                false += 1
        things, missed = things + len(named), missed + len(left)
    return Named(things, false, missed)
