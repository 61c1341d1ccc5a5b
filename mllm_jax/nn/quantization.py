"""Weights kept in eight or four bits, for frozen bases of adapters (QLoRA, arXiv 2305.14314).

The tree of parameters decides: an `Einsum` takes its weight from `w`, or from `w_int8`, `w_int4` or `w_nf4` with
`w_scale`. Eight bits: an integer in -127..127, a scale for every output. Four bits: two neighbors along the last input
axis in a byte, the first in the low half, a scale for every group of neighbors along it: of integers in -7..7, or of
the quantiles of a normal distribution. Scales are absolute maxima, divided by the largest integer.
"""

import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from mllm_jax.sharding.weights import Partitioned
from mllm_jax.types import Array

SCALE = "w_scale"
KINDS = ("int8", "int4", "nf4")
# Quantiles of a normal distribution at equal probabilities, including -1, 0 and 1: appendix E of the paper.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# The head is read by losses without its layer, experts by products of groups; a router is too small and too delicate.
WHOLE = re.compile(r"^decoder/head/w$|/(router|experts_\w+)/w$")
STACKED = ("layers", "deepstack_layers")


def quantize(w: Array, kind: str, inputs: tuple[int, ...], group: int) -> dict[str, Array]:
    """The leaves that stand for a weight.

    Args:
      w: of any axes. kind: of KINDS.
      inputs: axes that its product sums over, counted from the end.
      group: values that share a scale in four bits, at most; it is the largest even divisor of the last input axis.
    """
    if kind == "int8":
        scale = jnp.max(jnp.abs(w), axis=inputs) / 127
        return {"w_int8": jnp.round(w / _unless_zero(jnp.expand_dims(scale, inputs))).astype(jnp.int8), SCALE: scale}
    axis, size = inputs[-1], w.shape[inputs[-1]]
    groups = size // group_of(size, group)
    split = jnp.reshape(w, _split(w.shape, axis, groups))
    scale = jnp.max(jnp.abs(split), axis=axis, keepdims=True) / (1 if kind == "nf4" else 7)
    unit = jnp.reshape(split / _unless_zero(scale), w.shape)
    if kind == "nf4":
        code = jnp.searchsorted((np.float32(NF4[1:]) + np.float32(NF4[:-1])) / 2, unit)
    else:
        code = jnp.round(unit) + 8
    pairs = jnp.reshape(code.astype(jnp.uint8), _split(w.shape, axis, size // 2))
    low, high = (jnp.take(pairs, half, axis=axis) for half in (0, 1))
    return {f"w_{kind}": low | high << 4, SCALE: jnp.squeeze(scale, axis)}


def dequantize(leaves: Mapping[str, Array], inputs: tuple[int, ...]) -> Array:
    """The weight f32 that the leaves of `quantize` stand for."""
    scale = leaves[SCALE]
    if "w_int8" in leaves:
        return leaves["w_int8"] * jnp.expand_dims(scale, inputs)
    (kind, packed), axis = next((name, leaf) for name, leaf in leaves.items() if name != SCALE), inputs[-1]
    shape = list(packed.shape)
    shape[axis] *= 2
    code = jnp.reshape(jnp.stack([packed & 15, packed >> 4], axis=packed.ndim + 1 + axis), shape)
    value = jnp.take(jnp.float32(NF4), code, axis=0) if kind == "w_nf4" else code.astype(jnp.float32) - 8
    split = jnp.reshape(value, _split(shape, axis, scale.shape[axis]))
    return jnp.reshape(split * jnp.expand_dims(scale, axis), shape)


def kept(path: str, box: Partitioned, kind: str, group: int) -> dict[str, Partitioned]:
    """A frozen weight, by the end of its name, as a base of `kind` keeps it: "float32", "bfloat16" or one of KINDS.

    What is no matrix of a layer, or is one that had better stay, is kept in bfloat16 if it has two axes or more.
    """
    name = path.rpartition("/")[2]
    if kind == "float32" or len([axis for axis in box.names if axis not in STACKED]) < 2:
        return {name: box}
    if kind == "bfloat16" or box.matrix is None or WHOLE.search(path):
        return {name: box.replace(value=box.value.astype(jnp.bfloat16))}
    inputs, _ = box.matrix
    if kind != "int8" and box.value.shape[inputs[-1]] % 2:
        raise ValueError(
            f"lora.base_dtype={kind!r} packs two values in a byte, but an input axis of {path} has an odd size"
        )
    ndim, names = box.value.ndim, list(box.names)
    scales = [None if axis - ndim == inputs[-1] else name for axis, name in enumerate(names)]
    if kind == "int8":
        scales = [name for axis, name in enumerate(names) if axis - ndim not in inputs]
    leaves = quantize(box.value, kind, inputs, group)
    return {name: Partitioned(leaf, tuple(scales if name == SCALE else names)) for name, leaf in leaves.items()}


def group_of(size: int, group: int) -> int:
    """The largest even divisor of an axis that is at most `group`."""
    return max(divisor for divisor in range(2, min(size, group) + 1, 2) if size % divisor == 0)


def _split(shape, axis: int, count: int) -> tuple[int, ...]:
    """The shape with an axis, counted from the end, as `count` parts."""
    place = len(shape) + axis
    return (*shape[:place], count, shape[place] // count, *shape[place + 1 :])


def _unless_zero(scale):
    return jnp.where(scale == 0, 1, scale)
