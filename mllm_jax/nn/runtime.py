"""Settings of a model's execution. They change no weights, and results only by rounding."""

from dataclasses import dataclass, replace
from typing import Annotated

import jax
from flax import linen as nn

from mllm_jax.common.settings import Config, NonNegative, OneOf
from mllm_jax.sharding.logical_axes import Rules, freeze_rules, rules_of
from mllm_jax.sharding.presets import LOGICAL_AXIS_RULES

TAPS = "taps"  # Flax collection of values that interceptors record per layer; empty in training
EXCHANGED = ("expert_input", "expert_output")  # checkpoint names of tokens after the exchange to and from experts
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "experts": jax.checkpoint_policies.save_only_these_names(*EXCHANGED),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
ATTENTION = ("auto", "xla", "splash", "cudnn")
CONTEXT = ("auto", "ring", "ulysses")
DISPATCH = ("dropless", "capacity", "dense")
ALL_TO_ALL = ("auto", "even", "ragged")
GROUPED = ("auto", "loop", "megablox", "tokamax")


@dataclass(frozen=True)
class Runtime(Config):
    """Execution of a model.

    dtype: compute dtype, "float32" or "bfloat16". Parameters have a dtype of their own.
    attention: implementation: "auto" (by platform), "xla", "splash" (TPU) or "cudnn" (GPU).
    context: exchange of tokens that the mesh axis "context" shards: "auto", "ring" or "ulysses", see
      nn/attention/context_parallel.py.
    moe_dispatch: dispatch of tokens to experts: "dropless" (sorted by expert), "capacity" (a buffer per expert) or
      "dense" (every expert reads every token: for tests).
    capacity_factor: capacity of an expert ("capacity"), or of a device's experts ("dropless" on several devices), as a
      multiple of the mean load. Excess tokens are dropped and counted. 0: capacity for any routing.
    all_to_all: exchange of tokens between devices: "auto" (by platform), "even" (full buffers) or "ragged" (only the
      tokens; TPU), see nn/moe/all_to_all.py.
    grouped: implementation of grouped products: "auto" (by platform), "loop", "megablox" (TPU) or "tokamax" (GPU).
    remat: recomputation in the backward pass: "none", "full" (every layer), "experts" (every layer, but not the
      exchange of tokens between devices) or "dots" (all but matrix products).
    scan: whether layers run as one compiled scan (compile time independent of depth) or unrolled. Weights are the same.
    rules: logical axis -> mesh axes, see sharding/presets.py.
    """

    dtype: Annotated[str, OneOf(("float32", "bfloat16"))] = "float32"
    attention: Annotated[str, OneOf(ATTENTION)] = "auto"
    context: Annotated[str, OneOf(CONTEXT)] = "auto"
    moe_dispatch: Annotated[str, OneOf(DISPATCH)] = "dropless"
    capacity_factor: NonNegative = 0.0
    all_to_all: Annotated[str, OneOf(ALL_TO_ALL)] = "auto"
    grouped: Annotated[str, OneOf(GROUPED)] = "auto"
    remat: Annotated[str, OneOf(tuple(REMAT))] = "none"
    scan: bool = True
    rules: Rules = freeze_rules(LOGICAL_AXIS_RULES)

    def within(self, part: str) -> "Runtime":
        """Returns a copy with the sharding rules of a part of the model ("encoder", "connector")."""
        return replace(self, rules=rules_of(part, self.rules))


def expect_runs(count: float):
    """Returns a named scope with the expected trip count of a data-dependent loop in full batches, for the planner."""
    return jax.named_scope(f"times_{round(count, 3)}")


def expect_share(share: float):
    """Returns a named scope with the share of rows that grouped products use in full batches, for the planner."""
    return jax.named_scope(f"share_{round(share, 5)}")


def rematted(layer: type[nn.Module], runtime: Runtime) -> type[nn.Module]:
    """Returns the layer class with the recomputation policy `runtime.remat`."""
    if runtime.remat == "none":
        return layer
    return nn.remat(layer, policy=REMAT[runtime.remat], prevent_cse=not runtime.scan)


def scan_layers(body, layer: nn.Module, carry, per_layer, length: int, runtime: Runtime):
    """Scans `carry, out = body(layer, carry, per_layer[i])` over `length` layers.

    The parameters of `layer` are stacked on a leading axis `layers`. Returns (carry, outs stacked on a leading axis).
    """
    scan = nn.scan(
        body,
        variable_axes={"params": 0, TAPS: 0},
        split_rngs={"params": True, "dropout": True},
        length=length,
        unroll=1 if runtime.scan else length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scan(layer, carry, per_layer)
