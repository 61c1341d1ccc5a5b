"""Mixture-of-experts feed-forward block: every token uses a few of many experts (arXiv 1701.06538)."""

from dataclasses import dataclass
from typing import Annotated

from flax import linen as nn

from mllm_jax.common.settings import Config, NonNegativeInt, OneOf, Positive, PositiveInt
from mllm_jax.nn.einsum import Einsum, Weight
from mllm_jax.nn.mlp import ACTIVATIONS, GatedMlp
from mllm_jax.nn.moe.dispatch import AXES, Experts, dispatch
from mllm_jax.nn.moe.router import route, summarize
from mllm_jax.nn.runtime import Runtime
from mllm_jax.sharding.weights import partitioned


@dataclass(frozen=True)
class MoeConfig(Config):
    """A layer of experts.

    experts: number of experts.
    top_k: number of experts per token.
    mlp: hidden width of an expert.
    shared_expert_dim: hidden width of all shared experts together, an MLP that reads every token. 0: no shared experts.
    score_func: function of the router's logits: "softmax" or "sigmoid".
    bias: whether a bias, updated without gradients to balance the load, is added to scores for the selection alone.
    norm_topk_prob: whether the weights of a token's experts are normalized to sum to one, before `scale`.
    scale: factor of the weights.
    n_group, topk_group: number of groups of experts, and number of best groups from which experts are selected.
    group_best: number of best scores whose sum is the score of a group.
    activation: activation of the gate.
    """

    experts: PositiveInt
    top_k: PositiveInt
    mlp: PositiveInt
    shared_expert_dim: NonNegativeInt = 0
    score_func: Annotated[str, OneOf(("softmax", "sigmoid"))] = "softmax"
    bias: bool = False
    norm_topk_prob: bool = True
    scale: Positive = 1.0
    n_group: PositiveInt = 1
    topk_group: PositiveInt = 1
    group_best: PositiveInt = 1
    activation: Annotated[str, OneOf(tuple(ACTIVATIONS))] = "silu"

    def __post_init__(self):
        super().__post_init__()
        if self.experts % self.n_group:
            raise ValueError(f"moe.experts={self.experts}: must be a multiple of moe.n_group={self.n_group}.")
        eligible = self.experts // self.n_group * self.topk_group
        if self.top_k > eligible or self.topk_group > self.n_group:
            raise ValueError(
                f"moe.top_k={self.top_k}: exceeds the {eligible} experts in moe.topk_group={self.topk_group} of "
                f"moe.n_group={self.n_group} groups. Reduce moe.top_k, or set moe.topk_group between 1 and moe.n_group."
            )


class Moe(nn.Module):
    config: MoeConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, x, segment, modality):
        """Returns the experts' results [B T D] of x [B T D], and the Routing of this layer.

        `segment`, `modality`: i32[B T].
        """
        config, runtime, width = self.config, self.runtime, x.shape[-1]
        count, mlp = config.experts, config.mlp
        router = Einsum("...D,DE->...E", (width, count), ("embed", None), "float32", name="router")
        bias = self.param("bias", partitioned(nn.initializers.zeros, None), (count,)) if config.bias else None
        up_axes, down_axes, *_ = AXES
        gate_up = Weight((count, 2, width, mlp), up_axes, width, ((-2,), (-3, -1)), name="experts_gate_up")
        down = Weight((count, mlp, width), down_axes, mlp, ((-2,), (-1,)), name="experts_down")
        params = Experts(gate_up(), down(), gate_up.factors(), down.factors())
        logits = router(x)
        experts, weights, probability = route(logits, bias, config)
        y, dropped = dispatch(x, experts, weights, segment > 0, params, ACTIVATIONS[config.activation], runtime)
        if config.shared_expert_dim:
            sizes = (config.shared_expert_dim, x.shape[-1], config.activation, runtime.dtype)
            y = y + GatedMlp(*sizes, name="shared")(x)
        return y, summarize(logits, experts, probability, segment, modality, dropped)
