"""Computes fingerprints of arrays that do not depend on the mesh, so that any mesh can verify a checkpoint."""

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mllm_jax.common.config import ConfigError
from mllm_jax.common.files import write_atomically
from mllm_jax.common.trees import flatten
from mllm_jax.common.workdir import BEGIN_ANEW, read_note


def names(tree: Any) -> list[str]:
    """Returns the paths of a tree's leaves, in the order of the leaves."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def fingerprints(tree: Any) -> dict[str, int]:
    """Returns the fingerprint of every leaf by its path, see `_of_array`. Waits for the devices."""
    return dict(zip(names(tree), map(int, jax.device_get(_of_leaves(jax.tree.leaves(tree))))))


@jax.jit
def fingerprint(params: dict[str, Any]) -> jax.Array:
    """Returns one u32[] fingerprint of all leaves of a nested dict, and of their paths."""
    total = jnp.zeros((), jnp.uint32)
    for path, x in flatten(params).items():
        total += _of_array(x) * jnp.uint32(zlib.crc32(path.encode()) | 1)
    return total


def verify_frozen_weights(file: Path, resumed: bool, *weights: tuple[str, str, dict[str, Any] | None]) -> None:
    """Verifies that a resumed run has the frozen weights that it began with; its checkpoints do not store them.

    A new run writes fingerprints of the weights to a file, a resumed run compares with them.

    Args:
      file: path in the working directory of the run.
      weights: (role, settings that give the weights, parameters). None: the run has no weights in this role.

    Raises:
      ConfigError: weights differ, or the file is damaged.
    """
    current = {role: None if params is None else int(fingerprint(params)) for role, _, params in weights}
    if not resumed:
        if jax.process_index() == 0:
            write_atomically(file, json.dumps(current) + "\n")
        return
    first = read_note(file, BEGIN_ANEW, **dict.fromkeys(current, (int, type(None))))
    for role, settings, _ in weights:
        if first[role] != current[role]:
            raise ConfigError(
                f"{settings} gives other {role} weights than those that {file.parent} began with. "
                "Restore these settings, or use another --workdir."
            )


@jax.jit
def _of_leaves(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_of_array(x) for x in leaves]


def _of_array(x: jax.Array) -> jax.Array:
    """Returns u32[]: the sum, modulo 2^32, of every value's bits times an odd factor that depends on its index.

    A sum of integers does not depend on its order, and therefore not on the mesh. Changing one value of up to 32 bits
    always changes the sum, because an odd factor has an inverse modulo 2^32. Several changes cancel once in 2^32.
    """
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    places = sum(
        jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(zlib.crc32(bytes([axis])))
        for axis in range(x.ndim)
    )
    return jnp.sum(bits * (2 * places + 1), dtype=jnp.uint32)
