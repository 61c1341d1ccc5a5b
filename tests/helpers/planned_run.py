"""A tiny run to plan, and the text of a compiled program."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from tiny_run import get_config

from mllm_jax.train.runs.config import read_run


def compiled_text(step, mesh, *arguments):
    """The text of a step, compiled for arguments of these (shape, partition spec) in fp32."""
    place = lambda x, spec: jax.ShapeDtypeStruct(x, jnp.float32, sharding=NamedSharding(mesh, spec))
    return jax.jit(step).trace(*(place(*x) for x in arguments)).lower().compile().as_text()


def tiny(**runtime):
    """A run of every part, with AdamW: Muon has products of its own."""
    config = get_config()
    config.optim.name = "adamw"
    run = read_run(config)
    changed = dataclasses.replace(run.model.runtime, **runtime)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, runtime=changed))
