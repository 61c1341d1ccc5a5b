"""Initial weights of a run: published ones, those of another run (such as the stage before it), or random ones."""

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
    """Returns the initial fp32 parameters of a run, sharded on the mesh: random, or from `run.init` or `run.parts`.

    New adapters are added if the run has adapters and the source has none; the base is then stored as
    `run.lora.base_dtype` sets, and a base that is not fp32 is read in bf16. Adapters of an earlier run continue if this
    run has the same, and are merged if it has none. A value head starts at 0, and is left out if the run has none.

    Raises:
      ConfigError: the source has another model or other adapters. FileNotFoundError: the source run has no checkpoint.
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
            f"{ours.get(path)} here" + (f", and {len(other) - 1} more weights differ" if len(other) > 1 else "")
        )
    check_adapters(before.lora, run.lora, f"of config.init={run.init}")
    params = _valued(run, restore_params(run.init, mesh=mesh)[1], mesh)
    if not before.lora.rank:
        return _adapted(run, params, mesh)
    return params if run.lora.rank else _merged(run, params, mesh)


def check_adapters(before: LoraConfig, now: LoraConfig, whose: str) -> None:
    """Raises ConfigError if a run can neither continue nor merge the adapters of the run before it."""
    if before.rank and now.rank and before != now:
        told = ", ".join(f"{name} was {was!r}, is {is_now!r}" for name, was, is_now in differences(before, now))
        raise ConfigError(
            f"config.lora: the adapters {whose} continue only unchanged, but {told}: give the same, or rank=0 to merge "
            "them and train the weights"
        )


def _half(run: Run) -> dict[str, str]:
    """The weights that are read in bfloat16, by path: those that the run does not keep in fp32."""
    if run.lora.base_dtype == "float32" or not run.lora.rank:
        return {}
    kept, base = (flatten(abstract_params(replace(run.model, lora=lora))) for lora in (run.lora, LoraConfig()))
    return {path: "bfloat16" for path in base if path not in kept or kept[path].dtype != "float32"}


def _adapted(run: Run, params: dict, mesh: Mesh) -> dict:
    """The base model's parameters, kept as the run keeps them, and new adapters."""
    rules, boxed = run.model.runtime.rules, abstract_boxed(replace(run.model, lora=LoraConfig()))
    base, adapters = split_adapters(shardings(abstract_boxed(run.model), mesh, rules))
    fresh = jax.jit(partial(init_adapters, run.model), out_shardings=adapters)(jax.random.key(run.train.seed))
    return join(keep_arrays(params, boxed, run.lora, base), fresh)


def _merged(run: Run, params: dict, mesh: Mesh) -> dict:
    """The weights of a run before, fp32, with its adapters in them."""
    boxed = abstract_boxed(run.model)
    whole = lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
    merge = lambda params: split_adapters(add_products(jax.tree.map(whole, params), boxed))[0]
    return jax.jit(merge, out_shardings=shardings(boxed, mesh, run.model.runtime.rules))(params)


def _valued(run: Run, params: dict, mesh: Mesh) -> dict:
    """The parameters with a value head, theirs or a new one, where the run has one, and without where it has none."""
    if run.model == without_values(run.model):
        return {part: x for part, x in params.items() if part != VALUE_HEAD}
    if VALUE_HEAD in params:
        return params
    boxed = abstract_boxed(run.model)
    layout, shapes = shardings(boxed, mesh, run.model.runtime.rules)[VALUE_HEAD], abstract_params(run.model)[VALUE_HEAD]
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return params | {VALUE_HEAD: jax.jit(zeros, out_shardings=layout)()}


def processor_of(run: Run) -> str:
    """Folder or name of the run's processor: `config.processor`, or the source of its initial weights."""
    source = processor_source(run.processor, run.init, run.parts)
    return os.fspath(run_folder(source) / PROCESSOR) if source and is_run(source) else source


def read_config(workdir: str | Path, step: int | None = None) -> Run:
    """Reads the config of a checkpoint in `workdir`, by default the newest. Raises FileNotFoundError if there is none.

    A run with stages stands for its last completed stage.
    """
    return read_run(_config(_about(workdir, step)[1]))


def restore_params(
    workdir: str | Path, step: int | None = None, mesh: Mesh | None = None
) -> tuple[ModelConfig | DualConfig, dict]:
    """Returns a model and its fp32 parameters for generation and evaluation, without the optimizer's state.

    Args:
      workdir: folder of a training run. step: step of the checkpoint, by default the newest.
      mesh: mesh on which the run's rules shard the parameters. None: all on the first device.
    Raises:
      FileNotFoundError: there is no such checkpoint. Damaged: it is not complete.
    """
    step, about = _about(workdir, step)
    run = read_run(_config(about))
    model = run.model
    mesh = mesh or make_mesh(devices=jax.local_devices()[:1])
    layout = shardings(abstract_boxed(model), mesh, model.runtime.rules)
    wanted = saved(run, jax.tree.map(placed, abstract_params(model), layout))
    place = run_folder(workdir) / CHECKPOINTS / str(step)
    check_arrays({"params": wanted}, about["arrays"], place)
    with _reader(workdir) as manager, reading(place):
        found = manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(wanted)))
    verify({"params": found.params}, about["arrays"], place)
    return model, completed(run, run_folder(workdir), found.params, partial(first_params, run, mesh))


def load_workdir(workdir: str | Path, step: int | None = None, mesh: Mesh | None = None) -> Pretrained:
    """A trained model with its processor, ready for generation, evaluation and `save_pretrained`.

    A value head, which nothing of that needs, is left out; `restore_params` has it.

    Args and errors are those of `restore_params`.
    """
    model, params = restore_params(workdir, step, mesh)
    model, params = without_values(model), {part: x for part, x in params.items() if part != VALUE_HEAD}
    return Pretrained(model, model.build(), params, load_processor(run_folder(workdir) / PROCESSOR, model))


def _reader(workdir: str | Path) -> ocp.CheckpointManager:
    folder = run_folder(workdir).resolve() / CHECKPOINTS
    if not folder.is_dir():
        raise FileNotFoundError(f"{workdir} is not the folder of a training run: it has no {CHECKPOINTS}/")
    return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(create=False))


def _about(workdir: str | Path, step: int | None) -> tuple[int, dict[str, Any]]:
    with _reader(workdir) as manager:
        steps = manager.all_steps()
        step = manager.latest_step() if step is None else step
        if not steps:
            raise FileNotFoundError(f"{workdir} has no checkpoint yet: its run ended, or was ended, before it saved")
        if step not in steps:
            raise FileNotFoundError(f"{workdir} has no checkpoint {step}; there are {sorted(steps)}")
        place = run_folder(workdir) / CHECKPOINTS / str(step)
        with reading(place, everywhere=True):
            about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
    return step, read_sealed(about, place)


def _config(about: dict[str, Any]) -> ConfigDict:
    return load(json.dumps(about["config"]))
