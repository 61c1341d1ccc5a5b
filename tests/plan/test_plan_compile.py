"""Planning a step: what is read from a text, counted in a trace and warned of equals what is known beforehand."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from paths import HELPERS
from planned_run import compiled_text, tiny

from mllm_jax.common.config import ConfigError
from mllm_jax.data.pipeline.packing import collate
from mllm_jax.model.vlm import abstract_params
from mllm_jax.nn.attention.attend import attend
from mllm_jax.nn.moe.layer import MoeConfig
from mllm_jax.nn.runtime import Runtime, expect_runs
from mllm_jax.plan.compile import Collective, abstract_step, argument_groups, collectives, plan_step
from mllm_jax.plan.hardware.topology import Topology, get_topology, targeting
from mllm_jax.plan.hlo import hlo_text
from mllm_jax.plan.hlo.jaxpr import operations, place, products, unknown_loops
from mllm_jax.plan.hlo.replica_groups import axes_of
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.input.pipeline import Placer
from mllm_jax.train.runs.config import train_context
from mllm_jax.train.step.batches import batch_shardings
from mllm_jax.train.step.compiler import ASYNC_GATHERS, compiler_options

MESH = {"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2}

# A loop of three, whose condition is given its bound in a tuple; parts of one collective in two fusions; attributes
# over several lines; a reduce-scatter as TPU programs write it; a branch; a collective that starts and is done.
TEXT = """HloModule a_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

FileNames
1 "step.py"

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%part_one (p: f32[2]) -> f32[8] {
  %p = f32[2]{0} parameter(0)
  ROOT %gather.1 = f32[8]{0:T(256)} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}

%part_two (q: f32[2]) -> f32[8] {
  %q = f32[2]{0} parameter(0)
  ROOT %gather.2 = f32[8]{0:T(256)} all-gather(%q), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}

%all-reduce-scatter.1 (r: f32[8]) -> f32[2] {
  %r = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %whole = f32[8]{0} all-reduce(%r), channel_id=8, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %own = f32[2]{0} dynamic-slice(%whole, %zero), dynamic_slice_sizes={2}
}

%wrapped (w: f32[8]) -> f32[8] {
  %w = f32[8]{0} parameter(0)
  ROOT %swap = f32[8]{0} all-to-all(%w), channel_id=9, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}

%elsewhere (e: f32[8]) -> f32[8] {
  %e = f32[8]{0} parameter(0)
  ROOT %every = f32[8]{0} all-reduce(%e), channel_id=12, replica_groups={}, to_apply=%add
}, execution_thread="sparsecore"

%less (pair: (s32[], s32[])) -> pred[] {
  %pair = (s32[], s32[]) parameter(0)
  %count = s32[] get-tuple-element(%pair), index=0
  %bound = s32[] get-tuple-element(%pair), index=1
  ROOT %lt = pred[] compare(%count, %bound), direction=LT
}

%body (carry: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {
  %carry = (s32[], s32[], f32[8]{0:T(256)}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %n = s32[] get-tuple-element(%carry), index=1
  %v = f32[8]{0} get-tuple-element(%carry), index=2
  %slice.1 = f32[2]{0} slice(%v), slice={[0:2]}
  %fusion.1 = f32[8]{0} fusion(%slice.1), kind=kLoop, calls=%part_one
  %fusion.2 = f32[8]{0} fusion(%slice.1), kind=kLoop, calls=%part_two, backend_config={"a":{"b":"c
  }}, metadata={op_name="jit(step)/jvp(VLM)/decoder/while/body/closed_call/layers.body/layers/mlp/up/dot_general"}
  %fusion.3 = f32[2]{0} fusion(%fusion.2), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = (s32[], s32[], f32[8]{0}) tuple(%i, %n, %fusion.2)
}

%left (l: f32[8]) -> f32[8] {
  ROOT %l = f32[8]{0} parameter(0)
}

%right (m: f32[8]) -> f32[8] {
  %m = f32[8]{0} parameter(0)
  ROOT %ring = f32[8]{0} collective-permute(%m), channel_id=10, source_target_pairs={{0,2},{2,4},{4,6},{6,0}}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %zero.1 = s32[] constant(0)
  %three = s32[] constant(3)
  %first = (s32[], s32[], f32[8]{0}) tuple(%zero.1, %three, %a)
  %loop = (s32[], s32[], /*index=2*/f32[8]{0}) while(%first), condition=%less, body=%body
  %out = f32[8]{0} get-tuple-element(%loop), index=2
  %begun = ((f32[8]{0}), f32[8]{0}, u32[]) async-start(%out), calls=%wrapped
  %done = f32[8]{0} async-done(%begun), calls=%wrapped
  %start = (f32[8]{0}, f32[8,8]{1,0:T(8,128)}) all-gather-start(%done), channel_id=11, replica_groups={}, dimensions={0}
  %gathered = f32[8,8]{1,0:T(8,128)} all-gather-done(%start)
  %begun.2 = ((f32[8,8]{1,0}), f32[4,8]{1,0}, u32[]) reduce-scatter-start(%gathered), replica_groups=[4,2]<=[8]
  %half = f32[4,8]{1,0} reduce-scatter-done(%begun.2)
  %call = ((f32[8]{0}), f32[8]{0}, u32[]) call-start(%done), async_execution_thread="sparsecore", to_apply=%elsewhere
  %called = f32[8]{0} call-done(%call)
  %ragged = f32[8]{0} ragged-all-to-all(%done, %called), channel_id=13, replica_groups={{0,1},{2,3},{4,5},{6,7}},
    metadata={op_name="jit(step)/jvp(VLM)/decoder/layers/mlp/experts/share_0.25/ragged_all_to_all"}
  %token = token[] after-all()
  %receive = (f32[4,8]{1,0}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true,
    frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  %big = bf16[4,8,16]{2,1,0:T(8,128)(2,1)S(1)} custom-call(%gathered), custom_call_target="fast", metadata={op_name="a"}
  %large = bf16[4,8,16]{2,1,0} custom-call(%big), custom_call_target="slow", metadata={op_name="jit(step)/jvp()/while"}
  ROOT %choice = f32[8]{0} conditional(%zero.1, %out, %out), branch_computations={%left, %right}
}
"""


def test_collectives_of_a_text():
    program = hlo_text.parse(TEXT)
    found = [(x.kind, x.runs, x.bytes, axes_of(x.instruction, MESH, ("data",))) for x in hlo_text.transfers(program)]
    assert sorted(found) == [
        ("all-gather", 1, 256, ("fsdp", "tensor")),
        ("all-gather", 3, 32, ("fsdp",)),  # once, of its two parts
        ("all-reduce", 1, 32, ("fsdp", "tensor")),
        ("all-reduce", 1, 128, ("data",)),  # between slices
        ("all-to-all", 1, 32, ("tensor",)),
        ("collective-permute", 1, 32, ("fsdp",)),
        ("ragged-all-to-all", 1, 8, ("tensor",)),  # of which a quarter is filled
        ("reduce-scatter", 1, 128, ("tensor",)),
        ("reduce-scatter", 3, 8, ("fsdp",)),
    ]


def test_arrays_of_a_text():
    """Leaves out arrays in other memory spaces and inside fusions."""
    program = hlo_text.parse(TEXT)
    (shape, scope, size), (second, where, _) = hlo_text.largest_arrays(program, 2)
    assert (shape, scope, size) == ("bf16[4,8,16]", "jit(step)/jvp()/while", 1024)
    assert second == "f32[8]" and place(where) == "decoder/layers/mlp/up/dot_general"


@pytest.mark.parametrize(
    "attributes, axes",
    {
        "replica_groups={{0,2,4,6},{1,3,5,7}}": ("fsdp",),
        "replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add": ("tensor",),
        "replica_groups={}": ("fsdp", "tensor"),
        "replica_groups=[4,2]<=[8]": ("tensor",),
        "replica_groups=[2,4]<=[4,2]T(1,0)": ("fsdp",),
        "replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2] {'axis_1'}, dimensions={1}": ("fsdp",),
        "replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2] {'axis_1','axis_2'}": ("fsdp", "tensor"),
        "replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}": ("fsdp",),
        "replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=(0,2,4,6,1,3,5,7) {'axis_0'}": ("tensor",),
        "replica_groups=mesh['axis_0'=8] {'axis_0':(1)4}": ("fsdp",),
        "replica_groups=mesh['axis_0'=8] {'axis_0':(4)2}, use_global_device_ids=true": ("tensor",),
        "replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}": ("fsdp", "tensor"),
        "channel_id=1, source_target_pairs={{0,2},{2,4},{4,6},{6,0}}": ("fsdp",),
    }.items(),
    ids=str,
)
def test_axes_that_a_collective_joins(attributes, axes):
    instruction = hlo_text.Instruction("x", "all-reduce", "f32[8]", (), f", {attributes}", False)
    assert axes_of(instruction, MESH) == axes


def test_a_text_that_is_none():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo_text.parse("nothing")


def test_collectives_of_a_compiled_program():
    """Each is written by hand, in and out of loops, so that its bytes are known: a float is four."""
    mesh = make_mesh({"fsdp": 4, "tensor": 2})

    def local(x, w):  # [16 64], [5 8 64] on each device
        def layer(x, w):
            whole = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)  # [32 64]
            x = jnp.tanh(x @ whole.T) @ whole
            return jax.lax.psum(x, "tensor"), None  # [16 64]

        x, _ = jax.lax.scan(layer, x, w)
        x = jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True)
        x = jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)])
        return x + jax.lax.psum(jnp.max(x, axis=0), ("fsdp", "tensor"))  # [64]

    step = jax.shard_map(local, mesh=mesh, in_specs=(P("fsdp"), P(None, "fsdp")), out_specs=P("fsdp"), check_vma=False)
    text = compiled_text(step, mesh, ((64, 64), P("fsdp")), ((5, 32, 64), P(None, "fsdp")))
    assert set(collectives(hlo_text.parse(text), mesh)) == {
        Collective("all-gather", ("fsdp",), 5, 5 * 32 * 64 * 4),
        Collective("all-reduce", ("tensor",), 5, 5 * 16 * 64 * 4),
        Collective("all-to-all", ("fsdp",), 1, 16 * 64 * 4),
        Collective("collective-permute", ("tensor",), 1, 16 * 64 * 4),
        Collective("all-reduce", ("fsdp", "tensor"), 1, 64 * 4),
    }


def test_a_loop_whose_length_is_data_says_how_long_it_is():
    mesh = make_mesh({"fsdp": 8})

    def step(x, count):
        with expect_runs(6):
            return jax.lax.fori_loop(0, jnp.sum(count).astype(int), lambda i, x: jax.lax.psum(jnp.sin(x), "fsdp"), x)

    step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    found = collectives(hlo_text.parse(compiled_text(step, mesh, ((32,), P()), ((3,), P()))), mesh)
    assert found == (Collective("all-reduce", ("fsdp",), 6, 6 * 32 * 4),)


# FLOPs


def counted(run, platform, shape):
    """{part: (FLOPs on all devices, recomputed)} of the traced step, as a platform would trace it."""
    topology = Topology(platform, platform, tuple(jax.devices()))
    with targeting(topology):
        step, state, batch = abstract_step(run, make_mesh(shape))
        steps = list(operations(step.trace(state, batch).jaxpr))
    assert unknown_loops(steps) == []
    total = {}
    for product in products(steps):
        before = total.get(product.part, (0, 0))
        total[product.part] = (before[0] + product.flops, before[1] + product.recomputed)
    return total


def test_flops_of_a_dense_model_equal_a_hand_count():
    """A product costs twice its sizes; backward costs it twice more, but for the pixels' gradient. Plain attention on a
    CPU works on all pairs. What full rematerialization repeats is a layer without its last product."""
    run, rows = tiny(remat="full"), 8
    encoder, decoder, data = run.model.encoder, run.model.decoder, run.data
    patches, tokens = rows * data.patch_rows * data.patches_per_row, rows * data.tokens
    width, mlp = encoder.width, encoder.mlp
    embed = patches * encoder.patch_values * width
    layer = patches * (4 * width * width + 2 * width * mlp + 2 * data.patches_per_row * width)
    own = {"encoder": (2 * (3 * layer - embed + 3 * embed), 2 * (layer - patches * width * mlp))}
    assert encoder.layers == 1
    joined, merged = 4 * width, patches // 4
    connector = 2 * merged * (joined * joined + joined * decoder.width)  # the last layer's, and one tap's
    own["connector"] = (2 * 3 * connector, 0)
    wide, heads = decoder.width, decoder.attention.heads * decoder.attention.head_dim
    kv = decoder.attention.kv_heads * decoder.attention.head_dim
    layer = tokens * (2 * wide * heads + 2 * wide * kv + 3 * wide * decoder.mlp + 2 * data.tokens * heads)
    own["decoder"] = (2 * 2 * 3 * layer, 2 * 2 * (layer - tokens * wide * decoder.mlp))
    own["head"] = (2 * 3 * tokens * wide * decoder.vocab, 0)
    found = counted(run, "cpu", {"fsdp": 4, "tensor": 2})
    again = found["encoder"][1], found["decoder"][1]
    assert {part: flops - repeated for part, (flops, repeated) in found.items()} == pytest.approx(
        {part: flops for part, (flops, _) in own.items()}, rel=1e-3
    )
    assert again == pytest.approx((own["encoder"][1], own["decoder"][1]), rel=1e-3)


@pytest.mark.parametrize("shape", [{"fsdp": 2, "expert": 4}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_flops_of_experts_equal_a_hand_count(shape):
    """Traces for a TPU, with kernels for attention and experts. Every token goes to two experts, wherever they are."""
    run = tiny()
    moe = MoeConfig(experts=8, top_k=2, mlp=256)  # 128 of it, which TPUs have lanes for, on a device
    attention = dataclasses.replace(run.model.decoder.attention, heads=4)
    decoder = dataclasses.replace(run.model.decoder, moe=moe, width=128, attention=attention)
    data = dataclasses.replace(run.data, tokens=512, text_only=True)
    model = dataclasses.replace(run.model, decoder=decoder)
    run = dataclasses.replace(run, model=model, data=data)
    tokens, layers, heads = 8 * 512, decoder.layers, attention.heads * attention.head_dim
    found = counted(run, "tpu", shape)
    mixing = tokens * moe.top_k * decoder.width * shape.get("tensor", 1)  # of a token's experts' results, everywhere
    assert found["experts"][0] == pytest.approx(
        2 * 3 * layers * (tokens * moe.top_k * 3 * decoder.width * moe.mlp + mixing), rel=1e-3
    )
    kv = attention.kv_heads * attention.head_dim
    weights = decoder.width * (2 * heads + 2 * kv + moe.experts)  # of attention, and of the router
    pairs = tokens * 512  # one block: causality leaves nothing out
    scores, along = 2 * pairs * heads, tokens * heads  # of queries with keys or weights with values; of do with o
    kernel = {"new": 2 + 4, "again": 3}  # products of that size
    new = layers * (2 * 3 * tokens * weights + kernel["new"] * scores + 2 * along)
    flops, again = found["decoder"]
    assert again == pytest.approx(layers * kernel["again"] * scores, rel=1e-3)
    assert flops - again == pytest.approx(new, rel=1e-3)


def test_causal_attention_leaves_blocks_out():
    """Ten of 4 x 4 blocks are computed; a conversation's causal half of the pairs is eight of them."""
    q, k = (jax.ShapeDtypeStruct((1, 2048, n, 64), jnp.bfloat16) for n in (4, 2))
    segment = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    runtime = Runtime(dtype="bfloat16", attention="splash")
    for causal, share in ((True, 10 / 16), (False, 1)):
        run = partial(attend, causal=causal, runtime=runtime)
        loss = lambda q, k, v, s, run=run: run(q, k, v, q_segment=s, kv_segment=s).astype(jnp.float32).sum()
        steps = list(operations(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, k, segment)))
        kernels = [x for x in steps if x.equation.primitive.name == "pallas_call"]
        one = 2 * 4 * 2048 * 2048 * 64 * share
        assert sorted(x.flops / one for x in products(kernels)) == [2, 3, 4]


# The plan of a whole step


@pytest.fixture(scope="module")
def planned():
    return plan_step(tiny(), get_topology("cpu:8"), {"fsdp": 4, "tensor": 2})


def real_bytes(run, shape):
    """Bytes of the state and a batch on the first device, placed as the training loop does."""
    mesh, model = make_mesh(shape), run.model
    context = train_context(run, mesh)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), context.state)
    state = jax.device_put(state, context.state_shardings)
    rows = collate([[]] * run.data.batch, run.data.budget, merge=model.merge, values=model.patch_values)
    batch = Placer(run.data.batch, partial(batch_shardings, mesh=mesh, rules=model.runtime.rules))(rows)
    first = [shard.data for x in jax.tree.leaves((state, batch)) for shard in x.addressable_shards]
    return sum(x.nbytes for x in first if x.devices() == {jax.devices()[0]})


def test_arguments_are_as_large_as_they_really_are(planned):
    assert planned.arguments == real_bytes(tiny(), {"fsdp": 4, "tensor": 2})


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "context": 2}], ids=str)
def test_groups_of_arguments_add_up(shape):
    run = tiny()
    _, state, batch = abstract_step(run, make_mesh(shape))
    assert sum(argument_groups(state, batch).values()) == real_bytes(run, shape)


def test_the_plan_of_a_step(planned):
    assert planned.mesh == MESH and planned.devices == 8 and planned.device_kind == "cpu"
    assert planned.peak == planned.arguments + planned.temporaries and planned.temporaries > 0
    assert sum(planned.flops.values()) > planned.useful > 0 and planned.recomputed == 0
    sizes = [size for _, size in planned.largest]
    assert sizes == sorted(sizes, reverse=True) and "batch" in dict(planned.largest)
    kinds = {collective.kind for collective in planned.collectives}
    assert kinds >= {"all-gather", "all-reduce"}
    gathered = sum(x.bytes for x in planned.collectives if x.kind == "all-gather" and x.axes == ("fsdp",))
    weights = sum(x.size for x in jax.tree.leaves(abstract_params(tiny().model)))
    assert gathered > 4 * weights / 2  # every weight at least once, a half of most of them
    assert planned.warnings == ()
    assert planned.compile_seconds > 0 and planned.host_bytes > 2**26


# Accelerators that are not there


def ahead_of_time(topology, mesh, *kind):
    script = HELPERS / "plan_ahead_of_time.py"
    run = subprocess.run([sys.executable, script, topology, json.dumps(mesh), *kind], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def check_fsdp(report, excess=0.0):
    """Gathers are of two-byte weights, once forward and once backward, and of tables once; there are no others."""
    assert report["warnings"] == []
    sums = {x["kind"]: x["bytes"] for x in report["collectives"]}
    theory = 2 * (2 * report["layers"] + report["tables"])
    assert theory <= sums["all-gather"] <= theory * (1 + excess)
    assert all(x["axes"] == ["fsdp"] for x in report["collectives"])
    assert report["peak"] > report["arguments"] > 0 and report["recomputed"] > 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (pip install -e '.[plan]')")
def test_plans_a_tpu():
    report = ahead_of_time("v5p:2x2x1", {"fsdp": 4})
    assert report["device_kind"] == "TPU v5" and report["devices"] == 4
    names = {warning.split(":")[0] for warning in report["warnings"]}
    assert names == {"all-reduce for reduce-scatter"}  # XLA's choice on a torus, without options that may hang
    check_fsdp(report | {"warnings": []}, excess=0.1)  # the compiler gathers two weights of attention a third time


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (pip install -e '.[plan]')")
def test_a_quick_look_gathers_tables_as_they_are_used():
    """Gathers tables in two bytes.

    Low effort moves no cast before a gather, so the program states that of the tables.
    """
    report = ahead_of_time("v6e:2x2", {"fsdp": 4}, "quick")
    gathered = sum(x["bytes"] for x in report["collectives"] if x["kind"] == "all-gather")
    theory = 2 * (2 * report["layers"] + report["tables"])
    assert theory <= gathered < theory + 2 * report["tables"]  # that it would be more, if they had four


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (pip install -e '.[plan]')")
def test_a_tpu_compiles_adapters_of_experts():
    """Whose rank is narrower than what its registers hold."""
    report = ahead_of_time("v5p:2x2x1", {"fsdp": 2, "expert": 2}, "experts", "adapters")
    assert report["devices"] == 4 and report["peak"] > report["arguments"] > 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (pip install -e '.[plan]')")
def test_a_tpu_exchanges_the_tokens_that_there_are():
    """There and back, forward, recomputed and backward, two choices of every token, in each of three layers."""
    report = ahead_of_time("v5p:2x2x1", {"fsdp": 2, "expert": 2}, "experts")
    (ragged,) = (x for x in report["collectives"] if x["kind"] == "ragged-all-to-all")
    assert ragged["axes"] == ["expert"] and ragged["runs"] == 3 * 6
    assert ragged["bytes"] == pytest.approx(3 * 6 * (8 // 4) * 1024 * 2 * 512 * 2)
    assert report["peak"] > report["arguments"] > 0


CUDA = importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13")


@pytest.mark.slow
@pytest.mark.skipif(CUDA is None, reason="needs the CUDA plugin (pip install -e '.[cuda]')")
def test_plans_a_gpu():
    report = ahead_of_time("h200:8", {"fsdp": 8})
    assert report["device_kind"] == "NVIDIA H200" and report["devices"] == 8
    names = {warning.split(":")[0] for warning in report["warnings"]}
    assert names == {"dense mask"}  # cuDNN's public interface knows no segments
    check_fsdp(report | {"warnings": []})


# Errors


@pytest.mark.parametrize(
    "name",
    [
        "v5p",
        "v9:2x2",
        "h200",
        "h200:many",
        "h200:12",
        "h100:8*2",
        "cpu:0x2",
        "v5p:2x2x1*none",
        "v6e:2x2x2",
        "cpu:4096",
        "v6e:3x3",
        "v6e:1x2",
        "v6e:0x2",
        "v6e:2xa",
        "v5p:1x1x1",
        "",
    ],
)
def test_topologies_that_do_not_exist(name):
    jax.devices()  # jax has begun with eight; before, it makes as many of a CPU as are wanted
    with pytest.raises(ConfigError):
        get_topology(name)


@pytest.mark.parametrize(
    "mesh, message", [({"fsdp": 3}, "does not cover 8 devices"), ({"rows": 8}, "unknown mesh axes"),
                      ({"fsdp": 4, "tensor": 2, "stage": 1}, "reserved")],
)  # fmt: skip
def test_meshes_that_do_not_fit(mesh, message):
    with pytest.raises(ConfigError, match=message):
        plan_step(tiny(), get_topology("cpu:8"), mesh)


def test_batches_that_do_not_divide():
    run = tiny()
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, batch=6))
    with pytest.raises(ConfigError, match="cpu:8: .*batch"):
        plan_step(run, get_topology("cpu:8"), {"fsdp": 8})


def test_only_a_tpu_that_is_asked_to_gathers_by_options():
    assert set(compiler_options("tpu", True)) == set(ASYNC_GATHERS)
    assert not (compiler_options("tpu", False) or compiler_options("gpu", True) or compiler_options("cpu", True))


def test_what_the_step_tells_its_compiler_is_planned_too(monkeypatch):
    """One that there is not: the planner hears of it from the compiler."""
    told = lambda platform, wanted: {f"{platform}_option": "true"} if wanted else {}
    monkeypatch.setattr("mllm_jax.train.step.train_step.compiler_options", told)
    run = tiny()
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, async_gathers=True))
    with pytest.raises(ConfigError, match="the compiler for cpu:8 refuses the step: .*cpu_option"):
        plan_step(run, get_topology("cpu:8"), {"fsdp": 8})
