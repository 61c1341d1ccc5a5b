"""Experts: every way of reaching them gives what a plain loop gives, on one device and on meshes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.nn.moe.all_to_all import all_to_all_for
from mllm_jax.nn.moe.dispatch import Experts, dispatch
from mllm_jax.nn.moe.grouped_matmul import grouped_matmul
from mllm_jax.nn.moe.layer import MoeConfig
from mllm_jax.nn.moe.router import route, summarize
from mllm_jax.nn.runtime import REMAT, Runtime
from mllm_jax.plan.hlo.jaxpr import operations, used_share
from mllm_jax.sharding.mesh import make_mesh

ROWS, LENGTH, WIDTH, COUNT, TOP, HIDDEN = 8, 8, 16, 8, 3, 12


def close(got, want, tolerance=1e-5):
    got, want = np.asarray(got), np.asarray(want)
    assert np.abs(want).max() > 0
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("sizes", [(3, 0, 7, 2), (0, 0, 0, 12), (1, 1, 1, 1), (20, 0, 21, 9)], ids=str)
def test_grouped_products_and_their_gradients(sizes):
    """Rows beyond the groups give and get nothing, whatever they hold."""
    rng, count = np.random.default_rng(0), sum(sizes)
    x = rng.standard_normal((50, 6)).astype(np.float32)
    x[count:] = np.nan
    w, d_y = rng.standard_normal((4, 6, 5)).astype(np.float32), rng.standard_normal((50, 5)).astype(np.float32)
    group = np.repeat(np.arange(4), sizes)
    product = lambda x, w: grouped_matmul(x, w, jnp.array(sizes, jnp.int32), "loop")
    y, pull = jax.vjp(product, x, w)
    d_x, d_w = pull(d_y)
    close(y[:count], np.einsum("nd,ndf->nf", x[:count], w[group]))
    close(d_x[:count], np.einsum("nf,ndf->nd", d_y[:count], w[group]))
    close(d_w, sum(np.eye(4)[g][:, None, None] * np.outer(x[i], d_y[i]) for i, g in enumerate(group)))
    assert not np.any(np.asarray(y)[count:]) and not np.any(np.asarray(d_x)[count:])


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    x, weights = normal(ROWS, LENGTH, WIDTH), rng.random((ROWS, LENGTH, TOP)).astype(np.float32)
    # Uneven: expert 0 is chosen by many, expert 5 by nobody.
    scores = normal(ROWS, LENGTH, COUNT) + np.array([2, 0, 0, 0, 0, -99, 0, 0])
    experts = np.argsort(-scores, axis=-1)[..., :TOP].astype(np.int32)
    real = np.arange(LENGTH) < np.array([[8], [5], [0], [7], [8], [1], [3], [8]])
    params = Experts(normal(COUNT, 2, WIDTH, HIDDEN) / 4, normal(COUNT, HIDDEN, WIDTH) / 4)
    return x, experts, weights, real, params


def by_hand(x, experts, weights, real, params):
    y = np.zeros_like(x)
    for row, t in np.argwhere(real):
        for expert, weight in zip(experts[row, t], weights[row, t]):
            gate, up = x[row, t] @ params.gate_up[expert]
            y[row, t] += weight * (gate / (1 + np.exp(-gate)) * up) @ params.down[expert]
    return y


def run(runtime, x, experts, weights, real, params, change=lambda params: params):
    """(y, dropped, gradients of x, weights and params), of experts with the weights `change(params)`."""
    target = np.random.default_rng(9).standard_normal(x.shape).astype(np.float32)

    @jax.jit
    def both(x, weights, params):
        def loss(x, weights, params):
            y, dropped = dispatch(x, experts, weights, real, change(params), jax.nn.silu, runtime)
            return jnp.sum(y * target), (y, dropped)

        gradients, (y, dropped) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, weights, params)
        return y, dropped, gradients

    return both(x, weights, params)


@pytest.fixture(scope="module")
def plain():
    return run(Runtime(moe_dispatch="dense"), *inputs())


def test_every_expert_on_every_token_is_the_plain_loop(plain):
    close(plain[0], by_hand(*inputs()))


@pytest.mark.parametrize("experts", ["dropless", "capacity"])
def test_ways_to_the_experts_are_equal(plain, experts):
    y, dropped, gradients = run(Runtime(moe_dispatch=experts), *inputs())
    close(y, plain[0])
    jax.tree.map(close, gradients, plain[2])
    assert not dropped.any()


@pytest.mark.parametrize(
    "mesh",
    [
        {"expert": 8},
        {"data": 2, "expert": 4},
        {"fsdp": 2, "expert": 2, "tensor": 2},
        {"expert": 2, "context": 4},
        {"fsdp": 4, "tensor": 2},
    ],
    ids=str,
)
def test_meshes_give_what_one_device_gives(plain, mesh):
    with jax.set_mesh(make_mesh(mesh)):
        y, dropped, gradients = run(Runtime(), *inputs())
    close(y, plain[0])
    jax.tree.map(close, gradients, plain[2])
    assert not np.asarray(dropped).any()


@pytest.fixture(scope="module")
def adapted():
    """Inputs whose experts have adapters, and what comes of them where these are merged."""
    *others, params = inputs()
    normal = lambda *shape: np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32) / 4
    low = 2  # rank, on which no mesh divides
    first = normal(COUNT, WIDTH, low), normal(COUNT, low, 2, HIDDEN)
    params = Experts(params.gate_up, params.down, first, (normal(COUNT, HIDDEN, low), normal(COUNT, low, WIDTH)))

    def merged(params):
        gate_up = params.gate_up + jnp.einsum("EDr,ErCF->ECDF", *params.gate_up_factors)
        return Experts(gate_up, params.down + jnp.einsum("EFr,ErD->EFD", *params.down_factors))

    return (*others, params), run(Runtime(moe_dispatch="dense"), *others, params, merged)


@pytest.mark.parametrize(
    ("experts", "mesh"),
    [
        ("capacity", {}),
        ("dropless", {"fsdp": 2, "expert": 2, "tensor": 2}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("dense", {}), ("dropless", {}), ("dropless", {"expert": 8}), ("dropless", {"fsdp": 8})]
        ),
    ],
    ids=str,
)
def test_adapters_of_experts_add_their_products(plain, adapted, experts, mesh):
    given, expected = adapted
    assert np.abs(expected[0] - plain[0]).max() > 0.1
    with jax.set_mesh(make_mesh(mesh, jax.devices()[: 8 if mesh else 1])):
        y, _, gradients = run(Runtime(moe_dispatch=experts), *given)
    close(y, expected[0])
    jax.tree.map(close, gradients, expected[2])


def test_rows_that_do_not_divide_are_on_all_devices():
    few = [part[:3] for part in inputs()[:4]] + [inputs()[4]]
    with jax.set_mesh(make_mesh({"data": 2, "expert": 4})):
        y, _, gradients = run(Runtime(), *few)
    plain = run(Runtime(moe_dispatch="dense"), *few)
    close(y, plain[0])
    jax.tree.map(close, gradients, plain[2])


def test_tokens_go_to_the_devices_of_their_experts():
    x, experts, weights, real, params = inputs()
    with jax.set_mesh(make_mesh({"data": 2, "expert": 4})):
        step = jax.jit(lambda x: dispatch(x, experts, weights, real, params, jax.nn.silu, Runtime())[0])
        assert "all-to-all" in step.lower(x).compile().as_text()


def only_what_is_there(x, y, starts, sent, places, received, *, axis_name):
    """`ragged_all_to_all`, as its documentation describes it, of plain collectives; NaN where the sizes disagree."""
    me = jax.lax.axis_index(axis_name)
    x, starts, sent, places = (jax.lax.all_gather(part, axis_name) for part in (x, starts, sent, places))
    row = jnp.arange(x.shape[1])
    for device in range(len(sent)):
        target = jnp.where(row < sent[device, me], places[device, me] + row, len(y))
        y = y.at[target].set(x[device, starts[device, me] + row], mode="drop")
    return jnp.where(jnp.all(received == sent[:, me]), y, jnp.nan)


@pytest.mark.parametrize("room", [0.0, 1.0])
def test_a_ragged_exchange_is_the_even_one(monkeypatch, room):
    """To the bit, in values and gradients, with drops and without; no CPU has the collective itself."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", only_what_is_there)
    runtime = Runtime(capacity_factor=room)
    with jax.set_mesh(make_mesh({"data": 2, "expert": 4})):
        even, ragged = (run(replace(runtime, all_to_all=name), *inputs()) for name in ("even", "ragged"))
    assert bool(np.asarray(even[1]).any()) == bool(room)
    jax.tree.map(np.testing.assert_array_equal, ragged, even)


@pytest.mark.parametrize("remat, passes", [("none", 4), ("full", 6), ("experts", 4)])
def test_what_was_exchanged_is_saved_by_name(remat, passes):
    """There and back, forward and backward; rematerialization repeats it only where its results were not saved."""
    x, experts, weights, real, params = inputs()
    runtime = Runtime(all_to_all="ragged", remat=remat)

    def loss(x, weights, params):
        layer = lambda x, weights, params: dispatch(x, experts, weights, real, params, jax.nn.silu, runtime)[0]
        layer = layer if remat == "none" else jax.checkpoint(layer, policy=REMAT[remat])
        return jnp.sum(jnp.sin(layer(x, weights, params)))

    with jax.set_mesh(make_mesh({"data": 2, "expert": 4})):
        steps = list(operations(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, weights, params)))
    sent = [step for step in steps if step.equation.primitive.name == "ragged_all_to_all"]
    assert len(sent) == passes
    # Eight rows of 24 choices each on four devices: of room for all of 192 rows, two device's experts of a token each.
    assert {used_share(step.scope) for step in sent} == {24 / (4 * 8 * 2)}


def test_the_platform_chooses_the_exchange():
    assert [all_to_all_for("auto", platform) for platform in ("tpu", "gpu", "cpu")] == ["ragged", "even", "even"]
    assert all_to_all_for("even", "tpu") == "even" and all_to_all_for("ragged", "cpu") == "ragged"
    with pytest.raises(ValueError, match="Runtime.all_to_all='odd': must be one of auto, even, ragged."):
        Runtime(all_to_all="odd")


def test_what_finds_no_room_is_dropped_and_counted():
    """A buffer of 8 for each of 8 experts and 24 choices a row: first the best choices, then the first tokens."""
    x, _, weights, real, params = inputs()
    real[:] = True
    x, weights, real = np.repeat(x, 2, axis=1), np.repeat(weights, 2, axis=1), np.repeat(real, 2, axis=1)
    experts = np.broadcast_to(np.array([0, 1, 2], np.int32), (ROWS, 2 * LENGTH, TOP))  # all 16 tokens to the same three
    y, dropped, _ = run(Runtime(moe_dispatch="capacity", capacity_factor=1.0), x, experts, weights, real, params)
    assert dropped.tolist() == [3 * 8] * ROWS  # fair share 16 * 3 / 8 = 6, rounded up to 8
    kept = np.arange(2 * LENGTH) < 8
    close(y[:, kept], by_hand(x, experts, weights, real & kept, params)[:, kept])
    assert not np.any(np.asarray(y)[:, ~kept])


def test_devices_drop_and_count_what_is_beyond_their_room():
    x, _, weights, real, params = inputs()
    real[:] = True
    x, weights, real = (np.repeat(part, 4, axis=1) for part in (x, weights, real))
    experts = np.broadcast_to(np.array([0, 1, 7], np.int32), (ROWS, 4 * LENGTH, TOP))
    with jax.set_mesh(make_mesh({"expert": 4, "fsdp": 2})):
        y, dropped, _ = run(replace(Runtime(), capacity_factor=1.0), x, experts, weights, real, params)
    # A device has one row of 96 choices, of which 24 are a fair share; 64 go to the first device, 32 to the last.
    assert np.asarray(dropped).tolist() == [64 - 24 + 32 - 24] * ROWS


def test_padding_reaches_no_expert():
    x, experts, weights, real, params = inputs()
    noisy = np.where(real[..., None], x, 1e30)
    y = run(Runtime(), noisy, experts, weights, real, params)[0]
    close(y, by_hand(x, experts, weights, real, params))


def test_softmax_routing():
    logits = np.log(np.array([[[0.1, 0.4, 0.2, 0.3]]], np.float32))
    experts, weights, probability = route(logits, None, MoeConfig(4, 2, 8))
    assert experts.tolist() == [[[1, 3]]]
    np.testing.assert_allclose(weights[0, 0], [4 / 7, 3 / 7], rtol=1e-6)
    np.testing.assert_allclose(probability[0, 0], [0.1, 0.4, 0.2, 0.3], rtol=1e-6)
    _, weights, _ = route(logits, None, MoeConfig(4, 2, 8, norm_topk_prob=False, scale=16.0))
    np.testing.assert_allclose(weights[0, 0], [6.4, 4.8], rtol=1e-6)


def test_a_bias_selects_and_does_not_weigh():
    logits, bias = np.zeros((1, 1, 4), np.float32), np.array([0, 0.2, 0, 0.1], np.float32)
    experts, weights, probability = route(logits, bias, MoeConfig(4, 2, 8, score_func="sigmoid", bias=True))
    assert experts.tolist() == [[[1, 3]]]
    np.testing.assert_allclose(weights[0, 0], [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(probability[0, 0], [0.25] * 4, rtol=1e-6)


def test_only_the_best_groups_are_chosen_from():
    scores = np.array([[[0.30, 0.01, 0.20, 0.19, 0.02, 0.28]]], np.float32)
    best = lambda **groups: route(np.log(scores), None, MoeConfig(6, 2, 8, n_group=3, **groups))[0].tolist()
    assert best(topk_group=1, group_best=1) == [[[0, 1]]]  # by their best: the first
    assert best(topk_group=1, group_best=2) == [[[2, 3]]]  # by the sum of two: the second
    assert best(topk_group=2, group_best=1) == [[[0, 5]]]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"score_func": "tanh"}, "MoeConfig.score_func"),
        ({"n_group": 3}, "must be a multiple of moe.n_group=3"),
        ({"top_k": 9}, "exceeds the . experts"),
        ({"n_group": 4, "topk_group": 1, "top_k": 3}, "exceeds the . experts"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        MoeConfig(**({"experts": 8, "top_k": 2, "mlp": 4} | change))


def test_what_routing_adds_up_to():
    """Two conversations and padding in a row, against sums by hand."""
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((2, 7, 4)).astype(np.float32)
    segment = np.array([[1, 1, 1, 2, 2, 0, 0], [0] * 7], np.int32)
    modality = np.array([[0, 1, 1, 2, 0, 1, 0], [0] * 7], np.int32)
    config = MoeConfig(4, 2, 8)
    experts, _, probability = route(logits, None, config)
    found = summarize(logits, experts, probability, segment, modality, jnp.array([3, 0]))
    experts, probability = np.asarray(experts), np.asarray(probability)
    counts = np.zeros((3, 4), int)
    for t in range(5):
        np.add.at(counts[modality[0, t]], experts[0, t], 1)
    np.testing.assert_array_equal(found.counts, [counts, np.zeros((3, 4))])
    np.testing.assert_allclose(found.probability[0], probability[0, :5].sum(0), rtol=1e-6)
    expected = 0.0
    for tokens in (slice(0, 3), slice(3, 5)):
        fraction = np.bincount(experts[0, tokens].ravel(), minlength=4) / experts[0, tokens].size
        expected += 4 * fraction @ probability[0, tokens].mean(0)
    np.testing.assert_allclose(found.sequence, [expected, 0], rtol=1e-6)
    square = np.log(np.exp(logits[0, :5]).sum(-1)) ** 2
    np.testing.assert_allclose(found.square, [square.sum(), 0], rtol=1e-5)
    assert found.dropped.tolist() == [3, 0]
