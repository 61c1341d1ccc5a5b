"""Every encoder before every connector and every decoder: the grid is traced, a part of it trained."""

import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_run import load_config, load_module

from mllm_jax.config import ConfigError
from mllm_jax.data.pack import collate, tightest
from mllm_jax.model import abstract_params, init_params
from mllm_jax.train.inputs import make_processor
from mllm_jax.train.run import read_run
from mllm_jax.train.step import loss_sum

compose = load_module("compose")
GRID = list(itertools.product(compose.ENCODERS, compose.CONNECTORS))
# Every part at least once, and both entries.
TRAINED = [
    (encoder, list(compose.CONNECTORS)[i % 5], decoder, compose.ENTRIES[i % 2])
    for i, (encoder, decoder) in enumerate(zip(compose.ENCODERS, compose.DECODERS, strict=True))
]


def small(*names):
    """The composed model with one layer (or one of each kind) in every tower."""
    model = compose.model(*names)
    encoder = replace(model.encoder, layers=2 if model.encoder.window else 1)
    return replace(model, encoder=encoder, decoder=replace(model.decoder, layers=len(model.decoder.windows or (0,))))


def batch_of(model, count=3):
    """Two rows of questions about pictures and clips."""
    run = read_run(load_config("compose"))
    processor = make_processor(run.processor, model, run.data)
    source = run.data.source("train")
    examples = [processor(source[i]["messages"]) for i in range(count)]
    layout = {"merge": model.merge, "values": model.patch_values, "prefix": model.prefix}
    return collate([[example] for example in examples], tightest(examples), **layout)


def gradients(model, batch):
    return jax.grad(lambda params: loss_sum(model, params, batch)[0])


def check_shapes(encoder, connector, decoders):
    """Shapes only, which is where parts that do not fit fail."""
    batch = None
    for decoder in decoders:
        model = small(encoder, connector, decoder)
        batch = batch or batch_of(model)
        params = abstract_params(model)
        found = jax.eval_shape(gradients(model, batch), params)
        assert jax.tree.map(lambda leaf: leaf.shape, found) == jax.tree.map(lambda leaf: leaf.shape, params)


@pytest.mark.parametrize(("encoder", "connector"), GRID)
def test_every_encoder_fits_every_connector(encoder, connector):
    number = GRID.index((encoder, connector))
    check_shapes(encoder, connector, [list(compose.DECODERS)[number % len(compose.DECODERS)]])


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "connector"), GRID)
def test_the_whole_grid_has_gradients_of_its_parameters(encoder, connector):
    check_shapes(encoder, connector, compose.DECODERS)


@pytest.mark.parametrize("names", TRAINED, ids=",".join)
def test_a_step_lowers_the_loss_and_reaches_every_weight(names):
    model = small(*names)
    batch, params = batch_of(model), init_params(model, jax.random.key(0))

    @jax.jit
    def step(params):
        (loss, _), found = jax.value_and_grad(lambda params: loss_sum(model, params, batch), has_aux=True)(params)
        scale = 0.02 / jax.numpy.sqrt(sum(jax.numpy.sum(leaf**2) for leaf in jax.tree.leaves(found)))
        return loss, found, jax.tree.map(lambda leaf, change: leaf - scale * change, params, found)

    loss, found, params = step(params)
    assert step(params)[0] < loss
    unused = {"mask_token"}  # of self-supervised training
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        name = jax.tree_util.keystr(path)
        assert np.any(np.asarray(leaf) != 0) or unused & set(name.split("'")), name


def test_unknown_parts_are_named():
    with pytest.raises(ConfigError, match="no connector 'mpl'; did you mean 'mlp'"):
        compose.get_config("clip,mpl,llama")
    with pytest.raises(ConfigError, match="no entry 'cross'"):
        compose.get_config("clip,mlp,llama,cross")
    with pytest.raises(ConfigError, match="ENCODER,CONNECTOR,DECODER"):
        compose.get_config("clip")
