"""What compilers are told for a training step, on the devices and ahead of time."""

import importlib.metadata
import importlib.util
import re

# Without these, a TPU whose fsdp axis covers a whole 3-D torus gathers weights by an all-reduce, of each device's part
# among zeros, which sends twice as much.
TPU_OPTIONS = (
    "xla_tpu_prefer_async_allgather_to_allreduce",
    "xla_enable_async_all_gather",
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_enable_async_collective_fusion_multiple_steps",
    "xla_tpu_overlap_compute_collective_tc",
)
# From this libtpu on they are refused for all TPUs but v5e, which has no such torus; that of jax 0.10 is 0.0.42.
REFUSED = (0, 0, 43)


def compiler_options(platform: str) -> dict[str, str]:
    """For `jax.jit(..., compiler_options=)` on "tpu", "gpu" or "cpu"; only what the installed compiler accepts."""
    if platform != "tpu" or importlib.util.find_spec("libtpu") is None:
        return {}
    version = tuple(map(int, re.findall(r"\d+", importlib.metadata.version("libtpu"))[:3]))
    return dict.fromkeys(TPU_OPTIONS, "true") if version < REFUSED else {}
