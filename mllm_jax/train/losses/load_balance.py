"""Load balancing of experts: auxiliary losses on the routing, and the router bias that is updated without gradient.

A loss is the mean over layers of L = E * sum_i f_i P_i (Switch, arXiv 2101.03961), with f_i the fraction of choices of
expert i and P_i its mean probability; both sum to 1 over the E experts. L is 1 for an even load, whatever E. Padding is
ignored. Gradients flow through P alone.
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

    loss: tokens over which f and P are computed.
      "none": no loss.
      "micro": tokens of one batch row, averaged over rows.
      "sequence": tokens of one conversation, averaged over conversations (DeepSeek-V2, arXiv 2405.04434).
      "global": tokens of the whole batch, over all devices and accumulated parts (Qwen3, arXiv 2501.11873).
    aux_loss_weight: weight of L in the loss.
    exact: compute f of "global" over all accumulated parts, with an extra forward pass. False: each part uses f of the
      parts so far, the buffer of arXiv 2501.11873, an approximation that is best for the last part.
    z_loss_weight: weight of the mean squared log of the softmax denominator (ST-MoE, arXiv 2202.08906).
    bias_update_rate: step of loss-free balancing (arXiv 2408.15664): each update raises the bias of experts with less
      than the mean load and lowers that of the others. For routers with a bias.
    """

    loss: Annotated[str, OneOf(LOSSES)] = "none"
    aux_loss_weight: NonNegative = 0.001
    exact: bool = True
    z_loss_weight: NonNegative = 0.0
    bias_update_rate: NonNegative = 0.0

    def counts_first(self, grad_accum_steps: int) -> bool:
        """Returns True if an extra forward pass counts the choices of the whole batch before the gradients."""
        return self.loss == "global" and self.exact and grad_accum_steps > 1


class Totals(NamedTuple):
    """Totals of a whole batch, f32[], by which the sums of its parts are divided. 1 instead of 0."""

    weight: Array  # sum of the loss weights
    tokens: Array  # number of tokens without padding
    rows: Array  # number of rows with tokens
    conversations: Array  # number of conversations


def totals(batch: Batch, weight) -> Totals:
    """Returns the totals of a batch. weight: f32[B T] loss weights of its targets."""
    conversations = jnp.max(batch.segment, axis=1)
    counts = (jnp.sum(weight), jnp.sum(batch.segment > 0), jnp.sum(conversations > 0), jnp.sum(conversations))
    return Totals(*(jnp.where(count == 0, 1, count).astype(jnp.float32) for count in counts))


class Load(NamedTuple):
    """Load of the experts, from which f of the global loss is computed."""

    choices: Array  # f32[Lm E] number of choices of each expert in each MoE layer

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
    """Returns the contribution of a part to L of the whole batch, f32[]. The contributions of all parts add up to L.

    Args:
      routing: routing of the part, fields [Lm B ...].
      segment: i32[B T] segments of the part.
      load: load that f of "global" is computed from.
      whole: totals of the whole batch.
      kind: `BalanceConfig.loss`.
    """
    layers, _, _, experts = routing.counts.shape
    if kind == "sequence":
        return jnp.sum(routing.sequence) / (layers * whole.conversations)
    if kind == "global":
        probability = jnp.sum(routing.probability, axis=1) / whole.tokens
        return experts * jnp.sum(load.fraction * probability) / layers
    tokens = jnp.maximum(jnp.sum(segment > 0, axis=1), 1)
    choices = jnp.sum(routing.counts, axis=2)
    fraction = choices / jnp.maximum(jnp.sum(choices, axis=-1, keepdims=True), 1)
    return experts * jnp.sum(fraction * routing.probability / tokens[:, None]) / (layers * whole.rows)


def z_loss(routing: Routing, whole: Totals):
    """Returns the contribution of a part to the mean z-loss over tokens and layers of the whole batch, f32[]."""
    return jnp.sum(routing.square) / (routing.square.shape[0] * whole.tokens)


def imbalance(load: Load):
    """Returns the largest load of an expert relative to the mean of its layer, f32[]. 1: even."""
    return jnp.max(load.fraction) * load.choices.shape[-1]


BIAS = re.compile(r"^decoder/(layers\d*(?:/slots_\d+)?)/mlp/bias$")


def move_biases(params: dict, load: Load, config: DecoderConfig, bias_update_rate: float) -> dict:
    """Returns the parameters with router biases moved by `bias_update_rate` towards an even load."""
    expert_layers = config.expert_layers
    layers_of_slot = {
        name: layers for layer_segment in segments(config.kinds) for name, layers, _ in layer_segment.slots()
    }

    def move(path, leaf):
        if not (match := BIAS.match(path)):
            return leaf
        choices = load.choices[jnp.array([expert_layers.index(layer) for layer in layers_of_slot[match.group(1)]])]
        return leaf + bias_update_rate * jnp.sign(jnp.mean(choices, axis=-1, keepdims=True) - choices)

    return map_with_paths(move, params)
