"""Compiler options of a training step."""

# Without these, a TPU whose fsdp axis covers a whole 3-D torus gathers weights by an all-reduce of zero-padded shards,
# which sends twice as much. They are opt-in (`train.async_gathers`), because Google supports them only on v5e, which
# has no such torus. libtpu 0.0.42 (jax 0.10) accepts them everywhere; from 0.0.43 on it rejects them, since they "might
# lead to many errors including but not limited to: incorrect results, hang, SDC" (silent data corruption). A similar
# set gave NaN on v6e: github.com/jax-ml/jax/issues/38741.
ASYNC_GATHERS = (
    "xla_tpu_prefer_async_allgather_to_allreduce",
    "xla_enable_async_all_gather",
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_enable_async_collective_fusion_multiple_steps",
    "xla_tpu_overlap_compute_collective_tc",
)


def compiler_options(platform: str, async_gathers: bool) -> dict[str, str]:
    """Returns options for `jax.jit(..., compiler_options=)`. platform: "tpu", "gpu" or "cpu"."""
    return dict.fromkeys(ASYNC_GATHERS, "true") if async_gathers and platform == "tpu" else {}
