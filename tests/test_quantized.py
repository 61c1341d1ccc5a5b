"""Weights in few bits: how far from the true ones, that adapters learn beside them, in less memory, on any mesh."""

from dataclasses import replace
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lora import BASE, random_adapters
from test_lora import base as base  # the fixture
from test_lora import batch as batch

from mllm_jax.model import abstract_boxed, abstract_params
from mllm_jax.nn.lora import LoraConfig, join, keep_arrays, split_adapters, with_weights
from mllm_jax.nn.quantized import KINDS, NF4, dequantise, group_of, quantise
from mllm_jax.sharding import make_mesh, shardings
from mllm_jax.train.optim import merge, split
from mllm_jax.train.step import loss_sum


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "inputs"), (((2, 48, 3, 6), (-3,)), ((3, 4, 10, 7), (-3, -2)), ((6, 5), (-2,))))
def test_errors_stay_within_half_a_step(kind, shape, inputs):
    rng = np.random.default_rng(0)
    w = np.float32(rng.standard_normal(shape) * rng.uniform(0.1, 3, shape[-1]))
    w[..., 0] = 0
    leaves = quantise(jnp.asarray(w), kind, inputs, 16)
    found, bits = np.asarray(dequantise(leaves, inputs)), leaves[f"w_{kind}"]
    assert found.shape == shape and bits.size * bits.dtype.itemsize == w.size // (1 if kind == "int8" else 2)
    axis, size = inputs[-1], shape[inputs[-1]]
    if kind == "int8":
        largest = np.abs(w).max(axis=inputs, keepdims=True)
    else:
        group = group_of(size, 16)
        parts = np.abs(w).reshape(*shape[: len(shape) + axis], size // group, group, *shape[len(shape) + axis + 1 :])
        largest = np.repeat(parts.max(axis=axis), group, axis=axis)
    half = {"int8": 1 / 254, "int4": 1 / 14, "nf4": max(np.diff(NF4)) / 2}[kind]
    assert np.all(np.abs(found - w) <= largest * half * (1 + 1e-5))
    again = quantise(jnp.asarray(found), kind, inputs, 16)
    np.testing.assert_array_equal(again[f"w_{kind}"], bits)  # what is there already stays
    assert np.all(found[..., 0] == 0)


def test_codes_of_nf4_are_the_quantiles_of_the_paper():
    """Appendix E of arXiv 2305.14314: 8 quantiles above zero and 7 below, evenly from a probability near one to 1/2."""
    offset, quantile = 0.9677083, NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    np.testing.assert_allclose(NF4, np.sort([*below, 0, *above]) / max(above), atol=1e-6)


def test_groups_divide_their_axis():
    assert [group_of(size, 64) for size in (4096, 72, 4304, 48, 2, 14)] == [64, 36, 16, 48, 2, 14]


def quantised(base, lora):
    config = replace(BASE, lora=lora)
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    layout = split_adapters(shardings(abstract_boxed(config), mesh, BASE.runtime.rules))[0]
    return config, keep_arrays(jax.tree.map(jnp.asarray, base), abstract_boxed(BASE), lora, layout)


@pytest.mark.parametrize("kind", ("int8", "nf4"))
def test_adapters_learn_beside_few_bits_as_beside_their_values(kind, base, batch):
    """Logits near those of the whole weights; loss and gradients are those of a model of the dequantised ones."""
    lora = LoraConfig(rank=2, base=kind, group=16)
    config, few = quantised(base, lora)
    shapes = split_adapters(abstract_params(config))[0]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), few) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert few["encoder"]["layers"]["mlp"]["up"][f"w_{kind}"].dtype == (jnp.int8 if kind == "int8" else jnp.uint8)
    assert few["decoder"]["embed"].dtype == few["decoder"]["head"]["w"].dtype == jnp.bfloat16
    assert few["decoder"]["norm"]["scale"].dtype == jnp.float32
    adapters = random_adapters(lora)
    whole = with_weights(few, abstract_boxed(BASE))
    params = [join(tree, adapters) for tree in (few, whole)]

    def grads(params):
        trained, frozen = split(params, lora.freezes(()))
        return jax.jit(jax.value_and_grad(lambda part, rest: loss_sum(config, merge(part, rest), batch)[0]))(
            trained, frozen
        )

    (loss, found), (expected_loss, expected) = map(grads, params)
    assert loss == pytest.approx(float(expected_loss), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), found, expected)
