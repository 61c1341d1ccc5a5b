"""Sites of PEFT's A [rank in] and B [out rank] in transformers' model, and their relation to our weights.

A site is a linear layer, or the weights of all experts of a layer, which transformers keeps in two parameters of one
module. A linear layer may be one of several in one of our weights (queries, keys and values of a tower), or several of
our weights in one (Phi-3's `qkv_proj`): these then share its A, and have a part of its B each.
"""

import re
from typing import Any, NamedTuple

import numpy as np
from einops import EinopsError, rearrange

from mllm_jax.common.trees import unflatten
from mllm_jax.families import FAMILIES
from mllm_jax.nn.lora import HEAD, axes_of
from mllm_jax.sharding.weights import Partitioned
from mllm_jax.weights.table import Entry, expand

EXPERTS = {  # our weight -> transformers' parameter, and the weight of one expert from there
    "experts_gate_up": ("gate_up_proj", "(two f) d -> two d f"),
    "experts_down": ("down_proj", "d f -> f d"),
}


class Layer(NamedTuple):
    """A linear layer, or the part of one, that is a part of one of our weights."""

    beside: str  # path of our weight, without the name `w`
    box: Partitioned  # its shape and axes
    entry: Entry  # of the layer's weight in the family's table

    @property
    def stack(self) -> tuple[int, ...]:
        """Its place on the axes that our weight is stacked on."""
        return self.entry.index[: len(axes_of(self.box)[0])]

    @property
    def part(self) -> tuple[int, ...]:
        """Index on the first axes of our weight's outputs, where these are separate layers."""
        return self.entry.index[len(self.stack) :]

    def to_ours(self, down: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A [rank in], B [out rank] of the full layer -> [*inputs rank], [rank *outputs] of this part."""
        (into, inputs), (out, outputs), sizes, window = self._axes()
        try:
            down = rearrange(down, f"rank {into} -> {inputs} rank", **_of(into, sizes))
            up = rearrange(up, f"{out} rank -> {_apart(out)} rank", **_of(out, sizes))[window]
            up = rearrange(up, f"{_apart(out)} rank -> rank {outputs}")
        except EinopsError:
            down = np.zeros(0)
        if down.shape[-1:] != up.shape[:1]:
            raise ValueError(f"A and B do not fit each other and a weight {list(self.entry.shape)}")
        return down, up

    def to_theirs(self, down: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of `to_ours`; B is zero in the other parts of the layer."""
        (into, inputs), (out, outputs), sizes, window = self._axes()
        down = rearrange(down, f"{inputs} rank -> rank {into}", **_of(into, sizes))
        up = rearrange(up, f"rank {outputs} -> {_apart(out)} rank")
        axes = zip(_apart(out).split(), up.shape)
        whole = np.zeros((*(sizes.get(axis, size) for axis, size in axes), up.shape[-1]), up.dtype)
        whole[window] = up
        return down, rearrange(whole, f"{_apart(out)} rank -> {out} rank")

    def _axes(self) -> tuple[tuple[str, str], tuple[str, str], dict[str, int], tuple[slice, ...]]:
        """(their inputs, ours), (their outputs, ours) in einops' words; sizes; where this part is in their outputs."""
        entry, ndim, depth = self.entry, self.box.value.ndim, len(self.entry.index)
        theirs, _, ours = (entry.pattern or "a b -> a b").partition(" -> ")
        theirs, ours = (re.findall(r"\([^()]*\)|\S+", side) for side in (theirs, ours))
        inputs = [ours[axis - depth] for axis in axes_of(self.box)[1]]
        outputs = [ours[axis - depth] for axis in range(depth, ndim) if axis not in axes_of(self.box)[1]]
        letters = lambda groups: set(re.findall(r"\w+", " ".join(groups)))
        into, out = ([group for group in theirs if letters([group]) == letters(axes)] for axes in (inputs, outputs))
        split = entry.part and entry.part[0] in letters(outputs)
        if not into or not out or len(theirs) != 2 or bool(entry.part) != bool(split):
            raise ValueError(
                f"{self.beside}w is not a separate linear layer of transformers' model, so PEFT cannot adapt it"
            )
        sizes, window = dict(entry.sizes), (slice(None),)
        if entry.part:
            axis, first, count = entry.part
            before = _apart(out[0]).split().index(axis)
            window = (slice(None),) * before + (slice(first, first + sizes[axis]),)
            sizes[axis] = count
        return (into[0], " ".join(inputs)), (out[0], " ".join(outputs)), sizes, window


class Site(NamedTuple):
    """A place of one A and one B.

    name: of the module in transformers' memory. layers: our parts of it, or one of every expert.
    parameter: of the module, where it is that of all experts; "" = its only weight.
    """

    name: str
    layers: tuple[Layer, ...]
    parameter: str = ""

    @property
    def key(self) -> str:
        """Its name in PEFT's targets and patterns."""
        return f"{self.name}.{self.parameter}" if self.parameter else self.name

    def rank(self, down: np.ndarray) -> int:
        """Rank of an A."""
        return len(down) // (len(self.layers) if self.parameter else 1)

    def split(self, down: np.ndarray, up: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """A and B as each of the layers has them; of experts, A is [(expert rank) in] and B [out (rank expert)]."""
        if not self.parameter:
            return [layer.to_ours(down, up) for layer in self.layers]
        count = len(self.layers)
        if len(down) % count or up.shape[-1] % count:
            raise ValueError(f"A and B are not of {count} experts")
        downs = rearrange(down, "(expert rank) into -> expert rank into", expert=count)
        ups = rearrange(up, "out (rank expert) -> expert out rank", expert=count)
        return [layer.to_ours(*own) for layer, *own in zip(self.layers, downs, ups)]

    def joined(self, parts: dict[Layer, tuple[np.ndarray, np.ndarray, float]]) -> tuple[np.ndarray, np.ndarray, float]:
        """The inverse of `split`: A, B and scale from those of layers; one that is missing has no adapter.

        Parts of one layer whose A differ have the ranks of all together.
        """
        scale = next((scale for _, _, scale in parts.values() if scale), 0.0)
        theirs = {layer: layer.to_theirs(down, up * (own / scale)) for layer, (down, up, own) in parts.items()}
        downs, ups = zip(*theirs.values())
        if self.parameter:
            rank = max(map(len, downs))
            down = np.zeros((len(self.layers), rank, downs[0].shape[1]), np.float32)
            up = np.zeros((len(self.layers), ups[0].shape[0], rank), np.float32)
            for layer, (own, own_up) in theirs.items():
                expert = self.layers.index(layer)
                down[expert, : len(own)], up[expert, :, : len(own)] = own, own_up
            down = rearrange(down, "expert rank into -> (expert rank) into")
            return down, rearrange(up, "expert out rank -> out (rank expert)"), scale
        if all(np.array_equal(down, downs[0]) for down in downs):
            return downs[0], sum(ups[1:], ups[0]), scale
        return np.concatenate(downs), np.concatenate(ups, axis=1), scale


def sites_of(config: Any, boxes: dict[str, Partitioned]) -> dict[str, Site]:
    """The sites of all weights that can have adapters, by their keys; `boxes` are those of the base model."""
    family, experts = FAMILIES[config.family], {}
    entries = expand(family.weights(config), unflatten({path: box.value for path, box in boxes.items()}))
    sites = {}
    for name, entry in entries.items():
        path, box = entry.path, boxes[entry.path]
        if "expert" in box.names and box.matrix:
            module, weight = family.module_name(name[: name.index(".experts") + len(".experts")]), path.split("/")[-2]
            before = entry.index[: box.names.index("expert")]
            experts[f"{module}.{EXPERTS[weight][0]}"] = (module, path, before)
        elif name.endswith(".weight") and box.matrix and path != HEAD:
            module = family.module_name(name.removesuffix(".weight"))
            layers = [Layer(part.path.removesuffix("w"), boxes[part.path], part) for part in entry.parts]
            sites[module] = Site(module, tuple(layers))
    for key, (module, path, before) in experts.items():
        sites[key] = _experts(module, path, boxes[path], before)
    return sites


def _experts(module: str, path: str, box: Partitioned, before: tuple[int, ...]) -> Site:
    """The site of all experts of a layer, which is `before` on the axes that are stacked before that of experts."""
    parameter, pattern = EXPERTS[path.split("/")[-2]]
    count, *shape = box.value.shape[len(before) :]
    axes = pattern.partition(" -> ")[2].split()
    sizes = tuple(zip(axes, shape))
    entries = [Entry(path, (*before, expert), pattern, sizes, tuple(shape)) for expert in range(count)]
    return Site(module, tuple(Layer(path.removesuffix("w"), box, entry) for entry in entries), parameter)


def _apart(group: str) -> str:
    """ "(n h)" -> "n h"."""
    return group.strip("()")


def _of(group: str, sizes: dict[str, int]) -> dict[str, int]:
    """The sizes of a group's axes, as far as they are known."""
    return {axis: sizes[axis] for axis in _apart(group).split() if axis in sizes}
