"""Batches on a mesh: how their arrays are sharded, and what they hold without padding."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from mllm_jax.sharding.logical_axes import Rules, num_shards, partition_spec
from mllm_jax.types import Batch, DualBatch, Vision


def count(batch: Batch) -> dict[str, jax.Array]:
    """Counts a batch without padding: tokens, targets, patches, images (video frames included)."""
    vision, none = batch.vision, jnp.zeros(())
    return dict(
        tokens=jnp.sum(batch.segment > 0),
        targets=jnp.sum(batch.weight != 0),
        patches=none if vision is None else jnp.sum(vision.image > 0),
        images=none if vision is None else jnp.sum(jnp.max(vision.image, axis=(1, 2))),
    )


def count_pairs(batch: DualBatch) -> dict[str, jax.Array]:
    """Counts a batch of pairs without padding: pairs, tokens, patches."""
    return dict(
        pairs=jnp.sum(real_pairs(batch)),
        tokens=jnp.sum(batch.segment > 0),
        patches=jnp.sum(batch.vision.image > 0),
    )


def real_pairs(batch: DualBatch) -> jax.Array:
    """bool[images] which images of a batch, and so which pairs, are no padding."""
    real = jnp.ravel(batch.first >= 0)
    return real if batch.order is None else real[batch.order]


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
    divides = batch.vision.image.shape[1] % num_shards("patch_row", rules, mesh) == 0
    names = ("patch_row",) if divides else ()
    vision = {
        name: x if x is None else of(names, f"batch.vision.{name}", x) for name, x in batch.vision._asdict().items()
    }
    return Batch(**text, vision=Vision(**vision))


def pair_shardings(batch: DualBatch, mesh: Mesh, rules: Rules) -> DualBatch:
    """NamedSharding of every array of a batch: rows of texts and of images over the `batch` axes.

    Raises ValueError where the axes do not divide them.
    """

    def of(x):
        names = ("batch", *(None,) * (x.ndim - 1))
        return NamedSharding(mesh, partition_spec(names, rules, mesh, x.shape, "a batch of images and texts"))

    return jax.tree.map(of, batch)
