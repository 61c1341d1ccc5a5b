"""Rows that go to other devices and come back, in bins with room for as many as may come.

"even" sends every bin whole, filled or not (`all_to_all`). "ragged" sends the rows that a bin holds and leaves the same
behind (`ragged_all_to_all`, which XLA has for TPUs and not for CPUs). Of n tokens that choose k experts each among E on
d devices, bins with room for any routing hold n d min(k, E / d) rows, bins with room f times the fair share n k f; n k
are sent if they are ragged, whatever the room, so that room costs memory and nothing else.
"""

from functools import partial

import jax
import jax.numpy as jnp

from mllm_jax.nn.runtime import expect_share


def all_to_all_for(wanted: str, platform: str | None = None) -> str:
    """How rows are exchanged on a platform, by default this one, under "auto"; or what was asked for by name."""
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
