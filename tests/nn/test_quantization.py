"""Quantized weights: error, training of adapters on them, memory, meshes."""

from dataclasses import replace
from functools import partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import random_params
from flax.traverse_util import flatten_dict
from tiny_lora import BASE, random_adapters, random_batch, start

import mllm_jax
from mllm_jax.common.trees import join
from mllm_jax.model.vlm import VLM, abstract_boxed, abstract_params
from mllm_jax.nn.einsum import Einsum
from mllm_jax.nn.lora import LoraConfig, add_products, keep_arrays, split_adapters, with_weights
from mllm_jax.nn.quantization import KINDS, NF4, dequantize, group_of, quantize
from mllm_jax.nn.runtime import Runtime
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.sharding.weights import shardings
from mllm_jax.train.step.forward import loss_sum
from mllm_jax.train.step.optimizer import split


@pytest.fixture(scope="module")
def base():
    return random_params(BASE)


@pytest.fixture(scope="module")
def batch():
    return random_batch()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "inputs"), (((2, 48, 3, 6), (-3,)), ((3, 4, 10, 7), (-3, -2))))
def test_errors_stay_within_half_a_step(kind, shape, inputs):
    rng = np.random.default_rng(0)
    w = np.float32(rng.standard_normal(shape) * rng.uniform(0.1, 3, shape[-1]))
    w[..., 0] = 0
    leaves = quantize(jnp.asarray(w), kind, inputs, 16)
    found, bits = np.asarray(dequantize(leaves, inputs)), leaves[f"w_{kind}"]
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
    again = quantize(found, kind, inputs, 16)
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


def quantized(base, lora):
    config = replace(BASE, lora=lora)
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    layout = split_adapters(shardings(abstract_boxed(config), mesh, BASE.runtime.rules))[0]
    return config, keep_arrays(jax.tree.map(jnp.asarray, base), abstract_boxed(BASE), lora, layout)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_in_few_bits_is_the_layer_of_its_values(kind):
    """Output and gradients, of activations and of the adapter."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    layer = Einsum("...NH,NHD->...D", (3, 8, 6), (None, None, None), "float32")
    leaves = quantize(draw(3, 8, 6), kind, (-3, -2), 4)
    adapter = {"lora_down": draw(3, 8, 2), "lora_up": draw(2, 6), "lora_scale": jnp.float32(1.5)}
    run = lambda base: lambda adapter, x: layer.apply({"params": base | adapter}, x)
    given = adapter, draw(5, 3, 8)
    results = [jax.vjp(run(base), *given) for base in (leaves, {"w": dequantize(leaves, (-3, -2))})]
    (found, back), (expected, back_of_values) = results
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(found, expected)
    jax.tree.map(close, back(found), back_of_values(expected))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_learn_beside_few_bits_as_beside_their_values(kind, base, batch):
    """Loss and gradients are those of a model of the dequantized weights."""
    lora = LoraConfig(rank=2, base_dtype=kind, quant_block_size=16)
    config, few = quantized(base, lora)
    shapes = split_adapters(abstract_params(config))[0]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), few) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert few["encoder"]["layers"]["mlp"]["up"][f"w_{kind}"].dtype == (jnp.int8 if kind == "int8" else jnp.uint8)
    assert few["decoder"]["embed"].dtype == few["decoder"]["head"]["w"].dtype == jnp.bfloat16
    assert few["decoder"]["norm"]["scale"].dtype == jnp.float32
    adapters = random_adapters(lora)
    whole = with_weights(few, abstract_boxed(BASE))

    def grads(params):
        trained, frozen = split(join(params, adapters), lora.freezes(()))
        run = jax.value_and_grad(lambda part, rest: loss_sum(config, join(part, rest), batch)[0])
        return jax.jit(run)(trained, frozen)

    (loss, found), (expected_loss, expected) = map(grads, (few, whole))
    assert loss == pytest.approx(float(expected_loss), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_near_scanned_and_unrolled(kind, base, batch):
    """Compares with full precision: the mean error is within a fraction of the spread of logits that the bits allow."""
    _, few = quantized(base, LoraConfig(rank=2, base_dtype=kind, quant_block_size=16))
    run = lambda params, **runtime: jax.jit(VLM(replace(BASE, runtime=Runtime(**runtime))).apply)(
        {"params": params}, batch
    )
    true, scanned, unrolled = run(base).logits, run(few).logits, run(few, scan=False).logits
    np.testing.assert_allclose(unrolled, scanned, atol=1e-4)
    error = np.abs(scanned - true).mean() / np.std(true)
    assert error < {"int8": 0.02, "int4": 0.2, "nf4": 0.2}[kind], error


def test_arguments_shrink_by_what_the_bits_leave_out():
    """Counts bytes of the compiled forward pass: no base weight is stored twice or in more bits."""
    config = replace(BASE, lora=LoraConfig(rank=2, base_dtype="int4", quant_block_size=16))
    params = abstract_params(config)
    run = jax.jit(lambda params: VLM(config).apply({"params": params}, BASE.example(), hidden=True).hidden)
    held = run.lower(params).compile().memory_analysis().argument_size_in_bytes
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    assert held == size(params) - size(params["decoder"]["head"])  # which is not read
    whole = abstract_params(replace(BASE, lora=LoraConfig(rank=2)))
    layers = [tree["decoder"]["layers"]["mlp"]["up"] for tree in (params, whole)]
    assert size(layers[0]) - 2 * 2 * 4 * (64 + 128) < 0.2 * size(layers[1])


@pytest.mark.slow
def test_it_learns_on_a_mesh_as_on_one_device(base, batch):
    lora, losses = LoraConfig(rank=4, base_dtype="int4", quant_block_size=16), []
    _, few = quantized(base, lora)
    params = join(few, random_adapters(lora))
    for shape in ({"fsdp": 1}, {"fsdp": 4}):
        state, step, put = start(lora, params, shape)
        placed, own = put(batch), []
        for _ in range(12):
            state, metrics = step(state, placed)
            own.append(float(metrics["loss"]))
        losses.append(own)
        after = flatten_dict(split(state.params, lora.freezes(()))[1])
        for path, x in flatten_dict(split_adapters(few)[0]).items():
            np.testing.assert_array_equal(after[path], x)
    assert losses[0][-1] < 0.8 * losses[0][0]
    np.testing.assert_allclose(*losses, rtol=1e-3)


@pytest.mark.slow
def test_merging_gives_whole_weights(base):
    lora = LoraConfig(rank=2, base_dtype="int4", quant_block_size=16)
    config, few = quantized(base, lora)
    vlm = mllm_jax.Pretrained(config, config.build(), join(few, random_adapters(lora)))
    merged = mllm_jax.merge_adapters(vlm)
    assert jax.tree.map(np.shape, merged.params) == jax.tree.map(np.shape, base)
    expected = add_products(join(with_weights(few, abstract_boxed(BASE)), random_adapters(lora)), abstract_boxed(BASE))
    close = partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, merged.params, split_adapters(expected)[0])
