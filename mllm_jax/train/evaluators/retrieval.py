"""How often the nearest text of a held-out picture is its own, and the nearest picture of a text, during training."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllm_jax.data.pipeline.dual_processor import DualProcessor
from mllm_jax.model.dual_encoder import DualConfig
from mllm_jax.model.vlm import ModelConfig
from mllm_jax.train.algorithms.contrastive import pair_shardings, real_pairs
from mllm_jax.train.evaluators.generation import HeldOut, Spread, batches, placed
from mllm_jax.train.evaluators.reward import Judging
from mllm_jax.train.losses.contrastive import contrastive_loss
from mllm_jax.train.monitor.processes import compiled_together
from mllm_jax.train.runs.config import Run
from mllm_jax.types import DualBatch


def held_out(run: Run, processor: Any, mesh: Mesh, source: Any) -> Any:
    """What evaluates a run, `evaluate(params) -> dict`, by the kind of its model and of what it learns."""
    kind = Judging if run.train.reward.learn else EVALUATIONS[type(run.model)]
    return kind(run, processor, mesh, source)


class Retrieval:
    """`retrieval(params)` looks among the same held-out pairs every time."""

    def __init__(self, run: Run, processor: DualProcessor, mesh: Mesh, source: Any):
        self.source = Spread(source, run.train.heldout)
        self.data, self.processor = run.data, processor
        self.mesh, self.rules = mesh, run.model.runtime.rules
        self._step = compiled_together(make_embedding_step(run.model, mesh))

    def __call__(self, params: Any, after_batch: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """{"loss": mean of a pair among those of its batch, "pairs": number, "recall_at_1": see `recall_at_1`}.

        Pairs with one text are not told apart.
        """
        loss, pictures, texts, tokens = 0.0, [], [], []
        for batch, _ in batches(self.source, self.processor, self.data, self.data.batch):
            layout = pair_shardings(batch, self.mesh, self.rules)
            found = jax.device_get(self._step(params, placed(batch, layout)))
            real = np.ravel(batch.first >= 0)
            loss += float(found["loss"]) * real.sum()
            pictures.append(found["pictures"][real])
            texts.append(found["texts"][real])
            tokens.append(batch.tokens[real])
            after_batch()
        tokens = np.concatenate(tokens)
        shares = recall_at_1(np.concatenate(pictures), np.concatenate(texts), list(map(bytes, tokens)))
        return {"loss": loss / max(len(tokens), 1), "pairs": len(tokens), "recall_at_1": shares}


EVALUATIONS = {ModelConfig: HeldOut, DualConfig: Retrieval}


def recall_at_1(pictures: np.ndarray, texts: np.ndarray, names: list[Any]) -> dict[str, float]:
    """Shares of right ones among the nearest: the "text" of every picture, the "picture" of every text.

    Args:
      pictures, texts: f32[n D] of unit length.
      names: of every pair: those with one name are not told apart.
    """
    similarity, names = pictures @ texts.T, np.unique(names, return_inverse=True)[1]
    right = lambda axis: float(np.mean(names[similarity.argmax(axis)] == names))
    return {"text": right(1), "picture": right(0)}


def make_embedding_step(config: DualConfig, mesh: Mesh):
    """Jitted `embed(params, batch) -> {"pictures", "texts": f32[n D], "loss": f32[] mean of a pair}`."""
    model = config.build()

    def embed(params, batch: DualBatch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out = model.apply({"params": params}, batch)
            scale, bias = model.apply({"params": params}, method="temperature")
            about = (scale, bias, config.runtime.within("encoder").rules, real_pairs(batch))
            loss = contrastive_loss(config.loss, out.image_embeddings, out.text_embeddings, *about)
            return {"pictures": out.image_embeddings, "texts": out.text_embeddings, "loss": jnp.asarray(loss)}

    return jax.jit(embed, out_shardings=NamedSharding(mesh, PartitionSpec()))
