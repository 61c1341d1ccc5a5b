"""Compiler options of a training step, on the devices and ahead of time."""

# Without these, a TPU whose fsdp axis covers a whole 3-D torus gathers weights by an all-reduce, of each device's part
# among zeros, which sends twice as much. A run has to ask for them (`train.async_gathers`), for their maker supports
# them on v5e alone, which has no such torus. libtpu 0.0.42, that of jax 0.10, takes them everywhere; from 0.0.43 on it
# refuses them, since they "might lead to many errors including but not limited to: incorrect results, hang, SDC" (which
# is silent corruption). With a similar set somebody got NaN on v6e: github.com/jax-ml/jax/issues/38741.
ASYNC_GATHERS = (
    "xla_tpu_prefer_async_allgather_to_allreduce",
    "xla_enable_async_all_gather",
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_enable_async_collective_fusion_multiple_steps",
    "xla_tpu_overlap_compute_collective_tc",
)


def compiler_options(platform: str, async_gathers: bool) -> dict[str, str]:
    """Options for `jax.jit(..., compiler_options=)` on a platform: "tpu", "gpu" or "cpu"."""
    return dict.fromkeys(ASYNC_GATHERS, "true") if async_gathers and platform == "tpu" else {}
