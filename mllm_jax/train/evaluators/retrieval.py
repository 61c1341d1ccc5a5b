"""Retrieval recall on held-out pairs: of the text of an image, and of the image of a text."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllm_jax.data.pipeline.loader import Info
from mllm_jax.model.dual_encoder import DualConfig
from mllm_jax.train.evaluators.base import Evaluator
from mllm_jax.train.losses.contrastive import contrastive_loss
from mllm_jax.train.step.batches import pair_shardings, real_pairs
from mllm_jax.types import DualBatch


class RetrievalEvaluator(Evaluator):
    """Computes {"loss": mean over pairs, within batches, "pairs": number, "recall_at_1": see `recall_at_1`}.

    Pairs with equal texts count as one class.
    """

    def shardings(self, batch: DualBatch) -> DualBatch:
        return pair_shardings(batch, self.mesh, self.run.model.runtime.rules)

    def make_step(self) -> Callable:
        return make_embedding_step(self.run.model, self.mesh)

    def no_records(self) -> dict[str, Any]:
        return {"loss": 0.0, "images": [], "texts": [], "tokens": []}

    def add(self, totals: dict[str, Any], found: dict[str, Any], batch: DualBatch, info: Info) -> None:
        real = np.ravel(batch.first >= 0)
        totals["loss"] += float(found["loss"]) * real.sum()
        totals["images"].append(found["images"][real])
        totals["texts"].append(found["texts"][real])
        totals["tokens"].append(batch.tokens[real])

    def results(self, totals: dict[str, Any]) -> dict[str, Any]:
        images, texts, tokens = (np.concatenate(totals[name]) for name in ("images", "texts", "tokens"))
        recall = recall_at_1(images, texts, list(map(bytes, tokens)))
        return {"loss": totals["loss"] / max(len(tokens), 1), "pairs": len(tokens), "recall_at_1": recall}


def recall_at_1(images: np.ndarray, texts: np.ndarray, names: list[Any]) -> dict[str, float]:
    """Returns the fraction of right nearest neighbors: {"text": of images, "image": of texts}.

    Args:
      images, texts: f32[n D] of unit length.
      names: class of every pair; a neighbor of the same class is right.
    """
    similarity, names = images @ texts.T, np.unique(names, return_inverse=True)[1]
    right = lambda axis: float(np.mean(names[similarity.argmax(axis)] == names))
    return {"text": right(1), "image": right(0)}


def make_embedding_step(config: DualConfig, mesh: Mesh):
    """Returns a jitted `embed(params, batch) -> {"images", "texts": f32[n D], "loss": f32[] mean over pairs}`."""
    model = config.build()

    def embed(params, batch: DualBatch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out = model.apply({"params": params}, batch)
            scale, bias = model.apply({"params": params}, method="temperature")
            options = (scale, bias, config.runtime.within("encoder").rules, real_pairs(batch))
            loss = contrastive_loss(config.loss, out.image_embeddings, out.text_embeddings, *options)
            return {"images": out.image_embeddings, "texts": out.text_embeddings, "loss": jnp.asarray(loss)}

    return jax.jit(embed, out_shardings=NamedSharding(mesh, PartitionSpec()))
