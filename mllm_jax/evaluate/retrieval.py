"""Recall of a dual encoder from images to texts and from texts to images."""

from dataclasses import replace
from typing import Any

import jax

from mllm_jax.pretrained.api import Pretrained
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.evaluators.retrieval import RetrievalEvaluator
from mllm_jax.train.runs.config import Run


def retrieval(dual: Pretrained, run: Run, source: Any, count: int) -> dict[str, Any]:
    """{"pairs": number, "recall_at_1": {kind: fraction}} of `count` pairs, or all, spread evenly over a source.

    Recall falls with the number of pairs. See `recall_at_1`.

    Args:
      dual: a dual encoder with its processor, on the first device.
      run: run whose data settings pack the pairs.
    """
    if dual.processor is None:
        raise ValueError("the folder of this model has no tokenizer.json or no preprocessor_config.json; add them")
    run = replace(run, model=dual.config, train=replace(run.train, num_eval_examples=count))
    mesh = make_mesh(devices=jax.local_devices()[:1])
    return RetrievalEvaluator(run, dual.processor, mesh, source)(dual.params)
