"""One step of training a dual encoder on pairs of a picture and its text, compiled once for any mix of sizes."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllm_jax.common.trees import join
from mllm_jax.model.dual_encoder import DualConfig
from mllm_jax.sharding.logical_axes import Rules, partition_spec
from mllm_jax.train.losses.contrastive import contrastive_loss
from mllm_jax.train.step.optimizer import OptimConfig, split
from mllm_jax.train.step.state import TrainState, state_shardings
from mllm_jax.train.step.update import update
from mllm_jax.types import DualBatch

LARGEST_SCALE = 100.0  # of logits under a softmax (arXiv 2103.00020, section 2.5)


def make_contrastive_step(
    config: DualConfig, tx: optax.GradientTransformation, optim: OptimConfig, mesh: Mesh
) -> Callable[[TrainState, DualBatch], tuple[TrainState, dict[str, jax.Array]]]:
    """Jitted `step(state, batch) -> (state, metrics)`; the state is donated. Picture i of a batch belongs to text i.

    No device holds the logits of all pairs, see train/losses/contrastive.py. A step whose loss or gradient is not
    finite changes nothing but the counters.

    Args:
      tx: of `make_optimizer(optim, ...)`.
    Returns:
      metrics, f32 scalars: loss (mean of a pair), scale and bias of the logits, grad_norm (before clipping),
      learning_rate, finite (1 or 0), pairs, tokens, patches (counts without padding).
    """
    model, layout = config.build(), state_shardings(config, tx, mesh, config.runtime.rules)
    pinned, _ = split(layout.params, optim.freeze)

    def loss(trainable, frozen, batch: DualBatch):
        params = {"params": join(trainable, frozen)}
        out = model.apply(params, batch)
        scale, bias = model.apply(params, method="temperature")
        everywhere = config.runtime.within("encoder").rules  # pairs lie on all axes, as pictures do
        embeddings = (out.image_embeddings, out.text_embeddings)
        value = contrastive_loss(config.loss, *embeddings, scale, bias, everywhere, real_pairs(batch))
        return value, dict(loss=value, scale=scale, bias=bias)

    def bounded(params):
        if config.loss != "softmax":
            return params
        return params | {"log_scale": jnp.minimum(params["log_scale"], math.log(LARGEST_SCALE))}

    def step(state: TrainState, batch: DualBatch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            (_, found), grads = jax.value_and_grad(loss, has_aux=True)(*split(state.params, optim.freeze), batch)
            grads = jax.lax.with_sharding_constraint(grads, pinned)
            state, about = update(state, grads, found, tx, optim, bounded)
            metrics = found | about | _count(batch)
            return state, {name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()}

    return jax.jit(step, donate_argnums=0, out_shardings=(layout, NamedSharding(mesh, PartitionSpec())))


def real_pairs(batch: DualBatch) -> jax.Array:
    """bool[pictures] which pictures of a batch, and so which pairs, are no padding."""
    real = jnp.ravel(batch.first >= 0)
    return real if batch.order is None else real[batch.order]


def _count(batch: DualBatch) -> dict[str, jax.Array]:
    return dict(
        pairs=jnp.sum(real_pairs(batch)),
        tokens=jnp.sum(batch.segment > 0),
        patches=jnp.sum(batch.vision.image > 0),
    )


def pair_shardings(batch: DualBatch, mesh: Mesh, rules: Rules) -> DualBatch:
    """NamedSharding of every array of a batch: rows of texts and of pictures over the `batch` axes.

    Raises ValueError where the axes do not divide them.
    """

    def of(x):
        names = ("batch", *(None,) * (x.ndim - 1))
        return NamedSharding(mesh, partition_spec(names, rules, mesh, x.shape, "a batch of pictures and texts"))

    return jax.tree.map(of, batch)
