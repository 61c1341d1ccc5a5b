"""Execution of a model: settings that change neither weights nor, beyond rounding, results."""

from dataclasses import dataclass, replace
from typing import Annotated

import jax
from flax import linen as nn

from mllm_jax.common.settings import Config, NonNegative, OneOf
from mllm_jax.sharding.logical_axes import Rules, freeze_rules, rules_of
from mllm_jax.sharding.presets import LOGICAL_AXIS_RULES

TAPS = "taps"  # what somebody who listens to modules notes of every layer; nobody does in training
EXCHANGED = ("expert_input", "expert_output")  # what experts on other devices were sent, and sent back
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

    dtype: compute dtype, "float32" or "bfloat16"; parameters have their own.
    attention: "auto" (by platform), "xla", "splash" (TPU) or "cudnn" (GPU).
    context: exchange of tokens that the mesh axis "context" shards: "auto", "ring" or "ulysses", see
      nn/attention/context_parallel.py.
    moe_dispatch: dispatch of tokens to experts: "dropless" (sorted by expert), "capacity" (a buffer per expert) or
      "dense" (every expert reads every token: for tests).
    capacity_factor: capacity of an expert ("capacity"), or of a device's experts ("dropless" on several devices), as a
      multiple of the mean load. Tokens over it are dropped and counted. 0: room for any routing.
    all_to_all: exchange of tokens between devices: "auto" (by platform), "even" (full buffers) or "ragged" (only the
      tokens; TPU), see nn/moe/all_to_all.py.
    grouped: products with sorted tokens: "auto" (by platform), "loop", "megablox" (TPU) or "tokamax" (GPU).
    remat: recomputation in the backward pass: "none", "full" (every layer), "experts" (every layer, but not the
      exchange of tokens between devices) or "dots" (all but matrix products).
    scan: whether a tower is one compiled layer (compile time independent of depth), or unrolled; same weights.
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
        """The same, with the sharding rules of a part of the model ("encoder", "connector")."""
        return replace(self, rules=rules_of(part, self.rules))


def expect_runs(count: float):
    """A scope for a loop whose length only data tells: how often it runs if batches are full. The planner reads it."""
    return jax.named_scope(f"times_{round(count, 3)}")


def expect_share(share: float):
    """A scope for grouped products that use a share of their rows, if batches are full. The planner reads it."""
    return jax.named_scope(f"share_{round(share, 5)}")


def rematted(layer: type[nn.Module], runtime: Runtime) -> type[nn.Module]:
    """The layer class whose backward pass recomputes what `runtime.remat` does not save."""
    if runtime.remat == "none":
        return layer
    return nn.remat(layer, policy=REMAT[runtime.remat], prevent_cse=not runtime.scan)


def scan_layers(body, layer: nn.Module, carry, per_layer, length: int, runtime: Runtime):
    """`carry, out = body(layer, carry, per_layer[i])` for every i, `layer`'s parameters stacked on an axis `layers`.

    Returns (carry, outs stacked on a leading axis).
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
