"""Fingerprints of arrays: equal for equal values on any mesh, so that a checkpoint can be verified on another one."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from mllm_jax.common.trees import flatten


def names(tree: Any) -> list[str]:
    """The paths of the leaves of a tree, in the order of its leaves."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def fingerprints(tree: Any) -> dict[str, int]:
    """The fingerprint of every leaf by its path, as `fingerprint` defines it. Waits for the devices."""
    return dict(zip(names(tree), map(int, jax.device_get(_of_leaves(jax.tree.leaves(tree))))))


@jax.jit
def fingerprint(params: dict[str, Any]) -> jax.Array:
    """u32[]: one fingerprint of all leaves of a nested dict, and of their paths."""
    total = jnp.zeros((), jnp.uint32)
    for path, x in flatten(params).items():
        total += _of_array(x) * jnp.uint32(zlib.crc32(path.encode()) | 1)
    return total


@jax.jit
def _of_leaves(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_of_array(x) for x in leaves]


def _of_array(x: jax.Array) -> jax.Array:
    """u32[]: the sum, modulo 2^32, of the bits of every value times an odd number that depends on its place.

    A sum of integers does not depend on its order, thus not on the mesh. A change of one value of up to 32 bits always
    changes the sum, because an odd factor has an inverse modulo 2^32; several changes go unseen once in 2^32.
    """
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    places = sum(
        jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(zlib.crc32(bytes([axis])))
        for axis in range(x.ndim)
    )
    return jnp.sum(bits * (2 * places + 1), dtype=jnp.uint32)
