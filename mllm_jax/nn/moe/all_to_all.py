"""All-to-all exchange of rows between devices, in bins of fixed capacity.

"even" sends full bins, including unused rows (`all_to_all`). "ragged" sends only the used rows (`ragged_all_to_all`,
which XLA supports on TPUs but not on CPUs). With n tokens that choose k of E experts on d devices, bins for any routing
have n d min(k, E / d) rows, and bins of capacity factor f have n k f rows. A ragged exchange sends n k rows in both
cases, so that unused capacity costs only memory.
"""

from functools import partial

import jax
import jax.numpy as jnp

from mllm_jax.nn.runtime import expect_share


def all_to_all_for(wanted: str, platform: str | None = None) -> str:
    """Returns the exchange of rows: the configured one, or for "auto" that of a platform (default: this one)."""
    if wanted != "auto":
        return wanted
    return "ragged" if (platform or jax.default_backend()) == "tpu" else "even"


def all_to_all(x, sent, received, axes, fill: float, wanted: str):
    """Sends bin j of every device i to device j along `axes`, where it becomes bin i.

    Args:
      x: [d*room D], one bin for each of d devices: used rows first, then zeros.
      sent, received: i32[d] used rows of each bin, before and after the exchange.
      fill: used share of a bin for even routing and full batches, for the planner.
      wanted: value of `Runtime.all_to_all`.
    Returns:
      [d*room D].
    """
    if all_to_all_for(wanted) == "even":
        return jax.lax.all_to_all(x, axes, 0, 0, tiled=True)
    return _ragged(x, sent, received, axes, fill)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _ragged(x, sent, received, axes, fill):
    room = len(x) // len(sent)
    bins = room * jnp.arange(len(sent), dtype=jnp.int32)
    target = jnp.full_like(bins, room * jax.lax.axis_index(axes))
    with expect_share(fill):
        return jax.lax.ragged_all_to_all(x, jnp.zeros_like(x), bins, sent, target, received, axis_name=axes)


def _forward(x, sent, received, axes, fill):
    return _ragged(x, sent, received, axes, fill), (sent, received)


def _backward(axes, fill, saved, d_y):
    sent, received = saved
    return _ragged(d_y, received, sent, axes, fill), None, None


_ragged.defvjp(_forward, _backward)
