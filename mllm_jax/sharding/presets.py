"""Sharding presets: default rules for the logical axes of weights and activations, and meshes with matching rules."""

from typing import Any, TypedDict

from mllm_jax.sharding.mesh import MESH_AXES

# Axes of activations: batch, expert_batch, patch_row, length, residual. Axes of weights: embed, expert_embed, head_dim,
# latent, q_latent, layers, deepstack_layers, patch, position. Other axes belong to both. `residual` is the length of
# activations between decoder layers.
#
# Inside the encoder a rule `encoder_<axis>` takes precedence over `<axis>`; likewise `connector_<axis>`. Rows of both
# are independent patch rows, which are sharded over all devices, so that no work is repeated.
LOGICAL_AXIS_RULES: dict[str, Any] = {
    "batch": ("data", "fsdp", "expert"),
    "length": "context",
    "residual": "context",
    "patch_row": ("context", "tensor"),
    "embed": ("fsdp", "expert", "context"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "expert": "expert",
    "expert_batch": ("data", "fsdp"),
    "expert_embed": ("fsdp", "context"),
    "expert_mlp": "tensor",
    "head_dim": None,
    "latent": None,
    "q_latent": None,
    "layers": None,
    "deepstack_layers": None,
    "patch": None,
    "position": None,
    "encoder_batch": MESH_AXES,
    "encoder_length": None,
    "encoder_embed": ("fsdp", "expert", "context"),
    "connector_batch": MESH_AXES,
    "connector_length": None,
}


class Preset(TypedDict):
    mesh: dict[str, int]  # `shape` of `make_mesh`
    rules: dict[str, Any]  # rules of all logical axes


# A run selects a preset and can change it. Every mesh has all axes, so that the default rules fit most sizes; a preset
# changes rules only where the default ones would be slower.
PRESETS: dict[str, Preset] = {
    # Weights and batch rows are sharded over all devices (ZeRO, arXiv 1910.02054).
    "fsdp": {"mesh": {"fsdp": -1}, "rules": LOGICAL_AXIS_RULES},
    # Heads and mlp are sharded, too (Megatron, arXiv 1909.08053), and the tokens between layers (arXiv 2205.05198).
    "fsdp_tensor": {
        "mesh": {"fsdp": -1, "tensor": 4},
        "rules": LOGICAL_AXIS_RULES | {"residual": ("context", "tensor")},
    },
    # Experts are sharded, and tokens are sent to them (GShard, arXiv 2006.16668). Vision towers are narrower.
    "expert": {"mesh": {"fsdp": -1, "expert": 4}, "rules": LOGICAL_AXIS_RULES | {"encoder_embed": "fsdp"}},
    # The tokens of a row are sharded; devices exchange keys or heads (nn/attention/context_parallel.py).
    "long_context": {"mesh": {"fsdp": -1, "context": 4}, "rules": LOGICAL_AXIS_RULES},
    # Replicated weights and sharded batch rows, for small models.
    "replicated": {
        "mesh": {"data": -1},
        "rules": dict.fromkeys(LOGICAL_AXIS_RULES)
        | dict.fromkeys(("batch", "encoder_batch", "connector_batch"), MESH_AXES),
    },
}
