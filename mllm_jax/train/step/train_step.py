"""One step of training and of evaluation: pure functions of state and batch, compiled once for any mix of examples."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllm_jax.model.vlm import VLM, ModelConfig, head_table
from mllm_jax.sharding.logical_axes import Rules, partition_spec, ways
from mllm_jax.train.algorithms.supervised import CHUNK, CrossEntropy
from mllm_jax.train.losses.cross_entropy import sum_segments, token_errors
from mllm_jax.train.losses.load_balance import BalanceConfig, imbalance, move_biases
from mllm_jax.train.step.compiler import compiler_options
from mllm_jax.train.step.gradients import make_gradients
from mllm_jax.train.step.optimizer import OptimConfig, split
from mllm_jax.train.step.state import state_shardings
from mllm_jax.train.step.update import update
from mllm_jax.types import Batch, Vision

UNBALANCED = BalanceConfig()


def make_train_step(
    config: ModelConfig,
    tx: optax.GradientTransformation,
    optim: OptimConfig,
    mesh: Mesh,
    *,
    objective: Any = None,
    accumulate: int = 1,
    balance: BalanceConfig = UNBALANCED,
    async_gathers: bool = False,
    seed: int = 0,
) -> Callable:
    """Jitted `step(state, batch, reference=None) -> (state, metrics)`; the state is donated.

    A step whose loss or gradient is not finite changes nothing but the counters.

    Args:
      tx: of `make_optimizer(optim, ...)`.
      objective: what is minimised, see `mllm_jax.train.algorithms.supervised`; by default `CrossEntropy(config)`.
        `reference` are parameters that it may need.
      accumulate: A, number of parts that a batch of A * B rows is worked off in; the result is that of the whole batch.
      balance: of a model with experts.
      async_gathers: see `mllm_jax.train.step.compiler`.
      seed: of the dropout of adapters, which with the number of the step says what is left out, on any mesh.
    Returns:
      metrics, f32 scalars: loss (the mean of what the objective sums) and its other means, weight (what they are means
      over), grad_norm (before clipping), learning_rate, finite (1 or 0), tokens, targets, patches, images (counts
      without padding). With experts also balance (L, not times its weight; absent without a loss), z, imbalance (the
      busiest expert's load over the mean), dropped (share of choices that found no room).
    """
    pure = make_pure_step(config, tx, optim, mesh, objective or CrossEntropy(config), accumulate, balance, seed)
    return compiled_step(pure, config, tx, mesh, async_gathers)


def make_pure_step(
    config: ModelConfig,
    tx: optax.GradientTransformation,
    optim: OptimConfig,
    mesh: Mesh,
    objective: Any,
    accumulate: int = 1,
    balance: BalanceConfig = UNBALANCED,
    seed: int = 0,
) -> Callable:
    """The step of `make_train_step`, with its arguments, as a pure function for programs of several steps."""
    pinned, _ = split(state_shardings(config, tx, mesh, config.runtime.rules).params, optim.freeze)
    gradients = make_gradients(config, objective, optim.freeze, pinned, accumulate, balance)

    def step(state, batch: Batch, reference=None):
        key = jax.random.fold_in(jax.random.key(seed), state.step) if config.lora.drops else None
        grads, found, load = gradients(state, reference, batch, key)
        weight = jnp.sum(objective.weights(batch))
        rewards = objective.remembered(state.rewards, found, weight)
        adjust = lambda params: params if load is None else move_biases(params, load, config.decoder, balance.rate)
        state, about = update(state, grads, found, tx, optim, adjust)
        state = state._replace(rewards=jnp.where(about["finite"], rewards, state.rewards))
        if load is not None:
            found["imbalance"] = imbalance(load)
        metrics = found | about | dict(weight=weight, **count(batch))
        return state, {name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()}

    return step


def compiled_step(
    step: Callable, config: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, async_gathers: bool = False
) -> Callable:
    """A pure `step(state, batch, reference=None) -> (state, metrics)`, jitted for a mesh; the state is donated."""

    def on_mesh(state, batch: Batch, reference=None):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(state, batch, reference)

    layout, replicated = state_shardings(config, tx, mesh, config.runtime.rules), NamedSharding(mesh, PartitionSpec())
    options = compiler_options(mesh.devices.flat[0].platform, async_gathers)
    return jax.jit(on_mesh, donate_argnums=0, out_shardings=(layout, replicated), compiler_options=options)


def make_eval_step(config: ModelConfig, mesh: Mesh, *, loss_chunk: int = CHUNK) -> Callable:
    """Jitted `evaluate(params, batch) -> dict`: how well the model predicts each conversation, given the truth so far.

    Greedy decoding repeats a conversation's targets exactly if and only if none of them is wrong here.

    Returns:
      loss_sum, weight: f32[]; answered, wrong: i32[B T], in column s - 1 the number of targets, and of wrong ones, of
      segment s of the row (a row of T tokens has at most T). With experts also load: i32[Lm 3 E], how often each was
      chosen, by layer and MODALITIES.
    """

    def evaluate(params, batch: Batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out, runtime = VLM(config).apply({"params": params}, batch, hidden=True), config.runtime
            about = (loss_chunk, runtime.dtype, runtime.rules, config.decoder.logit_softcap)
            loss, wrong = token_errors(out.hidden, head_table(params), batch.targets, batch.weight, *about)
            load = {} if out.routing is None else {"load": jnp.sum(out.routing.counts, axis=1)}
            return load | dict(
                loss_sum=loss,
                weight=jnp.sum(batch.weight),
                answered=sum_segments(batch.weight != 0, batch.segment),
                wrong=sum_segments(wrong, batch.segment),
            )

    return jax.jit(evaluate, out_shardings=NamedSharding(mesh, PartitionSpec()))


def count(batch: Batch) -> dict[str, jax.Array]:
    """What a batch holds without its padding: tokens, targets, patches, images (frames of clips included)."""
    vision, none = batch.vision, jnp.zeros(())
    return dict(
        tokens=jnp.sum(batch.segment > 0),
        targets=jnp.sum(batch.weight != 0),
        patches=none if vision is None else jnp.sum(vision.image > 0),
        images=none if vision is None else jnp.sum(jnp.max(vision.image, axis=(1, 2))),
    )


def batch_shardings(batch: Batch, mesh: Mesh, rules: Rules) -> Batch:
    """NamedSharding of every array of a batch: rows over the `batch` axes, tokens over `length`, and rows of patches
    over `patch_row` where they divide. Raises ValueError where the rows or the tokens of the batch do not."""

    def of(names, what, x):
        names = ("batch", *names, *(None,) * (x.ndim - 1 - len(names)))
        return NamedSharding(mesh, partition_spec(names, rules, mesh, x.shape, what))

    text = {
        name: jax.tree.map(partial(of, ("length",), f"batch.{name}"), value)
        for name, value in batch._asdict().items()
        if name != "vision"
    }
    if batch.vision is None:
        return Batch(**text)
    divides = batch.vision.image.shape[1] % ways("patch_row", rules, mesh) == 0
    names = ("patch_row",) if divides else ()
    vision = {name: of(names, f"batch.vision.{name}", x) for name, x in batch.vision._asdict().items()}
    return Batch(**text, vision=Vision(**vision))
