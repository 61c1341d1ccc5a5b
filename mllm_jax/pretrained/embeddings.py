"""Images and texts as embeddings of a dual encoder, and which of some labels an image has."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.model.dual_encoder import DualConfig, probabilities
from mllm_jax.pretrained.api import Pretrained
from mllm_jax.types import DualBatch

BATCH = 32  # images, or texts, at once


def encode_image(dual: Pretrained, images: Sequence[Any]) -> np.ndarray:
    """Embeddings f32[images D] of unit length, so that the cosine of two is their product.

    Args:
      dual: of `load_pretrained`, a dual encoder (CLIP, SigLIP, SigLIP 2).
      images: paths, bytes, arrays u8[h w 3] or PIL images, of any sizes.
    Raises:
      ValueError: another kind of model, a folder without its processor, no images, or an image that cannot be read.
    """
    return _embed(dual, "encode_image", _processor(dual).images, images)


def encode_text(dual: Pretrained, texts: Sequence[str]) -> np.ndarray:
    """Embeddings f32[texts D] of unit length. Raises ValueError as `encode_image`, and for a text that is too long."""
    return _embed(dual, "encode_text", _processor(dual).texts, texts)


def classify(
    dual: Pretrained, images: Sequence[Any], labels: Sequence[str], prompts: str | Sequence[str] = "a photo of a {}."
) -> np.ndarray:
    """Zero-shot classification (arXiv 2103.00020, section 3.1): the probability of every label, f32[images labels].

    Of a model that was trained with a softmax they add up to 1 over the labels; of one with a sigmoid each stands for
    itself.

    Args:
      prompts: a sentence with {} for the label, or several, whose embeddings are averaged.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if odd := [prompt for prompt in prompts if "{}" not in prompt]:
        raise ValueError(f"a prompt needs {{}} in place of the label: {odd[0]!r}")
    texts = encode_text(dual, [prompt.replace("{}", label) for label in labels for prompt in prompts])
    means = texts.reshape(len(labels), len(prompts), -1).mean(axis=1)
    means /= np.linalg.norm(means, axis=-1, keepdims=True)
    logits = dual.model.apply({"params": dual.params}, encode_image(dual, images), means, method="similarity")
    return np.asarray(probabilities(logits, dual.config.loss))


def _processor(dual: Pretrained) -> Any:
    if not isinstance(dual.config, DualConfig):
        raise ValueError(
            f"this needs a dual encoder, such as CLIP or SigLIP, not a model of family {dual.config.family}"
        )
    if dual.processor is None:
        raise ValueError("the folder of this model has no tokenizer.json or no preprocessor_config.json; add them")
    return dual.processor


def _embed(dual: Pretrained, method: str, read: Any, items: Sequence[Any]) -> np.ndarray:
    """Batches have few sizes, so that they share programs: the last item fills up the last batch."""
    if isinstance(items, str) or not len(items):
        raise ValueError(f"{method} needs a list with something in it, not {items!r}")
    size = min(BATCH, 1 << (len(items) - 1).bit_length())
    found = []
    for start in range(0, len(items), size):
        own = list(items[start : start + size])
        batch = read(own + own[-1:] * (size - len(own)))
        found.append(np.asarray(_apply(dual.model, method, dual.params, batch))[: len(own)])
    return np.concatenate(found)


@partial(jax.jit, static_argnums=(0, 1))
def _apply(model, method: str, params, batch: DualBatch) -> jnp.ndarray:
    return model.apply({"params": params}, batch, method=method)
