"""Context parallelism: attention over tokens sharded on several devices, by ring and all-to-all, equals one
device's."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import VALUES, random_example, tiny_config
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mllm_jax.data.pipeline.packing import Budget, collate
from mllm_jax.model.vlm import VLM, abstract_boxed, init_params
from mllm_jax.nn.attention import flash
from mllm_jax.nn.attention.attend import attend
from mllm_jax.nn.attention.context_parallel import exchange_for
from mllm_jax.nn.attention.masks import KeyBounds, QueryBounds
from mllm_jax.nn.runtime import Runtime
from mllm_jax.sharding.activations import shard
from mllm_jax.sharding.logical_axes import freeze_rules
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.sharding.presets import LOGICAL_AXIS_RULES
from mllm_jax.sharding.weights import shardings
from mllm_jax.train.losses.cross_entropy import token_loss
from mllm_jax.train.step.batches import batch_shardings
from mllm_jax.train.step.forward import loss_sum

HEADS, HEAD_DIM, LENGTH = 4, 8, 40
ALONE = Runtime()


def rows_of_segments(lengths, total=LENGTH):
    """i32[rows total]: conversations of the given lengths one after another, then padding."""
    rows = [np.repeat(np.arange(len(row)) + 1, row) for row in lengths]
    return np.stack([np.pad(row, (0, total - len(row))) for row in rows]).astype(np.int32)


SEGMENTS = {
    "packed": rows_of_segments([[3, 11, 1, 20], [40], [17, 17], [5]]),
    "odd": np.random.default_rng(0).integers(0, 4, (4, LENGTH)).astype(np.int32),
}


def random_inputs(kv_heads, value_dim=HEAD_DIM, rows=4):
    """q, k, v, and what to multiply the result by."""
    rng = np.random.default_rng(kv_heads)
    shapes = (HEADS, HEAD_DIM), (kv_heads, HEAD_DIM), (kv_heads, value_dim), (HEADS, value_dim)
    return [rng.standard_normal((rows, LENGTH, *shape)).astype(np.float32) for shape in shapes]


@partial(jax.jit, static_argnames=("causal", "runtime", "window", "softcap"))
def value_and_gradients(q, k, v, target, segment, causal, runtime=ALONE, prefix=None, **kind):
    """Attention, and the gradients of its product with `target`, both where there is no padding."""

    def loss(q, k, v):
        out = attend(
            q, k, v, q_segment=segment, kv_segment=segment, causal=causal, runtime=runtime, prefix=prefix, **kind
        )
        out = jnp.where((segment > 0)[..., None, None], out, 0)
        return jnp.sum(out * target), out

    gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


def assert_close(got, wanted, tolerance=1e-5):
    """Relative to the largest value of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Each device then has several, of which the last is not full."""
    monkeypatch.setattr(flash, "BLOCK", 3)


CASES = [
    (1, HEAD_DIM, True, {"fsdp": 2, "context": 4}),
    (2, HEAD_DIM, True, {"fsdp": 2, "context": 4}),
    (4, 12, True, {"fsdp": 2, "context": 4}),
    (2, HEAD_DIM, False, {"fsdp": 2, "context": 4}),
    (1, HEAD_DIM, True, {"fsdp": 2, "context": 2, "tensor": 2}),
]


@pytest.mark.parametrize("kv_heads, value_dim, causal, mesh", CASES, ids=str)
@pytest.mark.parametrize("exchange", ["ring", "ulysses"])
def test_tokens_on_several_devices(exchange, kv_heads, value_dim, causal, mesh):
    inputs = random_inputs(kv_heads, value_dim)
    for segment in SEGMENTS.values():
        alone = value_and_gradients(*inputs, segment, causal=causal)
        with jax.set_mesh(make_mesh(mesh)):
            spread = value_and_gradients(*inputs, segment, causal=causal, runtime=Runtime(context=exchange))
        assert_close(spread, alone)


@pytest.mark.parametrize("exchange", ["ring", "ulysses"])
def test_windows_and_prefixes_on_several_devices(exchange):
    inputs, segment = random_inputs(2), SEGMENTS["packed"]
    starts = np.array([np.argmax(row == number) for row in segment for number in row]).reshape(segment.shape)
    prefix = (segment > 0) & (np.arange(LENGTH) - starts < 8)
    for kind in (dict(window=6, softcap=3.0), dict(window=6, prefix=prefix), dict(prefix=prefix)):
        alone = value_and_gradients(*inputs, segment, causal=True, **kind)
        with jax.set_mesh(make_mesh({"fsdp": 2, "context": 4})):
            spread = value_and_gradients(*inputs, segment, causal=True, runtime=Runtime(context=exchange), **kind)
        assert_close(spread, alone)


def test_which_exchange():
    heads_of = lambda heads, kv_heads, devices: exchange_for(heads, kv_heads, devices, "auto")
    assert heads_of(32, 8, 8) == heads_of(32, 8, 16) == heads_of(8, 1, 4) == "ulysses"
    assert heads_of(32, 8, 64) == heads_of(12, 12, 8) == heads_of(4, 3, 2) == "ring"
    with pytest.raises(ValueError, match="'ulysses': cannot shard 12 heads .12 of keys and values. over 8 devices"):
        exchange_for(12, 12, 8, "ulysses")


def test_a_causal_ring_gives_all_devices_the_same_work():
    """Counts the query blocks that meet key blocks in each turn of the ring."""
    devices, half = 4, 6

    def part(device):
        slot = np.concatenate([np.arange(half) + place * half for place in (device, 2 * devices - 1 - device)])[None]
        ones, block = np.ones((1, 2 * half), np.int32), np.zeros((1, 2 * half, 1, 1), np.float32)
        return flash._queries(block, QueryBounds(ones, None, slot), 1, 1.0), flash._keys(
            block, block, KeyBounds(ones, slot)
        )

    def work(queries, keys):
        first, last = flash._bounds(queries, keys, 1)
        return int(jnp.sum(last - first))

    parts = [part(device) for device in range(devices)]
    turns = [[work(parts[i][0], parts[(i - turn) % devices][1]) for i in range(devices)] for turn in range(devices)]
    assert turns == [[10] * devices, *[[8] * devices] * (devices - 1)]  # of 16


def rows_of_examples(rng, rows=4):
    """Conversations about images of several sizes, videos, and none."""
    contents = [[(9, (4, 6), (2, 2)), (5,)], [(17, (2, 2, 4)), (8, (2, 6))], [(30,)], [(6, (8, 8)), (4, (2, 2))]]
    examples = [[random_example(rng, text, *grids) for text, *grids in row] for row in contents[:rows]]
    return collate(examples, Budget(64, 2, 64), merge=2, values=VALUES)


@pytest.fixture(scope="module")
def params():
    params = jax.jit(partial(init_params, tiny_config()))(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 200))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)


@pytest.fixture(scope="module")
def batch():
    return rows_of_examples(np.random.default_rng(2))


def loss_and_gradients(config):
    return jax.jit(jax.value_and_grad(lambda params, batch: loss_sum(config, params, batch, chunk=16)[0]))


@pytest.fixture(scope="module")
def alone(params, batch):
    return loss_and_gradients(tiny_config())(params, batch)


@pytest.mark.parametrize("exchange", ["ring", "ulysses"])
def test_a_model_on_two_by_four_devices(params, batch, alone, exchange):
    """Images, M-RoPE and DeepStack: loss and gradients are those of one device."""
    config, mesh = tiny_config(context=exchange), make_mesh({"fsdp": 2, "context": 4})
    layout = shardings(abstract_boxed(config), mesh, config.runtime.rules)
    with jax.set_mesh(mesh):
        batch = jax.device_put(batch, batch_shardings(batch, mesh, config.runtime.rules))
        spread = loss_and_gradients(config)(jax.device_put(params, layout), batch)
    assert_close(spread, alone)


def test_images_are_spread_over_every_device(params, batch):
    """Each of eight devices does an eighth of the encoder's and the connector's work."""
    config = tiny_config(scan=False)
    encode = jax.jit(partial(VLM(config).apply, method="encode"))
    flops = lambda: encode.lower({"params": params}, batch.vision).compile().cost_analysis()["flops"]
    whole = flops()
    with jax.set_mesh(make_mesh({"fsdp": 2, "context": 2, "tensor": 2})):
        assert flops() < 1.1 * whole / 8


def test_the_loss_is_spread_over_every_device():
    """Each of eight devices does an eighth of the products with the head, and none waits for another in the loop."""
    rules, rng = freeze_rules(LOGICAL_AXIS_RULES), np.random.default_rng(0)
    hidden, table = (
        rng.standard_normal((4, 64, 32)).astype(np.float32),
        rng.standard_normal((96, 32)).astype(np.float32),
    )
    targets, weight = rng.integers(0, 96, (4, 64)), rng.random((4, 64)).astype(np.float32)

    def compiled(chunk):
        loss = jax.value_and_grad(lambda *args: token_loss(*args, chunk, "float32", rules), (0, 1))
        return jax.jit(loss).lower(hidden, table, targets, weight).compile()

    whole = compiled(32)
    with jax.set_mesh(make_mesh({"fsdp": 2, "context": 4})):
        spread = compiled(8)
    assert_close(spread(hidden, table, targets, weight), whole(hidden, table, targets, weight))
    assert spread.cost_analysis()["flops"] < 1.1 * whole.cost_analysis()["flops"] / 8
    bodies = [text for text in re.split(r"\n(?=%|ENTRY)", spread.as_text()) if not text.startswith("ENTRY")]
    assert not any(COLLECTIVE.search(text) for text in bodies)


COLLECTIVE = re.compile(r"= (.+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


@pytest.mark.parametrize("exchange", ["ring", "ulysses"])
def test_what_is_exchanged(exchange):
    """A ring passes keys and values on and gathers no sequence; Ulysses exchanges each of its four arrays once."""
    *inputs, segment = (*random_inputs(4), SEGMENTS["packed"])
    runtime = Runtime(context=exchange)
    forward = jax.jit(
        lambda q, k, v: attend(q, k, v, q_segment=segment, kv_segment=segment, causal=True, runtime=runtime)
    )
    with jax.set_mesh(make_mesh({"fsdp": 2, "context": 4})):
        place = lambda x: shard(x, ("batch", "length", None, None), runtime.rules)
        found = COLLECTIVE.findall(forward.lower(*map(jax.jit(place), inputs[:3])).compile().as_text())
    kinds = [kind for shape, kind in found if shape.startswith(("f32", "(f32"))]
    assert set(kinds) == {"collective-permute" if exchange == "ring" else "all-to-all"}
    assert exchange == "ring" or len(kinds) == 4


@pytest.mark.parametrize("exchange", ["ring", "ulysses"])
def test_explicit_axes(exchange):
    """Types that carry shardings, as `jax.make_mesh` gives by default, come out as they went in."""
    *inputs, _ = random_inputs(2)
    segment = SEGMENTS["packed"]
    mesh = make_mesh({"fsdp": 2, "context": 4})
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names))
    alone = attend(*inputs, q_segment=segment, kv_segment=segment, causal=False, runtime=Runtime())
    with jax.set_mesh(mesh):
        place = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp", "context")))
        spread = jax.jit(partial(attend, causal=False, runtime=Runtime(context=exchange)))
        out = spread(*map(place, inputs), q_segment=place(segment), kv_segment=place(segment))
    assert out.sharding.spec == PartitionSpec("fsdp", "context", None, None)
    assert_close(np.asarray(out)[segment > 0], np.asarray(alone)[segment > 0])
