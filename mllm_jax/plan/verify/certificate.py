"""Compares a step on several meshes with one device: logits, gradients, losses and routing must not change."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mllm_jax.common.config import ConfigError, from_config_dict
from mllm_jax.common.settings import Config, Positive
from mllm_jax.common.trees import flatten
from mllm_jax.data.pipeline.loader import make_loader
from mllm_jax.data.synthetic.scenes import SCENES
from mllm_jax.model.vlm import VLM, ModelConfig, init_params
from mllm_jax.sharding.mesh import MESH_AXES, make_mesh
from mllm_jax.train.algorithms.supervised import CrossEntropy
from mllm_jax.train.input.processors import chat_processor
from mllm_jax.train.losses.load_balance import BalanceConfig
from mllm_jax.train.runs.config import PARTS, processor_source, read_run
from mllm_jax.train.step.batches import batch_shardings
from mllm_jax.train.step.context import TrainContext, state_from_params
from mllm_jax.train.step.optimizer import OptimConfig
from mllm_jax.train.step.state import state_shardings
from mllm_jax.train.step.train_step import make_train_step
from mllm_jax.types import Batch

MESHES = ("fsdp=8", "fsdp=2,tensor=4", "data=2,expert=4", "fsdp=2,context=4", "data=2,fsdp=2,tensor=2")
QUICKLY = {"xla_backend_optimization_level": 0}  # machine code of CPUs that is compiled in half the time
PERTURBATION = 0.1  # standard deviation of what is added to all weights: some would begin with zero or one


@dataclass(frozen=True)
class Certificate(Config):
    """Settings of a certificate.

    models: models by name. data, processor: as in a run.
    balance: balance losses of the models with experts.
    meshes: sizes of axes, as in "fsdp=2,tensor=4"; the largest sets the number of devices.
    tolerance: largest relative difference that passes.
    """

    models: Mapping[str, ModelConfig]
    data: Any
    processor: str = SCENES
    balance: BalanceConfig = BalanceConfig("global", aux_loss_weight=0.01, z_loss_weight=0.001)
    meshes: tuple[str, ...] = MESHES
    tolerance: Positive = 1e-5


class Measured(NamedTuple):
    """Results of a step, on the host."""

    tensors: dict[str, np.ndarray]  # the logits of real tokens, and the gradient of every weight
    losses: dict[str, float]  # by name; with experts also those that balance them
    choices: np.ndarray | None  # i32[Lm n k] the experts that real tokens chose, in every layer that has some


class Comparison(NamedTuple):
    """Differences between one mesh and one device."""

    mesh: str
    differences: dict[str, float]  # of every tensor and loss, relative
    decisions: int | None  # tokens, in each layer anew, that chose other experts; None without experts

    @property
    def worst(self) -> str:
        return max(self.differences, key=self.differences.get)

    def drifts(self, tolerance: float) -> bool:
        return self.differences[self.worst] > tolerance or bool(self.decisions)


def read_certificate(config: ConfigDict, name: str = "run") -> Certificate:
    """Reads the config of a certificate, or of a run, which is certified on `MESHES`. Raises ConfigError."""
    if "models" in config:
        return from_config_dict(Certificate, config, PARTS, "config")
    run = read_run(config)
    return Certificate(
        {name: run.model}, run.data, processor_source(run.processor, run.init, run.parts), run.train.balance
    )


def compare(certificate: Certificate, name: str) -> Iterator[Comparison]:
    """One model, on every mesh. Raises ConfigError for a mesh that the model or its batch does not divide into."""
    model = certificate.models[name]
    batch = packed_batch(certificate, model)
    meshes = {text: make_mesh(read_mesh(text), jax.devices()[: devices(text)]) for text in certificate.meshes}
    for text, mesh in meshes.items():
        try:
            state_shardings(model, gradient_as_state(), mesh, model.runtime.rules)
            batch_shardings(batch, mesh, model.runtime.rules)
        except ValueError as error:
            raise ConfigError(f"config.meshes: {text} with {name}: {error}") from error
    run = partial(measure, model, random_params(model), batch, certificate.balance)
    alone = run(make_mesh({}, jax.devices()[:1]))
    for text, mesh in meshes.items():
        found = run(mesh)
        yield Comparison(text, differences(found, alone), decisions(found, alone))


def measure(model: ModelConfig, params, batch: Batch, balance: BalanceConfig, mesh: Mesh) -> Measured:
    """The forward pass and one training step on a mesh, in fp32."""
    model = replace(model, runtime=replace(model.runtime, dtype="float32"))
    rules, experts = model.runtime.rules, model.decoder.moe is not None
    optim = OptimConfig(schedule="constant", max_grad_norm=0.0)
    context = TrainContext(
        model, optim, mesh, balance=balance if experts else BalanceConfig(), optimizer=gradient_as_state()
    )
    step = make_train_step(context, CrossEntropy(model))

    @jax.jit
    def both(state, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out = VLM(model).apply({"params": state.params}, batch)
        return out.logits, None if out.routing is None else out.routing.choices, *step(state, batch)

    arguments = state_from_params(context, params), jax.device_put(batch, batch_shardings(batch, mesh, rules))
    compiled = both.lower(*arguments).compile(compiler_options=QUICKLY)
    logits, choices, state, metrics = jax.device_get(compiled(*arguments))
    gradients = {f"gradient {path}": value for path, value in flatten(state.opt_state).items()}
    losses = {name: float(metrics[name]) for name in ("loss", "balance", "z") if name in metrics}
    real = batch.segment > 0
    return Measured({"logits": logits[real], **gradients}, losses, choices[:, real] if experts else None)


def gradient_as_state() -> optax.GradientTransformation:
    """Changes no weight; its state is the last gradient."""
    zeros = partial(jax.tree.map, jnp.zeros_like)
    return optax.GradientTransformation(zeros, lambda gradient, state, params=None: (zeros(gradient), gradient))


def packed_batch(certificate: Certificate, model: ModelConfig) -> Batch:
    """The first batch of the data."""
    data = certificate.data
    loader = make_loader(
        data.source(),
        chat_processor(certificate.processor, model, data),
        data.budget,
        data.batch,
        seed=data.seed,
        window=data.window,
        prefetch=0,
    )
    batch, _ = next(loader)
    loader.close()
    return batch


def random_params(model: ModelConfig):
    """Weights on the host, none of which is zero or one."""
    params = jax.jit(partial(init_params, model))(jax.random.key(0, impl="rbg"))  # compiles in a tenth of the time
    noise = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + PERTURBATION * noise.standard_normal(x.shape, np.float32), jax.device_get(params))


def differences(found: Measured, alone: Measured) -> dict[str, float]:
    """Largest difference of every tensor and loss relative to its largest value; infinite if a value is not finite."""
    pairs = {name: (found.tensors[name], value) for name, value in alone.tensors.items()}
    pairs |= {name: (np.float32(found.losses[name]), np.float32(value)) for name, value in alone.losses.items()}
    relative = {name: np.max(np.abs(a - b)) / (np.max(np.abs(b)) or 1) for name, (a, b) in pairs.items()}
    return {name: float(value) if np.isfinite(value) else np.inf for name, value in relative.items()}


def decisions(found: Measured, alone: Measured) -> int | None:
    """Number of tokens, counted per layer, that chose other experts, in any order."""
    if alone.choices is None:
        return None
    return int((np.sort(found.choices) != np.sort(alone.choices)).any(axis=-1).sum())


def read_mesh(text: str) -> dict[str, int]:
    """Sizes of axes from "fsdp=2,tensor=4". ConfigError for what is no mesh."""
    parts = [part.partition("=") for part in text.split(",")]
    if not all(axis in MESH_AXES and size.isdecimal() and int(size) for axis, _, size in parts):
        axes = ", ".join(MESH_AXES)
        raise ConfigError(f"config.meshes: {text!r} is not written as in 'fsdp=2,tensor=4'; the axes are {axes}")
    return {axis: int(size) for axis, _, size in parts}


def devices(text: str) -> int:
    """Number of devices of a mesh."""
    return int(np.prod(list(read_mesh(text).values())))
