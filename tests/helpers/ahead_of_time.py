"""Compiles `attend`, forward and backward, for an accelerator that is not there. Run by test_attention.py in a process
of its own: `python ahead_of_time.py tpu|gpu '{"heads": 8, ...}'` prints one line of JSON."""

import json
import os
import re
import sys

platform, arguments = sys.argv[1], json.loads(sys.argv[2])
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="true")
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0" if platform == "gpu" else ""

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402

from mllm_jax.nn.attention.attend import attend  # noqa: E402
from mllm_jax.nn.runtime import Runtime  # noqa: E402
from mllm_jax.sharding.logical_axes import partition_spec  # noqa: E402
from mllm_jax.sharding.mesh import make_mesh  # noqa: E402

H200 = """
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4916060000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150754820096 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 }
device_description_str: "H200"
"""


def devices():
    if platform == "tpu":
        options = {"num_slices": arguments["slices"]} if "slices" in arguments else {}
        return topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1", **options).devices
    from jax._src import xla_bridge
    from jax._src.cudnn import fused_attention_stablehlo as fused

    fused.check_compute_capability = lambda least: float(least) <= 9.0  # which would ask a GPU that is not there
    known = xla_bridge.canonicalize_platform

    def canonicalize(name):
        """Without a GPU jax knows the plugin but refuses its name (jax issue 23971)."""
        return "cuda" if name in ("gpu", "cuda") else known(name)

    xla_bridge.canonicalize_platform = canonicalize
    return topologies.get_topology_desc("", platform="cuda", target_config=H200, topology="1x4x1").devices


rows, length, heads, kv_heads, head_dim = (
    arguments[name] for name in ("rows", "length", "heads", "kv_heads", "head_dim")
)
implementation = {"tpu": "splash", "gpu": "cudnn"}[platform]
runtime = Runtime(dtype="bfloat16", attention=implementation, context=arguments.get("context", "auto"))
mesh = make_mesh(arguments["mesh"], devices())


def shape(*sizes, names, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(
        sizes, dtype, sharding=NamedSharding(mesh, partition_spec(names, runtime.rules, mesh, sizes))
    )


def loss(q, k, v, segment):
    kind = {name: arguments[name] for name in ("causal", "window", "softcap") if name in arguments}
    out = attend(q, k, v, q_segment=segment, kv_segment=segment, runtime=runtime, **kind)
    return out.astype(jnp.float32).sum()


with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    names = ("batch", "length", "heads", "head_dim")
    q, k = (shape(rows, length, n, head_dim, names=names) for n in (heads, kv_heads))
    v = shape(rows, length, kv_heads, arguments.get("value_dim", head_dim), names=names)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(
        q, k, v, shape(rows, length, names=names[:2], dtype="int32")
    )
    compiled = traced.lower(lowering_platforms=({"tpu": "tpu", "gpu": "cuda"}[platform],)).compile()
text = compiled.as_text()
report = {
    "targets": re.findall(r'custom_call_target="([^"]+)"', text),
    "collectives": sorted(set(re.findall(r" (all-gather|all-to-all|collective-permute)(?:-start)?\(", text))),
    "temporary": compiled.memory_analysis().temp_size_in_bytes,
    "slices": [getattr(device, "slice_index", 0) for device in mesh.devices[:, 0, 0, 0, 0]],
}
print(json.dumps(report), flush=True)
os._exit(0)  # the plugins' own shutdown may fail without a device
