"""Weights stored in 8 or 4 bits, for frozen base models of adapters (QLoRA, arXiv 2305.14314).

The parameters select the format: an `Einsum` reads its weight from `w`, or from `w_int8`, `w_int4` or `w_nf4` and
`w_scale`. A scale is an absolute maximum, divided by the largest integer (nf4: by 1).

8 bits: integers in -127..127, with one scale per output.
4 bits: integers in -7..7 (int4) or quantiles of a normal distribution (nf4), with one scale per group of neighbors
along the last input axis. A byte holds two neighbors, the first in its low half.
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
# Weights that stay unquantized: losses read the head without its layer, grouped products read the experts, and a router
# is small and sensitive.
WHOLE = re.compile(r"^decoder/head/w$|/(router|experts_\w+)/w$")
STACKED = ("layers", "deepstack_layers")


def quantize(w: Array, kind: str, inputs: tuple[int, ...], group: int) -> dict[str, Array]:
    """Returns the quantized weight and its scale, by leaf name: {"w_int8": i8, "w_scale": f32} or alike.

    Args:
      w: weight with any number of axes.
      kind: one of KINDS.
      inputs: axes that the weight's product sums over, counted from the end.
      group: largest number of values that share a scale in 4 bits, see `group_of`.
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
    """Returns the f32 weight of the leaves of `quantize`."""
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
    """Returns a frozen weight as stored for the base dtype `kind`, by leaf name.

    Only matrices of layers are quantized, with the exceptions of WHOLE. Other weights with two axes or more become
    bfloat16; vectors are unchanged.

    Args:
      kind: "float32", "bfloat16" or one of KINDS.
      group: see `quantize`.
    Raises:
      ValueError: the last input axis has an odd size, and `kind` has 4 bits.
    """
    name = path.rpartition("/")[2]
    if kind == "float32" or len([axis for axis in box.names if axis not in STACKED]) < 2:
        return {name: box}
    if kind == "bfloat16" or box.matrix is None or WHOLE.search(path):
        return {name: box.replace(value=box.value.astype(jnp.bfloat16))}
    inputs, _ = box.matrix
    if kind != "int8" and box.value.shape[inputs[-1]] % 2:
        raise ValueError(
            f"lora.base_dtype={kind!r}: cannot pack two values per byte, as an input axis of {path} has an odd size. "
            "Set lora.base_dtype to 'int8' or 'bfloat16'."
        )
    ndim, names = box.value.ndim, list(box.names)
    scales = [None if axis - ndim == inputs[-1] else name for axis, name in enumerate(names)]
    if kind == "int8":
        scales = [name for axis, name in enumerate(names) if axis - ndim not in inputs]
    leaves = quantize(box.value, kind, inputs, group)
    return {name: Partitioned(leaf, tuple(scales if name == SCALE else names)) for name, leaf in leaves.items()}


def group_of(size: int, group: int) -> int:
    """Returns the largest even divisor of an axis size that is at most `group`."""
    return max(divisor for divisor in range(2, min(size, group) + 1, 2) if size % divisor == 0)


def _split(shape, axis: int, count: int) -> tuple[int, ...]:
    """Returns the shape with `axis`, counted from the end, split into `count` parts: [6 D], -2, 3 -> [3 2 D]."""
    place = len(shape) + axis
    return (*shape[:place], count, shape[place] // count, *shape[place + 1 :])


def _unless_zero(scale):
    return jnp.where(scale == 0, 1, scale)
