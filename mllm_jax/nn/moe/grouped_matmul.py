"""Grouped products of tokens, sorted by expert, and the experts' weights, on every platform.

`jax.lax.ragged_dot` is not used, because it costs as much as if every expert read every token: on TPU in the weight
gradient, on GPU in all products.
"""

import math

import jax
import jax.numpy as jnp

from mllm_jax.nn.precision import precision_of
from mllm_jax.nn.runtime import expect_runs

TILE = 256  # largest number of rows in a tile of the loop
MEGABLOX_TILE = 512
LANES = 128  # lanes of a TPU's registers; narrower tiles do not compile


def grouped_matmul(x, w, sizes, implementation: str):
    """Computes `y[i] = x[i] @ w[group of row i]`.

    Args:
      x: [n D] rows in the order of groups; n is a multiple of `row_multiple(implementation)`.
      w: [E D F].
      sizes: i32[E] rows of every group. Rows beyond their sum belong to no group.
      implementation: a result of `grouped_for`.
    Returns:
      [n F] in the dtype of x. Rows without a group are zero, and so is their gradient.
    """
    # Kernels do not write rows without a group, neither of y nor of the gradient of x.
    member = (jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None]
    y = IMPLEMENTATIONS[implementation](jnp.where(member, x, 0), w, sizes)
    return jnp.where(member, y, 0)


def grouped_for(wanted: str) -> str:
    """Returns the implementation: the named one, or for "auto" that of this platform."""
    if wanted != "auto":
        return wanted
    backend = jax.default_backend()
    return "megablox" if backend == "tpu" else "tokamax" if backend == "gpu" and _has_tokamax() else "loop"


def row_multiple(implementation: str) -> int:
    """Returns the number of which an implementation's row count must be a multiple."""
    return MEGABLOX_TILE if implementation == "megablox" else 1


def _has_tokamax() -> bool:
    try:
        import tokamax  # noqa: F401
    except ImportError:
        return False
    return True


def _megablox(x, w, sizes):
    """Pads widths with zeros to a multiple of LANES, for narrow matrices of adapters."""
    from jax.experimental.pallas.ops.tpu.megablox import ops

    out = w.shape[2]
    pad, pad_out = (-size % LANES for size in w.shape[1:])
    x, w = jnp.pad(x, ((0, 0), (0, pad))), jnp.pad(w, ((0, 0), (0, pad), (0, pad_out)))
    tiling = tuple(math.gcd(size, MEGABLOX_TILE) for size in (x.shape[0], *w.shape[1:]))
    return ops.gmm(x, w, sizes, x.dtype, tiling)[:, :out]


def _tokamax(x, w, sizes):
    import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():  # tokamax reads absl's flags, which not every program parses
        flags.FLAGS.mark_as_parsed()
    return tokamax.ragged_dot(x, w, sizes, preferred_element_type=x.dtype)


@jax.custom_vjp
def _loop(x, w, sizes):
    """Loops over tiles, each with rows of one group. The number of tiles depends on the rows of the groups."""
    tiles = _Tiles(x.shape[0], sizes)
    padded = tiles.pad(x)

    def body(i, y):
        group, start, _ = tiles(i)
        part = tiles.rows(padded, start)
        # A tile may write rows beyond the end of its group. The next group's tile overwrites these.
        return jax.lax.dynamic_update_slice_in_dim(y, _dot(part, _at(w, group)).astype(y.dtype), start, 0)

    y = jnp.zeros((padded.shape[0], w.shape[2]), x.dtype)
    with tiles.expected:
        return jax.lax.fori_loop(0, tiles.count, body, y)[: x.shape[0]]


def _forward(x, w, sizes):
    return _loop(x, w, sizes), (x, w, sizes)


def _backward(saved, d_y):
    x, w, sizes = saved
    tiles = _Tiles(x.shape[0], sizes)
    padded_x, padded_d_y = tiles.pad(x), tiles.pad(d_y)

    def body(i, carry):
        d_x, d_w = carry
        group, start, end = tiles(i)
        mask = (start + jnp.arange(tiles.size) < end)[:, None]
        part, d_part = tiles.rows(padded_x, start), jnp.where(mask, tiles.rows(padded_d_y, start), 0)
        d_x = jax.lax.dynamic_update_slice_in_dim(d_x, _dot(d_part, _at(w, group).T).astype(d_x.dtype), start, 0)
        return d_x, jax.lax.dynamic_update_index_in_dim(d_w, _at(d_w, group) + _dot(part.T, d_part), group, 0)

    zeros = jnp.zeros_like(padded_x), jnp.zeros(w.shape, jnp.float32)
    with tiles.expected:
        d_x, d_w = jax.lax.fori_loop(0, tiles.count, body, zeros)
    return d_x[: x.shape[0]], d_w.astype(w.dtype), None


_loop.defvjp(_forward, _backward)
IMPLEMENTATIONS = {"loop": _loop, "megablox": _megablox, "tokamax": _tokamax}


class _Tiles:
    """Tiles of `size` rows that cover all groups, each in a single group.

    `tiles(i)` returns (group, first row of the tile, end of the group). Example: groups of 3 and 5 rows with tiles of 4
    rows have the tiles (0, 0, 3), (1, 3, 8), (1, 7, 8).
    """

    def __init__(self, rows: int, sizes):
        # A tile is about as large as a mean group, so that few rows are computed needlessly.
        self.size = min(TILE, max(8, 2 ** math.ceil(math.log2(max(rows / sizes.shape[0], 1)))))
        per_group = (sizes + self.size - 1) // self.size
        self._last, self._ends = jnp.cumsum(per_group), jnp.cumsum(sizes)
        self._first, self._starts = self._last - per_group, self._ends - sizes
        self.count = self._last[-1]
        self.expected = expect_runs(rows / self.size + sizes.shape[0] / 2)  # on average half a tile per group is unused

    def __call__(self, i):
        group = jnp.searchsorted(self._last, i, side="right")
        return group, self._starts[group] + (i - self._first[group]) * self.size, self._ends[group]

    def pad(self, x):
        """Returns x padded for a tile that starts in its last row."""
        return jnp.pad(x, ((0, self.size), (0, 0)))

    def rows(self, padded, start):
        return jax.lax.dynamic_slice_in_dim(padded, start, self.size)


def _at(w, group):
    return jax.lax.dynamic_index_in_dim(w, group, keepdims=False)


def _dot(x, w):
    """Returns the fp32 product of operands in their own dtype."""
    return jnp.dot(x, w, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)
