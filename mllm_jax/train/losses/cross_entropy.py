"""Token-weighted cross-entropy in chunks: never materializes all logits, and skips positions without a target."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from mllm_jax.common.settings import OneOf
from mllm_jax.nn.attention.masks import cap
from mllm_jax.nn.precision import einsum
from mllm_jax.nn.runtime import expect_runs
from mllm_jax.sharding.activations import fold_rows, shard, unfold_rows
from mllm_jax.sharding.logical_axes import Rules, num_shards
from mllm_jax.train.losses.algorithm_config import AlgorithmConfig
from mllm_jax.types import Array, Batch

CHUNK = 512  # largest number of targets per row whose logits are held at once
WEIGHTINGS = ("token", "sqrt")


@dataclass(frozen=True)
class SupervisedConfig(AlgorithmConfig):
    """Trains on the answers of conversations and on documents, with a cross-entropy per token.

    weighting: "token", or "sqrt" (a conversation of n targets counts as sqrt(n)).
    """

    weighting: Annotated[str, OneOf(WEIGHTINGS)] = "token"


def sample_weights(batch: Batch, weighting: str) -> Array:
    """Returns the loss weight of every target, f32[B T].

    "token": `batch.weight`. "sqrt": `batch.weight` / sqrt(n) for the n weighted targets of a conversation, so that it
    counts as sqrt(n) tokens instead of n (square averaging, InternVL 2.5, arXiv 2412.05271).
    The loss is the sum of weight * cross-entropy over the sum of these weights.
    """
    if weighting == "token":
        return batch.weight
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting={weighting!r}: must be one of {', '.join(WEIGHTINGS)}.")
    counts = sum_segments(batch.weight != 0, batch.segment)
    num_targets = jnp.take_along_axis(counts, jnp.maximum(batch.segment - 1, 0), axis=1)
    return batch.weight * jax.lax.rsqrt(jnp.maximum(num_targets, 1).astype(jnp.float32))


def sum_segments(values, segment):
    """Sums over segments: [B T] -> [B T], with the sum of segment s in column s - 1. Booleans are counted.

    Example: values 1 2 3 4 5 with segments 1 1 2 2 0 give 3 7 0 0 0.
    """
    values = values.astype(jnp.int32) if values.dtype == bool else values
    column = jnp.where(segment > 0, segment - 1, segment.shape[1])  # padding is dropped
    add = lambda values, column: jnp.zeros(column.shape, values.dtype).at[column].add(values, mode="drop")
    return jax.vmap(add)(values, column)


def token_loss(
    hidden, table, targets, weight, chunk: int, dtype: str, rules: Rules = (), softcap: float = 0.0
) -> Array:
    """Returns the sum of weight * cross-entropy, f32[].

    The forward pass computes the loss and both gradients chunk by chunk, and the backward pass only scales them: three
    matrix products instead of the four with recomputed logits (Liger Kernel, arXiv 2410.10989).
    No gradient reaches `weight`.

    Args:
      hidden: [B T D] hidden states after the last norm.
      table: [V D] weight of the head (`head_table`).
      targets: i32[B T].
      weight: f32[B T]; targets of weight 0 are skipped.
      chunk: largest number of targets per row whose logits, f32[B chunk V], are held at once.
      dtype: dtype of matrix product operands; sums and softmax are fp32.
      rules: sharding rules of `vocab`, `batch` and `length` on the ambient mesh. (): a single device.
      softcap: c of the capped logits c tanh(logit / c). 0: no cap.
    """
    rows = _Rows(targets.shape, rules)
    return _token_loss(rows.split(hidden), table, rows.split(targets), rows.split(weight), chunk, dtype, rules, softcap)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _token_loss(hidden, table, targets, weight, chunk, dtype, rules, softcap):
    head, plan = _Head(table, dtype, rules, len(hidden), softcap), _plan(targets, weight, chunk)

    def body(i, total):
        part = plan.part(i, hidden)
        return total + part.sum(_cross_entropy(head.logits(part.hidden), part.targets)[0])

    return jnp.sum(plan.each(body, plan.zeros()))


def _loss_and_gradients(hidden, table, targets, weight, chunk, dtype, rules, softcap):
    """Returns the loss and the gradients of the differentiated inputs. A frozen table costs no matrix product."""
    (hidden, trains_hidden), (table, trains_table) = ((x.value, x.perturbed) for x in (hidden, table))
    head, plan = _Head(table, dtype, rules, len(hidden), softcap), _plan(targets.value, weight.value, chunk)

    def body(i, carry):
        total, d_hidden, d_table = carry
        part = plan.part(i, hidden)
        logits = head.logits(part.hidden)
        loss, log_sum, hit = _cross_entropy(logits, part.targets)
        d_logits = (jnp.exp(logits - log_sum[..., None]) - hit) * part.weight[..., None] * head.slope(logits)
        if trains_hidden:
            d_part = head.to_hidden(d_logits).astype(hidden.dtype)
            d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, d_part, i * plan.size, axis=1)
        if trains_table:
            d_table += head.to_table(d_logits, part.hidden)
        return total + part.sum(loss), d_hidden, d_table

    d_hidden = jnp.zeros((len(hidden), plan.order.shape[1], hidden.shape[2]), hidden.dtype) if trains_hidden else None
    carry = plan.zeros(), d_hidden, head.zeros() if trains_table else None
    total, d_hidden, d_table = plan.each(body, carry)
    d_hidden = plan.restore(d_hidden) if trains_hidden else None
    return jnp.sum(total), (d_hidden, head.collect(d_table).astype(table.dtype) if trains_table else None)


def _scale_gradients(chunk, dtype, rules, softcap, gradients, scale):
    d_hidden, d_table = jax.tree.map(lambda x: x * scale.astype(x.dtype), gradients)
    return d_hidden, d_table, None, None


_token_loss.defvjp(_loss_and_gradients, _scale_gradients, symbolic_zeros=True)


def token_errors(
    hidden, table, targets, weight, chunk: int, dtype: str, rules: Rules = (), softcap: float = 0.0
) -> tuple[Array, Array]:
    """Returns the sum of weight * cross-entropy, f32[], and the wrong predictions, bool[B T].

    A prediction is wrong if a target of non-zero weight is not the likeliest token. Arguments as in `token_loss`.
    """
    rows = _Rows(targets.shape, rules)
    hidden, targets, weight = (rows.split(x) for x in (hidden, targets, weight))
    head, plan = _Head(table, dtype, rules, len(hidden), softcap), _plan(targets, weight, chunk)

    def body(i, carry):
        total, wrong = carry
        part = plan.part(i, hidden)
        logits = head.logits(part.hidden)
        missed = (jnp.argmax(logits, axis=-1) != part.targets) & (part.weight != 0)
        wrong = jax.lax.dynamic_update_slice_in_dim(wrong, missed, i * plan.size, axis=1)
        return total + part.sum(_cross_entropy(logits, part.targets)[0]), wrong

    carry = plan.zeros(), jnp.zeros(plan.order.shape, bool)
    total, wrong = plan.each(body, carry)
    return jnp.sum(total), rows.join(plan.restore(wrong))


def token_log_probs(
    hidden, table, targets, weight, chunk: int, dtype: str, rules: Rules = (), softcap: float = 0.0
) -> Array:
    """Returns the log-probability of every target of non-zero weight, f32[B T]; 0 elsewhere.

    For losses that are functions of an answer's log-probability. The backward pass recomputes logits chunk by chunk and
    needs as much memory as `token_loss`. Arguments as there, but `weight` only selects targets.
    """
    rows = _Rows(targets.shape, rules)
    hidden, targets, weight = (rows.split(x) for x in (hidden, targets, weight))
    return rows.join(_log_probs(hidden, table, targets, weight, chunk, dtype, rules, softcap))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _log_probs(hidden, table, targets, weight, chunk, dtype, rules, softcap):
    head, plan = _Head(table, dtype, rules, len(hidden), softcap), _plan(targets, weight, chunk)

    def body(i, log_probs):
        part = plan.part(i, hidden)
        part_log_probs = jnp.where(part.weight != 0, -_cross_entropy(head.logits(part.hidden), part.targets)[0], 0)
        return jax.lax.dynamic_update_slice_in_dim(log_probs, part_log_probs, i * plan.size, axis=1)

    return plan.restore(plan.each(body, jnp.zeros(plan.order.shape, jnp.float32)))


class _Primal(NamedTuple):
    """An input as `custom_vjp(symbolic_zeros=True)` passes it: its value, and whether it is differentiated."""

    value: Array
    perturbed: bool


def _log_probs_and_inputs(hidden, table, targets, weight, *options):
    inputs = tuple(x.value for x in (hidden, table, targets, weight))
    trained = tuple(() if x.perturbed else None for x in (hidden, table))  # residuals must be pytrees: () is True
    return _log_probs(*inputs, *options), (inputs, trained)


def _gradients_of_log_probs(chunk, dtype, rules, softcap, saved, d_log_probs):
    """Returns the gradients of sum(d * log p), computed as those of a cross-entropy with weights -d."""
    (*inputs, targets, weight), trained = saved
    inputs = (_Primal(x, flag is not None) for x, flag in zip(inputs, trained))
    constants = (_Primal(x, False) for x in (targets, -jnp.where(weight != 0, d_log_probs, 0)))
    return *_loss_and_gradients(*inputs, *constants, chunk, dtype, rules, softcap)[1], None, None


_log_probs.defvjp(_log_probs_and_inputs, _gradients_of_log_probs, symbolic_zeros=True)


ROWS = ("batch", "length")  # logical axes over which the rows of `_Rows` are sharded


class _Rows:
    """Splits a row whose tokens are sharded over n devices into n rows, so that each device works on its own rows."""

    def __init__(self, shape: tuple[int, int], rules: Rules):
        self.rules, self.shape = rules, shape
        parts = num_shards("length", rules, jax.sharding.get_abstract_mesh())
        self.parts = parts if shape[1] % parts == 0 else 1

    def split(self, x):
        """[B T ...] -> [B*part T/part ...]."""
        x = fold_rows(rearrange(x, "B (part T) ... -> B part T ...", part=self.parts), self.rules)
        return shard(x, (ROWS, *(None,) * (x.ndim - 1)), self.rules)

    def join(self, x):
        """Inverts `split`."""
        return rearrange(unfold_rows(x, self.shape[0], self.rules), "B part T ... -> B (part T) ...")


def _cross_entropy(logits, targets):
    """f32[B t V] -> (cross-entropy f32[B t], log of the softmax denominator f32[B t], one-hot targets bool[B t V])."""
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    hit = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2) == targets[..., None]
    return log_sum - jnp.sum(jnp.where(hit, logits, 0), axis=-1), log_sum, hit


class _Part(NamedTuple):
    """A chunk of t positions per row."""

    hidden: Array  # [B t D]
    targets: Array  # i32[B t]
    weight: Array  # f32[B t]

    def sum(self, loss):
        """Returns the loss per row, f32[B]. Rows are summed once at the end, not per chunk: they are sharded."""
        return jnp.sum(self.weight * loss, axis=1)


class _Plan(NamedTuple):
    """Order of the positions of each row in n chunks of t: those with non-zero weight come first.

    Example: the weights 0 1 0 1 1 with t = 2 give the order 1 3 4 0 2 + padding, of which 2 of 3 chunks are computed.
    """

    order: Array  # i32[B n*t] permutation of the T positions, padded with 0
    rank: Array  # i32[B T] inverse permutation
    targets: Array  # i32[B n*t] reordered targets
    weight: Array  # f32[B n*t] reordered weights, 0 for padding
    count: Array  # i32[] number of leading chunks that hold a target of non-zero weight in any row
    size: int  # t, positions per chunk

    def zeros(self):
        return jnp.zeros(len(self.order), jnp.float32)

    def each(self, body, carry):
        """Applies `carry = body(i, carry)` to every chunk i that holds a target of non-zero weight."""
        with expect_runs(self.order.shape[1] // self.size):
            return jax.lax.fori_loop(0, self.count, body, carry)

    def part(self, i, hidden) -> _Part:
        order, targets, weight = (
            jax.lax.dynamic_slice_in_dim(x, i * self.size, self.size, axis=1)
            for x in (self.order, self.targets, self.weight)
        )
        return _Part(jnp.take_along_axis(hidden, order[..., None], axis=1), targets, weight)

    def restore(self, x):
        """[B n*t ...] in chunk order -> [B T ...] in the order of positions."""
        return jnp.take_along_axis(x, jnp.expand_dims(self.rank, range(2, x.ndim)), axis=1)


def _plan(targets, weight, chunk: int) -> _Plan:
    """Orders each row on its own, so that no data moves between devices."""
    length = targets.shape[1]
    chunks = math.ceil(length / chunk)
    size = math.ceil(length / chunks)
    order = jnp.argsort(weight == 0, axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)
    count = (jnp.max(jnp.sum(weight != 0, axis=1)) + size - 1) // size
    pad = lambda x: jnp.pad(x, ((0, 0), (0, chunks * size - length)))
    reorder = lambda x: pad(jnp.take_along_axis(x, order, axis=1))
    return _Plan(pad(order), rank, reorder(targets), reorder(weight), count, size)


class _Head:
    """The head's table [V D], gathered over `embed` once for all chunks.

    Its gradient is summed over chunks within each group of rows (one group per shard of the rows), and over the groups
    once at the end: a sum over groups in every chunk would be an all-reduce in every chunk.
    """

    def __init__(self, table, dtype: str, rules: Rules, rows: int, softcap: float):
        self.rules, self.dtype, self.shape, self.softcap = rules, dtype, table.shape, softcap
        shards = num_shards(ROWS, rules, jax.sharding.get_abstract_mesh())
        self.groups = shards if rows % shards == 0 else 1
        # Cast before the gather, or the partitioner may gather twice the bytes and cast afterwards.
        self.table = shard(shard(table.astype(dtype), ("vocab", "embed"), rules), ("vocab", None), rules)

    def _product(self, equation, x, y):
        return einsum(equation, x.astype(self.dtype), y.astype(self.dtype), jnp.float32)

    def logits(self, hidden):
        product = self._product("BTD,VD->BTV", hidden, self.table)
        return shard(cap(product, self.softcap), (ROWS, None, "vocab"), self.rules)

    def slope(self, logits):
        """Returns the derivative of the capped logits with respect to the uncapped ones."""
        return 1 - (logits / self.softcap) ** 2 if self.softcap else 1.0

    def to_hidden(self, d_logits):
        """Returns the gradient of the hidden states [B t D]."""
        return self._product("BTV,VD->BTD", d_logits, self.table)

    def to_table(self, d_logits, hidden):
        """Returns the gradient of the table per group of rows [groups V D]."""
        grouped = (rearrange(x, "(group B) ... -> group B ...", group=self.groups) for x in (d_logits, hidden))
        return self._by_group(self._product("gBTV,gBTD->gVD", *grouped))

    def _by_group(self, d_table):
        return shard(d_table, (ROWS, "vocab", None), self.rules)

    def zeros(self):
        return self._by_group(jnp.zeros((self.groups, *self.shape), jnp.float32))

    def collect(self, d_table):
        return shard(jnp.sum(d_table, axis=0), ("vocab", "embed"), self.rules)
