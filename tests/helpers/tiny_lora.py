"""A tiny model with random adapters, a batch for it, and the step that trains them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from examples import VALUES, random_example, random_params, tiny_config
from flax.traverse_util import flatten_dict, unflatten_dict

from mllm_jax.data.pipeline.packing import Budget, collate
from mllm_jax.nn.lora import split_adapters
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.algorithms.supervised import CrossEntropy
from mllm_jax.train.step.batches import batch_shardings
from mllm_jax.train.step.context import TrainContext, state_from_params
from mllm_jax.train.step.optimizer import OptimConfig
from mllm_jax.train.step.train_step import make_train_step

BASE = replace(tiny_config(), encoder=replace(tiny_config().encoder, layers=2, deepstack_layers=(0,)))
BASE = replace(BASE, decoder=replace(BASE.decoder, layers=2))
OPTIM = OptimConfig(learning_rate=1e-2, schedule="constant")


def random_adapters(lora, **constants):
    """Random adapters with other scales in every layer; given constants replace theirs."""
    drawn = split_adapters(random_params(replace(BASE, lora=lora), 1))[1]
    constant = lambda name, x: np.full_like(x, constants[name]) if name in constants else 1 + x
    value = lambda path, x: constant(path[-1].key, x) if x.ndim < 2 else 2 * x
    return jax.tree_util.tree_map_with_path(value, drawn)


def random_batch():
    """Eight rows of conversations with images and videos; one row is empty."""
    rng = np.random.default_rng(0)
    rows = [[random_example(rng, 20, (4, 6))], [random_example(rng, 7, (3, 4, 4)), random_example(rng, 9)], []]
    rows += [[random_example(rng, 9 + i, (2 * i + 2, 4))] for i in range(5)]
    return collate(rows, Budget(48, 2, 64), merge=2, values=VALUES)


def merged(base, adapters):
    """w + scale * A B, matrix by matrix."""
    flat, weights = flatten_dict(adapters, sep="/"), flatten_dict(base, sep="/")
    for path in [path.removesuffix("/lora_down") for path in flat if path.endswith("lora_down")]:
        down, up, scale = (flat[f"{path}/lora_{name}"] for name in ("down", "up", "scale"))
        w, rank = weights[f"{path}/w"].copy(), down.shape[-1]
        for layer in np.ndindex(scale.shape):
            product = scale[layer] * down[layer].reshape(-1, rank) @ up[layer].reshape(rank, -1)
            if "qkv" in path:  # one A for queries, keys and values
                product = product.reshape(len(product), 3, -1).swapaxes(0, 1)
            w[layer] += product.reshape(w[layer].shape)
        weights[f"{path}/w"] = w
    return unflatten_dict(weights, sep="/")


def start(lora, params, shape, **options):
    """(state, step, a function that puts batches on the mesh)."""
    config, mesh = replace(BASE, lora=lora), make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])
    optim = replace(OPTIM, freeze=lora.freezes(()))
    context = TrainContext(config, optim, mesh, **options)
    step = make_train_step(context, CrossEntropy(config, chunk=48))
    put = lambda batch: jax.device_put(batch, batch_shardings(batch, mesh, BASE.runtime.rules))
    return state_from_params(context, jax.tree.map(jnp.array, params)), step, put
