"""Connectors with learned queries equal transformers' and torch's modules, for images of many sizes packed together."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.core import meta
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

from mllm_jax.common.trees import flatten
from mllm_jax.data.pipeline.packing import patch_coords
from mllm_jax.model.connectors.perceiver import PerceiverConfig
from mllm_jax.model.connectors.position_aware import PositionAwareConfig, sinusoids
from mllm_jax.model.connectors.qformer import QFormerConfig
from mllm_jax.model.encoders.vit import Features
from mllm_jax.nn.runtime import Runtime
from mllm_jax.nn.stack import segments
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.types import Vision

WIDTH, OUT, QUERIES, HEADS = 24, 32, 4, 4
ROWS = [[(3, 4), (2, 2)], [(1, 7)], [], [(4, 4)]]  # (h, w) of the images of every patch row
PATCHES, SLOTS = 20, 3


def packed(rows=ROWS, patches: int = PATCHES, slots: int = SLOTS, seed: int = 0):
    """(features of one batch row with noise as padding, vision, features of each image)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, len(rows), patches, WIDTH), np.float32)
    image, coords = np.zeros(x.shape[:3], np.int32), np.zeros((*x.shape[:3], 3), np.int32)
    grid, places, features = np.ones((*x.shape[:3], 2), np.int32), np.zeros((1, len(rows), slots), np.int32), []
    for row, grids in enumerate(rows):
        start = 0
        for slot, (height, width) in enumerate(grids):
            here = (0, row, slice(start, start + height * width))
            features.append(x[here])
            image[here] = places[0, row, slot] = len(features)
            coords[here][:, 1:], grid[here] = patch_coords((height, width), 1), (height, width)
            start += height * width
    return x, Vision(None, image, coords, grid, places), features


def connect(config, params, x, vision, out=OUT, runtime=None):
    module = config.build(out, runtime or Runtime(), None)
    features = Features(x, np.zeros((0, *x.shape), x.dtype))
    return module.apply({"params": params}, features, vision).embeddings


def initial(config, out=OUT):
    """Random parameters, none of which is zero or one."""
    x, vision, _ = packed([[(1, 1)]], 1, 1)
    module = config.build(out, Runtime(), None)
    features = Features(x, np.zeros((0, *x.shape), x.dtype))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), features, vision)["params"])
    draw = np.random.default_rng(1).standard_normal

    def weight(path, x):
        scale = path[-1].key == "scale"
        return (scale + 0.3 * draw(x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(weight, meta.unbox(shapes))


def set_linear(module: torch.nn.Linear, w, b=None) -> None:
    """Sets a torch layer to a weight [in ... out ...] of ours."""
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(np.asarray(w).reshape(module.in_features, module.out_features).T))
        if b is not None:
            module.bias.copy_(torch.from_numpy(np.asarray(b).reshape(-1)))


def set_norm(module, params) -> None:
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(params["scale"]))
        if "bias" in params:
            module.bias.copy_(torch.from_numpy(params["bias"]))


def set_attention(params, q, k, v, out) -> None:
    for module, name in ((q, "q"), (k, "k"), (v, "v"), (out, "out")):
        set_linear(module, params[name]["w"], params[name].get("b"))


def at(layers, number: int):
    """The parameters of one layer of a stack."""
    return jax.tree.map(lambda leaf: leaf[number], layers)


def idefics(params, config):
    """transformers' resampler of IDEFICS with our parameters."""
    theirs = transformers.IdeficsConfig(vision_config={"embed_dim": WIDTH})
    theirs.perceiver_config.qk_layer_norms_perceiver = config.qk_norm
    model = IdeficsPerceiverResampler(theirs, WIDTH, config.layers, HEADS, config.head_dim, QUERIES)
    with torch.no_grad():
        model.latents.copy_(torch.from_numpy(params["queries"]["tokens"]))
    for number, (attention, mlp) in enumerate(model.blocks):
        layer = at(params["layers"], number)
        own = layer["attention"]
        set_attention(own, attention.q_proj, attention.k_proj, attention.v_proj, attention.output_proj)
        set_norm(attention.context_layer_norm, layer["norm_patches"])
        set_norm(attention.latents_layer_norm, layer["norm1"])
        set_norm(mlp.ln, layer["norm2"])
        if config.qk_norm:
            set_norm(attention.q_layer_norm, own["q_norm"])
            set_norm(attention.k_layer_norm, own["k_norm"])
        set_linear(mlp.fc, layer["mlp"]["up"]["w"])
        set_linear(mlp.c_proj, layer["mlp"]["down"]["w"])
    set_norm(model.layer_norm, params["norm"])
    return model


def idefics2(params, config):
    """transformers' connector of IDEFICS2 with our parameters."""
    theirs = transformers.Idefics2Config(
        vision_config={"hidden_size": WIDTH},
        text_config=dict(model_type="mistral", hidden_size=OUT, intermediate_size=config.input_mlp),
        perceiver_config=dict(
            hidden_size=OUT,
            resampler_n_latents=QUERIES,
            resampler_depth=config.layers,
            resampler_n_heads=HEADS,
            resampler_head_dim=config.head_dim,
            num_key_value_heads=config.kv_heads,
            rms_norm_eps=config.norm_eps,
        ),
    )
    theirs.perceiver_config._attn_implementation = "eager"
    model = Idefics2Connector(theirs)
    with torch.no_grad():
        model.perceiver_resampler.latents.copy_(torch.from_numpy(params["queries"]["tokens"]))
    gated = lambda module, own: [set_linear(getattr(module, f"{x}_proj"), own[x]["w"]) for x in ("gate", "up", "down")]
    gated(model.modality_projection, params["input"])
    for number, module in enumerate(model.perceiver_resampler.layers):
        layer, attention = at(params["layers"], number), module.self_attn
        set_attention(layer["attention"], attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        set_norm(module.input_latents_norm, layer["norm1"])
        set_norm(module.input_context_norm, layer["norm_patches"])
        set_norm(module.post_attention_layernorm, layer["norm2"])
        gated(module.mlp, layer["mlp"])
    set_norm(model.perceiver_resampler.norm, params["norm"])
    return lambda x: model(x, torch.ones(x.shape[:2], dtype=torch.int64))


def blip2(params, config):
    """transformers' Q-Former and a linear layer with our parameters."""
    theirs = transformers.Blip2QFormerConfig(
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=HEADS,
        intermediate_size=config.mlp,
        encoder_hidden_size=WIDTH,
        cross_attention_frequency=config.cross_every,
    )
    theirs._attn_implementation = "eager"
    model, linear = Blip2QFormerModel(theirs).eval(), torch.nn.Linear(config.width, OUT)

    def block(module, attention, norm) -> None:
        own = module.attention
        set_attention(attention, own.query, own.key, own.value, module.output.dense)
        set_norm(module.output.LayerNorm, norm)

    stacks = {number: (name, slot) for name, number, slot in places(config)}
    for number, module in enumerate(model.encoder.layer):
        name, repeat = stacks[number]
        layer = params
        for part in name.split("/"):
            layer = layer[part]
        layer = at(layer, repeat)
        block(module.attention, layer["attention"], layer["norm1"])
        if module.has_cross_attention:
            block(module.crossattention, layer["cross_attention"], layer["norm_cross"])
        mlp = layer["mlp"]
        set_linear(module.intermediate_query.dense, mlp["up"]["w"], mlp["up"]["b"])
        set_linear(module.output_query.dense, mlp["down"]["w"], mlp["down"]["b"])
        set_norm(module.output_query.LayerNorm, layer["norm2"])
    set_norm(model.layernorm, params["norm"])
    set_linear(linear, params["output"]["w"], params["output"]["b"])
    queries = torch.from_numpy(params["queries"]["tokens"])[None]
    return lambda x: linear(model(queries, encoder_hidden_states=x).last_hidden_state)


def places(config):
    """(path of the stack, layer, place in the stack) of every layer of a Q-Former."""
    return [
        (name, number, place)
        for part in segments(config.kinds)
        for name, numbers, _ in part.slots()
        for place, number in enumerate(numbers)
    ]


def qwen_vl(params, config):
    """The resampler of Qwen-VL, from torch's own modules, with our parameters."""
    side, eps = config.side, config.norm_eps
    project = torch.nn.Linear(WIDTH, OUT, bias=False)
    set_linear(project, params["input"]["w"])
    attention = torch.nn.MultiheadAttention(OUT, HEADS, batch_first=True)
    own = params["attention"]
    with torch.no_grad():
        weights = [own[name]["w"].reshape(OUT, OUT).T for name in "qkv"]
        attention.in_proj_weight.copy_(torch.from_numpy(np.concatenate(weights)))
        attention.in_proj_bias.copy_(torch.from_numpy(np.concatenate([own[name]["b"].reshape(-1) for name in "qkv"])))
    set_linear(attention.out_proj, own["out"]["w"], own["out"]["b"])
    norms = {name: torch.nn.LayerNorm(OUT, eps) for name in ("norm", "norm_patches", "norm_queries")}
    for name, norm in norms.items():
        set_norm(norm, params[name])
    table = torch.from_numpy(sinusoids(side, OUT))

    def model(x, grid):
        place = torch.nn.functional.interpolate(table.permute(2, 0, 1)[None], size=grid, mode="bicubic")
        values = norms["norm_patches"](project(x))
        keys = values + place[0].permute(1, 2, 0).reshape(-1, OUT)
        queries = norms["norm_queries"](torch.from_numpy(params["queries"]["tokens"])) + table.reshape(-1, OUT)
        out, _ = attention(queries[None], keys, values)
        return norms["norm"](out) @ torch.from_numpy(params["output"]["w"])

    return model


RESAMPLER = dict(queries=QUERIES, layers=2, heads=HEADS, head_dim=5)
IDEFICS = PerceiverConfig(**RESAMPLER, kv_heads=HEADS, width=WIDTH, mlp=4 * WIDTH, activation="relu")
CASES = {
    "idefics": (idefics, IDEFICS, WIDTH),
    "idefics with norms of heads": (idefics, PerceiverConfig(**vars(IDEFICS) | {"qk_norm": True}), WIDTH),
    "idefics2": (
        idefics2,
        PerceiverConfig(
            **RESAMPLER,
            kv_heads=2,
            width=OUT,
            mlp=4 * OUT,
            activation="silu",
            gated=True,
            norm="rms",
            norm_eps=1e-6,
            input_mlp=20,
        ),
        OUT,
    ),
    "blip-2": (blip2, QFormerConfig(QUERIES, width=16, layers=5, heads=HEADS, mlp=20, cross_every=2), OUT),
    "blip-2 with cross-attention everywhere": (
        blip2,
        QFormerConfig(QUERIES, width=16, layers=2, heads=HEADS, mlp=20, cross_every=1),
        OUT,
    ),
    "qwen-vl": (qwen_vl, PositionAwareConfig(QUERIES, OUT, HEADS), OUT),
}


@pytest.mark.parametrize("case", CASES)
def test_every_image_alone_gives_the_reference(case):
    reference, config, out = CASES[case]
    params = initial(config, out)
    x, vision, features = packed()
    got = np.asarray(jax.jit(partial(connect, config, out=out))(params, x, vision))
    assert got.shape == (1, len(ROWS) * SLOTS * QUERIES, out)
    model = reference(params, config)
    grids = [grid for row in ROWS for grid in row]
    tokens = got.reshape(len(ROWS), SLOTS, QUERIES, out)
    slots = [(row, slot) for row, images in enumerate(ROWS) for slot in range(len(images))]
    for (row, slot), grid, image in zip(slots, grids, features, strict=True):
        with torch.no_grad():
            expected = model(torch.from_numpy(image)[None], *([grid] if reference is qwen_vl else []))[0].numpy()
        np.testing.assert_allclose(tokens[row, slot], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_no_image_reaches_the_tokens_of_another(case):
    _, config, out = CASES[case]
    params, (x, vision, _) = initial(config, out), packed()

    def second(x):
        """The tokens of the second image, which shares a patch row with the first."""
        return connect(config, params, x, vision, out)[0, QUERIES : 2 * QUERIES]

    reached = np.asarray(jax.jit(jax.grad(lambda x: jnp.sum(second(x) ** 2)))(x))
    assert np.abs(reached[vision.image == 2]).min(axis=0).max() > 0
    np.testing.assert_array_equal(reached[vision.image != 2], 0)


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_reaches_every_weight(case):
    _, config, out = CASES[case]
    params, (x, vision, _) = initial(config, out), packed()
    onto = np.random.default_rng(2).standard_normal((1, len(ROWS) * SLOTS * QUERIES, out), np.float32)
    loss = lambda params: jnp.sum(connect(config, params, x, vision, out) * onto)
    for path, gradient in flatten(jax.jit(jax.grad(loss))(params)).items():
        # A bias of keys adds the same to all scores of a query, which the softmax does not see.
        assert np.abs(gradient).max() > 1e-6 or path.endswith(("k/b", "k_norm/bias")), path


def test_one_program_serves_all_numbers_and_sizes_of_images():
    _, config, out = CASES["idefics2"]
    params, run = initial(config, out), jax.jit(partial(connect, config, out=out))
    for rows in (ROWS, [[], [], [], []], [[(2, 2), (1, 3), (4, 3)]] * 4, [[(4, 5)]] * 4):
        x, vision, _ = packed(rows)
        assert np.isfinite(run(params, x, vision)).all()
    assert run._cache_size() == 1


@pytest.mark.parametrize("mesh", [{"data": 4, "tensor": 2}, {"fsdp": 8}], ids=str)
def test_a_mesh_changes_nothing(mesh):
    for case in ("idefics2", "blip-2", "qwen-vl"):
        _, config, out = CASES[case]
        params, (x, vision, _) = initial(config, out), packed()
        x, vision = jax.tree.map(lambda leaf: np.repeat(leaf, 8, axis=0), (x, vision))
        run = partial(connect, config, out=out)
        expected = jax.jit(run)(params, x, vision)
        with jax.set_mesh(make_mesh(mesh)):
            np.testing.assert_allclose(jax.jit(run)(params, x, vision), expected, atol=1e-5)


def test_prefix_tokens_are_read_only_if_asked_for():
    config = PerceiverConfig(**RESAMPLER, kv_heads=HEADS, width=WIDTH, mlp=WIDTH)
    params, (x, vision, _) = initial(config), packed([[(3, 4)]], 12, 1)
    vision.coords[0, 0, 0, 0] = -1  # the first place has a class token
    other = x.copy()
    other[0, 0, 0] += 1
    for prefix_tokens in (False, True):
        run = partial(connect, PerceiverConfig(**vars(config) | {"prefix_tokens": prefix_tokens}), params)
        assert np.array_equal(run(x, vision), run(other, vision)) != prefix_tokens


def test_errors_name_the_setting():
    x, vision, _ = packed()
    with pytest.raises(ValueError, match="data.images_per_row"):
        connect(IDEFICS, initial(IDEFICS), x, vision._replace(slots=None))
    with pytest.raises(ValueError, match="connector.queries=8 must be a square number"):
        PositionAwareConfig(8)
    with pytest.raises(ValueError, match="connector.width=32 is not a multiple of 4 and of connector.heads=3"):
        PositionAwareConfig(4, 32, heads=3)
    with pytest.raises(ValueError, match="connector.heads=6 is not a multiple of connector.kv_heads=4"):
        PerceiverConfig(heads=6, kv_heads=4)
    with pytest.raises(ValueError, match="connector.width=100 is not a multiple of connector.heads=12"):
        QFormerConfig(width=100)


def test_sinusoids_are_those_of_the_formula():
    table = sinusoids(3, 8)
    omega = np.array([1, 1e4**-0.5])
    expected = np.concatenate([np.sin(2 * omega), np.cos(2 * omega), np.sin(omega), np.cos(omega)])
    np.testing.assert_allclose(table[1, 2], expected, atol=1e-6)
