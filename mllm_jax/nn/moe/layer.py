"""A feed-forward block of experts, of which every token takes a few (arXiv 1701.06538)."""

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

    experts: E; top_k: experts of a token; mlp: width of an expert.
    shared_expert_dim: width of an MLP that every token also passes through (all shared experts together). 0: none.
    score_func: "softmax" or "sigmoid".
    bias: whether experts are selected, but not weighted, with a bias that balances the load without a gradient.
    norm_topk_prob: whether the weights of a token's experts sum to one, before `scale`.
    n_group, topk_group, group_best: experts are selected from the `topk_group` best of `n_group` groups; the score of a
      group is the sum of its `group_best` best scores.
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
            raise ValueError(f"moe.experts={self.experts} do not divide into moe.n_group={self.n_group}")
        eligible = self.experts // self.n_group * self.topk_group
        if self.top_k > eligible or self.topk_group > self.n_group:
            raise ValueError(
                f"moe.top_k={self.top_k} of {eligible} experts (those of {self.topk_group} of {self.n_group} groups) "
                "cannot be chosen"
            )


class Moe(nn.Module):
    config: MoeConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, x, segment, modality):
        """x [B T D] -> ([B T D], Routing of this layer); segment, modality i32[B T]."""
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
