"""Vision transformer over packed pictures of any size (arXiv 2010.11929, 2307.06304; Qwen3-VL's arXiv 2511.21631).

Patches of many pictures share a row. Everything that depends on a picture's size comes from traced coordinates, so one
compiled program serves any mix of sizes, clips, or no picture at all.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from mllm_jax.nn.attention import attend
from mllm_jax.nn.einsum import Einsum
from mllm_jax.nn.mlp import Mlp
from mllm_jax.nn.norm import LayerNorm
from mllm_jax.nn.rope import rope_table, rotate
from mllm_jax.nn.runtime import Runtime, rematted, scan_layers
from mllm_jax.sharding import join_rows, named, shard, split_rows
from mllm_jax.types import Array, Vision


@dataclass(frozen=True)
class VitConfig:
    """
    position_grid: side of the learned position table, which is resampled to each picture's size.
    taps: layers (0-based) whose output is returned beside the last one's.
    pixel_mean, pixel_std: of pixels in 0..1, per channel; applied to u8 patches only.
    """

    width: int
    layers: int
    heads: int
    mlp: int
    patch_size: int = 16
    temporal_patch_size: int = 2
    channels: int = 3
    position_grid: int = 48
    taps: tuple[int, ...] = ()
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def patch_values(self) -> int:
        """C, the values in a patch."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    def build(self, runtime: Runtime, name: str) -> nn.Module:
        return Vit(self, runtime, name=name)


class Features(NamedTuple):
    """What every encoder returns."""

    value: Array  # [B R P D]
    taps: Array  # [taps B R P D] outputs of the tapped layers


def normalise(patches, config: VitConfig):
    """u8 pixels [... C] in (c, t, y, x) order -> f32, (pixel / 255 - mean) / std; floats are taken as normalised."""
    if patches.dtype != jnp.uint8:
        return patches
    mean, std = (
        np.repeat(np.float32(x), config.patch_values // config.channels) for x in (config.pixel_mean, config.pixel_std)
    )
    return patches.astype(jnp.float32) * (1 / (255 * std)) - mean / std


def interpolated_positions(table, coords, grid):
    """The learned table [Y X D], bilinear with aligned corners, at every patch of pictures of any size.

    Args: coords i32[... 3] (t, y, x); grid i32[... 2] (h, w) of the patch's picture. Returns f32[... D].
    """
    side = table.shape[0]
    source = coords[..., 1:] * ((side - 1) / jnp.maximum(grid - 1, 1).astype(jnp.float32))
    low = jnp.floor(source).astype(jnp.int32)
    high = jnp.minimum(low + 1, side - 1)
    fraction = source - low
    flat = rearrange(table, "Y X D -> (Y X) D")

    def corner(y, x, weight_y, weight_x):
        return jnp.take(flat, y * side + x, axis=0) * (weight_y * weight_x)[..., None]

    y0, x0, y1, x1 = low[..., 0], low[..., 1], high[..., 0], high[..., 1]
    fy, fx = fraction[..., 0], fraction[..., 1]
    return (
        corner(y0, x0, 1 - fy, 1 - fx)
        + corner(y0, x1, 1 - fy, fx)
        + corner(y1, x0, fy, 1 - fx)
        + corner(y1, x1, fy, fx)
    )


def patch_rope(coords, config: VitConfig):
    """2-D RoPE: half of the frequency slots read the row, half the column."""
    slots = config.head_dim // 4
    axes = np.repeat([1, 2], slots)
    frequencies = config.rope_theta ** (-np.arange(slots, dtype=np.float32) / slots)
    return rope_table(coords, axes, np.tile(frequencies, 2))


class VitAttention(nn.Module):
    config: VitConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, x, image, rope):
        config, dtype = self.config, self.runtime.dtype
        width, heads, head_dim = config.width, config.heads, config.head_dim
        axes = ("embed", None, "heads", "head_dim")
        qkv = Einsum("...D,DCNH->...CNH", (width, 3, heads, head_dim), axes, dtype, bias=True, name="qkv")(x)
        q, k, v = (qkv[..., i, :, :] for i in range(3))
        q, k = rotate(q, rope), rotate(k, rope)
        out = attend(q, k, v, q_segment=image, kv_segment=image, causal=False, runtime=self.runtime)
        return Einsum(
            "...NH,NHD->...D", (heads, head_dim, width), ("heads", "head_dim", "embed"), dtype, bias=True, name="out"
        )(out)


class VitLayer(nn.Module):
    config: VitConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, x, image, rope):
        config = self.config
        attention = VitAttention(config, self.runtime, name="attention")
        mlp = Mlp(config.mlp, config.width, config.activation, self.runtime.dtype, name="mlp")
        x = x + attention(LayerNorm(config.norm_eps, name="norm1")(x), image, rope)
        return x + mlp(LayerNorm(config.norm_eps, name="norm2")(x))


class Vit(nn.Module):
    config: VitConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, vision: Vision) -> Features:
        config, runtime = self.config, self.runtime.within("encoder")
        side, width, taps = config.position_grid, config.width, len(config.taps)
        # All rows in one line: any number of devices that divides their number can share them.
        rows, count = ("batch", "length", None), len(vision.image)
        vision = Vision(*(join_rows(x, self.runtime.rules) for x in vision))
        patches = normalise(shard(vision.patches, rows, runtime.rules), config)
        embed = Einsum(
            "...C,CD->...D",
            (config.patch_values, width),
            ("patch", "embed"),
            runtime.dtype,
            bias=True,
            name="patch_embed",
        )
        table = self.param(
            "position_embed",
            named(nn.initializers.normal(width**-0.5), "position", "position", "embed"),
            (side, side, width),
        )
        table = shard(table, (None, None, None), runtime.rules)  # or its gradient would gather all patches
        x = embed(patches) + interpolated_positions(table, vision.coords, vision.grid).astype(runtime.dtype)
        x = shard(x, rows, runtime.rules)
        slots = np.full(config.layers, taps, np.int32)
        slots[list(config.taps)] = np.arange(taps)
        rope = patch_rope(vision.coords, config)

        def body(layer, carry, slot):
            """Untapped layers write a slot that nobody reads. The write is linear: backward saves nothing for it."""
            x, kept = carry
            x = shard(layer(x, vision.image, rope), rows, runtime.rules)
            return (x, jax.lax.dynamic_update_index_in_dim(kept, x, slot, 0)), None

        layer = rematted(VitLayer, runtime)(config, runtime, name="layers")
        kept = jnp.zeros((taps + 1, *x.shape), x.dtype)
        (x, kept), _ = scan_layers(body, layer, (x, kept), jnp.asarray(slots), config.layers, runtime)
        split = partial(split_rows, count=count, rules=self.runtime.rules)
        return Features(split(x), jax.vmap(split)(kept[:taps]))
