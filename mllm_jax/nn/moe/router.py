"""Selection of each token's experts, and statistics of the routing. Computed in fp32."""

import jax
import jax.numpy as jnp
from einops import rearrange

from mllm_jax.types import MODALITIES, Routing


def route(logits, bias, config):
    """Selects the experts of every token.

    Scores are softmax (Switch, arXiv 2101.03961; Qwen3-MoE), or sigmoid with a bias for the selection alone
    (DeepSeek-V3, arXiv 2412.19437). Experts are selected from all, or from the best groups (DeepSeek-V2, arXiv
    2405.04434).

    Args:
      logits: f32[B T E].
      bias: f32[E] added to the scores for the selection alone, or None.
      config: MoeConfig.
    Returns:
      (experts i32[B T k] best first, weights f32[B T k], probabilities f32[B T E] that sum to one).
    """
    if config.score_func == "softmax":
        score = probability = jax.nn.softmax(logits, axis=-1)
    else:
        score = jax.nn.sigmoid(logits)
        probability = score / (jnp.sum(score, axis=-1, keepdims=True) + 1e-20)
    choice = score if bias is None else score + bias
    if config.n_group > 1:
        choice = _best_groups(choice, config)
    _, experts = jax.lax.top_k(choice, config.top_k)
    weights = jnp.take_along_axis(score, experts, axis=-1)
    if config.norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return experts, weights * config.scale, probability


def _best_groups(choice, config):
    """Returns scores [B T E] with minus infinity outside the `topk_group` best groups of neighboring experts."""
    grouped = rearrange(choice, "B T (group E) -> B T group E", group=config.n_group)
    best = jnp.sum(jax.lax.top_k(grouped, config.group_best)[0], axis=-1)
    _, groups = jax.lax.top_k(best, config.topk_group)
    allowed = jnp.any(groups[..., None] == jnp.arange(config.n_group), axis=-2)
    return rearrange(jnp.where(allowed[..., None], grouped, -jnp.inf), "B T group E -> B T (group E)")


def summarize(logits, experts, probability, segment, modality, dropped) -> Routing:
    """Returns sums of a layer's routing per batch row.

    Args:
      logits, probability: f32[B T E]; experts: i32[B T k]; segment, modality: i32[B T]; dropped: i32[B].
    """
    count, real = logits.shape[-1], segment > 0
    # One column for each expert and modality, and a last one for padding.
    kind = jnp.where(real, modality, len(MODALITIES))
    column = jnp.where(kind == len(MODALITIES), len(MODALITIES) * count, kind * count)[..., None] + jnp.where(
        real[..., None], experts, 0
    )
    counts = jax.vmap(lambda c: jnp.zeros(len(MODALITIES) * count + 1, jnp.int32).at[c.ravel()].add(1))(column)
    counts = rearrange(counts[:, :-1], "B (kind E) -> B kind E", E=count)
    square = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    return Routing(
        counts=counts,
        probability=jnp.sum(jnp.where(real[..., None], probability, 0), axis=1),
        sequence=_sequence(experts, probability, segment),
        square=jnp.sum(jnp.where(real, square, 0), axis=1),
        dropped=dropped,
        choices=experts,
    )


def _sequence(experts, probability, segment):
    """Returns f32[B], the sum over a row's conversations of the balance loss E * sum_i f_i P_i of each."""
    length, (top_k, count) = segment.shape[1], (experts.shape[-1], probability.shape[-1])

    def row(experts, probability, segment):
        column = jnp.where(segment > 0, segment - 1, length)  # padding is out of bounds, so that it is dropped
        sums = lambda values: jax.ops.segment_sum(values, column, length)
        tokens = jnp.maximum(sums(jnp.ones(length)), 1)
        chosen = jnp.zeros((length, count)).at[column[:, None], experts].add(1, mode="drop")
        return count * jnp.sum(chosen * sums(probability) / (top_k * tokens**2)[:, None])

    return jax.vmap(row)(experts, probability, segment)
