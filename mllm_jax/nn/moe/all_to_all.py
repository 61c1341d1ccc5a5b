"""Exchange of rows with other devices and back, in bins with a fixed capacity.

"even" sends every bin in full, filled or not (`all_to_all`). "ragged" sends only the rows in a bin
(`ragged_all_to_all`, which XLA has for TPUs and not for CPUs). With n tokens that choose k of E experts each on d
devices, bins with room for any routing hold n d min(k, E / d) rows, and bins of a capacity factor f hold n k f. Ragged
exchanges send n k rows in either case, so that spare capacity costs only memory.
"""

from functools import partial

import jax
import jax.numpy as jnp

from mllm_jax.nn.runtime import expect_share


def all_to_all_for(wanted: str, platform: str | None = None) -> str:
    """The exchange of rows: the configured one, or under "auto" that of a platform, by default this one."""
    if wanted != "auto":
        return wanted
    return "ragged" if (platform or jax.default_backend()) == "tpu" else "even"


def all_to_all(x, sent, received, axes, fill: float, wanted: str):
    """Bin j of every device becomes, on device j along `axes`, the bin of that device.

    Args:
      x: [d*room D], a bin for each of d devices: first the rows that it holds, then zeros.
      sent, received: i32[d] rows that each bin holds, before and after.
      fill: the share of a bin that is filled where routing is even and batches are full, for the planner.
      wanted: of `Runtime.all_to_all`.
    """
    if all_to_all_for(wanted) == "even":
        return jax.lax.all_to_all(x, axes, 0, 0, tiled=True)
    return _ragged(x, sent, received, axes, fill)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _ragged(x, sent, received, axes, fill):
    room = len(x) // len(sent)
    bins = room * jnp.arange(len(sent), dtype=jnp.int32)
    own = jnp.full_like(bins, room * jax.lax.axis_index(axes))
    with expect_share(fill):
        return jax.lax.ragged_all_to_all(x, jnp.zeros_like(x), bins, sent, own, received, axis_name=axes)


def _forward(x, sent, received, axes, fill):
    return _ragged(x, sent, received, axes, fill), (sent, received)


def _backward(axes, fill, saved, d_y):
    sent, received = saved
    return _ragged(d_y, received, sent, axes, fill), None, None


_ragged.defvjp(_forward, _backward)
