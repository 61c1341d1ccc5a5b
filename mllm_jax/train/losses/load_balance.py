"""Keeping experts evenly loaded: losses that are values of what the routers did, and the bias that needs no gradient.

All are 1 where experts are chosen evenly, whatever the number of layers and experts: a loss is a mean over layers, and
the fractions f of an expert's choices, f_i, sum to one, as do its probabilities, P_i: L = E * sum_i f_i P_i (Switch,
arXiv 2101.03961). Padding counts nowhere. Gradients flow through P alone.
"""

import re
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from mllm_jax.common.settings import Config, NonNegative, OneOf
from mllm_jax.common.trees import map_with_paths
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.nn.stack import segments
from mllm_jax.types import Array, Batch, Routing

LOSSES = ("none", "micro", "sequence", "global")


@dataclass(frozen=True)
class BalanceConfig(Config):
    """Load balancing of experts.

    loss: the tokens over which f and P are taken.
      "micro": those of one batch row, averaged over rows.
      "sequence": those of one conversation, averaged over conversations (DeepSeek-V2, arXiv 2405.04434).
      "global": those of the whole batch, over all devices and accumulated parts (Qwen3, arXiv 2501.11873).
    aux_loss_weight: c; c * L is added to the loss.
    exact: with "global" and accumulated parts, whether f is that of the whole batch, which takes a forward pass over
      all parts beforehand. Otherwise a part takes the f of the parts up to its own, the buffer of arXiv 2501.11873: it
      approximates the whole batch's, best for the last part.
    z_loss_weight: weight of the mean squared log of the softmax's denominator (ST-MoE, arXiv 2202.08906).
    bias_update_rate: gamma of loss-free balancing: after a step the bias of an expert rises or falls by this much if
      its load was below or above the mean (arXiv 2408.15664). For models whose routers have a bias.
    """

    loss: Annotated[str, OneOf(LOSSES)] = "none"
    aux_loss_weight: NonNegative = 0.001
    exact: bool = True
    z_loss_weight: NonNegative = 0.0
    bias_update_rate: NonNegative = 0.0

    def counts_first(self, grad_accum_steps: int) -> bool:
        """Returns whether a forward pass counts the choices of the whole batch before any gradient."""
        return self.loss == "global" and self.exact and grad_accum_steps > 1


class Totals(NamedTuple):
    """Amounts of a whole batch, f32[], by which the sums of its parts are divided; 1 if it has none."""

    weight: Array  # sum of the loss weights
    tokens: Array
    rows: Array  # that hold a token
    conversations: Array


def totals(batch: Batch, weight) -> Totals:
    """Totals of a batch, with the loss weights f32[B T] of its targets."""
    conversations = jnp.max(batch.segment, axis=1)
    counts = (jnp.sum(weight), jnp.sum(batch.segment > 0), jnp.sum(conversations > 0), jnp.sum(conversations))
    return Totals(*(jnp.where(count == 0, 1, count).astype(jnp.float32) for count in counts))


class Load(NamedTuple):
    """Number of choices of each expert, from which the f of the global loss follows."""

    choices: Array  # f32[Lm E]

    @classmethod
    def of(cls, routing: Routing) -> "Load":
        return cls(jax.lax.stop_gradient(jnp.sum(routing.counts, axis=(1, 2)).astype(jnp.float32)))

    @classmethod
    def zeros(cls, config: DecoderConfig) -> "Load":
        return cls(jnp.zeros((len(config.expert_layers), config.moe.experts)))

    @property
    def fraction(self) -> Array:
        return self.choices / jnp.maximum(jnp.sum(self.choices, axis=-1, keepdims=True), 1)


def balance_loss(routing: Routing, segment, load: Load, whole: Totals, kind: str):
    """L of BalanceConfig's `kind`, f32[]: for a part of a batch its share, so that the shares of all parts add up.

    Args:
      routing: routing of the part, fields [Lm B ...].
      segment: i32[B T] of the part.
      load: load from which f of "global" is taken.
      whole: totals of the whole batch.
    """
    layers, _, _, experts = routing.counts.shape
    if kind == "sequence":
        return jnp.sum(routing.sequence) / (layers * whole.conversations)
    if kind == "global":
        probability = jnp.sum(routing.probability, axis=1) / whole.tokens
        return experts * jnp.sum(load.fraction * probability) / layers
    tokens = jnp.maximum(jnp.sum(segment > 0, axis=1), 1)
    chosen = jnp.sum(routing.counts, axis=2)
    fraction = chosen / jnp.maximum(jnp.sum(chosen, axis=-1, keepdims=True), 1)
    return experts * jnp.sum(fraction * routing.probability / tokens[:, None]) / (layers * whole.rows)


def z_loss(routing: Routing, whole: Totals):
    """The part's share of the mean over tokens and layers, f32[]."""
    return jnp.sum(routing.square) / (routing.square.shape[0] * whole.tokens)


def imbalance(load: Load):
    """The busiest expert's load over the mean, in the layer where it is greatest, f32[]: 1 is even."""
    return jnp.max(load.fraction) * load.choices.shape[-1]


BIAS = re.compile(r"^decoder/(layers\d*(?:/slots_\d+)?)/mlp/bias$")


def move_biases(params: dict, load: Load, config: DecoderConfig, bias_update_rate: float) -> dict:
    """Parameters whose routers' biases have moved by `bias_update_rate` towards an even load."""
    numbers = config.expert_layers
    slots = {name: layers for part in segments(config.kinds) for name, layers, _ in part.slots()}

    def moved(path, leaf):
        if not (found := BIAS.match(path)):
            return leaf
        own = load.choices[jnp.array([numbers.index(layer) for layer in slots[found.group(1)]])]
        return leaf + bias_update_rate * jnp.sign(jnp.mean(own, axis=-1, keepdims=True) - own)

    return map_with_paths(moved, params)
