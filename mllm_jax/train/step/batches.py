"""Shardings of batches on a mesh, and counts of what they contain without padding."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from mllm_jax.sharding.logical_axes import Rules, num_shards, partition_spec
from mllm_jax.types import Batch, DualBatch, Vision


def count(batch: Batch) -> dict[str, jax.Array]:
    """Counts a batch without padding: tokens, targets, patches, images (video frames included)."""
    vision, zero = batch.vision, jnp.zeros(())
    return dict(
        tokens=jnp.sum(batch.segment > 0),
        targets=jnp.sum(batch.weight != 0),
        patches=zero if vision is None else jnp.sum(vision.image > 0),
        images=zero if vision is None else jnp.sum(jnp.max(vision.image, axis=(1, 2))),
    )


def count_pairs(batch: DualBatch) -> dict[str, jax.Array]:
    """Counts a batch of pairs without padding: pairs, tokens, patches."""
    return dict(
        pairs=jnp.sum(real_pairs(batch)),
        tokens=jnp.sum(batch.segment > 0),
        patches=jnp.sum(batch.vision.image > 0),
    )


def real_pairs(batch: DualBatch) -> jax.Array:
    """Returns bool[images]: True for images, and so pairs, that are not padding."""
    real = jnp.ravel(batch.first >= 0)
    return real if batch.order is None else real[batch.order]


def batch_shardings(batch: Batch, mesh: Mesh, rules: Rules) -> Batch:
    """Returns the NamedSharding of every array of a batch: rows over the `batch` axes, tokens over `length`.

    Patch rows are sharded over `patch_row` if they divide. Raises ValueError if the rows or the tokens do not.
    """

    def sharding(names, array_name, x):
        names = ("batch", *names, *(None,) * (x.ndim - 1 - len(names)))
        return NamedSharding(mesh, partition_spec(names, rules, mesh, x.shape, array_name))

    text = {
        name: jax.tree.map(partial(sharding, ("length",), f"batch.{name}"), value)
        for name, value in batch._asdict().items()
        if name != "vision"
    }
    if batch.vision is None:
        return Batch(**text)
    divides = batch.vision.image.shape[1] % num_shards("patch_row", rules, mesh) == 0
    names = ("patch_row",) if divides else ()
    vision = {
        name: None if x is None else sharding(names, f"batch.vision.{name}", x)
        for name, x in batch.vision._asdict().items()
    }
    return Batch(**text, vision=Vision(**vision))


def pair_shardings(batch: DualBatch, mesh: Mesh, rules: Rules) -> DualBatch:
    """Returns the NamedSharding of every array of a batch: rows of texts and of images over the `batch` axes.

    Raises ValueError if a size does not divide over the axes.
    """

    def sharding(x):
        names = ("batch", *(None,) * (x.ndim - 1))
        return NamedSharding(mesh, partition_spec(names, rules, mesh, x.shape, "a batch of images and texts"))

    return jax.tree.map(sharding, batch)
