"""A tower of layers of several kinds: what repeats is scanned, so that compile time does not grow with depth."""

from collections.abc import Callable, Hashable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.nn.runtime import Runtime, scan_layers


class Segment(NamedTuple):
    """Layers `start`, `start + 1`, ...: a pattern of kinds that repeats."""

    name: str  # of its parameters
    start: int
    pattern: tuple[Hashable, ...]
    repeats: int

    def slots(self) -> list[tuple[str, range, Hashable]]:
        """(name of its parameters, numbers of its layers, kind) of every place in the pattern."""
        period, length = len(self.pattern), len(self.pattern) * self.repeats
        name = lambda slot: self.name if period == 1 else f"{self.name}/slots_{slot}"
        return [
            (name(slot), range(self.start + slot, self.start + length, period), kind)
            for slot, kind in enumerate(self.pattern)
        ]


def segments(kinds: tuple[Hashable, ...]) -> tuple[Segment, ...]:
    """The segments that compile the fewest layers; of these the fewest segments, the first one as long as can be.

    One segment has its parameters under "layers"; several under "layers0", "layers1", ...
    """
    count = len(kinds)

    @cache
    def best(start: int) -> tuple[int, int, tuple]:
        """(layers compiled, segments, ((start, pattern, repeats), ...)) from `start` on."""
        if start == count:
            return 0, 0, ()
        options = []
        for period in range(1, count - start + 1):
            pattern, end = kinds[start : start + period], start + period
            while kinds[end : end + period] == pattern:
                end += period
            compiled, parts, rest = best(end)
            options.append((compiled + period, parts + 1, ((start, pattern, (end - start) // period), *rest)))
        return min(options, key=lambda option: (*option[:2], -option[2][0][2] * len(option[2][0][1])))

    found = best(0)[2]
    names = ["layers"] if len(found) == 1 else [f"layers{i}" for i in range(len(found))]
    return tuple(Segment(name, *part) for name, part in zip(names, found))


class Pattern(nn.Module):
    """Layers of several kinds that repeat together: `build(kind)` for each of them."""

    build: Callable[[Hashable], nn.Module]
    kinds: tuple[Hashable, ...]

    def setup(self):
        self.slots = [self.build(kind) for kind in self.kinds]


def layers_of(build: Callable[[Hashable], nn.Module], segment: Segment, name: str | None = None) -> nn.Module:
    """Returns the module that `scan_segment` scans: `build(kind)`, or a `Pattern` where several kinds repeat."""
    if len(segment.pattern) == 1:
        return build(*segment.pattern, name=name)
    return Pattern(build, segment.pattern, name=name)


def scan_segment(step, layers: nn.Module, carry, segment: Segment, runtime: Runtime):
    """`carry, out = step(layer, carry, number)` for every layer of a segment, its number i32[].

    Args:
      layers: the layer, or where the pattern is longer than one a module whose `slots` are the pattern's layers.
        Parameters are stacked on a leading axis `layers`.
    Returns:
      (carry, what the layers gave out, in their order, on a leading axis; None where none gave anything).
    """
    period = len(segment.pattern)

    def body(layers, carry, first):
        outs = []
        for slot, layer in enumerate([layers] if period == 1 else layers.slots):
            carry, out = step(layer, carry, first + slot)
            outs += [] if out is None else [out]
        return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outs) if outs else None

    firsts = segment.start + period * jnp.arange(segment.repeats)
    carry, outs = scan_layers(body, layers, carry, firsts, segment.repeats, runtime)
    return carry, jax.tree.map(lambda out: out.reshape(-1, *out.shape[2:]), outs)
