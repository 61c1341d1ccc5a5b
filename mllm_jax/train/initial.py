"""What a run begins with: published weights, or those of another run, which may have been the stage before it."""

import os

from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from mllm_jax.config import ConfigError
from mllm_jax.model import abstract_params
from mllm_jax.train.checkpoint import PROCESSOR, read_config, restore_params
from mllm_jax.train.run import Run, load_init
from mllm_jax.train.stages import is_run, run_folder


def initial_params(run: Run, mesh: Mesh) -> dict:
    """The weights that `run.init` names, fp32, on the mesh.

    Raises:
      ConfigError: they are of a run with another model. FileNotFoundError: that run has no checkpoint.
    """
    if not is_run(run.init):
        return load_init(run, mesh)
    shapes = lambda model: {path: x.shape for path, x in flatten_dict(abstract_params(model), sep="/").items()}
    ours, theirs = shapes(run.model), shapes(read_config(run.init).model)
    if other := [path for path in sorted({*ours, *theirs}) if ours.get(path) != theirs.get(path)]:
        path = other[0]
        raise ConfigError(
            f"config.init={run.init} is a run of another model: {path} has the shape {theirs.get(path)} there, "
            f"{ours.get(path)} here" + (f", and {len(other) - 1} more weights differ" if len(other) > 1 else "")
        )
    return restore_params(run.init, mesh=mesh)[1]


def processor_of(run: Run) -> str:
    """Where the run's processor is: where it says, or beside the weights that it begins with."""
    source = run.processor or run.init
    return os.fspath(run_folder(source) / PROCESSOR) if source and is_run(source) else source
