"""Sharding rules to begin with: the axis names of weights and activations, and meshes with the rules that suit them."""

from typing import Any, TypedDict

from mllm_jax.sharding.mesh import MESH_AXES

# Of activations: batch expert_batch patch_row length residual; of weights: embed expert_embed head_dim latent q_latent
# layers deepstack_layers patch position; of both: the rest. `residual` is the length of what one decoder layer hands to
# the next.
#
# Inside the encoder a rule `encoder_embed` goes before `embed`, and so on; likewise `connector_`. There the rows are
# rows of patches, which know nothing of each other: they lie over all devices, and no device does another's work.
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
    mesh: dict[str, int]  # sizes of axes, as `make_mesh` takes them
    rules: dict[str, Any]  # all of them


# Where to begin: a run names one and edits it. Every mesh has every axis, so one set of rules serves most mixtures of
# them, and the sizes say which; a preset has rules of its own only where the usual ones would do worse.
PRESETS: dict[str, Preset] = {
    # Each device keeps a part of every weight, and has rows of its own (ZeRO, arXiv 1910.02054).
    "fsdp": {"mesh": {"fsdp": -1}, "rules": LOGICAL_AXIS_RULES},
    # Heads and mlp are split besides (Megatron, arXiv 1909.08053), and tokens between layers (arXiv 2205.05198).
    "fsdp_tensor": {
        "mesh": {"fsdp": -1, "tensor": 4},
        "rules": LOGICAL_AXIS_RULES | {"residual": ("context", "tensor")},
    },
    # Experts lie apart, and tokens travel (GShard, arXiv 2006.16668). A vision tower's width rarely divides as far.
    "expert": {"mesh": {"fsdp": -1, "expert": 4}, "rules": LOGICAL_AXIS_RULES | {"encoder_embed": "fsdp"}},
    # The tokens of a row lie on several devices, which exchange keys or heads (nn/attention/context_parallel.py).
    "long_context": {"mesh": {"fsdp": -1, "context": 4}, "rules": LOGICAL_AXIS_RULES},
    # Each device has all weights, and rows of its own: for models that are small.
    "replicated": {
        "mesh": {"data": -1},
        "rules": dict.fromkeys(LOGICAL_AXIS_RULES)
        | dict.fromkeys(("batch", "encoder_batch", "connector_batch"), MESH_AXES),
    },
}
