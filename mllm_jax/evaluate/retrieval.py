"""Retrieval recall of a dual encoder, from images to texts and from texts to images."""

from dataclasses import replace
from typing import Any

import jax

from mllm_jax.pretrained.api import Pretrained
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.evaluators.retrieval import RetrievalEvaluator
from mllm_jax.train.runs.config import Run


def retrieval(dual: Pretrained, run: Run, source: Any, count: int) -> dict[str, Any]:
    """Evaluates retrieval on pairs spread evenly over a source. Recall decreases with the number of pairs.

    Args:
      dual: dual encoder with a processor, on the first device.
      run: run whose data settings pack the pairs.
      source: source of image-text pairs.
      count: number of pairs. If the source has fewer: all of them.
    Returns:
      {"pairs": number of pairs, "recall_at_1": {kind: share in 0..1}}, see `recall_at_1`.
    Raises:
      ValueError: the model has no processor.
    """
    if dual.processor is None:
        raise ValueError("the folder of the model lacks tokenizer.json or preprocessor_config.json. Add the files.")
    run = replace(run, model=dual.config, train=replace(run.train, num_eval_examples=count))
    mesh = make_mesh(devices=jax.local_devices()[:1])
    return RetrievalEvaluator(run, dual.processor, mesh, source)(dual.params)
