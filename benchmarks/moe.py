"""A block of experts, forward and backward: every dispatch here and transformers' block, in one run.

    python benchmarks/moe.py                     on this machine, fp32, from the same weights
    python benchmarks/moe.py --device            ours alone on an accelerator, bf16, at the size of Qwen3-VL-30B-A3B

The outputs are compared first. Memory is that of XLA's temporaries; torch does not report its own.
"""

import statistics
import time

import numpy as np

from mllm_jax.common.cli import Parser


def blocks(experts: int, top_k: int, width: int, mlp: int, dtype: str, ways: dict):
    """(jitted `(params, x, segment) -> ((d_params, d_x), y)` by name, random parameters)."""
    import jax
    import jax.numpy as jnp

    from mllm_jax.nn.moe.layer import Moe, MoeConfig
    from mllm_jax.nn.runtime import Runtime

    config = MoeConfig(experts, top_k, mlp)

    def step(runtime):
        module = Moe(config, runtime)

        def loss(params, x, segment):
            y, _ = module.apply({"params": params}, x, segment, jnp.zeros_like(segment))
            return jnp.sum(y.astype(jnp.float32) ** 2), y

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

    from flax.core import meta

    module, example = Moe(config, Runtime(dtype=dtype)), jnp.zeros((1, 8, width))
    init = lambda key: module.init(key, example, jnp.ones((1, 8), int), jnp.zeros((1, 8), int))["params"]
    params = meta.unbox(jax.jit(init)(jax.random.key(0)))
    return {name: step(Runtime(dtype=dtype, **way)) for name, way in ways.items()}, params


WAYS = {
    "dropless": {"moe_dispatch": "dropless"},
    "capacity, room 1.25": {"moe_dispatch": "capacity", "capacity_factor": 1.25},
    "dense": {"moe_dispatch": "dense"},
}


def against_transformers(args):
    import jax
    import torch
    from pair import in_turn
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    torch.set_num_threads(2)
    steps, params = blocks(args.experts, args.top_k, args.width, args.mlp, "float32", WAYS)
    theirs = Qwen3MoeSparseMoeBlock(
        Qwen3MoeConfig(
            hidden_size=args.width,
            num_experts=args.experts,
            num_experts_per_tok=args.top_k,
            moe_intermediate_size=args.mlp,
            norm_topk_prob=True,
        )
    )
    gate_up = np.asarray(params["experts_gate_up"]["w"])  # [E 2 D F]
    tensors = {
        "gate.weight": np.asarray(params["router"]["w"]).T,
        "experts.gate_up_proj": gate_up.transpose(0, 1, 3, 2).reshape(args.experts, -1, args.width),
        "experts.down_proj": np.asarray(params["experts_down"]["w"]).transpose(0, 2, 1),
    }
    theirs.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in tensors.items()})
    x = np.random.default_rng(0).standard_normal((args.rows, args.tokens, args.width)).astype(np.float32)
    segment = np.ones(x.shape[:2], np.int32)

    def reference():
        given = torch.from_numpy(x).requires_grad_()
        y = theirs(given)
        y = y[0] if isinstance(y, tuple) else y
        theirs.zero_grad()
        (y**2).sum().backward()
        return y.detach().numpy(), given.grad.numpy()

    y, d_x = reference()
    for name, step in steps.items():
        (_, ours), out = step(params, x, segment)
        if "room" not in name:
            np.testing.assert_allclose(out, y, atol=1e-4 * np.abs(y).max())
            np.testing.assert_allclose(ours, d_x, atol=1e-4 * np.abs(d_x).max())
    runs = {name: lambda step=step: jax.block_until_ready(step(params, x, segment)) for name, step in steps.items()}
    seconds = in_turn({"transformers": reference, **runs}, args.rounds)
    memory = {name: temporaries(step, params, x, segment) for name, step in steps.items()}
    print(f"{args.experts} experts of {args.mlp}, {args.top_k} of them, width {args.width}, {x[..., 0].size} tokens")
    table(seconds, x[..., 0].size, memory)


def on_an_accelerator(args):
    import jax
    import jax.numpy as jnp

    steps, params = blocks(128, 8, 2048, 768, "bfloat16", {name: WAYS[name] for name in list(WAYS)[:2]})
    x = jax.random.normal(jax.random.key(1), (args.rows, args.tokens, 2048), jnp.bfloat16)
    segment = jnp.ones(x.shape[:2], jnp.int32)
    seconds = {}
    for name, step in steps.items():
        jax.block_until_ready(step(params, x, segment))
        seconds[name] = []
        for _ in range(args.rounds):
            start = time.perf_counter()
            jax.block_until_ready(step(params, x, segment))
            seconds[name].append(time.perf_counter() - start)
    print(f"128 experts of 768, 8 of them, width 2048, {segment.size} tokens, {jax.devices()[0].device_kind}")
    table(seconds, segment.size, {name: temporaries(step, params, x, segment) for name, step in steps.items()})


def temporaries(step, *args) -> int:
    """Bytes that the compiled step holds in addition to its arguments and results."""
    return step.lower(*args).compile().memory_analysis().temp_size_in_bytes


def table(seconds: dict[str, list[float]], tokens: int, memory: dict[str, int]) -> None:
    first = next(iter(seconds))
    print(f"{'':22}{'ms':>9}{'tokens/s':>11}{'ratio':>8}{'MiB':>8}")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[first], times))
        held = f"{memory[name] / 2**20:8.0f}" if name in memory else f"{'-':>8}"
        median = statistics.median(times)
        print(f"{name:22}{1000 * median:9.1f}{tokens / median:11.0f}{ratio:8.2f}{held}")


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--device", action="store_true", help="ours alone, on the accelerator that jax finds")
    for name, value in {"experts": 64, "top_k": 4, "width": 256, "mlp": 192, "rows": 4, "tokens": 512}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--rounds", type=int, default=10, help="counted runs of each (default 10)")
    args = parser.parse_args()
    if args.device:
        on_an_accelerator(args)
    else:
        import os

        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        against_transformers(args)


if __name__ == "__main__":
    main()
