"""Assembles a model from published parts: a tower from one folder, a decoder from another, the rest random."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllm_jax.common.config import ConfigError
from mllm_jax.common.errors import describe_error
from mllm_jax.common.trees import differences, flatten, unflatten
from mllm_jax.model.dual_encoder import DualConfig
from mllm_jax.model.vlm import ModelConfig, abstract_boxed, init_params
from mllm_jax.nn.lora import LoraConfig
from mllm_jax.pretrained.api import load_params, published_config
from mllm_jax.sharding.weights import Partitioned, shardings
from mllm_jax.train.runs.config import Run

# Fields of a part's config that may differ from the published ones; a difference in any other field is printed.
CHOSEN = ("features", "deepstack_layers", "vocab", "prefix", "family")


def load_parts(run: Run, mesh: Mesh, dtypes: dict[str, str]) -> dict[str, Any]:
    """Returns the base model's parameters, sharded over the mesh.

    The parts in `run.taken` are loaded from their folders, all others are random. If the run's vocabulary is larger
    than a folder's, each additional row is the mean of the published rows: `resize_token_embeddings` of transformers
    without its noise.

    Args:
      dtypes: dtypes of parameters that are not kept in fp32, by path.
    Raises:
      ConfigError: a folder contains an unknown model, lacks the part, or its weights have other names or shapes; the
        message lists them. FileNotFoundError: the folder or model does not exist.
    """
    model, sources = replace(run.model, lora=LoraConfig()), run.taken
    boxed, rules = abstract_boxed(model), model.runtime.rules
    layout = shardings(boxed, mesh, rules)
    theirs = {part: _matching(part, source, model, boxed) for part, source in sources.items()}
    others = lambda tree: {name: leaf for name, leaf in tree.items() if name not in sources}
    seeded = jax.jit(lambda key: others(init_params(model, key)), out_shardings=others(layout))
    params = seeded(jax.random.key(run.train.seed))
    for part, source in sources.items():
        params[part] = _load(part, source, theirs[part], boxed[part], layout[part], dtypes)
    return params


def _matching(part: str, source: str, model: ModelConfig | DualConfig, boxed: Any) -> ModelConfig | DualConfig:
    """Returns the config of the published model in a folder. Raises ConfigError unless this part's weights fit ours."""
    try:
        theirs = replace(published_config(source), runtime=model.runtime)
    except ValueError as error:
        raise ConfigError(f"config.parts.{part}: {describe_error(error)}") from error
    if part not in (parts := abstract_boxed(theirs)):
        raise ConfigError(
            f"config.parts.{part}={source}: this model has no {part}. Choose a folder with that part; this one has "
            f"{', '.join(parts)}."
        )
    ours, published = flatten({part: boxed[part]}), flatten({part: parts[part]})
    faults = [f"{path} is not in the folder, {_shape(ours[path])} here" for path in ours.keys() - published.keys()]
    faults += [
        f"{path} is {_shape(published[path])} in the folder, not here" for path in published.keys() - ours.keys()
    ]
    faults += [
        f"{path} is {_shape(published[path])} in the folder, {_shape(ours[path])} here"
        for path in ours.keys() & published.keys()
        if not _fits(published[path], ours[path])
    ]
    if faults:
        lines = "\n  ".join(sorted(faults))
        raise ConfigError(f"config.parts.{part}={source} does not fit config.model.{part}:\n  {lines}")
    if jax.process_index() == 0:
        for path, published, own in differences(getattr(theirs, part), getattr(model, part), CHOSEN):
            change = f"with {path}={published!r}, which is {own!r} in config.model.{part}"
            print(f"config.parts.{part}={source} was published {change}", flush=True)
    return theirs


def _shape(box: Partitioned) -> list[int]:
    return list(box.value.shape)


def _fits(theirs: Partitioned, ours: Partitioned) -> bool:
    """Returns whether the shapes are equal, except that our vocabulary may have more rows."""
    if theirs.value.ndim != ours.value.ndim:
        return False
    sizes = zip(ours.names, theirs.value.shape, ours.value.shape)
    return all(a == b or (name == "vocab" and a < b) for name, a, b in sizes)


def _load(part: str, source: str, theirs: Any, boxed: Any, layout: Any, dtypes: dict[str, str]) -> Any:
    """Loads the weights of one part, with the shapes and shardings of our model."""
    boxes, targets, published = flatten(boxed), flatten(layout), flatten(abstract_boxed(theirs)[part])
    resized = [path for path in boxes if boxes[path].value.shape != published[path].value.shape]
    # Replicated until resized: the mesh may not divide the published number of rows.
    replicated = {path: NamedSharding(targets[path].mesh, PartitionSpec()) for path in resized}
    loaded = unflatten(targets | replicated)
    params = flatten(load_params(source, theirs, {part: loaded}, dtypes=dtypes, part=part)[part])
    for path in resized:
        axis = boxes[path].names.index("vocab")
        grow = partial(_with_means, axis=axis, size=boxes[path].value.shape[axis])
        params[path] = jax.jit(grow, out_shardings=targets[path])(params[path])
    return unflatten(params)


def _with_means(x: jax.Array, axis: int, size: int) -> jax.Array:
    mean = jnp.mean(x.astype(jnp.float32), axis, keepdims=True).astype(x.dtype)
    return jnp.concatenate([x, jnp.repeat(mean, size - x.shape[axis], axis)], axis)
