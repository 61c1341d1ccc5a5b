"""Loads the initial parameters of a run, and the models of finished runs.

A run begins with published weights, the weights of another run (such as the stage before it), or random ones.
"""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mllm_jax.common.config import ConfigError, load
from mllm_jax.common.trees import differences, flatten, join
from mllm_jax.common.workdir import CHECKPOINTS, PROCESSOR, is_run, run_folder
from mllm_jax.model.dual_encoder import DualConfig
from mllm_jax.model.vlm import ModelConfig, abstract_boxed, abstract_params, init_adapters, init_params, without_values
from mllm_jax.nn.lora import LoraConfig, add_products, keep_arrays, split_adapters
from mllm_jax.nn.value_head import NAME as VALUE_HEAD
from mllm_jax.pretrained.api import Pretrained, load_params, load_processor
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.sharding.weights import shardings
from mllm_jax.train.checkpoint.components import load_parts
from mllm_jax.train.checkpoint.damage import check_arrays, read_sealed, reading, verify
from mllm_jax.train.checkpoint.frozen_base import completed, saved
from mllm_jax.train.checkpoint.manager import placed
from mllm_jax.train.runs.config import Run, processor_source, read_run


def first_params(run: Run, mesh: Mesh) -> dict:
    """Returns the initial parameters of a run, sharded over the mesh: from `run.parts`, `run.init`, or at random.

    They are fp32, except the base weights under new adapters: `run.lora.base_dtype` sets their dtype, and those that
    are not kept in fp32 are read in bf16. Adapters of a previous run are kept if this run has the same ones, and merged
    into the weights if it has none. A missing value head is initialized to 0, a superfluous one is removed.

    Raises:
      ConfigError: the previous run has another model or other adapters. FileNotFoundError: it has no checkpoint.
    """
    if run.taken:
        return _adapted(run, _valued(run, load_parts(run, mesh, _half(run)), mesh), mesh)
    if not run.init:
        layout = shardings(abstract_boxed(run.model), mesh, run.model.runtime.rules)
        return jax.jit(partial(init_params, run.model), out_shardings=layout)(jax.random.key(run.train.seed))
    base = without_values(replace(run.model, lora=LoraConfig()))
    if not is_run(run.init):
        layout = shardings(abstract_boxed(base), mesh, base.runtime.rules)
        return _adapted(run, _valued(run, load_params(run.init, base, layout, dtypes=_half(run)), mesh), mesh)
    before = read_config(run.init)
    shapes = lambda model: {path: x.shape for path, x in flatten(abstract_params(model)).items()}
    ours, theirs = shapes(base), shapes(without_values(replace(before.model, lora=LoraConfig())))
    if other := [path for path in sorted({*ours, *theirs}) if ours.get(path) != theirs.get(path)]:
        path = other[0]
        raise ConfigError(
            f"config.init={run.init} is a run of another model: {path} has the shape {theirs.get(path)} there, "
            f"{ours.get(path)} here"
            + (f", and {len(other) - 1} more weights differ" if len(other) > 1 else "")
            + ". Set config.model to the model of that run, or choose another run."
        )
    check_adapters(before.lora, run.lora, f"of config.init={run.init}")
    params = _valued(run, restore_params(run.init, mesh=mesh)[1], mesh)
    if not before.lora.rank:
        return _adapted(run, params, mesh)
    return params if run.lora.rank else _merged(run, params, mesh)


def check_adapters(before: LoraConfig, now: LoraConfig, whose: str) -> None:
    """Raises ConfigError if a run can neither continue the adapters of the previous one nor merge them.

    Args:
      before, now: adapters of the previous run and of this one.
      whose: origin of the previous adapters, for the message.
    """
    if before.rank and now.rank and before != now:
        changes = ", ".join(f"{name} was {was!r}, is {is_now!r}" for name, was, is_now in differences(before, now))
        raise ConfigError(
            f"config.lora: the adapters {whose} cannot change, and {changes}. Set the same values, or rank=0 to merge "
            "them and train the weights."
        )


def _half(run: Run) -> dict[str, str]:
    """Returns {path: "bfloat16"} of the weights to read in bfloat16: those that the run does not keep in fp32."""
    if run.lora.base_dtype == "float32" or not run.lora.rank:
        return {}
    stored, base = (flatten(abstract_params(replace(run.model, lora=lora))) for lora in (run.lora, LoraConfig()))
    return {path: "bfloat16" for path in base if path not in stored or stored[path].dtype != "float32"}


def _adapted(run: Run, params: dict, mesh: Mesh) -> dict:
    """Returns the base model's parameters in the dtypes of the run, with new adapters."""
    rules, boxed = run.model.runtime.rules, abstract_boxed(replace(run.model, lora=LoraConfig()))
    base, adapters = split_adapters(shardings(abstract_boxed(run.model), mesh, rules))
    fresh = jax.jit(partial(init_adapters, run.model), out_shardings=adapters)(jax.random.key(run.train.seed))
    return join(keep_arrays(params, boxed, run.lora, base), fresh)


def _merged(run: Run, params: dict, mesh: Mesh) -> dict:
    """Returns the fp32 weights of a previous run with its adapters merged into them."""
    boxed = abstract_boxed(run.model)
    to_fp32 = lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
    merge = lambda params: split_adapters(add_products(jax.tree.map(to_fp32, params), boxed))[0]
    return jax.jit(merge, out_shardings=shardings(boxed, mesh, run.model.runtime.rules))(params)


def _valued(run: Run, params: dict, mesh: Mesh) -> dict:
    """Returns the parameters with a value head (the given one, or zeros) if the run's model has one, else without."""
    if run.model == without_values(run.model):
        return {part: x for part, x in params.items() if part != VALUE_HEAD}
    if VALUE_HEAD in params:
        return params
    boxed = abstract_boxed(run.model)
    layout, shapes = shardings(boxed, mesh, run.model.runtime.rules)[VALUE_HEAD], abstract_params(run.model)[VALUE_HEAD]
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return params | {VALUE_HEAD: jax.jit(zeros, out_shardings=layout)()}


def processor_of(run: Run) -> str:
    """Returns the folder or name of the run's processor: `run.processor`, or the one next to its initial weights."""
    source = processor_source(run.processor, run.init, run.parts)
    return os.fspath(run_folder(source) / PROCESSOR) if source and is_run(source) else source


def read_config(workdir: str | Path, step: int | None = None) -> Run:
    """Returns the run whose checkpoint is below `workdir`: at `step`, by default the newest.

    For a run with stages, this and the functions below read the last stage that has ended.

    Raises:
      FileNotFoundError: there is no such checkpoint.
    """
    return read_run(_config(_about(workdir, step)[1]))


def restore_params(
    workdir: str | Path, step: int | None = None, mesh: Mesh | None = None
) -> tuple[ModelConfig | DualConfig, dict]:
    """Restores a model and its fp32 parameters for generation and evaluation, without the optimizer's state.

    Args:
      workdir: folder of a training run. step: step of the checkpoint. Default: the newest.
      mesh: mesh over which the run's rules shard the parameters. Default: the first device.
    Raises:
      FileNotFoundError: there is no such checkpoint. Damaged: the checkpoint is damaged.
    """
    step, about = _about(workdir, step)
    run = read_run(_config(about))
    model = run.model
    mesh = mesh or make_mesh(devices=jax.local_devices()[:1])
    layout = shardings(abstract_boxed(model), mesh, model.runtime.rules)
    wanted = saved(run, jax.tree.map(placed, abstract_params(model), layout))
    folder = run_folder(workdir) / CHECKPOINTS / str(step)
    check_arrays({"params": wanted}, about["arrays"], folder)
    with _reader(workdir) as manager, reading(folder):
        items = manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(wanted)))
    verify({"params": items.params}, about["arrays"], folder)
    return model, completed(run, run_folder(workdir), items.params, partial(first_params, run, mesh))


def load_workdir(workdir: str | Path, step: int | None = None, mesh: Mesh | None = None) -> Pretrained:
    """Loads a trained model with its processor, ready for generation, evaluation and `save_pretrained`.

    A value head is left out, since these do not use it; `restore_params` returns it. Arguments and errors are those of
    `restore_params`.
    """
    model, params = restore_params(workdir, step, mesh)
    model, params = without_values(model), {part: x for part, x in params.items() if part != VALUE_HEAD}
    return Pretrained(model, model.build(), params, load_processor(run_folder(workdir) / PROCESSOR, model))


def _reader(workdir: str | Path) -> ocp.CheckpointManager:
    folder = run_folder(workdir).resolve() / CHECKPOINTS
    if not folder.is_dir():
        raise FileNotFoundError(f"{workdir} is not the folder of a training run: it has no folder {CHECKPOINTS}.")
    return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(create=False))


def _about(workdir: str | Path, step: int | None) -> tuple[int, dict[str, Any]]:
    with _reader(workdir) as manager:
        steps = manager.all_steps()
        step = manager.latest_step() if step is None else step
        if not steps:
            raise FileNotFoundError(f"{workdir} has no checkpoint yet: its run ended before the first save.")
        if step not in steps:
            raise FileNotFoundError(f"{workdir} has no checkpoint {step}; there are {sorted(steps)}.")
        folder = run_folder(workdir) / CHECKPOINTS / str(step)
        with reading(folder, everywhere=True):
            about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
    return step, read_sealed(about, folder)


def _config(about: dict[str, Any]) -> ConfigDict:
    return load(json.dumps(about["config"]))
