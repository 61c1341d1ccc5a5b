"""Towers with several kinds of layers. Repeated patterns are scanned, so that compile time is independent of depth."""

from collections.abc import Callable, Hashable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.nn.runtime import Runtime, scan_layers


class Segment(NamedTuple):
    """Layers `start`, `start + 1`, ...: a repeated pattern of kinds."""

    name: str  # key of the parameters
    start: int
    pattern: tuple[Hashable, ...]
    repeats: int

    def slots(self) -> list[tuple[str, range, Hashable]]:
        """Returns (key of the parameters, layer numbers, kind) of every place in the pattern."""
        period, length = len(self.pattern), len(self.pattern) * self.repeats
        name = lambda slot: self.name if period == 1 else f"{self.name}/slots_{slot}"
        return [
            (name(slot), range(self.start + slot, self.start + length, period), kind)
            for slot, kind in enumerate(self.pattern)
        ]


def segments(kinds: tuple[Hashable, ...]) -> tuple[Segment, ...]:
    """Splits layers into the segments that compile the fewest layers.

    Ties are broken by the number of segments, then by the length of the first. The parameters of a single segment are
    under "layers", those of several under "layers0", "layers1", ...

    Example: kinds a b b b b compile 2 layers, as layers0 (pattern a, once) and layers1 (pattern b, 4 times).
    """
    count = len(kinds)

    @cache
    def best(start: int) -> tuple[int, int, tuple]:
        """Returns (compiled layers, number of segments, ((start, pattern, repeats), ...)) from layer `start` on."""
        if start == count:
            return 0, 0, ()
        options = []
        for period in range(1, count - start + 1):
            pattern, end = kinds[start : start + period], start + period
            while kinds[end : end + period] == pattern:
                end += period
            compiled, parts, following = best(end)
            options.append((compiled + period, parts + 1, ((start, pattern, (end - start) // period), *following)))
        return min(options, key=lambda option: (*option[:2], -option[2][0][2] * len(option[2][0][1])))

    parts = best(0)[2]
    names = ["layers"] if len(parts) == 1 else [f"layers{i}" for i in range(len(parts))]
    return tuple(Segment(name, *part) for name, part in zip(names, parts))


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
    """Applies `carry, out = step(layer, carry, number)` to every layer of a segment, with its number i32[].

    Args:
      layers: the layer, or for a pattern of several layers a module with these as `slots`. Parameters are stacked on a
        leading axis `layers`.
    Returns:
      (carry, outs of the layers in order, stacked on a leading axis, or None if all are None).
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
