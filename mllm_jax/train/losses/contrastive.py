"""Contrastive losses of n images and their n texts, on any mesh: CLIP's softmax, SigLIP's sigmoid.

Both losses read the logits of all n x n pairs. Each device keeps its images while the texts of all devices rotate in a
ring (arXiv 2303.15343, section 3.3). It holds the logits of its images with at most BLOCK texts; the backward pass
recomputes them. With 2 devices, A and B, of 2 pairs each:

    round 1  A: images 0 1, texts 0 1    B: images 2 3, texts 2 3
    round 2  A: images 0 1, texts 2 3    B: images 2 3, texts 0 1
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from mllm_jax.common.config import ConfigError
from mllm_jax.model.dual_encoder import DualConfig
from mllm_jax.nn.attention.flash import around
from mllm_jax.sharding.activations import constrain
from mllm_jax.sharding.logical_axes import Rules, divisible_axes
from mllm_jax.train.losses.algorithm_config import AlgorithmConfig
from mllm_jax.types import Array

BLOCK = 1024  # largest number of texts whose logits are held at once


@dataclass(frozen=True)
class ContrastiveConfig(AlgorithmConfig):
    """Trains a dual encoder on pairs of an image and a text, with the loss `DualConfig.loss`."""

    model: ClassVar[type] = DualConfig

    def check(self, run: Any, path: str) -> None:
        if run.train.grad_accum_steps > 1:
            raise ConfigError(
                f"{path}.train.grad_accum_steps={run.train.grad_accum_steps}: contrastive losses compare all pairs of "
                "a batch. Set it to 1."
            )
        if run.lora.drops:
            raise ConfigError(
                f"{path}.lora.dropout={run.lora.dropout}: contrastive training has no dropout. Set it to 0."
            )


class _Kind(NamedTuple):
    """Reductions of a loss that treats all pairs as negatives: half of it is summed per image, half per text."""

    nothing: float  # sum over no pairs
    of: Callable  # (logits [i j], axis) -> sum over that axis, [j] or [i]
    join: Callable  # combines two sums
    slope: Callable  # (logits [i j], sums of images [i 1], sums of texts [j]) -> d loss / d logits [i j]


KINDS = {
    "softmax": _Kind(  # log of the softmax denominators
        nothing=-jnp.inf,
        of=jax.nn.logsumexp,
        join=jnp.logaddexp,
        slope=lambda logits, image_sum, text_sum: (jnp.exp(logits - image_sum) + jnp.exp(logits - text_sum)) / 2,
    ),
    "sigmoid": _Kind(  # -log sigmoid(-logit) of every pair
        nothing=0.0,
        of=lambda logits, axis: jnp.sum(jax.nn.softplus(logits), axis),
        join=jnp.add,
        slope=lambda logits, image_sum, text_sum: jax.nn.sigmoid(logits),
    ),
}


def contrastive_loss(kind: str, images, texts, scale, bias=0.0, rules: Rules = (), real=None) -> Array:
    """Returns the mean loss over pairs, f32[]. Image i belongs to text i; all other pairs are negatives.

    "softmax": mean of the cross-entropies of each image over all texts and of each text over all images (CLIP, arXiv
    2103.00020, figure 3). "sigmoid": -log sigmoid(z * logit) with z = 1 for matching pairs and -1 for others, summed
    over pairs and divided by n (SigLIP, arXiv 2303.15343, algorithm 1).

    Args:
      images, texts: f32[n D] embeddings of unit length.
      scale, bias: f32[]; logit = scale * cosine + bias.
      rules: their rule of `batch` sets the axes of the ambient mesh that shard the pairs. (): a single device.
      real: bool[n] pairs that are not padding, which does not change the loss. None: all.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(sorted(KINDS))}.")
    if images.shape != texts.shape:
        raise ValueError(
            f"texts: shape {texts.shape} differs from that of images, {images.shape}. Pass one text per image."
        )
    mesh = jax.sharding.get_abstract_mesh()
    axes = () if mesh.empty else divisible_axes("batch", len(images), rules, mesh)
    scale, bias = jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32)
    real = jnp.ones(len(images)) if real is None else real.astype(jnp.float32)
    positive_logits = jnp.sum(real * (scale * jnp.sum(images * texts, axis=-1) + bias))
    # `_all_pairs` treats matching pairs like all others. Subtracting their logits corrects this: a cross-entropy is
    # log(denominator) - x, and -log sigmoid(x) = -log sigmoid(-x) - x.
    return (_all_pairs(images, texts, scale, bias, real, KINDS[kind], axes) - positive_logits) / jnp.maximum(
        jnp.sum(real), 1
    )


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _all_pairs(images, texts, scale, bias, real, kind: _Kind, axes: tuple[str, ...]):
    return _forward(images, texts, scale, bias, real, kind, axes)[0]


def _forward(images, texts, scale, bias, real, kind, axes):
    def on_device(images, texts, scale, bias, real):
        def visit(image_sum, block):
            text, text_real, text_sum = block
            logits = _mask_padding(scale * _similarity(images, text) + bias, real, text_real)
            image_sum = kind.join(image_sum, kind.of(logits, axis=1))
            return image_sum, (text, text_real, kind.join(text_sum, kind.of(logits, axis=0)))

        empty = jnp.full(len(images), kind.nothing)
        image_sum, (*_, text_sum) = _rotate(axes, visit, empty, (texts, real, empty))
        image_sum, text_sum = (jnp.where(real > 0, sums, 0) for sums in (image_sum, text_sum))
        return _total((jnp.sum(image_sum) + jnp.sum(text_sum)) / 2, axes), image_sum, text_sum

    total, *sums = _shard_map(on_device, axes, "nnssn", "snn")(images, texts, scale, bias, real)
    return total, (images, texts, scale, bias, real, *sums)


def _backward(kind, axes, saved, d_total):
    def on_device(images, texts, scale, bias, real, image_sum, text_sum):
        def visit(totals, block):
            d_images, d_scale, d_bias = totals
            text, text_real, text_sum, d_text = block
            similarity = _similarity(images, text)
            logits = _mask_padding(scale * similarity + bias, real, text_real)
            d_logits = kind.slope(logits, image_sum[:, None], text_sum)
            d_scale, d_bias = d_scale + jnp.sum(d_logits * similarity), d_bias + jnp.sum(d_logits)
            d_text += _product("ij,iD->jD", d_logits, images)
            d_images += _product("ij,jD->iD", d_logits, text)
            return (d_images, d_scale, d_bias), (text, text_real, text_sum, d_text)

        zero, zeros = jnp.zeros(()), jnp.zeros(images.shape)
        texts_and_sums = (texts, real, text_sum, zeros)
        (d_images, *d_scalars), (*_, d_texts) = _rotate(axes, visit, (zeros, zero, zero), texts_and_sums)
        return scale * d_images, scale * d_texts, *(_total(x, axes) for x in d_scalars)

    gradients = _shard_map(on_device, axes, "nnssnnn", "nnss")(*saved)
    gradients = tuple((d_total * gradient).astype(x.dtype) for gradient, x in zip(gradients, saved))
    return *gradients, jnp.zeros_like(saved[4])


_all_pairs.defvjp(_forward, _backward)


def _rotate(axes, visit, carry, texts_and_sums):
    """Applies `carry, block = visit(carry, block)` to the texts of all devices along the axes, at most BLOCK at a time.

    The texts return to their device.
    """
    length = len(texts_and_sums[0])
    count = next(n for n in range(math.ceil(length / BLOCK), length + 1) if length % n == 0)
    blocks = jax.tree.map(lambda x: rearrange(x, "(n j) ... -> n j ...", n=count), texts_and_sums)
    carry, blocks = around(axes, lambda carry, blocks: jax.lax.scan(visit, carry, blocks), carry, blocks)
    return carry, jax.tree.map(lambda x: rearrange(x, "n j ... -> (n j) ..."), blocks)


def _shard_map(on_device, axes, inputs: str, outputs: str):
    """Maps a function over the devices along the axes. inputs, outputs: "n" for a sharded array, "s" for a scalar."""
    if not axes:
        return on_device
    specs = {"n": jax.P(axes), "s": jax.P()}
    ins, outs = (tuple(specs[letter] for letter in letters) for letters in (inputs, outputs))
    mapped = jax.shard_map(on_device, in_specs=ins, out_specs=outs, check_vma=False)
    return lambda *args: mapped(*map(constrain, args, ins))


def _mask_padding(logits, image_real, text_real):
    """Returns the logits [i j], -inf where the image or the text is padding."""
    return jnp.where((image_real[:, None] > 0) & (text_real > 0), logits, -jnp.inf)


def _total(x, axes):
    return jax.lax.psum(x, axes) if axes else x


def _similarity(images, texts):
    return _product("iD,jD->ij", images, texts)


def _product(equation, x, y):
    return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
