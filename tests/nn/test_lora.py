"""Adapters: outputs, frozen weights without cost, meshes equal to one device, dropout."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from examples import random_params
from flax.traverse_util import flatten_dict
from tiny_lora import BASE, OPTIM, merged, random_adapters, random_batch, start
from traced_flops import dot_flops

from mllm_jax.common.config import ConfigError
from mllm_jax.common.trees import join
from mllm_jax.model.vlm import VLM, abstract_boxed, abstract_params, init_adapters
from mllm_jax.nn.einsum import Einsum
from mllm_jax.nn.lora import LoraConfig, add_products, split_adapters
from mllm_jax.nn.moe.layer import MoeConfig
from mllm_jax.nn.runtime import Runtime
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.monitor.flops import count_flops, padded
from mllm_jax.train.runs.config import read_run
from mllm_jax.train.step.forward import loss_sum
from mllm_jax.train.step.optimizer import split
from mllm_jax.train.step.train_step import make_eval_step

EVERYWHERE = LoraConfig(
    rank=4,
    alpha=6.0,
    target_modules=("^(encoder|decoder)/layers.*/w$", "^connector/.*/w$"),
    rank_pattern=(("^connector/", 3), ("attention/out", 2), ("encoder/layers/mlp/up", 0)),
    alpha_pattern=(("/mlp/down", 9.0),),
)
DROPPING = LoraConfig(rank=4, dropout=0.25)


@pytest.fixture(scope="module")
def base():
    return random_params(BASE)


@pytest.fixture(scope="module")
def adapters():
    return random_adapters(EVERYWHERE)


@pytest.fixture(scope="module")
def batch():
    return random_batch()


logits = jax.jit(lambda params, batch: VLM(BASE).apply({"params": params}, batch).logits)


def test_an_adapter_adds_its_product(base, adapters, batch):
    both, expected = join(base, adapters), merged(base, adapters)
    found, plain = logits(both, batch), logits(base, batch)
    assert np.abs(found - plain).max() > 1
    np.testing.assert_allclose(found, logits(expected, batch), atol=1e-4)
    added = split_adapters(add_products(both, abstract_boxed(BASE)))[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), added, expected)
    back = add_products(join(added, adapters), abstract_boxed(BASE), -1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), back, both)


@pytest.mark.slow
def test_unrolled_layers_are_the_scanned_ones(base, adapters, batch):
    both, unrolled = join(base, adapters), jax.jit(VLM(replace(BASE, runtime=Runtime(scan=False))).apply)
    np.testing.assert_allclose(unrolled({"params": both}, batch).logits, logits(both, batch), atol=1e-4)


def test_new_adapters_change_nothing_and_know_their_ranks(base, batch):
    config = replace(BASE, lora=EVERYWHERE)
    fresh = jax.jit(lambda key: init_adapters(config, key))(jax.random.key(0))
    np.testing.assert_array_equal(logits(join(base, fresh), batch), logits(base, batch))
    off, on = split_adapters(join(base, fresh))
    jax.tree.map(np.testing.assert_array_equal, (off, on), (base, fresh))
    flat = flatten_dict(fresh, sep="/")
    assert flat["decoder/layers/mlp/up/lora_down"].shape == (2, 64, 4)
    assert flat["decoder/layers/attention/out/lora_up"].shape == (2, 2, 64)
    assert flat["connector/deepstack/mlp/down/lora_down"].shape == (1, 256, 3)
    assert np.all(flat["connector/main/mlp/down/lora_scale"] == 3) and not any(
        "mlp/up" in x for x in flat if "enc" in x
    )
    assert np.all(flat["decoder/layers/attention/q/lora_scale"] == np.full(2, 1.5, np.float32))
    down = np.asarray(flat["decoder/layers/mlp/down/lora_down"])
    assert 0.9 * 128**-0.5 < np.abs(down).max() <= 128**-0.5 and np.abs(down[0] - down[1]).max() > 0


@pytest.mark.parametrize("lora", (EVERYWHERE, LoraConfig(rank=2)), ids=("everywhere", "decoder"))
def test_what_is_frozen_costs_nothing(lora, batch):
    """The traced program has the products of adapters and of activations' gradients, and none for the base's."""
    config, freeze = replace(BASE, lora=lora), lora.freezes(())
    ones = batch._replace(weight=np.ones_like(batch.weight))
    trained, frozen = split(abstract_params(config), freeze)
    assert all(path[-1] in ("lora_down", "lora_up") for path in flatten_dict(trained))
    traced = jax.make_jaxpr(jax.grad(lambda part, rest: loss_sum(config, join(part, rest), ones)[0]))(trained, frozen)
    counts = padded(batch)._replace(token_pairs=2 * padded(batch).token_pairs)
    flops = count_flops(config, counts, freeze)
    assert dot_flops(traced.jaxpr) == sum(part.total for part in flops.values())
    assert sum(part.total for part in flops.values()) < sum(part.total for part in count_flops(BASE, counts).values())


def test_steps_train_adapters_alone_on_any_mesh(base, batch):
    """Dropout drops the same values on every mesh, and different ones in every step."""
    dropping = replace(BASE, lora=DROPPING)
    params = join(base, random_adapters(DROPPING, lora_keep=0.75))
    found = []
    for shape in ({"fsdp": 1}, {"fsdp": 2, "tensor": 2}):
        state, step, put = start(DROPPING, params, shape, seed=3)
        placed = put(batch)
        assert len(jax.tree.leaves(state.opt_state[0].mu)) == 2 * 7
        state, first = step(state, placed)
        again = jax.tree.map(np.asarray, (state.opt_state[0].mu, first["loss"]))
        state = state._replace(params=jax.device_put(params, jax.tree.map(lambda x: x.sharding, state.params)))
        state, second = step(state, placed)
        assert abs(first["loss"] - second["loss"]) > 1e-4  # of the same weights
        found.append((again, np.asarray(second["loss"])))
        after, _ = split(state.params, OPTIM.freeze)
        changed = {path[-1] for path, x in flatten_dict(after).items() if np.any(x != flatten_dict(params)[path])}
        assert changed == {"lora_down", "lora_up"}
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
    jax.tree.map(close, *found)
    plain = make_eval_step(dropping, make_mesh({"fsdp": 1}, jax.devices()[:1]))(params, batch)
    assert abs(plain["loss_sum"] / plain["weight"] - found[0][0][1]) > 1e-4  # nothing is left out


def test_dropout_keeps_the_mean():
    layer = Einsum("...D,DF->...F", (1, 1), (None, None), "float32")
    one = jnp.ones((1, 1))
    leaves = {"w": 0 * one, "lora_down": one, "lora_up": one, "lora_scale": 3 * one[0, 0], "lora_keep": 0.8 * one[0, 0]}
    run = lambda **rngs: np.asarray(layer.apply({"params": leaves}, jnp.ones((10_000, 1)), rngs=rngs))
    kept = run(dropout=jax.random.key(0))
    np.testing.assert_allclose(np.unique(kept), [0, 3 / 0.8], rtol=1e-6)
    assert abs(kept.mean() - 3) < 0.05 and np.all(run() == 3)
    assert np.any(kept != run(dropout=jax.random.key(1)))


def test_a_run_with_adapters():
    config = tiny_run.get_config()
    assert "lora" not in config.model and read_run(config).optim.freeze == ()
    config.lora.rank, config.lora.modules_to_save = 16, ("^connector/",)
    run = read_run(config)
    paths = flatten_dict(split(abstract_params(run.model), run.optim.freeze)[0], sep="/")
    assert {path for path in paths if not path.startswith("connector/")} == {
        f"decoder/layers/{weight}/lora_{side}"
        for weight in (
            *(f"attention/{x}" for x in ("q", "k", "v", "out")),
            *(f"mlp/{x}" for x in ("gate", "up", "down")),
        )
        for side in ("down", "up")
    }
    assert {path for path in paths if path.startswith("connector/")} == {
        path for path in flatten_dict(abstract_params(run.model), sep="/") if path.startswith("connector/")
    }
    config.lora.dropout = 1.0
    with pytest.raises(ConfigError, match="config.lora.dropout=1.0: must be at least 0 and less than 1"):
        read_run(config)


@pytest.mark.parametrize(
    "change, message",
    (
        (
            {"target_modules": ("decodr/layers",)},
            "lora.target_modules: 'decodr/layers' matches no weight; .* decoder/layers",
        ),
        ({"target_modules": ("mlp/norm",)}, "lora.target_modules: 'mlp/norm' matches no weight"),
        ({"target_modules": ("decoder/embed",)}, "lora.target_modules: 'decoder/embed' matches no weight"),
        ({"target_modules": ("decoder/head",)}, "'decoder/head/w', which cannot have an adapter"),
        (
            {"target_modules": ("experts",), "dropout": 0.1},
            "lora.dropout=0.1: adapters of experts, as of 'decoder/l",
        ),
        ({"rank_pattern": (("^encoder/", 8),)}, "lora.rank_pattern: '\\^encoder/' matches no weight"),
        ({"modules_to_save": ("conector",)}, "lora.modules_to_save: 'conector' matches no weight; .*connector"),
    ),
)
def test_patterns_that_fit_nothing_are_told(change, message):
    experts = replace(BASE, decoder=replace(BASE.decoder, moe=MoeConfig(4, 2, 16)))
    with pytest.raises(ValueError, match=message):
        LoraConfig(rank=4, **change).ranks_of(abstract_boxed(experts))
