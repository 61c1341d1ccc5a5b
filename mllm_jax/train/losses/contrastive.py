"""Contrastive losses of n images and their n texts, on any mesh: CLIP's softmax, SigLIP's sigmoid.

Both read the logits of all n x n pairs. A device keeps its own images while the texts of all devices go round
(arXiv 2303.15343, section 3.3), so that it never holds more logits than those of its images with BLOCK texts, neither
forward nor backward, where they are computed again.
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

BLOCK = 1024  # texts


@dataclass(frozen=True)
class ContrastiveConfig(AlgorithmConfig):
    """Trains a dual encoder on pairs of an image and a text, by the loss that `DualConfig.loss` names."""

    model: ClassVar[type] = DualConfig

    def check(self, run: Any, path: str) -> None:
        if run.train.grad_accum_steps > 1:
            raise ConfigError(
                f"{path}.train.grad_accum_steps must be 1: every pair of a batch is compared with all others"
            )
        if run.lora.drops:
            raise ConfigError(f"{path}.lora.dropout must be 0: training on pairs of an image and a text drops nothing")


class _Kind(NamedTuple):
    """Sums of a loss over all pairs with the wrong ones as negatives: half of it per image, half per text."""

    nothing: float
    of: Callable  # (logits [i j], axis) -> its sum over an axis, [j] or [i]
    join: Callable  # two sums to one
    slope: Callable  # (logits, sums of images [i 1], sums of texts [j]) -> derivative of both halves together


KINDS = {
    "softmax": _Kind(  # the logarithms of the softmax's denominators
        nothing=-jnp.inf,
        of=jax.nn.logsumexp,
        join=jnp.logaddexp,
        slope=lambda logits, of_image, of_text: (jnp.exp(logits - of_image) + jnp.exp(logits - of_text)) / 2,
    ),
    "sigmoid": _Kind(  # -log sigmoid(-logit) of every pair
        nothing=0.0,
        of=lambda logits, axis: jnp.sum(jax.nn.softplus(logits), axis),
        join=jnp.add,
        slope=lambda logits, of_image, of_text: jax.nn.sigmoid(logits),
    ),
}


def contrastive_loss(kind: str, images, texts, scale, bias=0.0, rules: Rules = (), real=None) -> Array:
    """Mean loss of a pair, f32[]; image i belongs to text i, and all other pairs are negatives.

    "softmax": cross-entropy of finding the text of an image among all, and the image of a text, halved (CLIP, arXiv
    2103.00020, figure 3). "sigmoid": -log sigmoid(z * logit), z = 1 for a pair that belongs together and -1 for others,
    summed over pairs and divided by n (SigLIP, arXiv 2303.15343, algorithm 1).

    Args:
      images, texts: f32[n D] embeddings of unit length.
      scale, bias: f32[]; a logit is scale * cosine + bias.
      rules: the rule of `batch` gives the axes of the ambient mesh that shard the pairs; none for a single device.
      real: bool[n] pairs that are not padding; the loss does not depend on padding. None: all.
    """
    if kind not in KINDS:
        raise ValueError(f"the loss must be one of {sorted(KINDS)}, not {kind!r}")
    if images.shape != texts.shape:
        raise ValueError(f"every image needs one text: images are {images.shape}, texts {texts.shape}")
    mesh = jax.sharding.get_abstract_mesh()
    axes = () if mesh.empty else divisible_axes("batch", len(images), rules, mesh)
    scale, bias = jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32)
    real = jnp.ones(len(images)) if real is None else real.astype(jnp.float32)
    right = jnp.sum(real * (scale * jnp.sum(images * texts, axis=-1) + bias))
    # -log sigmoid(x) = -log sigmoid(-x) - x, as for the softmax: the right pairs are taken off at the end.
    return (_all_pairs(images, texts, scale, bias, real, KINDS[kind], axes) - right) / jnp.maximum(jnp.sum(real), 1)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _all_pairs(images, texts, scale, bias, real, kind: _Kind, axes: tuple[str, ...]):
    return _forward(images, texts, scale, bias, real, kind, axes)[0]


def _forward(images, texts, scale, bias, real, kind, axes):
    def on_device(images, texts, scale, bias, real):
        def meet(of_image, guest):
            text, is_text, of_text = guest
            logits = _of_pairs(scale * _similarity(images, text) + bias, real, is_text)
            of_image = kind.join(of_image, kind.of(logits, axis=1))
            return of_image, (text, is_text, kind.join(of_text, kind.of(logits, axis=0)))

        nothing = jnp.full(len(images), kind.nothing)
        of_image, (*_, of_text) = _round(axes, meet, nothing, (texts, real, nothing))
        of_image, of_text = (jnp.where(real > 0, sums, 0) for sums in (of_image, of_text))
        return _total((jnp.sum(of_image) + jnp.sum(of_text)) / 2, axes), of_image, of_text

    total, *sums = _spread(on_device, axes, "nnssn", "snn")(images, texts, scale, bias, real)
    return total, (images, texts, scale, bias, real, *sums)


def _backward(kind, axes, saved, d_total):
    def on_device(images, texts, scale, bias, real, of_image, of_text):
        def meet(found, guest):
            d_images, d_scale, d_bias = found
            text, is_text, of_text, d_text = guest
            similarity = _similarity(images, text)
            logits = _of_pairs(scale * similarity + bias, real, is_text)
            slope = kind.slope(logits, of_image[:, None], of_text)
            d_scale, d_bias = d_scale + jnp.sum(slope * similarity), d_bias + jnp.sum(slope)
            d_text += _product("ij,iD->jD", slope, images)
            d_images += _product("ij,jD->iD", slope, text)
            return (d_images, d_scale, d_bias), (text, is_text, of_text, d_text)

        zero, zeros = jnp.zeros(()), jnp.zeros(images.shape)
        guests = (texts, real, of_text, zeros)
        (d_images, *d_scalars), (*_, d_texts) = _round(axes, meet, (zeros, zero, zero), guests)
        return scale * d_images, scale * d_texts, *(_total(x, axes) for x in d_scalars)

    gradients = _spread(on_device, axes, "nnssnnn", "nnss")(*saved)
    gradients = tuple((d_total * gradient).astype(x.dtype) for gradient, x in zip(gradients, saved))
    return *gradients, jnp.zeros_like(saved[4])


_all_pairs.defvjp(_forward, _backward)


def _round(axes, meet, carry, guests):
    """`carry, guests = meet(carry, guests)` for blocks of at most BLOCK guests of every device along the axes; the
    guests end where they began."""
    length = len(guests[0])
    count = next(n for n in range(math.ceil(length / BLOCK), length + 1) if length % n == 0)
    blocks = jax.tree.map(lambda x: rearrange(x, "(n j) ... -> n j ...", n=count), guests)
    carry, blocks = around(axes, lambda carry, blocks: jax.lax.scan(meet, carry, blocks), carry, blocks)
    return carry, jax.tree.map(lambda x: rearrange(x, "n j ... -> (n j) ..."), blocks)


def _spread(on_device, axes, inputs: str, outputs: str):
    """Maps a function over the devices along the axes; "n" is an array sharded over them, "s" a scalar."""
    if not axes:
        return on_device
    specs = {"n": jax.P(axes), "s": jax.P()}
    ins, outs = (tuple(specs[letter] for letter in letters) for letters in (inputs, outputs))
    spread = jax.shard_map(on_device, in_specs=ins, out_specs=outs, check_vma=False)
    return lambda *args: spread(*map(constrain, args, ins))


def _of_pairs(logits, is_image, is_text):
    """Logits [i j] of what is there; of what is not -inf, as if it could not be meant."""
    return jnp.where((is_image[:, None] > 0) & (is_text > 0), logits, -jnp.inf)


def _total(x, axes):
    return jax.lax.psum(x, axes) if axes else x


def _similarity(images, texts):
    return _product("iD,jD->ij", images, texts)


def _product(equation, x, y):
    return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
