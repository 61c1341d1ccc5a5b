"""Sites: places of PEFT's A [rank in] and B [out rank] in transformers' model, and the matching parts of our weights.

A site is a linear layer, or one of the two parameters in which transformers stores the weights of all experts of a
layer. One of our weights may comprise several linear layers (queries, keys and values of a tower). One linear layer may
also comprise several of our weights (Phi-3's `qkv_proj`): these share its A, and each has a part of its B.
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

EXPERTS = {  # our weight -> (transformers' parameter, einops pattern of one expert from their axes to ours)
    "experts_gate_up": ("gate_up_proj", "(two f) d -> two d f"),
    "experts_down": ("down_proj", "d f -> f d"),
}


class Layer(NamedTuple):
    """A linear layer, or part of one, that is stored in one of our weights."""

    beside: str  # path of our weight without the final "w"
    box: Partitioned  # shape and axes of our weight
    entry: Entry  # entry of the layer's weight in the family's table

    @property
    def stack(self) -> tuple[int, ...]:
        """Index on the stacked axes of our weight."""
        return self.entry.index[: len(axes_of(self.box)[0])]

    @property
    def part(self) -> tuple[int, ...]:
        """Index on the first output axes of our weight, if these are separate layers of transformers. Otherwise ()."""
        return self.entry.index[len(self.stack) :]

    def to_ours(self, down: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns this part's A [*inputs rank] and B [rank *outputs] from A [rank in] and B [out rank] of the layer.

        Example: queries [heads=2 head_dim=4] of a layer with 8 inputs: A [r 8] -> [8 r], B [8 r] -> [r 2 4].

        Raises:
          ValueError: the shapes of A and B do not match the weight.
        """
        (into, inputs), (out, outputs), sizes, window = self._axes()
        try:
            down = rearrange(down, f"rank {into} -> {inputs} rank", **_sizes_of(into, sizes))
            up = rearrange(up, f"{out} rank -> {_ungroup(out)} rank", **_sizes_of(out, sizes))[window]
            up = rearrange(up, f"{_ungroup(out)} rank -> rank {outputs}")
        except EinopsError:
            down = np.zeros(0)
        if down.shape[-1:] != up.shape[:1]:
            raise ValueError(f"A and B do not fit each other and a weight {list(self.entry.shape)}")
        return down, up

    def to_theirs(self, down: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns A [rank in] and B [out rank] of the layer: inverts `to_ours`, with zeros in B for the other parts."""
        (into, inputs), (out, outputs), sizes, window = self._axes()
        down = rearrange(down, f"{inputs} rank -> rank {into}", **_sizes_of(into, sizes))
        up = rearrange(up, f"rank {outputs} -> {_ungroup(out)} rank")
        axes = zip(_ungroup(out).split(), up.shape)
        full = np.zeros((*(sizes.get(axis, size) for axis, size in axes), up.shape[-1]), up.dtype)
        full[window] = up
        return down, rearrange(full, f"{_ungroup(out)} rank -> {out} rank")

    def _axes(self) -> tuple[tuple[str, str], tuple[str, str], dict[str, int], tuple[slice, ...]]:
        """Returns the axes of the layer as einops patterns.

        Returns:
          ((their inputs, our inputs), (their outputs, our outputs), sizes of axes, slices of this part in the outputs).
        Raises:
          ValueError: the weight is not a separate linear layer of transformers' model.
        """
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
                f"{self.beside}w is not a separate linear layer of transformers' model, so PEFT cannot adapt it. Save "
                "the merged model (merge_adapters)."
            )
        sizes, window = dict(entry.sizes), (slice(None),)
        if entry.part:
            axis, first, count = entry.part
            position = _ungroup(out[0]).split().index(axis)
            window = (slice(None),) * position + (slice(first, first + sizes[axis]),)
            sizes[axis] = count
        return (into[0], " ".join(inputs)), (out[0], " ".join(outputs)), sizes, window


class Site(NamedTuple):
    """A module of transformers, or a parameter of it, that has one A and one B.

    name: name of the module in a loaded transformers model.
    layers: parts of our weights that it comprises, or one layer per expert.
    parameter: parameter that stores the weights of all experts. "": the module is a linear layer.
    """

    name: str
    layers: tuple[Layer, ...]
    parameter: str = ""

    @property
    def key(self) -> str:
        """Name of the site in PEFT's targets and patterns."""
        return f"{self.name}.{self.parameter}" if self.parameter else self.name

    def rank(self, down: np.ndarray) -> int:
        """Returns the rank of an A of this site."""
        return len(down) // (len(self.layers) if self.parameter else 1)

    def split(self, down: np.ndarray, up: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns A and B of each layer, as `Layer.to_ours`.

        Args:
          down: A [rank in], or of experts [(expert rank) in].
          up: B [out rank], or of experts [out (rank expert)].
        """
        if not self.parameter:
            return [layer.to_ours(down, up) for layer in self.layers]
        count = len(self.layers)
        if len(down) % count or up.shape[-1] % count:
            raise ValueError(f"A {list(down.shape)} and B {list(up.shape)} are not those of {count} experts")
        downs = rearrange(down, "(expert rank) into -> expert rank into", expert=count)
        ups = rearrange(up, "out (rank expert) -> expert out rank", expert=count)
        return [layer.to_ours(*factors) for layer, *factors in zip(self.layers, downs, ups)]

    def joined(self, parts: dict[Layer, tuple[np.ndarray, np.ndarray, float]]) -> tuple[np.ndarray, np.ndarray, float]:
        """Returns A, B and scale of the site from those of its layers: inverts `split`.

        Layers without an adapter may be missing. If parts of one linear layer have different A, these are concatenated,
        and the rank of the result is the sum of theirs.
        """
        scale = next((scale for _, _, scale in parts.values() if scale), 0.0)
        factors = {
            layer: layer.to_theirs(down, up * (layer_scale / scale)) for layer, (down, up, layer_scale) in parts.items()
        }
        downs, ups = zip(*factors.values())
        if self.parameter:
            rank = max(map(len, downs))
            down = np.zeros((len(self.layers), rank, downs[0].shape[1]), np.float32)
            up = np.zeros((len(self.layers), ups[0].shape[0], rank), np.float32)
            for layer, (layer_down, layer_up) in factors.items():
                expert = self.layers.index(layer)
                down[expert, : len(layer_down)], up[expert, :, : len(layer_down)] = layer_down, layer_up
            down = rearrange(down, "expert rank into -> (expert rank) into")
            return down, rearrange(up, "expert out rank -> out (rank expert)"), scale
        if all(np.array_equal(down, downs[0]) for down in downs):
            return downs[0], sum(ups[1:], ups[0]), scale
        return np.concatenate(downs), np.concatenate(ups, axis=1), scale


def sites_of(config: Any, boxes: dict[str, Partitioned]) -> dict[str, Site]:
    """Returns the sites of all weights that can have adapters, by key.

    Args:
      config: config of the model.
      boxes: shapes and axes of the base model's parameters, by path (`abstract_boxed`, flattened).
    """
    family, experts = FAMILIES[config.family], {}
    entries = expand(family.weights(config), unflatten({path: box.value for path, box in boxes.items()}))
    sites = {}
    for name, entry in entries.items():
        path, box = entry.path, boxes[entry.path]
        if "expert" in box.names and box.matrix:
            module, weight = family.module_name(name[: name.index(".experts") + len(".experts")]), path.split("/")[-2]
            stack = entry.index[: box.names.index("expert")]
            experts[f"{module}.{EXPERTS[weight][0]}"] = (module, path, stack)
        elif name.endswith(".weight") and box.matrix and path != HEAD:
            module = family.module_name(name.removesuffix(".weight"))
            layers = [Layer(part.path.removesuffix("w"), boxes[part.path], part) for part in entry.parts]
            sites[module] = Site(module, tuple(layers))
    for key, (module, path, stack) in experts.items():
        sites[key] = _expert_site(module, path, boxes[path], stack)
    return sites


def _expert_site(module: str, path: str, box: Partitioned, stack: tuple[int, ...]) -> Site:
    """Returns the site of all experts of the layer at index `stack` of the axes before the expert axis."""
    parameter, pattern = EXPERTS[path.split("/")[-2]]
    count, *shape = box.value.shape[len(stack) :]
    axes = pattern.partition(" -> ")[2].split()
    sizes = tuple(zip(axes, shape))
    entries = [Entry(path, (*stack, expert), pattern, sizes, tuple(shape)) for expert in range(count)]
    return Site(module, tuple(Layer(path.removesuffix("w"), box, entry) for entry in entries), parameter)


def _ungroup(group: str) -> str:
    """ "(n h)" -> "n h"."""
    return group.strip("()")


def _sizes_of(group: str, sizes: dict[str, int]) -> dict[str, int]:
    """Returns the entries of `sizes` for the axes of an einops group."""
    return {axis: sizes[axis] for axis in _ungroup(group).split() if axis in sizes}
