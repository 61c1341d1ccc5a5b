"""Contrastive training of a dual encoder on pairs of an image and its text."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mllm_jax.common.trees import join
from mllm_jax.train.algorithms.base import Algorithm
from mllm_jax.train.checkpoint.restore import processor_of
from mllm_jax.train.evaluators.base import Evaluator
from mllm_jax.train.evaluators.retrieval import RetrievalEvaluator
from mllm_jax.train.input.processors import pair_processor
from mllm_jax.train.losses.contrastive import contrastive_loss
from mllm_jax.train.monitor.cost import BatchCost
from mllm_jax.train.monitor.flops import rows_of_towers
from mllm_jax.train.step.batches import count_pairs, pair_shardings, real_pairs
from mllm_jax.train.step.context import TrainContext
from mllm_jax.train.step.optimizer import split
from mllm_jax.train.step.state import TrainState
from mllm_jax.train.step.train_step import compiled_step
from mllm_jax.train.step.update import update
from mllm_jax.types import DualBatch

LARGEST_SCALE = 100.0  # bound on the scale of softmax logits (arXiv 2103.00020, section 2.5)


class Contrastive(Algorithm):
    """Trains a dual encoder, see `ContrastiveConfig`."""

    def processor(self) -> Any:
        return pair_processor(processor_of(self.run), self.run.model, self.run.data)

    def batch_shardings(self, batch: DualBatch, mesh: Mesh) -> DualBatch:
        return pair_shardings(batch, mesh, self.run.model.runtime.rules)

    def cost(self) -> BatchCost:
        return BatchCost(self.run, rows_of_towers)

    def step(self, context: TrainContext) -> Callable:
        return make_contrastive_step(context)

    def evaluator(self, mesh: Mesh, processor: Any, source: Any) -> Evaluator:
        return RetrievalEvaluator(self.run, processor, mesh, source)


def make_contrastive_step(context: TrainContext) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Returns a jitted `step(state, batch) -> (state, metrics)`, which donates the state.

    Image i belongs to text i. No device holds the logits of all pairs, see train/losses/contrastive.py. A step with a
    non-finite loss or gradient changes only the counters.

    Returns:
      metrics, f32 scalars: loss (mean over pairs), scale and bias of the logits, grad_norm (before clipping),
      learning_rate, finite (1 or 0), pairs, tokens, patches (counts without padding).
    """
    config, optim = context.model, context.optim
    model, (grad_shardings, _) = config.build(), split(context.state_shardings.params, optim.freeze)

    def loss(trainable, frozen_params, batch: DualBatch):
        params = {"params": join(trainable, frozen_params)}
        out = model.apply(params, batch)
        scale, bias = model.apply(params, method="temperature")
        rules = config.runtime.within("encoder").rules  # pairs are sharded over all axes, as images are
        embeddings = (out.image_embeddings, out.text_embeddings)
        mean_loss = contrastive_loss(config.loss, *embeddings, scale, bias, rules, real_pairs(batch))
        return mean_loss, dict(loss=mean_loss, scale=scale, bias=bias)

    def clip_scale(params):
        if config.loss != "softmax":
            return params
        return params | {"log_scale": jnp.minimum(params["log_scale"], math.log(LARGEST_SCALE))}

    def step(state: TrainState, batch: DualBatch, frozen=None):
        (_, loss_metrics), grads = jax.value_and_grad(loss, has_aux=True)(*split(state.params, optim.freeze), batch)
        grads = jax.lax.with_sharding_constraint(grads, grad_shardings)
        state, update_metrics = update(state, grads, loss_metrics, context.tx, optim, clip_scale)
        metrics = loss_metrics | update_metrics | count_pairs(batch)
        return state, {name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()}

    return compiled_step(step, context)
