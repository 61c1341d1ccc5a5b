"""Compares a training step on meshes with the same step on one device: logits, gradients, losses and routing."""

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
QUICKLY = {"xla_backend_optimization_level": 0}  # halves the compile time on CPUs
PERTURBATION = 0.1  # standard deviation of noise on all weights, since some are initialized to zero or one


@dataclass(frozen=True)
class Certificate(Config):
    """Config of a certification.

    models: models by name. data, processor: as in `Run`.
    balance: balance loss of models with experts.
    meshes: sizes of axes, such as "fsdp=2,tensor=4". The largest mesh determines the number of devices.
    tolerance: largest relative difference that does not count as drift.
    """

    models: Mapping[str, ModelConfig]
    data: Any
    processor: str = SCENES
    balance: BalanceConfig = BalanceConfig("global", aux_loss_weight=0.01, z_loss_weight=0.001)
    meshes: tuple[str, ...] = MESHES
    tolerance: Positive = 1e-5


class Measured(NamedTuple):
    """Results of a step, on the host."""

    tensors: dict[str, np.ndarray]  # logits of real tokens, and the gradient of every weight
    losses: dict[str, float]  # losses by name, including the balance losses of models with experts
    choices: np.ndarray | None  # i32[Lm n k] experts chosen by the n real tokens in each of Lm layers with experts


class Comparison(NamedTuple):
    """Differences between one mesh and one device."""

    mesh: str
    differences: dict[str, float]  # relative difference of every tensor and loss
    decisions: int | None  # number of tokens with other experts, summed over layers. None: no experts

    @property
    def worst(self) -> str:
        return max(self.differences, key=self.differences.get)

    def drifts(self, tolerance: float) -> bool:
        return self.differences[self.worst] > tolerance or bool(self.decisions)


def read_certificate(config: ConfigDict, name: str = "run") -> Certificate:
    """Reads a certificate from its config, or makes one for the config of a run, with `MESHES`. Raises ConfigError.

    Args:
      name: name of the run's model in reports.
    """
    if "models" in config:
        return from_config_dict(Certificate, config, PARTS, "config")
    run = read_run(config)
    return Certificate(
        {name: run.model}, run.data, processor_source(run.processor, run.init, run.parts), run.train.balance
    )


def compare(certificate: Certificate, name: str) -> Iterator[Comparison]:
    """Compares one model on every mesh with one device. Raises ConfigError if a mesh does not divide model or batch."""
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
    reference = run(make_mesh({}, jax.devices()[:1]))
    for text, mesh in meshes.items():
        measured = run(mesh)
        yield Comparison(text, differences(measured, reference), decisions(measured, reference))


def measure(model: ModelConfig, params, batch: Batch, balance: BalanceConfig, mesh: Mesh) -> Measured:
    """Runs the forward pass and one training step on a mesh, in fp32."""
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
    """Returns an optimizer that changes no weight and whose state is the last gradient."""
    zeros = partial(jax.tree.map, jnp.zeros_like)
    return optax.GradientTransformation(zeros, lambda gradient, state, params=None: (zeros(gradient), gradient))


def packed_batch(certificate: Certificate, model: ModelConfig) -> Batch:
    """Returns the first batch of the data."""
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
    """Returns random weights on the host, with noise so that none stays at an initial zero or one."""
    params = jax.jit(partial(init_params, model))(jax.random.key(0, impl="rbg"))  # rbg compiles ten times faster
    noise = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + PERTURBATION * noise.standard_normal(x.shape, np.float32), jax.device_get(params))


def differences(found: Measured, alone: Measured) -> dict[str, float]:
    """Returns the largest difference of every tensor and loss relative to its largest value. inf if not finite."""
    pairs = {name: (found.tensors[name], value) for name, value in alone.tensors.items()}
    pairs |= {name: (np.float32(found.losses[name]), np.float32(value)) for name, value in alone.losses.items()}
    relative = {name: np.max(np.abs(a - b)) / (np.max(np.abs(b)) or 1) for name, (a, b) in pairs.items()}
    return {name: float(value) if np.isfinite(value) else np.inf for name, value in relative.items()}


def decisions(found: Measured, alone: Measured) -> int | None:
    """Returns the number of tokens that chose another set of experts, summed over layers. None without experts."""
    if alone.choices is None:
        return None
    return int((np.sort(found.choices) != np.sort(alone.choices)).any(axis=-1).sum())


def read_mesh(text: str) -> dict[str, int]:
    """Parses sizes of axes such as "fsdp=2,tensor=4". Raises ConfigError if they are not a mesh."""
    parts = [part.partition("=") for part in text.split(",")]
    if not all(axis in MESH_AXES and size.isdecimal() and int(size) for axis, _, size in parts):
        axes = ", ".join(MESH_AXES)
        raise ConfigError(f"config.meshes: {text!r} is not written as in 'fsdp=2,tensor=4'. The axes are {axes}.")
    return {axis: int(size) for axis, _, size in parts}


def devices(text: str) -> int:
    """Returns the number of devices of a mesh such as "fsdp=2,tensor=4"."""
    return int(np.prod(list(read_mesh(text).values())))
