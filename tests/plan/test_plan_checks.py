"""Warnings of a planned step: each on a program that walks into the trap, and not on one that does not."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from planned_run import compiled_text, tiny

from mllm_jax.model.vlm import abstract_params
from mllm_jax.nn.attention.attend import attend
from mllm_jax.nn.runtime import Runtime, expect_runs
from mllm_jax.plan.hardware.topology import Topology, targeting
from mllm_jax.plan.hlo import checks, hlo_text
from mllm_jax.plan.hlo.jaxpr import operations, products, unknown_loops
from mllm_jax.sharding.mesh import make_mesh


def test_warns_of_gathers_that_add_zeros():
    text = """HloModule a_step

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

ENTRY %main (own: f32[256,1024]) -> f32[1024,1024] {
  %own = f32[256,1024]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %nothing = f32[] constant(0)
  %zeros = f32[1024,1024]{1,0} broadcast(%nothing), dimensions={}
  %placed = f32[1024,1024]{1,0} dynamic-update-slice(%zeros, %own, %zero, %zero)
  %moved = f32[1024,1024]{0,1} copy(%placed)
  ROOT %all-reduce = f32[1024,1024]{0,1} all-reduce(%moved), channel_id=1, replica_groups={}, to_apply=%add
}
"""
    (warning,) = checks.replaced_gathers(hlo_text.parse(text))
    assert warning.startswith("all-reduce for all-gather: 4 MiB")
    assert not list(checks.replaced_gathers(hlo_text.parse(text.replace("copy(%placed)", "copy(%zeros)"))))


def test_warns_of_gradients_that_are_summed_whole():
    """Two gradients are summed together; a device keeps a shard of one. The program is written as a TPU's."""
    text = """HloModule a_step

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%x, %y)
}

%own (p: s32[], q: bf16[4096,1024]) -> f32[1024,1024] {
  %p = s32[] parameter(0)
  %q = bf16[4096,1024]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %part = bf16[1024,1024]{1,0} dynamic-slice(%q, %p, %zero), dynamic_slice_sizes={1024,1024}
  ROOT %exact = f32[1024,1024]{1,0} convert(%part)
}

%less (c: (s32[], bf16[4096,1024], bf16[64,1024])) -> pred[] {
  %c = (s32[], bf16[4096,1024]{1,0}, bf16[64,1024]{1,0}) parameter(0)
  %count = s32[] get-tuple-element(%c), index=0
  %three = s32[] constant(3)
  ROOT %lt = pred[] compare(%count, %three), direction=LT
}

%layer (carry: (s32[], bf16[4096,1024], bf16[64,1024])) -> (s32[], bf16[4096,1024], bf16[64,1024]) {
  %carry = (s32[], bf16[4096,1024]{1,0}, bf16[64,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %g = bf16[4096,1024]{1,0} get-tuple-element(%carry), index=1
  %h = bf16[64,1024]{1,0} get-tuple-element(%carry), index=2
  %sums = (bf16[4096,1024]{1,0}, bf16[64,1024]{1,0}) all-reduce(%g, %h), channel_id=1, replica_groups={}, to_apply=%add
  %large = bf16[4096,1024]{1,0} get-tuple-element(%sums), index=0
  %small = bf16[64,1024]{1,0} get-tuple-element(%sums), index=1
  %moved = bf16[4096,1024]{0,1} copy(%large)
  %kept = f32[1024,1024]{1,0} fusion(%i, %moved), kind=kLoop, calls=%own
  ROOT %next = (s32[], bf16[4096,1024]{1,0}, bf16[64,1024]{1,0}) tuple(%i, %g, %small)
}

ENTRY %main (a: bf16[4096,1024], b: bf16[64,1024]) -> bf16[64,1024] {
  %a = bf16[4096,1024]{1,0} parameter(0)
  %b = bf16[64,1024]{1,0} parameter(1)
  %none = s32[] constant(0)
  %first = (s32[], bf16[4096,1024]{1,0}, bf16[64,1024]{1,0}) tuple(%none, %a, %b)
  %loop = (s32[], bf16[4096,1024]{1,0}, bf16[64,1024]{1,0}) while(%first), condition=%less, body=%layer
  ROOT %out = bf16[64,1024]{1,0} get-tuple-element(%loop), index=2
}
"""
    (warning,) = checks.replaced_scatters("tpu", hlo_text.parse(text))
    assert warning.startswith("all-reduce for reduce-scatter: 24 MiB")  # three times 4096 x 1024 x 2 bytes
    assert not list(checks.replaced_scatters("cpu", hlo_text.parse(text)))
    whole = text.replace("tuple(%i, %g, %small)", "tuple(%i, %large, %small)")
    assert not list(checks.replaced_scatters("tpu", hlo_text.parse(whole)))


def test_warns_of_a_head_in_every_chunk():
    """A loss whose table is gathered in its loop, against ours, whose table is gathered before."""
    run, mesh = tiny(), make_mesh({"fsdp": 8})
    table = abstract_params(run.model)["decoder"]["head"]["w"]

    def chunks(hidden, table):
        def chunk(i, total):
            return total + jnp.sum(
                jax.lax.with_sharding_constraint(jnp.tanh(table * i), NamedSharding(mesh, P())) @ hidden
            )

        with expect_runs(3):
            return jax.lax.fori_loop(0, jnp.int32(hidden[0]), chunk, 0.0)

    step = lambda hidden, table: jax.value_and_grad(lambda x: x * chunks(hidden, table))(1.0)
    arguments = ((table.shape[1],), P()), (table.shape, P("fsdp"))
    found = list(checks.head_exchanges(run, hlo_text.parse(compiled_text(step, mesh, *arguments)), mesh))
    assert len(found) == 1 and found[0].startswith("head in every chunk: all-gather")


def test_warns_of_dense_gradients_of_experts():
    x, w = jnp.zeros((32, 8)), jnp.zeros((4, 8, 6))
    sizes = jnp.full(4, 8, jnp.int32)
    forward = list(operations(jax.make_jaxpr(jax.lax.ragged_dot)(x, w, sizes)))
    loss = lambda x, w: jax.lax.ragged_dot(x, w, sizes).sum()
    both = list(operations(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, w)))
    count = lambda platform, steps: len(list(checks.dense_expert_gradients(platform, steps)))
    assert (count("tpu", forward), count("tpu", both)) == (0, 1)
    assert (count("gpu", forward), count("cpu", both)) == (1, 0)
    assert sum(x.flops for x in products(forward)) == 2 * 32 * 8 * 6
    assert sum(x.flops for x in products(both)) == 3 * 2 * 32 * 8 * 6


def traced_attention(platform, length, **runtime):
    q, k = (jax.ShapeDtypeStruct((1, length, n, 64), jnp.bfloat16) for n in (4, 2))
    segment = jax.ShapeDtypeStruct((1, length), jnp.int32)
    runtime = Runtime(dtype="bfloat16", **runtime)

    def run(q, k, v, segment):
        with jax.named_scope("decoder/layers/attention"):
            return attend(q, k, v, q_segment=segment, kv_segment=segment, causal=True, runtime=runtime)

    with targeting(Topology(platform, platform, tuple(jax.devices()))):
        return list(operations(jax.make_jaxpr(run)(q, k, k, segment)))


def test_warns_of_attention_that_is_not_the_kernels():
    kernel, plain = traced_attention("tpu", 1024), traced_attention("tpu", 1000)
    assert not list(checks.attention_on_xla("tpu", kernel)) and not list(checks.attention_on_xla("cpu", plain))
    found = set(checks.attention_on_xla("tpu", plain))
    assert len(found) == 1 and found.pop().startswith(
        "attention on XLA: decoder/layers/attention does not run in splash"
    )


def test_warns_of_masks_of_all_pairs():
    dense = traced_attention("gpu", 1024)
    assert all(x.startswith("dense mask: decoder/layers/attention makes bool[") for x in checks.dense_masks(dense))
    assert list(checks.dense_masks(dense)) and not list(checks.attention_on_xla("gpu", dense))
    assert not list(checks.dense_masks(traced_attention("tpu", 1024)))


def test_warns_of_loops_that_nobody_knows_the_length_of():
    loop = lambda x, n: jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)
    known = lambda x, n: expect_runs(5)(loop)(x, n)
    x, n = jnp.zeros((4, 4)), jnp.int32(3)
    for step, runs, unknown in ((loop, 1, 1), (known, 5, 0)):
        steps = list(operations(jax.make_jaxpr(step)(x, n)))
        assert len(unknown_loops(steps)) == unknown
        assert sum(x.flops for x in products(steps)) == runs * 2 * 4**3
