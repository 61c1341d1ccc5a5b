"""Forward passes of language models that objectives, evaluation and generated answers share. Pure functions."""

import jax.numpy as jnp

from mllm_jax.model.vlm import VLM, ModelConfig, head_table
from mllm_jax.train.losses.cross_entropy import CHUNK, sample_weights, sum_segments, token_log_probs, token_loss
from mllm_jax.types import Array, Batch, Routing


def dropout(key) -> dict[str, Array]:
    """`rngs` of `apply` for a key, or for None where nothing is dropped."""
    return {} if key is None else {"dropout": key}


def loss_sum(config: ModelConfig, params, batch: Batch, weighting: str = "token", chunk: int = CHUNK, key=None):
    """(sum of weight * cross-entropy f32[], Routing or None): sums, so that batches add up.

    key: of the dropout of adapters; None = none.
    """
    out, runtime = VLM(config).apply({"params": params}, batch, hidden=True, rngs=dropout(key)), config.runtime
    weight = sample_weights(batch, weighting)
    about = (chunk, runtime.dtype, runtime.rules, config.decoder.logit_softcap)
    loss = token_loss(out.hidden, head_table(params), batch.targets, weight, *about)
    return loss, out.routing


def answer_log_probs(config: ModelConfig, params, batch: Batch, chunk: int = CHUNK, key=None):
    """f32[B T], in column s - 1 the log-probability of the targets of segment s, and what the routers did."""
    out, runtime = VLM(config).apply({"params": params}, batch, hidden=True, rngs=dropout(key)), config.runtime
    about = (chunk, runtime.dtype, runtime.rules, config.decoder.logit_softcap)
    found = token_log_probs(out.hidden, head_table(params), batch.targets, batch.weight, *about)
    return sum_segments(batch.weight * found, batch.segment), out.routing


def log_probs_and_values(config: ModelConfig, params, batch: Batch, chunk: int):
    """f32[B T] of every target of weight, 0 elsewhere; f32[B T] of the value head, None without one; routing."""
    model, runtime = VLM(config), config.runtime
    out = model.apply({"params": params}, batch, hidden=True)
    about = (chunk, runtime.dtype, runtime.rules, config.decoder.logit_softcap)
    found = token_log_probs(out.hidden, head_table(params), batch.targets, batch.weight, *about)
    values = model.apply({"params": params}, out.hidden, method="values") if config.value_head else None
    return found, values, out.routing


def scores(config: ModelConfig, params, batch: Batch, key=None) -> tuple[Array, Routing | None]:
    """f32[B T], in column s - 1 the number of the last token of segment s, and what the routers did."""
    model = VLM(config)
    out = model.apply({"params": params}, batch, hidden=True, rngs=dropout(key))
    values = model.apply({"params": params}, out.hidden, method="values")
    following = jnp.pad(batch.segment[:, 1:], ((0, 0), (0, 1)))
    return sum_segments(jnp.where(batch.segment != following, values, 0.0), batch.segment), out.routing
