"""Every encoder before every connector, every connector before every decoder: traced here, trained in part."""

import itertools
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from examples import random_params
from tiny_run import load_config, load_module

from mllm_jax.common.config import ConfigError
from mllm_jax.data.pipeline.packing import collate, smallest_budget
from mllm_jax.model.vlm import abstract_params
from mllm_jax.train.input.processors import chat_processor
from mllm_jax.train.runs.config import read_run
from mllm_jax.train.step.forward import loss_sum

compose = load_module("compose")
ENCODERS, CONNECTORS, DECODERS = (list(parts) for parts in (compose.ENCODERS, compose.CONNECTORS, compose.DECODERS))
# All pairs of an encoder and a connector, and all of a connector and a decoder; an encoder and a decoder never meet.
PAIRS = [
    (encoder, connector, decoder, compose.ENTRIES[(i // 2 + j) % 2])
    for i, (encoder, decoder) in enumerate(zip(ENCODERS, DECODERS, strict=True))
    for j, connector in enumerate(CONNECTORS)
]
# Every part at least once, and both entries.
TRAINED = [pair for pair in PAIRS if CONNECTORS.index(pair[1]) == ENCODERS.index(pair[0]) % len(CONNECTORS)]


def small(*names):
    """The composed model with one layer (or one of each kind, or one more than taps feed) in every tower."""
    model = compose.model(*names)
    encoder = replace(model.encoder, layers=2 if model.encoder.window else 1)
    layers = max(len(model.decoder.sliding_windows or (0,)), 1 + len(encoder.deepstack_layers))
    return replace(model, encoder=encoder, decoder=replace(model.decoder, layers=layers))


def batch_of(model, count=3):
    """Two rows of questions about images and videos."""
    run = read_run(load_config("compose"))
    processor = chat_processor(run.processor, model, run.data)
    source = run.data.source("train")
    examples = [processor(source[i]["messages"]) for i in range(count)]
    return collate([[example] for example in examples], smallest_budget(examples), **model.layout)


def loss_of(model, params, batch):
    return loss_sum(model, params, batch)[0]


def check_step(*names):
    """One step lowers the loss and reaches every weight."""
    model = small(*names)
    batch, params = batch_of(model), random_params(model)
    step = jax.jit(jax.value_and_grad(partial(loss_of, model, batch=batch)))
    loss, found = step(params)
    unused = {"mask_token"}  # of self-supervised training
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        name = jax.tree_util.keystr(path)
        assert np.any(np.asarray(leaf) != 0) or unused & set(name.split("'")), name
    scale = 0.02 / np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(found)))
    assert step(jax.tree.map(lambda leaf, change: leaf - scale * change, params, found))[0] < loss


def test_pairs_are_all_pairs_of_neighbors():
    for first, second in ((ENCODERS, CONNECTORS), (CONNECTORS, DECODERS)):
        pairs = {pair[:2] if first is ENCODERS else pair[1:3] for pair in PAIRS}
        assert pairs == set(itertools.product(first, second))
    for number, parts in enumerate((ENCODERS, CONNECTORS, DECODERS, compose.ENTRIES)):
        assert {pair[number] for pair in TRAINED} == set(parts)


@pytest.mark.parametrize("names", PAIRS, ids=",".join)
def test_neighbors_fit(names):
    """Shapes only, which is where parts that do not fit fail."""
    model = small(*names)
    batch = batch_of(model, count=1)
    output, _ = jax.eval_shape(lambda: model.build().init_with_output(jax.random.key(0), batch))
    assert output.logits.shape == (*batch.tokens.shape, compose.VOCAB)


@pytest.mark.parametrize("names", TRAINED, ids=",".join)
def test_a_step_lowers_the_loss_and_reaches_every_weight(names):
    check_step(*names)


@pytest.mark.slow
@pytest.mark.parametrize("names", PAIRS, ids=",".join)
def test_a_step_of_all_neighbors(names):
    check_step(*names)


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "connector"), itertools.product(ENCODERS, CONNECTORS))
def test_the_whole_grid_has_gradients_of_its_parameters(encoder, connector):
    batch = batch_of(small(encoder, connector, DECODERS[0]))
    for decoder in DECODERS:
        model = small(encoder, connector, decoder)
        params = abstract_params(model)
        found = jax.eval_shape(jax.grad(partial(loss_of, model, batch=batch)), params)
        assert jax.tree.map(lambda leaf: leaf.shape, found) == jax.tree.map(lambda leaf: leaf.shape, params)


def test_unknown_parts_are_named():
    with pytest.raises(ConfigError, match="no connector 'mpl'; did you mean 'mlp'"):
        compose.get_config("clip,mpl,llama")
    with pytest.raises(ConfigError, match="no entry 'cross'"):
        compose.get_config("clip,mlp,llama,cross")
    with pytest.raises(ConfigError, match="ENCODER,CONNECTOR,DECODER"):
        compose.get_config("clip")
