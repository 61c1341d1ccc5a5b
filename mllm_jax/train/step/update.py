"""Updates the state of a run with clipped gradients. A non-finite step leaves parameters unchanged."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mllm_jax.common.trees import join
from mllm_jax.train.step.optimizer import OptimConfig, make_schedule, split
from mllm_jax.train.step.state import TrainState


def update(
    state: TrainState,
    grads: Any,
    found: Mapping[str, jax.Array],
    tx: optax.GradientTransformation,
    optim: OptimConfig,
    adjust: Callable[[Any], Any] = lambda params: params,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state after a step, and the metrics grad_norm (before clipping), learning_rate and finite.

    Args:
      grads: gradients of the trained weights, see `optim.split`.
      found: losses. If one of them is not finite, only the counters change.
      tx: transformation of `make_optimizer(optim, ...)`.
      adjust: function that changes parameters after the gradient update.
    """
    trainable, frozen = split(state.params, optim.freeze)
    norm = optax.global_norm(grads)
    finite = jnp.all(jnp.isfinite(jnp.array([norm, *found.values()])))
    if optim.max_grad_norm:
        scale = jnp.minimum(1, optim.max_grad_norm / norm)
        grads = jax.tree.map(lambda grad: grad * scale, grads)
    updates, opt_state = tx.update(grads, state.opt_state, trainable)
    params = adjust(join(optax.apply_updates(trainable, updates), frozen))
    keep = lambda new, old: jax.tree.map(partial(jnp.where, finite), new, old)
    state = state._replace(
        step=state.step + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        bad=jnp.where(finite, 0, state.bad + 1),
        skipped=jnp.where(finite, state.skipped, state.skipped + 1),
    )
    updates_done = state.step - 1 - state.skipped  # the optimizer's count
    return state, dict(grad_norm=norm, learning_rate=make_schedule(optim)(updates_done), finite=finite)
