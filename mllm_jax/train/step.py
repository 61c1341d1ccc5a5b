"""One step of training and of evaluation: pure functions of state and batch, compiled once for any mix of examples."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllm_jax.model import VLM, ModelConfig, head_table
from mllm_jax.sharding import Rules, partition_spec, ways
from mllm_jax.train.balance import BalanceConfig, Load, Totals, balance_loss, imbalance, move_biases, totals, z_loss
from mllm_jax.train.compiler import compiler_options
from mllm_jax.train.loss import sample_weights, sum_segments, token_errors, token_loss
from mllm_jax.train.optim import OptimConfig, merge, split
from mllm_jax.train.state import state_shardings
from mllm_jax.train.update import update
from mllm_jax.types import Array, Batch, Routing, Vision

CHUNK = 512  # targets of a row whose logits are held at once
UNBALANCED = BalanceConfig()


def loss_sum(config: ModelConfig, params, batch: Batch, weighting: str = "token", chunk: int = CHUNK, key=None):
    """(sum of weight * cross-entropy f32[], Routing or None): sums, so that batches add up.

    key: of the dropout of adapters; None = none.
    """
    out, runtime = VLM(config).apply({"params": params}, batch, hidden=True, rngs=dropout(key)), config.runtime
    weight = sample_weights(batch, weighting)
    about = (chunk, runtime.dtype, runtime.rules, config.decoder.logit_softcap)
    loss = token_loss(out.hidden, head_table(params), batch.targets, weight, *about)
    return loss, out.routing


def dropout(key) -> dict[str, jax.Array]:
    """`rngs` of `apply` for a key, or for None where nothing is dropped."""
    return {} if key is None else {"dropout": key}


@dataclass(frozen=True)
class CrossEntropy:
    """What a step minimises, here the loss of every target; of pairs of answers see train/pairs.py.

    weighting: see `sample_weights`. chunk: see `token_loss`.
    """

    config: ModelConfig
    weighting: str = "token"
    chunk: int = CHUNK

    def weights(self, batch: Batch) -> Array:
        """f32[...] whose sum is what the sums of a whole batch are divided by."""
        return sample_weights(batch, self.weighting)

    def sums(self, params, batch: Batch, key, reference=None, rewards=None) -> tuple[dict[str, Array], Routing | None]:
        """{"loss": f32[], which is differentiated, and others to be reported}, and what the routers did.

        Args:
          key: of the dropout of adapters; None = none.
          reference: the parameters that a step was given beside its state. rewards: f32[2] of that state.
        """
        loss, routing = loss_sum(self.config, params, batch, self.weighting, self.chunk, key)
        return {"loss": loss}, routing

    def remembered(self, rewards, means: dict[str, Array], weight) -> Array:
        """The rewards of the next state, given the means of a batch and the f32[] that its sums were divided by."""
        return rewards


def make_train_step(
    config: ModelConfig,
    tx: optax.GradientTransformation,
    optim: OptimConfig,
    mesh: Mesh,
    *,
    objective: Any = None,
    accumulate: int = 1,
    weighting: str = "token",
    loss_chunk: int = CHUNK,
    balance: BalanceConfig = UNBALANCED,
    async_gathers: bool = False,
    seed: int = 0,
) -> Callable:
    """Jitted `step(state, batch, reference=None) -> (state, metrics)`; the state is donated.

    A step whose loss or gradient is not finite changes nothing but the counters.

    Args:
      tx: of `make_optimizer(optim, ...)`.
      objective: what is minimised; by default `CrossEntropy(config, weighting, loss_chunk)`. `reference` are parameters
        that it may need.
      accumulate: A, number of parts that a batch of A * B rows is worked off in; the result is that of the whole batch.
      weighting: see `sample_weights`.
      loss_chunk: see `token_loss`.
      balance: of a model with experts.
      async_gathers: see `mllm_jax.train.compiler`.
      seed: of the dropout of adapters, which with the number of the step says what is left out, on any mesh.
    Returns:
      metrics, f32 scalars: loss (the mean of what the objective sums) and its other means, weight (what they are means
      over), grad_norm (before clipping), learning_rate, finite (1 or 0), tokens, targets, patches, images (counts
      without padding). With experts also balance (L, not times its weight; absent without a loss), z, imbalance (the
      busiest expert's load over the mean), dropped (share of choices that found no room).
    """
    layout = state_shardings(config, tx, mesh, config.runtime.rules)
    pinned, _ = split(layout.params, optim.freeze)
    pin = lambda grads: jax.lax.with_sharding_constraint(grads, pinned)
    objective = objective or CrossEntropy(config, weighting, loss_chunk)
    moe = config.decoder.moe
    choices_of_token = 0 if moe is None else moe.top_k * len(config.decoder.expert_layers)
    ahead = moe is not None and balance.counts_first(accumulate)

    def add_part(state, reference, whole: Totals, total, part: Batch, key, known: Load | None):
        """total + (gradients, what a part adds to the means of the whole batch, its load).

        known: the load of the whole batch, if that is known beforehand.
        """

        trainable, frozen = split(state.params, optim.freeze)

        def loss(trainable):
            sums, routing = objective.sums(merge(trainable, frozen), part, key, reference, state.rewards)
            found = {name: value / whole.weight for name, value in sums.items()}
            if routing is None:
                return found["loss"], (found, None)
            own = Load.of(routing)
            load = known or (own if total is None else jax.tree.map(jnp.add, total[2], own))
            found["z"] = z_loss(routing, whole)
            found["dropped"] = jnp.sum(routing.dropped) / (whole.tokens * choices_of_token)
            value = found["loss"] + balance.z * found["z"]
            if balance.loss != "none":
                found["balance"] = balance_loss(routing, part.segment, load, whole, balance.loss)
                value += balance.weight * found["balance"]
            return value, (found, own)

        (_, (found, own)), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        new = (pin(grads), found, own)
        return new if total is None else jax.tree.map(jnp.add, total, new)

    def load_of(params, parts: Batch, keys) -> Load:
        """The load of all parts, by forward passes that compute nothing else."""

        def add(load, part_and_key):
            part, key = part_and_key
            routing = VLM(config).apply({"params": params}, part, hidden=True, rngs=dropout(key)).routing
            return jax.tree.map(jnp.add, load, Load.of(routing)), None

        return jax.lax.scan(add, Load.zeros(config.decoder), (parts, keys))[0]

    def gradients(state, reference, batch: Batch, key):
        """(gradients, means, load) of a batch."""
        whole = totals(batch, objective.weights(batch))
        add = partial(add_part, state, reference, whole)
        if accumulate == 1:
            return add(None, batch, key, None)
        parts, keys = _parts(batch, accumulate), None if key is None else jax.random.split(key, accumulate)
        known = load_of(state.params, parts, keys) if ahead else None
        shapes = jax.eval_shape(lambda part: add(None, *part, None), jax.tree.map(lambda x: x[0], (parts, keys)))
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        zeros = (pin(zeros[0]), *zeros[1:])
        return jax.lax.scan(lambda total, part: (add(total, *part, known), None), zeros, (parts, keys))[0]

    def step(state, batch: Batch, reference=None):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
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

    replicated = NamedSharding(mesh, PartitionSpec())
    options = compiler_options(mesh.devices.flat[0].platform, async_gathers)
    return jax.jit(step, donate_argnums=0, out_shardings=(layout, replicated), compiler_options=options)


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


def _parts(batch: Batch, accumulate: int) -> Batch:
    """[B*A ...] -> [A B ...], every A-th row: each device's rows stay on it."""
    rows = batch.tokens.shape[0]
    if rows % accumulate:
        raise ValueError(f"a batch of {rows} rows does not split into accumulate={accumulate} parts")
    return jax.tree.map(lambda x: rearrange(x, "(B A) ... -> A B ...", A=accumulate), batch)
