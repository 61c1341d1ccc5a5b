"""Vision transformer over packed images of any size (arXiv 2010.11929, 2307.06304); every vision tower is one.

Patches of several images share a row. Image sizes enter only as traced coordinates, so that one compiled program serves
any mix of image sizes and videos, or no image.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from mllm_jax.common.settings import Config, Finite, Int, NonNegativeInt, OneOf, Positive, PositiveInt
from mllm_jax.model.encoders.positions import RESAMPLING, patch_rope, resample
from mllm_jax.model.encoders.windows import window_segments
from mllm_jax.nn.attention.attend import attend
from mllm_jax.nn.einsum import Einsum
from mllm_jax.nn.mlp import ACTIVATIONS, GatedMlp, Mlp
from mllm_jax.nn.norm import NORMS
from mllm_jax.nn.rope import rotate
from mllm_jax.nn.runtime import Runtime, rematted, scan_layers
from mllm_jax.sharding.activations import fold_rows, shard, unfold_rows
from mllm_jax.sharding.weights import partitioned
from mllm_jax.types import Array, Vision


@dataclass(frozen=True)
class VitConfig(Config):
    """A vision transformer.

    width: size of hidden states.
    layers: number of layers.
    heads: number of attention heads.
    mlp: width of the feed-forward block.
    patch_size: side of a patch in pixels.
    temporal_patch_size: number of frames in a patch.
    channels: number of color channels.
    patch_bias: whether the patch embedding has a bias.
    position_grid: side of the learned position table, which is resampled to each image's size. 0: no table.
    image_size: side in pixels of the table's images, if it is not a multiple of `patch_size`. 0: `position_grid *
      patch_size`.
    resampling: resampling of the table, see `positions.resample`.
    class_token: whether a learned token precedes an image's patches; its position is the first row of the table.
    registers: number of further learned tokens, which have no positions (arXiv 2309.16588).
    mask_token: whether the weights include the mask token of self-supervised training, which the model does not use.
    rope_theta: base of the rotary positions. None: no rotary positions.
    window: side of the attention windows in patches. 0: global attention.
    whole: layers (0-based) with global attention, if `window` is set.
    qkv_bias: whether the projections to queries, keys and values have biases.
    qk_norm: whether queries and keys are normalized, over all heads together.
    norm: norm of nn/norm.py: "layer" or "rms".
    norm_eps: epsilon of all norms.
    activation: activation of the feed-forward block.
    gated: whether the feed-forward block has a gate (SwiGLU, arXiv 2002.05202).
    layer_scale: initial value of a factor per channel of each block's output (arXiv 2103.17239). None: no factors.
    first_norm, last_norm: whether there is a norm before all layers, and after them.
    features: layers whose outputs, not normalized, are concatenated as the features. -1: the last. Later layers do not
      run, but keep their weights. (): the output of the last norm.
    deepstack_layers: layers (0-based) whose outputs are returned beside the features.
    pixel_mean, pixel_std: mean and standard deviation per channel of pixels in 0..1, for u8 patches.
    """

    width: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    mlp: PositiveInt
    patch_size: PositiveInt = 16
    temporal_patch_size: PositiveInt = 2
    channels: PositiveInt = 3
    patch_bias: bool = True
    position_grid: NonNegativeInt = 48
    image_size: NonNegativeInt = 0
    resampling: Annotated[str, OneOf(tuple(RESAMPLING))] = "bilinear_aligned"
    class_token: bool = False
    registers: NonNegativeInt = 0
    mask_token: bool = False
    rope_theta: Positive | None = 10_000.0
    window: NonNegativeInt = 0
    whole: tuple[Int, ...] = ()
    qkv_bias: bool = True
    qk_norm: bool = False
    norm: Annotated[str, OneOf(tuple(NORMS))] = "layer"
    norm_eps: Positive = 1e-6
    activation: Annotated[str, OneOf(tuple(ACTIVATIONS))] = "gelu_tanh"
    gated: bool = False
    layer_scale: Finite | None = None
    first_norm: bool = False
    last_norm: bool = False
    features: tuple[Int, ...] = ()
    deepstack_layers: tuple[Int, ...] = ()
    pixel_mean: tuple[Finite, ...] = (0.5, 0.5, 0.5)
    pixel_std: tuple[Positive, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(
                f"encoder.width={self.width}: is not a multiple of encoder.heads={self.heads}. Change either."
            )
        if self.rope_theta is not None and self.head_dim % 4:
            raise ValueError(
                f"encoder.width={self.width}: width / heads is {self.head_dim}, which is not a multiple of 4 as rotary "
                f"positions need. Change encoder.width or encoder.heads={self.heads}, or set encoder.rope_theta=None."
            )
        for name in ("pixel_mean", "pixel_std"):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(
                    f"encoder.{name}={getattr(self, name)}: is not one value per channel. "
                    f"Give encoder.channels={self.channels} values."
                )
        for name in ("features", "deepstack_layers", "whole"):
            if not all(-self.layers <= layer < self.layers for layer in getattr(self, name)):
                raise ValueError(
                    f"encoder.{name}={getattr(self, name)}: the encoder has only {self.layers} layers. Use integers "
                    f"from {-self.layers} to {self.layers - 1}."
                )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def side(self) -> int:
        """Side in pixels of the square images of the position table."""
        return self.image_size or self.position_grid * self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before an image's patches: class token and registers."""
        return self.class_token + self.registers

    @property
    def depth(self) -> int:
        """Number of layers that run."""
        return (
            1 + max(layer % self.layers for layer in self.features + self.deepstack_layers)
            if self.features
            else self.layers
        )

    @property
    def patch_values(self) -> int:
        """C, the number of values in a patch."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    def build(self, runtime: Runtime, name: str) -> nn.Module:
        return Vit(self, runtime, name=name)


class Features(NamedTuple):
    """Output of an encoder."""

    value: Array  # [B R P D]
    deepstack: Array  # [deepstack B R P D] outputs of the layers `deepstack_layers`


def normalize(patches, config: VitConfig):
    """Returns u8 pixels [... C], in (c, t, y, x) order, as f32 (pixel / 255 - mean) / std; floats pass unchanged."""
    if patches.dtype != jnp.uint8:
        return patches
    mean, std = (
        np.repeat(np.float32(x), config.patch_values // config.channels) for x in (config.pixel_mean, config.pixel_std)
    )
    return patches.astype(jnp.float32) * (1 / (255 * std)) - mean / std


class VitAttention(nn.Module):
    config: VitConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, x, segment, rope):
        config, dtype = self.config, self.runtime.dtype
        width, heads, head_dim = config.width, config.heads, config.head_dim
        shape, axes = (3, width, heads, head_dim), (None, "embed", "heads", "head_dim")
        qkv = Einsum("...D,CDNH->...CNH", shape, axes, dtype, bias=config.qkv_bias, name="qkv")(x)
        q, k, v = (qkv[..., i, :, :] for i in range(3))
        if config.qk_norm:
            q, k = (self._normed(name, x) for name, x in (("q_norm", q), ("k_norm", k)))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        out = attend(q, k, v, q_segment=segment, kv_segment=segment, causal=False, runtime=self.runtime)
        return Einsum(
            "...NH,NHD->...D", (heads, head_dim, width), ("heads", "head_dim", "embed"), dtype, bias=True, name="out"
        )(out)

    def _normed(self, name: str, x):
        joined = NORMS["rms"](self.config.norm_eps, name=name)(rearrange(x, "... N H -> ... (N H)"))
        return rearrange(joined, "... (N H) -> ... N H", N=self.config.heads)


class VitLayer(nn.Module):
    config: VitConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, x, segment, rope):
        config, dtype, norm = self.config, self.runtime.dtype, NORMS[self.config.norm]
        attention = VitAttention(config, self.runtime, name="attention")
        if config.gated:
            mlp = GatedMlp(config.mlp, config.width, config.activation, dtype, bias=True, name="mlp")
        else:
            mlp = Mlp(config.mlp, config.width, config.activation, dtype, name="mlp")
        x = x + self._scaled("scale1", attention(norm(config.norm_eps, name="norm1")(x), segment, rope))
        return x + self._scaled("scale2", mlp(norm(config.norm_eps, name="norm2")(x)))

    def _scaled(self, name: str, added):
        if self.config.layer_scale is None:
            return added
        init = nn.initializers.constant(self.config.layer_scale)
        return added * self.param(name, partitioned(init, None), added.shape[-1:]).astype(added.dtype)


class Vit(nn.Module):
    config: VitConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, vision: Vision) -> Features:
        config, runtime = self.config, self.runtime.within("encoder")
        # Patch rows of all batch rows on one axis, which more numbers of devices divide.
        axes, count = ("batch", "length", None), len(vision.image)
        vision = jax.tree.map(partial(fold_rows, rules=self.runtime.rules), vision)
        prefix_index = -1 - vision.coords[..., 0]  # 0, 1, ... at the prefix tokens of an image, negative at its patches
        image = jnp.where(prefix_index < config.num_prefix_tokens, vision.image, 0)
        windows = window_segments(image, vision.coords, vision.grid, config.window) if config.window else None
        rope = None
        if config.rope_theta is not None:
            rope = patch_rope(vision.coords, config.head_dim, config.rope_theta)
        x = self._embed(vision, prefix_index)
        norm = NORMS[config.norm]
        if config.first_norm:
            x = norm(config.norm_eps, name="first_norm")(x)
        x = shard(x, axes, runtime.rules)

        tapped = list(dict.fromkeys(layer % config.layers for layer in config.deepstack_layers + config.features))
        slots = np.full(config.layers, len(tapped), np.int32)
        slots[tapped] = np.arange(len(tapped))
        is_global = np.isin(np.arange(config.layers), config.whole)

        def body(layer, carry, per_layer):
            """Runs a layer and stores its output; layers that are not tapped write to an extra slot.

            The write is linear, so that the backward pass needs no residuals of it.
            """
            (x, outputs), (slot, is_global) = carry, per_layer
            segment = image if windows is None else jnp.where(is_global, image, windows)
            x = shard(layer(x, segment, rope), axes, runtime.rules)
            return (x, jax.lax.dynamic_update_index_in_dim(outputs, x, slot, 0)), None

        depth = config.layers if self.is_initializing() else config.depth
        first = lambda tree: jax.tree.map(lambda leaf: leaf[:depth], tree)

        def run(layer, carry):
            per_layer = (jnp.asarray(slots), jnp.asarray(is_global))
            return scan_layers(body, layer, carry, first(per_layer), depth, runtime)[0]

        layer = rematted(VitLayer, runtime)(config, runtime, name="layers")
        run = run if depth == config.layers else nn.map_variables(run, "params", first)
        x, outputs = run(layer, (x, jnp.zeros((len(tapped) + 1, *x.shape), x.dtype)))
        if config.last_norm:
            x = norm(config.norm_eps, name="last_norm")(x)
        if config.features:
            x = jnp.concatenate([outputs[slots[layer]] for layer in config.features], axis=-1)
        split = partial(unfold_rows, count=count, rules=self.runtime.rules)
        return Features(split(x), jax.vmap(split)(outputs[: len(config.deepstack_layers)]))

    def _embed(self, vision: Vision, prefix_index):
        """Returns patch embeddings [rows P D] with learned positions, and the prefix tokens at their places."""
        config, runtime = self.config, self.runtime.within("encoder")
        shape, axes, side = (config.patch_values, config.width), ("patch", "embed"), config.position_grid
        patches = normalize(shard(vision.patches, ("batch", "length", None), runtime.rules), config)
        embed = Einsum("...C,CD->...D", shape, axes, runtime.dtype, bias=config.patch_bias, name="patch_embed")
        x = embed(patches)
        if side:
            positions = self._learned("position_embed", "position", config.class_token + side**2)
            grid = rearrange(positions[config.class_token :], "(Y X) D -> Y X D", Y=side)
            x = x + resample(grid, vision.coords, vision.grid, config.resampling).astype(runtime.dtype)
        if config.mask_token:
            self._learned("mask_token")
        tokens = []
        if config.class_token:
            token = self._learned("class_token")[None]
            tokens += [token + positions[:1] if side else token]
        if config.registers:
            tokens += [self._learned("registers", None, config.registers)]
        if not tokens:
            return x
        tokens = jnp.concatenate(tokens).astype(runtime.dtype)
        prefix = jnp.take(tokens, jnp.clip(prefix_index, 0, config.num_prefix_tokens - 1), axis=0)
        return jnp.where((prefix_index >= 0)[..., None], prefix, x)

    def _learned(self, name: str, axis: str | None = None, *sizes: int):
        """Returns a parameter f32[*sizes D], all-gathered; otherwise its gradient would all-gather all patches."""
        axes, shape = (axis,) if sizes else (), (*sizes, self.config.width)
        weight = self.param(name, partitioned(nn.initializers.normal(shape[-1] ** -0.5), *axes, "embed"), shape)
        return shard(weight, (None,) * len(shape), self.runtime.within("encoder").rules)
