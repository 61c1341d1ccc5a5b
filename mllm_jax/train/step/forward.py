"""Forward passes of language models, shared by objectives, evaluators and PPO. Pure functions."""

import jax.numpy as jnp

from mllm_jax.model.vlm import VLM, ModelConfig, head_table
from mllm_jax.train.losses.cross_entropy import CHUNK, sample_weights, sum_segments, token_log_probs, token_loss
from mllm_jax.types import Array, Batch, Routing


def dropout(key) -> dict[str, Array]:
    """Returns the `rngs` of `apply`. key: key of the dropout. None: no dropout."""
    return {} if key is None else {"dropout": key}


def loss_sum(config: ModelConfig, params, batch: Batch, weighting: str = "token", chunk: int = CHUNK, key=None):
    """Returns the sum of weight * cross-entropy, f32[], and the Routing or None. Sums of batches add up.

    key: key of adapter dropout. None: no dropout.
    """
    out, runtime = VLM(config).apply({"params": params}, batch, hidden=True, rngs=dropout(key)), config.runtime
    weight = sample_weights(batch, weighting)
    options = (chunk, runtime.dtype, runtime.rules, config.decoder.logit_softcap)
    loss = token_loss(out.hidden, head_table(params), batch.targets, weight, *options)
    return loss, out.routing


def answer_log_probs(config: ModelConfig, params, batch: Batch, chunk: int = CHUNK, key=None):
    """Returns the log-probabilities of segments, f32[B T] with segment s in column s - 1, and the Routing or None."""
    out, runtime = VLM(config).apply({"params": params}, batch, hidden=True, rngs=dropout(key)), config.runtime
    options = (chunk, runtime.dtype, runtime.rules, config.decoder.logit_softcap)
    log_probs = token_log_probs(out.hidden, head_table(params), batch.targets, batch.weight, *options)
    return sum_segments(batch.weight * log_probs, batch.segment), out.routing


def log_probs_and_values(config: ModelConfig, params, batch: Batch, chunk: int):
    """Returns (log-probabilities of weighted targets, else 0, f32[B T]; values f32[B T] or None; Routing or None)."""
    model, runtime = VLM(config), config.runtime
    out = model.apply({"params": params}, batch, hidden=True)
    options = (chunk, runtime.dtype, runtime.rules, config.decoder.logit_softcap)
    log_probs = token_log_probs(out.hidden, head_table(params), batch.targets, batch.weight, *options)
    values = model.apply({"params": params}, out.hidden, method="values") if config.value_head else None
    return log_probs, values, out.routing


def scores(config: ModelConfig, params, batch: Batch, key=None) -> tuple[Array, Routing | None]:
    """Returns values of the segments' last tokens, f32[B T] with segment s in column s - 1, and the Routing or None."""
    model = VLM(config)
    out = model.apply({"params": params}, batch, hidden=True, rngs=dropout(key))
    values = model.apply({"params": params}, out.hidden, method="values")
    next_segment = jnp.pad(batch.segment[:, 1:], ((0, 0), (0, 1)))
    return sum_segments(jnp.where(batch.segment != next_segment, values, 0.0), batch.segment), out.routing
