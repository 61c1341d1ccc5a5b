"""Embeddings of images and texts with a dual encoder, and zero-shot classification."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.model.dual_encoder import DualConfig, probabilities
from mllm_jax.pretrained.api import Pretrained
from mllm_jax.types import DualBatch

BATCH = 32  # images or texts per call of the model


def encode_image(dual: Pretrained, images: Sequence[Any]) -> np.ndarray:
    """Returns image embeddings f32[images D] of unit length, so that a dot product is a cosine similarity.

    Args:
      dual: dual encoder (CLIP, SigLIP, SigLIP 2) from `load_pretrained`.
      images: paths, bytes, arrays u8[h w 3] or PIL images, of any sizes.
    Raises:
      ValueError: the model is no dual encoder or has no processor, `images` is empty, or an image cannot be read.
    """
    return _embed(dual, "encode_image", _processor(dual).images, images)


def encode_text(dual: Pretrained, texts: Sequence[str]) -> np.ndarray:
    """Returns text embeddings f32[texts D] of unit length.

    Args:
      dual: dual encoder from `load_pretrained`.
      texts: texts of any lengths that the model's positions allow.
    Raises:
      ValueError: the model is no dual encoder or has no processor, `texts` is empty, or a text is too long.
    """
    return _embed(dual, "encode_text", _processor(dual).texts, texts)


def classify(
    dual: Pretrained, images: Sequence[Any], labels: Sequence[str], prompts: str | Sequence[str] = "a photo of a {}."
) -> np.ndarray:
    """Returns the probability of every label for every image (zero-shot, arXiv 2103.00020, section 3.1).

    Args:
      dual: dual encoder from `load_pretrained`.
      images: as in `encode_image`.
      labels: names of the classes.
      prompts: sentence with {} in place of the label, or several, whose embeddings are averaged.
    Returns:
      f32[images labels]. Probabilities of a softmax model sum to 1 over labels; those of a sigmoid model do not.
    Raises:
      ValueError: a prompt has no {}, or as `encode_image` and `encode_text`.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if invalid := [prompt for prompt in prompts if "{}" not in prompt]:
        raise ValueError(f"prompts: {invalid[0]!r} has no {{}}. Write {{}} in place of the label.")
    texts = encode_text(dual, [prompt.replace("{}", label) for label in labels for prompt in prompts])
    means = texts.reshape(len(labels), len(prompts), -1).mean(axis=1)
    means /= np.linalg.norm(means, axis=-1, keepdims=True)
    logits = dual.model.apply({"params": dual.params}, encode_image(dual, images), means, method="similarity")
    return np.asarray(probabilities(logits, dual.config.loss))


def _processor(dual: Pretrained) -> Any:
    if not isinstance(dual.config, DualConfig):
        raise ValueError(
            f"config.family={dual.config.family}: is no dual encoder. Load a model such as CLIP or SigLIP."
        )
    if dual.processor is None:
        raise ValueError("the folder of the model lacks tokenizer.json or preprocessor_config.json. Add the files.")
    return dual.processor


def _embed(dual: Pretrained, method: str, read: Any, items: Sequence[Any]) -> np.ndarray:
    """Embeds items in batches of a power of two, so that few programs are compiled. The last item pads a batch."""
    if isinstance(items, str) or not len(items):
        raise ValueError(f"{method}({items!r}): is not a list of items. Pass a list with at least one item.")
    size = min(BATCH, 1 << (len(items) - 1).bit_length())
    embeddings = []
    for start in range(0, len(items), size):
        chunk = list(items[start : start + size])
        batch = read(chunk + chunk[-1:] * (size - len(chunk)))
        embeddings.append(np.asarray(_apply(dual.model, method, dual.params, batch))[: len(chunk)])
    return np.concatenate(embeddings)


@partial(jax.jit, static_argnums=(0, 1))
def _apply(model, method: str, params, batch: DualBatch) -> jnp.ndarray:
    return model.apply({"params": params}, batch, method=method)
