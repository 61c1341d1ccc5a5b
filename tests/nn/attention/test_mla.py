"""Latent attention: both forms are one function, the cache is small, decoding never expands it; YaRN."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from traced_flops import dot_flops
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mllm_jax.families import FAMILIES
from mllm_jax.families.decoders import deepseek
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.vlm import VLM, ModelConfig, abstract_boxed, cache_bytes_per_token, init_cache, init_params
from mllm_jax.nn.attention.layer import AttentionConfig
from mllm_jax.nn.attention.mla import Mla, MlaConfig
from mllm_jax.nn.rope import YarnRopeScaling
from mllm_jax.nn.runtime import Runtime
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.sharding.weights import shardings
from mllm_jax.train.monitor.flops import Counts, count_flops
from mllm_jax.train.runs.config import Run, read_run, run_config
from mllm_jax.train.runs.data import ScenesData
from mllm_jax.train.step.forward import loss_sum
from mllm_jax.types import Batch

SMALL = MlaConfig(heads=4, kv_rank=32, nope_dim=16, rope_dim=8, v_dim=12, q_rank=24)
YARN = YarnRopeScaling(factor=40.0, length=64, mscale=1.0, mscale_all_dim=0.5)
DENSE = ModelConfig(None, None, DecoderConfig(200, 64, 2, replace(SMALL, rope_scaling=YARN), 96), family="deepseek_v2")


def packed(rng, rows: int, length: int) -> Batch:
    """Two conversations and some padding in every row."""
    cut, end = length // 3, length - 3
    place = np.arange(length)
    segment = np.broadcast_to(np.where(place < cut, 1, np.where(place < end, 2, 0)), (rows, length)).astype(np.int32)
    position = np.where(place < cut, place, place - cut)
    tokens = rng.integers(0, 200, (rows, length)).astype(np.int32)
    return Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        weight=(segment > 0).astype(np.float32),
        segment=segment,
        position=np.broadcast_to(position[:, None], (rows, length, 3)).astype(np.int32),
        vision_index=np.full((rows, length), -1, np.int32),
    )


def perturbed(config: ModelConfig):
    params = init_params(config, jax.random.key(0))
    noise = lambda path, x: x + 0.1 * np.random.default_rng(len(str(path))).standard_normal(x.shape).astype(np.float32)
    return jax.tree_util.tree_map_with_path(noise, params)


@pytest.mark.parametrize("theta, head_dim, length", [(1e4, 64, 4096), (1e4, 8, 64), (5e5, 32, 32), (1e4, 64, 100000)])
@pytest.mark.parametrize("mscale, mscale_all_dim", [(0.707, 0.707), (1.0, 0.5), (1.0, 0.0)])
def test_yarn_equals_transformers(theta, head_dim, length, mscale, mscale_all_dim):
    config = transformers.DeepseekV3Config(
        qk_rope_head_dim=head_dim,
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=theta,
            factor=40.0,
            original_max_position_embeddings=length,
            mscale=mscale,
            mscale_all_dim=mscale_all_dim,
        ),
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    yarn = YarnRopeScaling(40.0, length, mscale=mscale, mscale_all_dim=mscale_all_dim)
    np.testing.assert_allclose(yarn.frequencies(theta, head_dim), frequencies, rtol=2e-6)
    assert yarn.table_scale == pytest.approx(scale)


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, q_rank=0, rope_scaling=YARN)], ids=["plain", "yarn"])
def test_both_forms_are_one_function(config, monkeypatch):
    """A cache that is read in one piece, by either form, gives what no cache gives; segments and padding included."""
    rng, batch = np.random.default_rng(0), packed(np.random.default_rng(0), 2, 21)
    x = rng.standard_normal((2, 21, 64)).astype(np.float32)
    rope = config.rope(jnp.asarray(batch.position), batch.segment)
    layer = Mla(config, Runtime())
    params = jax.jit(layer.init)(jax.random.key(0), x, rope, batch.segment, None)
    whole, kept = jax.jit(layer.apply)(params, x, rope, batch.segment, None)
    assert kept is None
    real = batch.segment > 0
    for absorbs in (True, False):
        monkeypatch.setattr(MlaConfig, "absorbs", lambda self, queries, keys, absorbs=absorbs: absorbs)
        empty = [jnp.zeros((3, 2, heads, 25, values)) for heads, values in config.cached]
        segment = np.pad(batch.segment, ((0, 0), (0, 4)))
        out, kept = jax.jit(layer.apply)(params, x, rope, batch.segment, (empty, 1, segment, 0))
        np.testing.assert_allclose(np.asarray(out)[real], np.asarray(whole)[real], atol=1e-5)
        assert [part.shape for part in kept] == [(3, 2, 1, 25, 32), (3, 2, 1, 25, 8)]
        assert all(np.any(part[1]) and not np.any(part[0]) and not np.any(part[2]) for part in kept)


def test_the_cheaper_form_is_taken():
    config = deepseek.SIZES["v3"].attention
    assert config.absorbs(1, 2) and config.absorbs(1, 100_000) and config.absorbs(100, 100_000)
    assert not config.absorbs(1000, 100_000) and not config.absorbs(4096, 4096) and not config.absorbs(1, 1)


def one_token(config: MlaConfig, slots: int):
    """A layer that reads one token with `slots` in its cache, and the shapes of its arguments."""
    layer, x, segment = Mla(config, Runtime()), jnp.zeros((1, 1, 64)), jnp.ones((1, 1), jnp.int32)
    rope = config.rope(jnp.zeros((1, 1, 3), jnp.int32), segment)
    params = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, rope, segment, None))
    kept = [jax.ShapeDtypeStruct((2, 1, heads, slots, values), jnp.float32) for heads, values in config.cached]
    read = lambda params, kept, known: layer.apply(params, x, rope, segment, (kept, 1, known, slots - 1))
    return read, (params, kept, jax.ShapeDtypeStruct((1, slots), jnp.int32))


@pytest.mark.parametrize("nope_dim", [16, 64])
def test_decoding_never_expands_the_cache(nope_dim):
    """The cost of one more cached token is the same for any `nope_dim`, and no array holds it per head."""
    config, slots = replace(SMALL, nope_dim=nope_dim), 211
    count = lambda read, arguments: dot_flops(jax.make_jaxpr(read)(*arguments).jaxpr)
    added = count(*one_token(config, slots)) - count(*one_token(config, slots - 100))
    assert added == 100 * 2 * config.heads * (2 * config.kv_rank + config.rope_dim)
    read, arguments = one_token(config, slots)
    text = jax.jit(read, donate_argnums=1).lower(*arguments).compile().as_text()
    shapes = [[int(size) for size in dims.split(",")] for dims in re.findall(r"\w\d+\[([\d,]+)\]", text)]
    caches = [2 * slots * values for _, values in config.cached]
    assert max(caches) in map(np.prod, shapes)
    largest = max(np.prod(shape) for shape in shapes if slots in shape and np.prod(shape) not in caches)
    assert largest < slots * config.heads * nope_dim


def test_a_mesh_changes_nothing():
    batch, params = packed(np.random.default_rng(1), 4, 24), perturbed(DENSE)

    def read(params, runtime):
        """Logits of one full pass, and of three pieces through a cache."""

        @jax.jit
        def run(params, part, cache):
            out = VLM(replace(DENSE, runtime=runtime)).apply({"params": params}, part, cache)
            return out.logits, out.cache

        part = lambda window: jax.tree.map(lambda x: x[:, window], batch)
        pieces, cache = [], init_cache(DENSE, 4, 32)
        for start in (0, 8, 16):
            logits, cache = run(params, part(slice(start, start + 8)), cache)
            pieces.append(logits)
        return np.asarray(run(params, batch, None)[0]), np.concatenate(pieces, axis=1)

    real = batch.segment > 0
    expected, from_cache = read(params, Runtime())
    np.testing.assert_allclose(from_cache[real], expected[real], atol=1e-4)
    mesh = make_mesh({"fsdp": 2, "context": 2, "tensor": 2})
    spread = jax.device_put(params, shardings(abstract_boxed(DENSE), mesh, DENSE.runtime.rules))
    with jax.set_mesh(mesh):
        for got in read(spread, Runtime(context="ring")):
            np.testing.assert_allclose(got[real], expected[real], atol=1e-4)


def test_flops_are_those_of_the_traced_program():
    batch = packed(np.random.default_rng(0), 2, 24)
    batch = batch._replace(weight=np.ones_like(batch.weight))
    counts = Counts(tokens=48, token_pairs=2 * 24**2, patches=0, patch_pairs=0, targets=48)
    params = jax.eval_shape(lambda: init_params(DENSE, jax.random.key(0)))
    loss = lambda params: loss_sum(DENSE, params, batch)[0]
    flops = count_flops(DENSE, counts)
    assert dot_flops(jax.make_jaxpr(loss)(params).jaxpr) == sum(part.forward for part in flops.values())
    assert dot_flops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr) == sum(part.total for part in flops.values())


def test_bytes_of_cache():
    """576 values per token and layer, whatever the heads: as many as 2.25 key-value heads have (arXiv 2405.04434)."""
    for size, layers in (("v2", 60), ("v3", 61), ("v2-lite", 27)):
        config = FAMILIES["deepseek_v3"].config(size)
        assert cache_bytes_per_token(config, "bfloat16") == layers * 576 * 2
        cache = jax.eval_shape(lambda config=config: init_cache(config, 3, 5, "bfloat16"))
        assert (cache.k.size + cache.v.size) * 2 == 3 * 5 * cache_bytes_per_token(config, "bfloat16")
    assert cache_bytes_per_token(FAMILIES["qwen3"].config("235b-a22b")) == 94 * 2 * 4 * 128 * 4
    config = FAMILIES["deepseek_v3"].config("v3")
    for kv_heads in (128, 8):
        heads = AttentionConfig(heads=128, kv_heads=kv_heads, head_dim=128, rope_sections=(64, 0, 0))
        other = replace(config, decoder=replace(config.decoder, attention=heads))
        assert cache_bytes_per_token(other) / cache_bytes_per_token(config) == kv_heads / 2.25


def test_a_run_states_latent_attention():
    run = Run(model=replace(DENSE, runtime=Runtime()), data=ScenesData(batch=8, text_only=True))
    assert read_run(run_config(run)).model.decoder == DENSE.decoder
    with pytest.raises(ValueError, match="config.data.patch_rows"):
        read_run(run_config(replace(run, data=ScenesData(batch=8))))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "gelu"}, 'hidden_act="gelu": must be'),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8"),
        ({"topk_method": "noaux_tc"}, 'topk_method="noaux_tc": must be'),
        ({"norm_topk_prob": True}, "norm_topk_prob"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            'rope_type="linear": must be "default" or "yarn"',
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "mscale": 1.0}}, "agreed meaning"),
    ],
)
def test_what_config_json_may_not_say(change, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES["deepseek_v3"].from_hf(FAMILIES["deepseek_v3"].to_hf(FAMILIES["deepseek_v3"].config("v2")) | change)


def test_a_model_that_config_json_cannot_say():
    config = FAMILIES["deepseek_v3"].config("v2")
    odd = replace(config.decoder, moe=replace(config.decoder.moe, bias=True))
    with pytest.raises(ValueError, match="cannot represent this model: saving decoder.moe.bias=True would load"):
        FAMILIES["deepseek_v3"].to_hf(replace(config, decoder=odd))
    with pytest.raises(ValueError, match="requires latent attention and experts"):
        FAMILIES["deepseek_v3"].to_hf(FAMILIES["qwen3"].config("30b-a3b"))
    with pytest.raises(ValueError, match="must be even"):
        MlaConfig(heads=2, rope_dim=7)
